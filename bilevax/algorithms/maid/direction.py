"""The direction of a step, and how far it may go."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from bilevax import tree
from bilevax.base import PyTree
from bilevax.inner.lbfgs import LbfgsState, inverse_hessian_product, lbfgs, remember

FIRST_MOVE = 0.1  # length of the first move, relative to the outer parameters or to √n
STEEP = 1e-5  # least cosine between a quasi-Newton direction and the gradient
# least cosine between a move and the change of the gradient along it, for a pair to be kept
BENT = 1e-4


class Model(NamedTuple):
    """What earlier steps say of the outer problem.

    Attributes:
      memory: pairs of moves and changes of the hypergradient, or () for gradient directions.
      step: the Barzilai-Borwein step of the last pair; 0 before any.
      radius: the longest move that is tried.
    """

    memory: LbfgsState | tuple[Any, ...]
    step: Any
    radius: Any


def first_model(outer: PyTree, pairs: int, dtype: Any) -> Model:
    """A model that knows nothing but the scale of the outer parameters."""
    reach = jnp.maximum(
        jnp.sqrt(jnp.asarray(tree.size(outer), dtype)), tree.norm(outer).astype(dtype)
    )
    return Model(
        lbfgs(memory=pairs).init(outer) if pairs else (), jnp.zeros((), dtype), FIRST_MOVE * reach
    )


def learned(model: Model, move: PyTree, change: PyTree, failed: Any) -> Model:
    """The model after a move that changed the hypergradient by `change`; after a search that
    failed, one that knows nothing again.
    """
    dtype = model.step.dtype
    su, ss = tree.dot(move, change).astype(dtype), tree.dot(move, move).astype(dtype)
    keep = ~failed & (ss > 0) & (su > BENT * jnp.sqrt(ss) * tree.norm(change).astype(dtype))
    step = jnp.where(
        keep,
        ss / jnp.where(keep, su, jnp.ones_like(su)),
        jnp.where(failed, jnp.zeros_like(su), model.step),
    )
    memory = model.memory
    if isinstance(memory, LbfgsState):
        memory = remember(memory, move, change, su.astype(memory.gamma.dtype), keep)
        memory = tree.where(failed, tree.zeros_like(memory), memory)
    return model._replace(memory=memory, step=step)


def resized(radius: Any, length: Any, trials: Any, capped: Any, failed: Any) -> Any:
    """The next radius: doubled where a capped step passed at once, cut to the move after a search
    that had to shorten, or failed.
    """
    shortened = jnp.maximum(2 * length, 0.1 * radius)
    old = radius
    radius = jnp.where(trials > 1, shortened, jnp.where(capped, 2 * radius, radius))
    return jnp.where(failed, 0.1 * old, radius)


def direction(model: Model, z: PyTree, quasi_newton: bool) -> PyTree:
    """A direction p of descent, ``x⁺ = x − p``: quasi-Newton where it is allowed and descends, else
    a Barzilai-Borwein gradient.
    """
    size = tree.norm(z).astype(model.step.dtype)
    gradient = tree.scale(gradient_step(model, size), z)
    if not quasi_newton or not isinstance(model.memory, LbfgsState):
        return gradient
    p = inverse_hessian_product(model.memory, z)
    descends = tree.dot(z, p).astype(size.dtype) >= STEEP * size * tree.norm(p).astype(size.dtype)
    return tree.where(descends & (model.memory.gamma > 0), p, gradient)


def gradient_step(model: Model, size: Any) -> Any:
    """The step of a gradient of norm `size`: Barzilai and Borwein's, and before any pair the one
    that goes as far as is allowed.
    """
    return jnp.where(
        model.step > 0, model.step, model.radius / jnp.where(size > 0, size, jnp.ones_like(size))
    )


def capped(model: Model, p: PyTree) -> Any:
    """The first step length along p, at most 1."""
    length = tree.norm(p).astype(model.radius.dtype)
    return jnp.minimum(1.0, model.radius / jnp.where(length > 0, length, jnp.ones_like(length)))
