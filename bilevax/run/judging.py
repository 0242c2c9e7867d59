"""What a step's numbers are worth: whether its value may be kept, whether it is a solution, whether
the run has left its senses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from bilevax import tree
from bilevax.base import StepInfo
from bilevax.results import RESULTS, ladder, warning

# an iterate may be kept whose inner gradient is at most so many times the typical one
CAUGHT_UP = 2.0
FADE = 0.1  # weight of the newest step in the typical one
EARLY = 10  # steps that say what size the run's numbers have
FAR = 1e10  # times that size, and a run has diverged


class Watch(NamedTuple):
    """What the steps so far say.

    Attributes:
      typical: running geometric mean of the inner gradients' norms, of algorithms that report it; 0
        before any.
      most: the largest of them.
      kept: that of the iterate that is kept.
      value, grad_norm: the largest of the first steps.
    """

    typical: Any
    most: Any
    kept: Any
    value: Any
    grad_norm: Any


def first_watch(zero: Any) -> Watch:
    """Nothing seen yet."""
    return Watch(*(jnp.zeros_like(zero) for _ in Watch._fields))


def watched(watch: Watch, info: StepInfo, step: Any) -> tuple[Watch, Any]:
    """With this step's numbers; and the mask of a run whose value and hypergradient are orders of
    magnitude above what they were at first.
    """
    dtype, early = watch.value.dtype, step < EARLY
    value, grad_norm = _size(info.value, dtype), _size(info.grad_norm, dtype)
    far = (value / FAR > watch.value) & (grad_norm / FAR > watch.grad_norm) & (watch.grad_norm > 0)
    warned = warning(far & ~early, RESULTS.diverged)
    watch = watch._replace(
        value=jnp.where(early, jnp.fmax(watch.value, value), watch.value),
        grad_norm=jnp.where(early, jnp.fmax(watch.grad_norm, grad_norm), watch.grad_norm),
    )
    if info.lag is None:
        return watch, warned
    lag = jnp.maximum(_size(info.lag, dtype), jnp.finfo(dtype).tiny)
    begun = watch.typical > 0
    faded = jnp.exp(
        (1 - FADE) * jnp.log(jnp.where(begun, watch.typical, lag)) + FADE * jnp.log(lag)
    )
    watch = watch._replace(typical=jnp.where(begun, faded, lag), most=jnp.fmax(watch.most, lag))
    return watch, warned


def _size(number: Any, dtype: Any) -> Any:
    number = jnp.abs(jnp.asarray(number, dtype))
    return jnp.where(jnp.isfinite(number), number, jnp.zeros_like(number))


def settled(watch: Watch, info: StepInfo, tol: Any) -> Any:
    """Whether a small hypergradient may be a solution: of an adjoint that has not moved yet it is
    small anywhere.
    """
    if info.lag is None:
        return True
    return (
        jnp.asarray(info.lag, watch.most.dtype)
        <= jnp.sqrt(jnp.asarray(tol, watch.most.dtype)) * watch.most
    )


def improves(
    watch: Watch, info: StepInfo, best: Any, score: Any, chosen: bool, descends: bool = False
) -> tuple[Any, Watch]:
    """Whether to keep this step's iterate, and the watch if it is kept.

    A value is that of an outer problem only where the inner level has caught up. Of steps that
    cannot tell, those whose inner gradient is not large beside the typical one; what was kept
    before the inner level caught up gives way to the next that may be kept. Of an algorithm that
    `descends`, each that may be compared is better than those before. A score that was `chosen` is
    taken as it is.
    """
    if chosen:
        return score < best.score, watch
    if info.lag is None:
        less = jnp.isfinite(score) if descends else score < best.score
        return jnp.asarray(info.scored) & less, watch
    lag = jnp.asarray(info.lag, watch.typical.dtype)
    outdated = watch.kept > CAUGHT_UP * watch.typical
    fits = jnp.asarray(info.scored) & (lag <= CAUGHT_UP * watch.typical)
    return fits & ((score < best.score) | (outdated & jnp.isfinite(score))), watch._replace(
        kept=lag
    )


def lost(algorithm: Any) -> Any:
    """The code of a step that made outer parameters or model state non-finite."""
    return ladder(
        inner=tree.all_finite(algorithm.inner.model), grad=tree.all_finite(algorithm.outer)
    )


def undone(plan: Any, failed: Any, before: Any, after: Any) -> Any:
    """The state to go on with. An algorithm that undoes its own failures has undone all but what
    only its outer step made.
    """
    if not plan.algorithm.undoes or plan.strict:
        return tree.where(failed, before, after)
    inner = after.inner._replace(model=tree.where(failed, before.inner.model, after.inner.model))
    return after._replace(inner=inner, outer=tree.where(failed, before.outer, after.outer))
