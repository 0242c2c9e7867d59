"""What adapters of other libraries' solvers share: whose promotion rules hold where, and how a
solve ends.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import base, tree
from bilevax.base import PyTree, Scalar
from bilevax.inner import _tolerance as tolerance
from bilevax.results import RESULTS


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """For code that mixes dtypes and ranks on its own."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def own_rules(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The user's `fn` under the promotion rules that hold now, by which it was written, wherever it
    is called.
    """
    promotion, rank = (
        getattr(jax.config, name)
        for name in ("jax_numpy_dtype_promotion", "jax_numpy_rank_promotion")
    )

    @functools.wraps(fn)  # some libraries look which parameters it has
    def called(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion(promotion), jax.numpy_rank_promotion(rank):
            return fn(*args, **kwargs)

    return called


def ended(
    objective: base.Objective,
    state: base.InnerState,
    found: PyTree,
    outer: PyTree,
    ctx: base.Ctx,
    solved: Scalar,
    iterations: Scalar,
    **said: Scalar,
) -> tuple[base.InnerState, dict[str, Scalar]]:
    """The solver's step at what was `found`, which is `solved` or not; one that left the finite
    numbers gives the point that it began at.

    The info has ``value`` (at the start), ``grad_norm`` (at the end), ``iterations`` and ``code``,
    and what is `said` instead.
    """
    params = jax.tree.map(tolerance.like, found, state.params)
    point = tolerance.evaluate(objective, params, outer, ctx)
    code = jnp.where(solved, jnp.int32(RESULTS.success), jnp.int32(RESULTS.inner_not_converged))
    finite = tolerance.is_finite(point) & tree.all_finite(params)
    info = {
        "value": objective(state.params, outer, ctx)[0],
        "grad_norm": point.grad_norm,
        "iterations": jnp.asarray(iterations, jnp.int32),
        "code": jnp.where(finite, code, jnp.int32(RESULTS.inner_nonfinite)),
    }
    params, model = tree.where(finite, (params, point.model), (state.params, state.model))
    return base.InnerState(params, state.opt, model), {**info, **said}
