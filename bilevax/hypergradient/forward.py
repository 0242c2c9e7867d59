"""Differentiation of the inner iterations themselves, forwards."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import tree
from bilevax.base import Bound, Ctx, Feed, Hypergradient, InnerState, Lower, Pullback, PyTree
from bilevax.hypergradient._solve import summary

# outer parameters: as many tangents of inner parameters and optimizer state are carried
LARGEST = 1024


def forward() -> Hypergradient:
    """Forward-mode differentiation through the inner solver's steps, for few outer parameters.

    ``J_{t+1} = (∂y_{t+1}/∂y_t) J_t + ∂y_{t+1}/∂x`` beside the solve, then ``dx = J_K' w``. Exact
    for the K-step map, whatever the optimizer, and whatever the loop: a solver that runs until a
    tolerance is differentiated as it ran. The model's state is differentiated along.

    Time is that of K steps for each outer parameter, all of them batched; memory is flat in K, one
    copy of inner parameters, optimizer state and activations for each outer parameter. Beyond a
    handful `unrolled` is cheaper, and beyond 1,024 this is refused.

    Returns:
      A `Hypergradient`. Its info has the counters ``gradients``, ``hvps`` and ``mixed_products``,
      and ``inner_grad_norm``, of the last gradient that the solver took, where it reports one.

    Raises:
      ValueError: when run, with more than 1,024 outer parameters.

    The initial inner point gets no cotangent.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> inner = lambda y, x, batch: 0.5 * jnp.sum((y - x) ** 2)
      >>> outer = lambda y, x, batch: jnp.sum(y)
      >>> solver = bx.inner.optax(optax.sgd(0.5), steps=2)
      >>> fn = bx.value_and_hypergrad(
      ...     inner, outer, solver=solver, hypergradient=bx.hypergradient.forward()
      ... )
      >>> fn(jnp.zeros(1), jnp.ones(1)).grad.tolist()
      [0.75]

    Source: Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization"
    (ICML 2017), algorithm 2.
    """
    return Hypergradient(
        init=_init,
        vjp=Bound("forward", _vjp),
        order=2,
        sees_model=True,
        sees_settings=True,
        sees_steps=True,
        batches=0,
    )


def _init(inner: PyTree) -> Any:
    return ()


def _vjp(
    lower: Lower, inner_state: InnerState, outer: PyTree, feed: Feed, ctx: Ctx, state: PyTree
) -> tuple[InnerState, Pullback]:
    count = tree.size(outer)
    if count > LARGEST:
        raise ValueError(
            f"outer_params: got {count} numbers with forward mode, which carries a tangent of the "
            "inner state for each; expected at most "
            f"{LARGEST}. Try hypergradient.unrolled(), whose cost does not grow with them."
        )

    def solve(outer):
        end, info = lower.run(inner_state, outer, feed)
        seen = info.pop("steps") if lower.keeps else end.params
        return (seen, tree.partition(end.model)[0]), (end, info)

    def push(direction):
        return jax.jvp(solve, (outer,), (direction,), has_aux=True)

    # Only the tangents are batched: the solve itself is done once.
    (params, moved), jacobian, (solution, info) = jax.vmap(push, out_axes=(None, 0, None))(
        _basis(outer, count)
    )
    solution = solution._replace(
        params=params, model=tree.combine(moved, tree.partition(solution.model)[1])
    )
    report = summary(jax.lax.stop_gradient(info), jax.lax.stop_gradient(solution))
    evaluations = jnp.int32(count * lower.solver.steps)
    report |= {"gradients": jnp.int32(0), "hvps": evaluations, "mixed_products": evaluations}

    def pullback(w):
        flat = jax.vmap(lambda row: tree.dot(row, (w.params, w.model)))(jacobian)
        return _unflatten(outer, flat), None, state, report

    return solution, pullback


def _basis(like: PyTree, count: int) -> PyTree:
    """Unit directions, along a new leading axis of every leaf."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])
    rows = [
        jnp.eye(count, leaf.size, int(leaf.size - end), dtype=leaf.dtype)
        for leaf, end in zip(leaves, ends, strict=True)
    ]
    return treedef.unflatten(
        [row.reshape(count, *leaf.shape) for row, leaf in zip(rows, leaves, strict=True)]
    )


def _unflatten(like: PyTree, flat: jax.Array) -> PyTree:
    leaves, treedef = jax.tree.flatten(like)
    cuts = np.cumsum([leaf.size for leaf in leaves])[:-1]
    return treedef.unflatten(
        [
            part.reshape(leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(jnp.split(flat, cuts), leaves, strict=True)
        ]
    )
