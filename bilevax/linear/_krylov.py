"""The loop of the Krylov solvers other than CG: run, measure the residual, go on from the measured
one.

A method is a pair of pure functions on its own state, each returning the vector to multiply next:

    start(r, r_norm) -> (state, p)
    step(x, state, p, Ap, A_norm) -> (x, state, p, Step)
    finish(x, state) -> x               # where a method moves x only before a measurement

so that the matvec stands in one place of the compiled loop, whatever it is needed for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import PyTree
from bilevax.base import LinearInfo
from bilevax.linear import _common
from bilevax.results import RESULTS


class Step(NamedTuple):
    """What one step says: the norm of the residual that the method believes in, and whether it must
    start anew from a measured one.
    """

    r_norm: Any
    restart: Any = False
    breakdown: Any = False


class _Carry(NamedTuple):
    step: Any
    matvecs: Any
    x: PyTree
    p: PyTree
    state: PyTree
    r_norm: Any  # measured
    a_norm: Any  # the largest stretch of a vector met, a bound from below on the norm of A
    measure: Any
    failure: Any
    done: Any


def run(
    matvec: Callable[..., Any],
    b: PyTree,
    x0: PyTree | None,
    start: Callable[..., Any],
    step: Callable[..., Any],
    finish: Callable[..., Any] | None = None,
    *,
    maxiter: int,
    tol: Any,
    progress: Any,
) -> tuple[PyTree, LinearInfo]:
    """Solve with a method.

    It ends at `tol`, after `maxiter` steps, on a failure, or where a restart does not bring the
    residual to `progress` times the one before: rounding allows no more, or the method has broken
    down for good.
    """
    b, x0 = _common.prepare(b, x0)
    b_norm = tree.norm(b)
    dtype = b_norm.dtype
    target = jnp.maximum(jnp.asarray(tol, dtype), numbers.rounding_unit(b) / 2) * b_norm
    x = tree.where(b_norm == 0, tree.zeros_like(b), x0)
    warm = tree.norm(x) != 0
    state, p = start(b, b_norm)
    init = _Carry(
        step=jnp.int32(0),
        matvecs=jnp.int32(0),
        x=x,
        p=tree.where(warm, x, p),
        state=state,
        r_norm=jnp.where(warm, jnp.inf, b_norm),
        a_norm=jnp.zeros((), dtype),
        measure=warm,
        failure=jnp.int32(RESULTS.success),
        done=(b_norm == 0) | ~jnp.isfinite(b_norm),
    )

    def measured(c: _Carry, ap: PyTree) -> _Carry:
        r = tree.sub(b, ap)
        r_norm = tree.norm(r).astype(dtype)
        drop = jnp.isinf(c.r_norm) & (r_norm > b_norm)  # a start worse than zero
        r, r_norm = tree.where(drop, b, r), jnp.where(drop, b_norm, r_norm)
        state, p = start(r, r_norm)
        finite = jnp.isfinite(r_norm)
        converged = r_norm <= target
        stalled = ~(r_norm <= progress * c.r_norm)
        return c._replace(
            x=tree.where(drop, tree.zeros_like(b), c.x),
            p=p,
            state=state,
            r_norm=r_norm,
            measure=jnp.asarray(False),
            failure=jnp.where(
                stalled & finite & ~converged, c.failure, RESULTS.success
            ),  # a breakdown that a restart cures is none
            done=~finite | converged | stalled | (c.step >= maxiter),
        )

    def stepped(c: _Carry, ap: PyTree) -> _Carry:
        x, state, p, report = step(c.x, c.state, c.p, ap, c.a_norm)
        count = c.step + 1
        measure = (report.r_norm <= target) | (count >= maxiter) | report.restart | report.breakdown
        if finish is not None:
            x = lax.cond(measure, finish, lambda x, _: x, x, state)
        # A product that is not finite spoils x nowhere: the iterate before it is kept, and the
        # residual reported is the last measured.
        finite = jnp.isfinite(report.r_norm) & tree.all_finite(x)
        singular = _common.singular(c.a_norm, tree.norm(x), b_norm)
        x = tree.where(finite & ~singular, x, c.x)
        breakdown = report.breakdown | singular
        measure = measure | singular
        failure = jnp.where(
            finite,
            jnp.where(breakdown, RESULTS.adjoint_breakdown, RESULTS.success),
            RESULTS.adjoint_nonfinite,
        )
        return c._replace(
            step=count,
            x=x,
            p=tree.where(measure, x, p),
            state=state,
            measure=measure,
            failure=failure.astype(jnp.int32),
            done=~finite,
        )

    def body(c: _Carry) -> _Carry:
        ap = matvec(c.p)
        stretch = (
            tree.norm(ap) / jnp.maximum(tree.norm(c.p), float(jnp.finfo(dtype).tiny))
        ).astype(dtype)
        c = c._replace(matvecs=c.matvecs + 1, a_norm=jnp.fmax(c.a_norm, stretch))
        return lax.cond(c.measure, measured, stepped, c, ap)

    end = lax.while_loop(lambda c: ~c.done, body, init)
    r_norm = jnp.where(b_norm == 0, jnp.zeros((), dtype), end.r_norm)
    return end.x, _common.info(end.matvecs, _common.relative(r_norm, b_norm), end.failure, tol)
