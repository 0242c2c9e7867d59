"""Which algorithm runs when none is named."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bilevax import hypergradient, inner, tree
from bilevax._core.settings import join, split
from bilevax._core.spectrum import NEGATIVE, krylov
from bilevax.algorithms.double_loop import double_loop
from bilevax.algorithms.maid import MaidState, maid
from bilevax.base import Algorithm, Ctx, Feed, InnerState, Problem, PyTree
from bilevax.data import same

PRODUCTS = 10  # of the inner Hessian, at each of two points
BESIDE = 0.1  # how far the second point lies from the start, relative to it


@functools.cache
def _convex() -> Algorithm:
    return maid()


@functools.cache
def _any() -> Algorithm:
    adam = inner.optax(
        inner.tunable(optax.adam, learning_rate=1e-3, eps_root=1e-8), 10
    )  # eps_root: no NaN behind a dead unit
    return double_loop(
        adam, hypergradient.unrolled(), inner.tunable(optax.adam, learning_rate=1e-2)
    )


def default_algorithm(
    problem: Problem,
    sources: Any,
    start: InnerState,
    outer: PyTree,
    key: Any = None,
    state: Any = None,
) -> Algorithm:
    """The algorithm for a problem on these data sources.

    Where every stream gives the same batch each time (or None), the start is not a function of the
    outer parameters, and the lower level looks convex, it is `maid`: L-BFGS inside, conjugate
    gradients from the last adjoint, accuracies and steps found on the way, nothing to tune. It
    looks convex if ten Lanczos products of the inner Hessian, at the start and beside it, show no
    negative curvature. Anything else, every neural network and all sampled data: a warm-started
    double loop of 10 Adam steps (1e-3) inside, which are unrolled, and Adam (1e-2) outside.

    Args:
      problem: as the driver solves it, on floating-point leaves.
      sources: the three data sources of a run.
      start: where the lower level starts.
      outer: where the upper level starts.
      key: of the run.
      state: an algorithm's state that the run goes on from; its algorithm is not chosen anew.

    Returns:
      An `Algorithm`, the same object for the same choice.

    Raises:
      ValueError: for traced parameters or data, of which nothing can be found out.
    """
    if state is not None:
        return _convex() if isinstance(state, MaidState) else _any()
    if problem.inner_init is not None or not all(getattr(s, "draw", None) is same for s in sources):
        return _any()
    if any(
        isinstance(leaf, jax.core.Tracer)
        for leaf in jax.tree.leaves(
            (start, outer, key, [s.data for s in sources], split(problem)[1])
        )
    ):
        raise ValueError(
            "algorithm: got None with traced parameters or data, of which no algorithm can be "
            "chosen; expected an Algorithm. Where the lower level "
            "is convex, try algorithm=bx.algorithms.maid(); else "
            "algorithm=bx.algorithms.double_loop(bx.inner.optax(optax.adam(1e-3, eps_root=1e-8), "
            "10), bx.hypergradient.unrolled(), optax.adam(1e-2))."
        )
    convex = looks_convex(
        problem, Feed(sources[0].data, key, jnp.zeros((), jnp.int32)), start, outer
    )
    if jax.process_count() > 1:  # rounding may decide, and all must decide alike
        from jax.experimental import multihost_utils

        convex = bool(multihost_utils.broadcast_one_to_all(np.asarray(convex)))
    return _convex() if convex else _any()


def looks_convex(problem: Problem, feed: Feed, start: InnerState, outer: PyTree) -> bool:
    """Whether Lanczos products find no negative curvature of the inner objective, at the start and
    beside it.

    Args:
      problem: whose inner objective is looked at.
      feed: of its batch.
      start: inner parameters and model state.
      outer: outer parameters.
    """
    static, dynamic = split(problem)
    least, largest = np.inf, 0.0
    for gram in np.asarray(_grams(static, dynamic, feed, start, outer), np.float64):
        if not np.all(np.isfinite(gram)):
            return False
        values = np.linalg.eigvalsh(gram)
        least, largest = min(least, values[0]), max(largest, abs(values[0]), abs(values[-1]))
    return bool(least >= -NEGATIVE * largest)


@functools.partial(jax.jit, static_argnums=0)
def _grams(static: Any, dynamic: Any, feed: Feed, start: InnerState, outer: PyTree) -> jax.Array:
    """The inner Hessian on two Krylov spaces, ``(2, PRODUCTS, PRODUCTS)``."""
    problem = join(static, dynamic)
    ctx: Ctx = problem.inner_draw(feed, 0)._replace(model=start.model)
    first, second = jax.random.split(jax.random.key(0))
    y = start.params
    scale = BESIDE * jnp.where(tree.norm(y) > 0, tree.norm(y) / max(tree.size(y), 1) ** 0.5, 1.0)
    beside = tree.axpy(scale, tree.normal_like(first, y), y)
    points = jax.tree.map(lambda a, b: jnp.stack([a, b]), y, beside)
    return lax.map(
        lambda y: (
            krylov(
                lambda v: _product(problem, y, outer, v, ctx), tree.normal_like(second, y), PRODUCTS
            ).gram
        ),
        points,
    )


def _product(problem: Problem, y: PyTree, x: PyTree, v: PyTree, ctx: Ctx) -> PyTree:
    return jax.jvp(lambda y: jax.grad(problem.inner, has_aux=True)(y, x, ctx)[0], (y,), (v,))[1]
