"""How a run ended, and what to do about it."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class RESULTS(enum.IntEnum):
    """How a run ended. Failures carry what happened, the likely causes, and what to try
    (`message`).

    The integer is what compiled code carries; `worst` combines two of them. Failures end a run,
    undo its last step, and raise unless
    ``throw=False``: ask `failed`, never compare numbers. Warnings stand for numbers that are rough;
    the run goes on (`warning`).
    """

    success = 0
    converged = 1
    stopped = 2
    tolerance_not_met = 3
    data_exhausted = 4
    inner_not_converged = 5
    preempted = 6
    no_step_accepted = 7
    statistics_constant = 8
    interrupted = 9
    nonfinite_batch = 10
    inner_nonfinite = 11
    dependent_constraints = 12
    adjoint_not_converged = 20
    adjoint_breakdown = 21
    negative_curvature = 22
    adjoint_nonfinite = 23
    difference_lost = 24
    adaptation_zero = 25
    not_stationary = 26
    off_constraint = 27
    lower_level_failed = 28
    weakly_active = 29
    outer_nonfinite = 30
    hypergradient_nonfinite = 31
    diverged = 32
    metric_nonfinite = 33

    @property
    def failed(self) -> bool:
        """Whether this ends a run and raises. A warning's code does where ``strict=`` asked for it,
        and stands for a run nowhere else.
        """
        return bool(failed(self.value))

    def __bool__(self) -> bool:
        """``if solution.result:`` asks whether it is none of the failures; as a number, success is
        0.
        """
        return not self.failed

    @property
    def message(self) -> str:
        """What happened, likely causes, what to try."""
        return _MESSAGES[self]


_MESSAGES = {
    RESULTS.success: "All steps were done.",
    RESULTS.converged: "The hypergradient's norm fell below tol times its first value.",
    RESULTS.stopped: "A callback asked to stop.",
    RESULTS.tolerance_not_met: (
        "All steps were done, and the hypergradient is still above tol. Give more steps, or a "
        "larger outer step."
    ),
    RESULTS.data_exhausted: (
        "An iterator of batches came to its end before num_steps. Pass something that can be "
        "iterated again, or fewer steps."
    ),
    RESULTS.preempted: (
        "SIGTERM came, and the run was saved. Start it again with the same arguments and "
        "checkpoint directory, and it goes on from there."
    ),
    RESULTS.interrupted: (
        "An interrupt (Ctrl-C) came, and the run ended after its last whole chunk. Its state is in "
        ".state, from which it goes on."
    ),
    RESULTS.no_step_accepted: (
        "No step length passed the test of sufficient decrease, so the point stayed where it was. "
        "At a solution that is rounding; elsewhere the "
        "hypergradient is too rough for the value's own accuracy. Try a more accurate inner solve, "
        "float64, or a fixed outer step."
    ),
    RESULTS.statistics_constant: (
        "The outer objective depends on the model's state (BatchNorm's statistics), which this "
        "method takes as constant, so its hypergradient leaves "
        "that path out. Try hypergradient.unrolled() or forward(), or judge with frozen statistics."
    ),
    RESULTS.nonfinite_batch: (
        "A batch held NaN or infinity. The data itself, or its preprocessing (a division by a zero "
        "spread, a log of zero), is the cause. "
        "Check it with jnp.isfinite before the run."
    ),
    RESULTS.inner_nonfinite: (
        "The inner solve left the finite numbers: the lower level's parameters or its model state "
        "diverged. Usually the inner step size is too large for its curvature (which "
        "moves with the outer parameters), or the outer step is so large that it made the lower "
        "level unbounded. Try a smaller inner step, a line "
        "search (inner.lbfgs, inner.agd), gradient clipping, a smaller outer step, or project= to "
        "keep the outer parameters in a safe set. "
        "If model_state alone is not finite, look at what updates it."
    ),
    RESULTS.inner_not_converged: (
        "The inner solver stopped short of its tolerance, so the point is not the best response. "
        "Try more iterations, a looser tolerance (float32 "
        "rarely gets below 1e-5), or a regulariser that makes the lower level strongly convex."
    ),
    RESULTS.dependent_constraints: (
        "Constraints that meet at the inner point have linearly dependent gradients, so their "
        "multipliers are not unique. The derivative is right where they stay dependent however the "
        "outer parameters move, and a mean of one-sided ones where these move them apart. Try "
        "leaving out constraints that others imply; two that bound "
        "the same thing from both sides are one equality."
    ),
    RESULTS.adjoint_not_converged: (
        "The adjoint system H q = f_y was left with a residual above its tolerance, or with an "
        "answer that by the inner solver's own estimate is more than a tenth off, so the "
        "hypergradient is rough. Likely an ill-conditioned or "
        "singular inner Hessian, or too few iterations. Try more iterations, damping "
        "(implicit(damping=1e-3)), a preconditioner, a regulariser in "
        "the inner objective, shine(refine=30) over inner.lbfgs where parameters have units of "
        "their own, or max_residual= if a rough hypergradient is enough."
    ),
    RESULTS.adjoint_breakdown: (
        "The linear solver broke down: a division by (nearly) zero inside its recurrence. Likely a "
        "singular or non-symmetric inner Hessian. Try damping, "
        "linear.minres for symmetric indefinite Hessians, or linear.gmres for anything else."
    ),
    RESULTS.negative_curvature: (
        "The adjoint solve met a direction in which the inner Hessian is negative: the point is no "
        "minimum of the lower level, or a saddle of it. "
        "What was solved until there is used. Try more inner steps, damping larger than the "
        "negative curvature, linear.minres, or an unrolled "
        "hypergradient."
    ),
    RESULTS.adjoint_nonfinite: (
        "The adjoint became NaN or infinite although the inner point is finite. Likely a Hessian "
        "that overflows, a kink (norm at zero, sqrt at zero) in "
        "the inner objective, or a divergent Neumann series. Try a smooth form of the objective, "
        "damping, or linear.cg."
    ),
    RESULTS.difference_lost: (
        "The finite difference moved the inner parameters by less than their dtype can hold, or "
        "the gradients that it compares by hardly more than their rounding, so the hypergradient "
        "would be noise. Try a larger "
        "radius=, float32 inner parameters, or an exact mixed product (hypergradient.one_step, "
        "sama(product='exact'))."
    ),
    RESULTS.adaptation_zero: (
        "The inner optimizer's update does not depend on the gradient to first order, so SAMA's "
        "adaptation of a non-zero cotangent is exactly zero and "
        "with it the hypergradient. Sign updates (optax.lion, sign_sgd), a MultiSteps step that "
        "only accumulates, clipping of every entry and a "
        "learning rate of zero all do this; so does Adam when the whole gradient is exactly zero "
        "(give it eps_root=1e-12). Try another inner "
        "optimizer, or hypergradient.one_step, finite_difference or implicit, which do not "
        "differentiate the update."
    ),
    RESULTS.not_stationary: (
        "The inner solver says that it is done, and its point does not satisfy the condition that "
        "this method differentiates: the derivative would "
        "be that of another problem. Try hypergradient.fixed_point with the solver's mapping, or "
        "an unconstrained solver."
    ),
    RESULTS.off_constraint: (
        "The inner point is off its constraint, so the conditions that this method differentiates "
        "do not hold there. Try more inner steps or a "
        "tighter tolerance of the constrained solver."
    ),
    RESULTS.lower_level_failed: (
        "A level inside this one failed: its own linear system had no usable answer. Look at that "
        "level alone (its curvature, its solver), try "
        "linear.minres for a symmetric indefinite Hessian, damping, or a regulariser that makes it "
        "strongly convex."
    ),
    RESULTS.weakly_active: (
        "An inequality is active with a multiplier of zero: the solution has one-sided derivatives "
        "only, and what is returned is one of them. "
        "Try outer parameters beside this point, or a smoothed constraint."
    ),
    RESULTS.outer_nonfinite: (
        "The outer objective is NaN or infinite at a finite inner point. Look at the outer "
        "objective at the returned iterate: a log of zero, a division, "
        "an overflow. Working with logits and jax.nn's stable losses usually cures it."
    ),
    RESULTS.hypergradient_nonfinite: (
        "The hypergradient, or the outer parameters after its step (an optimizer's overflow, "
        "project=), are NaN or infinite although both "
        "objectives are finite. Where Adam, RMSProp or their like are unrolled, set eps_root=1e-12 "
        "in the optimizer first: at a gradient of exactly "
        "zero (a dead unit, a masked weight) they have no derivative. Else likely one that does "
        "not exist (sqrt or a norm at zero, jnp.where around a "
        "NaN branch), or a reverse pass that overflowed. Try smooth forms, fewer unrolled steps, "
        "or implicit."
    ),
    RESULTS.diverged: (
        "The run left its start by orders of magnitude without becoming infinite: outer value or "
        "hypergradient grew past any use. Usually the inner, "
        "adjoint or outer step is too large for the curvature. Try a tenth of it, or "
        "algorithm=None."
    ),
    RESULTS.metric_nonfinite: (
        "The metric that selects the kept iterate was never finite. Check the metric at the "
        "returned iterate, which is the last."
    ),
}


_FIRST_FAILURE = 10  # of the numbers above; those below are ends, and three warnings

# What may be rough about a step that goes on, in the order of their bits in a mask. The order never
# changes: masks stand in histories and checkpoints.
WARNINGS = (
    RESULTS.adjoint_not_converged,
    RESULTS.adjoint_breakdown,
    RESULTS.negative_curvature,
    RESULTS.inner_not_converged,
    RESULTS.no_step_accepted,
    RESULTS.statistics_constant,
    RESULTS.not_stationary,
    RESULTS.off_constraint,
    RESULTS.weakly_active,
    RESULTS.diverged,
    RESULTS.metric_nonfinite,
    RESULTS.difference_lost,
    RESULTS.adaptation_zero,
    RESULTS.dependent_constraints,
)


_SMALL_WARNINGS = tuple(int(code) for code in WARNINGS if code < _FIRST_FAILURE)
# the ends among and behind their numbers
_ENDS = tuple(sorted(set(range(min(_SMALL_WARNINGS), _FIRST_FAILURE)) - set(_SMALL_WARNINGS)))


class SolveError(RuntimeError):
    """A run failed. `solution` holds all that it reached: the kept iterate, the state before the
    failing step, the history.
    """

    def __init__(self, result: RESULTS, solution: Any, where: str = ""):
        self.result, self.solution = result, solution
        super().__init__(
            f"{result.name}{where}: {result.message} (throw=False returns the solution instead; it "
            "is also in this error's .solution.)"
        )


def worst(*codes: Any) -> Any:
    """The largest of some codes, as int32: failures win over successes, and the order of the enum
    decides among failures.
    """
    out = jnp.asarray(codes[0], jnp.int32)
    for code in codes[1:]:
        out = jnp.maximum(out, jnp.asarray(code, jnp.int32))
    return out


def first(*codes: Any) -> Any:
    """The first failure among some codes, in the order in which a step meets them; otherwise the
    largest.
    """
    out = worst(*codes)
    for code in reversed(codes):
        code = jnp.asarray(code, jnp.int32)
        out = jnp.where(failed(code), code, out)
    return out


def ladder(
    *said: Any, inner: Any = True, value: Any = True, adjoint: Any = True, grad: Any = True
) -> Any:
    """The code of a step: its quantities in the order in which it meets them, and the first that no
    number came of names it.

    Args:
      *said: codes of the solves on the way (adjoints), asked after the outer value.
      inner: whether the inner point is finite.
      value: whether the outer value is.
      adjoint: whether the adjoint is.
      grad: whether the hypergradient is.
    """
    out = jnp.int32(RESULTS.success)
    rungs = [(inner, RESULTS.inner_nonfinite), (value, RESULTS.outer_nonfinite)]
    rungs += [(jnp.logical_not(failed(code)), code) for code in said]
    rungs += [(adjoint, RESULTS.adjoint_nonfinite), (grad, RESULTS.hypergradient_nonfinite)]
    for fine, code in reversed(rungs):
        if fine is not True:  # what a step does not have costs nothing
            out = jnp.where(fine, out, jnp.asarray(code, jnp.int32))
    return out


def failed(code: Any) -> Any:
    """Whether a code (an integer, an array of them) is a failure: no number could come, or
    ``strict=`` forbade the one that did.

    A warning stands in a mask and not in a code; where it stands in a code, it was made a failure.
    """
    out = code >= min(_SMALL_WARNINGS)
    for end in _ENDS:
        out = out & (code != end)
    return out


def warning(condition: Any, code: RESULTS) -> Any:
    """The bit mask of one warning: `code`'s bit where `condition` (a traced scalar) holds, else
    0.
    """
    return jnp.where(condition, jnp.int32(mask_of(code)), jnp.int32(0))


def mask_of(code: RESULTS) -> int:
    """The bit of one warning."""
    return 1 << WARNINGS.index(code)


def warnings_in(masks: Any) -> dict[RESULTS, Any]:
    """How often each warning stands in an array of bit masks, along its last axis; those that never
    do are left out.

    Counts are integers for one axis and arrays for more (a lane each). Traced masks give a traced
    count of every warning.
    """
    if isinstance(masks, jax.core.Tracer):
        return {code: jnp.sum((masks >> bit) & 1, axis=-1) for bit, code in enumerate(WARNINGS)}
    masks = np.atleast_1d(np.asarray(masks, np.int64))
    counts = {code: np.sum((masks >> bit) & 1, axis=-1) for bit, code in enumerate(WARNINGS)}
    return {code: int(n) if n.ndim == 0 else n for code, n in counts.items() if np.any(n)}


def as_warning(code: Any) -> Any:
    """A code as ``(code, mask)``: what is a warning moves from the one to the other, failures and
    ends stay.

    Inner solvers say in one code how they ended; of their words, that they were not content is a
    warning to those above.
    """
    code = jnp.asarray(code, jnp.int32)
    mask = jnp.int32(0)
    for warned in _SMALL_WARNINGS:
        bit = jnp.int32(1 << WARNINGS.index(RESULTS(warned)))
        mask = jnp.where(code == warned, bit, mask)
    return jnp.where(mask != 0, jnp.int32(RESULTS.success), code), mask


def strictness(strict: Any, argument: str = "strict") -> int:
    """The mask of the warnings that are to be failures: none for False, all for True, else those of
    a set of `RESULTS`.
    """
    if isinstance(strict, bool):
        return (1 << len(WARNINGS)) - 1 if strict else 0
    expected = (
        f"expected True, False or a set of {', '.join(code.name for code in WARNINGS)}. Try "
        f"{argument}={{RESULTS.negative_curvature}}."
    )
    if (
        isinstance(strict, (str, bytes))
        or not isinstance(strict, Iterable)
        or hasattr(strict, "dtype")
    ):
        raise TypeError(f"{argument}: got {type(strict).__name__}; {expected}")
    mask = 0
    for code in strict:
        if not isinstance(code, RESULTS) or code not in WARNINGS:
            raise ValueError(f"{argument}: got {code!r}, which is no warning; {expected}")
        mask |= 1 << WARNINGS.index(code)
    return mask


def strictly(code: Any, warnings: Any, mask: int) -> Any:
    """`code`, or the first of the `warnings` that `mask` makes a failure, where nothing has failed
    already.
    """
    found = jnp.asarray(code, jnp.int32)
    if not mask:
        return found
    chosen = jnp.int32(RESULTS.success)
    for bit in reversed(range(len(WARNINGS))):
        if (mask >> bit) & 1:
            chosen = jnp.where(
                (jnp.asarray(warnings, jnp.int32) >> bit) & 1 != 0, jnp.int32(WARNINGS[bit]), chosen
            )
    return jnp.where(failed(found) | (chosen == RESULTS.success), found, chosen)


def unless(condition: Any, code: RESULTS) -> Any:
    """`code` where `condition` (a traced scalar) is false, success where it holds."""
    return jnp.where(condition, jnp.int32(RESULTS.success), jnp.int32(code))


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "RESULTS", "WARNINGS", "SolveError", "as_warning", "failed", "first", "ladder", "strictly",
    "strictness", "unless", "warning", "warnings_in", "worst",
]  # fmt: skip
