"""One hypergradient against a reference, and what explains the difference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevax import check, tree
from bilevax._call import prepared
from bilevax._core import numbers
from bilevax._core.types import Key
from bilevax.base import (
    Estimate,
    Feed,
    Feeds,
    Hypergradient,
    InnerSolver,
    InnerState,
    Problem,
    PyTree,
)
from bilevax.data.draws import count_steps
from bilevax.diagnostics import _reference
from bilevax.diagnostics._reference import Point, Reference, frozen
from bilevax.estimate import estimate
from bilevax.results import RESULTS, warnings_in


class HypergradientReport(NamedTuple):
    """What `check_hypergradient` found; printing it tells the story.

    Attributes:
      ok: whether ``relative_error <= tol``.
      relative_error: ``‖grad − reference‖ / ‖reference‖``; on the directions checked, where these
        are not all.
      cosine: of the angle between the two.
      value: the outer objective as the method computed it.
      grad: the hypergradient checked.
      reference: what it was checked against, shaped like `grad`; with `directions` fewer than the
        unknowns its projection on them.
      inner_grad_norm: ``‖∇_y g‖`` at the solver's point.
      adjoint_residual: the method's own ``‖Hq − f_y‖/‖f_y‖``; NaN where it solves no such system.
      advice: the likely causes of the difference and what to try.
      inner_error: ``‖y − y*‖/‖y*‖``.
      method_error: the method against the exact adjoint *at the solver's point*, relative: what a
        better adjoint would gain.
      solve_error: that exact adjoint against the reference, relative: what a better inner solve
        would gain. With ``kind="solver"`` neither says anything of `ok`: the steps are what is
        asked for, not the solution.
      kind: "dense", "finite_difference" or "solver".
      precision: dtype of the reference.
      tol: as given.
    """

    ok: bool
    relative_error: float
    cosine: float
    value: float
    grad: PyTree
    reference: PyTree
    inner_grad_norm: float
    adjoint_residual: float
    advice: str
    inner_error: float
    method_error: float
    solve_error: float
    kind: str
    precision: str
    tol: float

    def _verdict(self) -> str:
        decided = self.ok or np.all(np.isfinite(flat(self.reference)))
        return "ok" if self.ok else "WRONG" if decided else "NOT DECIDED"

    def __repr__(self) -> str:
        adjoint = (
            "none reported" if math.isnan(self.adjoint_residual) else f"{self.adjoint_residual:.2e}"
        )
        lines = [
            f"hypergradient {self._verdict()}: relative error "
            f"{self.relative_error:.2e} (tol {self.tol:.0e}), cosine {self.cosine:.6f}",
            f"  reference           {self.kind}, {self.precision}",
            f"  outer value         {self.value:.6g}",
            f"  inner gradient norm {self.inner_grad_norm:.2e}",
            f"  adjoint residual    {adjoint}",
        ]
        if self.kind != "solver":  # which asks for no solution, so that nothing is far from one
            lines[3] += f", distance to the solution {self.inner_error:.2e} (relative)"
            lines.append(
                f"  error from method   {self.method_error:.2e}, from the inner solve "
                f"{self.solve_error:.2e} (relative)"
            )
        return "\n".join([*lines, "  " + self.advice])


def check_hypergradient(
    inner_objective: Callable[..., Any],
    outer_objective: Callable[..., Any],
    inner_params: PyTree,
    outer_params: PyTree,
    *,
    solver: InnerSolver,
    hypergradient: Hypergradient,
    inner_batch: PyTree = None,
    outer_batch: PyTree = None,
    model_state: PyTree = None,
    inner_init: Callable[..., Any] | None = None,
    reference: str = "auto",
    directions: int | None = None,
    tol: float = 1e-3,
    key: Key | None = None,
) -> HypergradientReport:
    r"""Compare a solver and a method with a hypergradient known to be right, and say what explains
    the difference.

    .. math::
        h(x) = f(y^*(x), x), \qquad
        \nabla h = \nabla_x f - \nabla^2_{xy} g \, (\nabla^2_{yy} g)^{-1} \nabla_y f \Big|_{y^*(x)}

    The reference starts from the solver's point, polishes it, and is computed in double precision
    where the objectives allow it and draw the same numbers there, whatever the session's precision
    is. Batches and randomness are
    frozen: each inner step sees the whole of `inner_batch` and the same key.

    Args:
      inner_objective: ``g(inner_params, outer_params, batch) -> scalar``, or an `objective`.
      outer_objective: ``f(inner_params, outer_params, batch) -> scalar``, or an `objective`.
      inner_params: the solver's start.
      outer_params: where to check.
      solver: the `InnerSolver` to check with; its steps are taken once, from `inner_params`.
      hypergradient: the method to check.
      inner_batch: data of the inner objective.
      outer_batch: data of the outer objective.
      model_state: of a stateful inner objective.
      inner_init: as for `value_and_hypergrad`; use ``reference="solver"`` with it.
      reference: ``"dense"`` polishes by Newton and factorises the Hessian (at most 4,096 inner
        unknowns), and tests along one direction by differences that h is smooth;
        ``"finite_difference"`` takes central differences of h, each from a polished solve;
        ``"solver"`` takes them of ``f(y_K(x), x)``, the solver's own K steps: what an unrolled
        hypergradient is the derivative of, and the reference for lower levels that are constrained
        or not smooth (solve them tightly). ``"auto"`` is dense up to 512 inner unknowns, else
        finite differences.
      directions: random orthonormal directions of the finite differences; None takes every
        coordinate up to 32 of them, else 16.
      tol: largest relative error that is ok.
      key: PRNG key for the directions, for keyed objectives and for methods that draw.

    Returns:
      A `HypergradientReport`; print it.

    Raises:
      TypeError, ValueError: for arguments that cannot work.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> inner = lambda y, x, batch: jnp.sum((y - x) ** 2)
      >>> outer = lambda y, x, batch: jnp.sum(y**2)
      >>> solver = bx.inner.optax(optax.sgd(0.1), steps=3)
      >>> report = bx.check_hypergradient(
      ...     inner,
      ...     outer,
      ...     jnp.zeros(2),
      ...     jnp.ones(2),
      ...     solver=solver,
      ...     hypergradient=bx.hypergradient.implicit(),
      ... )
      >>> report.ok, round(report.relative_error, 3)
      (False, 0.512)
      >>> "The inner problem is not solved" in report.advice
      True

    Source: the exact adjoint is that of Pedregosa, "Hyperparameter optimization with approximate
    gradient" (ICML 2016), equation 3.
    """
    numbers.choice(reference, "reference", ("auto", *_reference.KINDS))
    if directions is not None:
        directions = numbers.count(directions, "directions")
    tol = numbers.positive(tol, "tol", example=1e-3)
    if inner_init is not None and reference != "solver":
        raise ValueError(
            f"reference: got {reference!r} with inner_init; expected 'solver', since an exact "
            "solution does not depend on where it was started."
        )
    check.pieces(solver, hypergradient)
    ready = prepare(
        inner_objective,
        outer_objective,
        inner_params,
        outer_params,
        inner_batch,
        outer_batch,
        model_state,
        inner_init,
        key,
    )
    kind = reference_kind(reference, tree.size(ready.inner))
    solution, est = jax.jit(ready.run(solver, hypergradient))(
        *ready.arguments(solver, hypergradient)
    )
    key = jax.random.key(0) if key is None else key
    ref = _reference.reference(ready.problem, solver, ready.point(solution), kind, directions, key)
    return _report(hypergradient, est, ref, tol)


class Prepared(NamedTuple):
    """A checked problem with everything frozen: ``run(solver, method)`` of the arguments gives
    ``(solution, Estimate)``.
    """

    problem: Problem
    inner: PyTree
    outer: PyTree
    feeds: Feeds
    model: PyTree

    def arguments(self, solver: InnerSolver, method: Hypergradient) -> tuple[Any, ...]:
        """What the function of `run` takes."""
        opt, state = tree.strong((solver.first(self.inner, self.outer), method.init(self.inner)))
        return self.inner, self.outer, self.feeds, opt, state, self.model

    def run(self, solver: InnerSolver, method: Hypergradient) -> Callable[..., Any]:
        """The estimate as one function, to be compiled."""
        problem = count_steps(self.problem, solver.steps)

        def run(inner, outer, feeds, opt, state, model):
            return estimate(
                problem, solver, method, InnerState(inner, opt, model), outer, feeds, state
            )

        return run

    def point(self, solution: InnerState) -> Point:
        """Where a reference is taken."""
        inner_ctx, outer_ctx = (
            frozen(feed, 0)._replace(model=solution.model)
            for feed in (self.feeds.inner, self.feeds.outer)
        )
        return Point(self.inner, solution.params, self.outer, inner_ctx, outer_ctx, self.model)


def prepare(
    inner_objective: Any,
    outer_objective: Any,
    inner_params: PyTree,
    outer_params: PyTree,
    inner_batch: Any,
    outer_batch: Any,
    model_state: Any,
    inner_init: Any,
    key: Any,
) -> Prepared:
    """Check what was given, by its names, and freeze batches and randomness."""
    problem = check.problem(
        inner_objective, outer_objective, frozen, frozen, frozen, inner_init=inner_init
    )
    call = prepared(problem, inner_params, outer_params, model_state, key)
    inner_batch, outer_batch = (
        check.batch(inner_batch, "inner_batch"),
        check.batch(outer_batch, "outer_batch"),
    )
    keys = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
    inner_feed, outer_feed = Feed(inner_batch, keys[0], 0), Feed(outer_batch, keys[1], 0)
    feeds = Feeds(inner_feed, inner_feed, outer_feed, keys[2], 0)
    if problem.outer.trajectory:
        raise ValueError(
            f"outer_objective: got {problem.outer!r}; expected an objective of the inner point. "
            "Try objective(fn) of the last step alone."
        )
    problem, _ = call.traced(frozen(inner_feed, 0), frozen(outer_feed, 0))
    return Prepared(problem, call.inner, call.outer, feeds, call.model)


def reference_kind(reference: str, size: int) -> str:
    """Which reference is meant, for so many inner unknowns."""
    if reference == "auto":
        return "dense" if size <= _reference.SMALL else "finite_difference"
    if reference == "dense" and size > _reference.LARGEST:
        raise ValueError(
            f"reference: got 'dense' with {size} inner unknowns; expected at most "
            f"{_reference.LARGEST}, since the Hessian is stored. "
            "Try reference='finite_difference'."
        )
    return reference


class Comparison(NamedTuple):
    """A gradient against a reference, on the directions that the reference knows."""

    relative_error: float
    cosine: float
    norm_ratio: float


def compared(grad: np.ndarray, ref: Reference, unit: float) -> Comparison:
    """Flat `grad` against a reference. Where the terms of the hypergradient cancel to rounding, the
    error is relative to that level.
    """
    want = np.asarray(ref.grad, np.float64)
    got = np.asarray(grad, np.float64)
    if ref.directions is not None:
        rows = np.asarray(ref.directions, np.float64)
        got = rows.T @ (rows @ got)
    norm, size_got, floor = (
        float(np.linalg.norm(want)),
        float(np.linalg.norm(got)),
        100 * unit * ref.scale,
    )
    size = max(norm, floor)
    error = float(np.linalg.norm(got - want))
    both = norm * size_got
    cosine = float(got @ want / both) if both > 0 else (1.0 if error <= floor else 0.0)
    ratio = size_got / norm if norm > 0 else (1.0 if error <= floor else math.inf)
    return Comparison(
        0.0 if error == 0 else (error / size if size > 0 else math.inf), cosine, ratio
    )


def flat(values: PyTree) -> np.ndarray:
    """One float64 vector of all leaves, in the order of ``jax.tree.leaves``."""
    return np.concatenate(
        [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(values)]
    )


def _report(
    method: Hypergradient, est: Estimate, ref: Reference, tol: float
) -> HypergradientReport:
    unit = numbers.rounding_unit(est.grad)
    grad = flat(est.grad)
    total = compared(grad, ref, unit)
    # Both parts on the scale of the reference, so that they can be compared with each other and
    # with the whole.
    size = max(float(np.linalg.norm(ref.grad)), 100 * unit * ref.scale, np.finfo(np.float64).tiny)
    at_point = np.asarray(ref.at_point, np.float64)
    method_error = float(np.linalg.norm(grad - at_point)) / size
    solve_error = compared(at_point, ref, unit).relative_error
    _, unravel = ravel_pytree(est.grad)
    leaves = jax.tree.leaves(est.grad)
    reference = unravel(
        jnp.asarray(
            np.asarray(ref.grad),
            jnp.result_type(*leaves) if len({leaf.dtype for leaf in leaves}) == 1 else None,
        )
    )
    residual = float(est.info["adjoint_residual"]) if "adjoint_residual" in est.info else math.nan
    ok = bool(total.relative_error <= tol) and not _doubts(ref)
    constant = RESULTS.statistics_constant in warnings_in(est.info["warnings"])
    return HypergradientReport(
        ok, total.relative_error, total.cosine, float(est.value), est.grad, reference,
        ref.inner_grad_norm, residual,
        _advice(
            method, ok, total, ref, residual, method_error, solve_error, tol, constant,
            bool(np.all(np.isfinite(grad))),
        ),
        ref.inner_distance, method_error, solve_error, ref.kind,
        ref.precision, tol,
    )  # fmt: skip


def _doubts(ref: Reference) -> list[str]:
    """Why there may be no hypergradient at this point, whatever agrees with what."""
    said: list[str] = []
    if ref.kind == "solver":
        return said
    if ref.kink > 0.05:
        said.append(
            f"Differences disagree with the exact adjoint, or with each other, by {ref.kink:.0%}: "
            "the lower level is not smooth, or has several "
            "solutions here. Move the point off the kink, smooth the objective, or differentiate a "
            "fixed point (hypergradient.fixed_point)."
        )
    if ref.curvature < -1e-10:
        said.append(
            "The reference met negative curvature (no minimum): add a regulariser to the inner "
            "objective, or damping, before believing either side."
        )
    if ref.newton > 1e-3:
        said.append(
            "No stationary point of the inner objective was found (‖∇_y g‖ = "
            f"{ref.polished_grad_norm:.1e} at the best): it has a kink there, no "
            "minimum, or constraints that the solver knows of. Smooth it, or differentiate a fixed "
            "point (hypergradient.fixed_point, with "
            "reference='solver')."
        )
    return said


def _advice(
    method: Hypergradient,
    ok: bool,
    total: Comparison,
    ref: Reference,
    residual: Any,
    method_error: Any,
    solve_error: Any,
    tol: Any,
    constant: Any,
    finite: bool,
) -> str:
    """Causes in the order in which to cure them."""
    if not math.isfinite(total.relative_error):
        if finite and ref.kind != "solver":
            return (
                "The hypergradient is finite where the solver stopped; the reference, at what was "
                "found for a solution of the inner objective, is not. Networks have no such "
                "solution, or many: try reference='solver', the derivative of the solver's own "
                "steps by differences."
            )
        return (
            "The hypergradient or its reference is not finite: look at both objectives, and at the "
            "inner solve, at this point."
        )
    if ok:
        return "Agrees with the reference."
    said = []
    if ref.kind == "solver":
        if method.sees_init:
            return (
                f"{method!r} differentiates the solver's steps and still differs from their "
                "differences: a kink in the steps (clipping, a gradient "
                "of exactly zero), or differences lost in rounding. Try another point, or "
                "objectives that compute in float64."
            )
        statistics = ""
        if constant:
            statistics = (
                "It takes the model's statistics as constants, and the outer objective reads them. "
            )
        if method.constant:
            return statistics + (
                f"{method!r} counts the solution as a constant, and leaves out how the solver's "
                "steps move with the outer parameters. Try hypergradient.unrolled()."
            )
        return statistics + (
            f"{method!r} takes the solver's point for a solution, which is not the derivative of "
            "the solver's own steps. Try "
            "hypergradient.unrolled() if the steps are what counts, or reference='dense' if the "
            "solution is."
        )
    said += _doubts(ref)
    if total.relative_error <= tol:
        return " ".join(said)
    if -1e-10 <= ref.curvature <= 1e-10:
        said.append(
            "The reference met a singular inner Hessian (no unique solution): add a regulariser to "
            "the inner objective, or damping, before believing "
            "either side."
        )
    if solve_error > tol / 2 and not method.sees_init:
        said.append(
            f"The inner problem is not solved: ‖∇_y g‖ = {ref.inner_grad_norm:.1e}, "
            f"{ref.inner_distance:.1e} from the solution, which alone puts the "
            f"hypergradient off by {solve_error:.1e}. Try more inner steps, a smaller tolerance, "
            "inner.lbfgs(), or a warm start."
        )
    if method.sees_init and (method_error > tol / 2 or solve_error > tol / 2):
        said.append(
            f"{method!r} differentiates the solver's steps, not the solution: it is biased until "
            f"they converge ({ref.inner_distance:.1e} from the "
            "solution now). Try more steps, or hypergradient.implicit(); reference='solver' checks "
            "it for what it is."
        )
    elif method_error > tol / 2 and residual > tol / 10:
        said.append(
            f"The adjoint is not converged: residual {residual:.1e}, which puts the hypergradient "
            f"off by {method_error:.1e}. Try more iterations or "
            "a smaller tol of the linear solver, a preconditioner, no damping."
        )
    elif method_error > tol / 2:
        cause = "although its adjoint residual is small (damping, another batch, low precision)"
        cause = "which solves no adjoint system" if math.isnan(residual) else cause
        cause = "since the solution counts as a constant" if method.constant else cause
        said.append(
            f"{method!r} is off by {method_error:.1e} at the very point, {cause}. Compare with "
            "hypergradient.implicit()."
        )
    if ref.polished_grad_norm > 1e-2 * ref.inner_grad_norm and solve_error <= tol / 2:
        said.append(
            f"The reference could not be polished (‖∇_y g‖ = {ref.polished_grad_norm:.1e}); it may "
            "be wrong itself."
        )
    if ref.precision != "float64":
        said.append(
            f"The reference was computed in {ref.precision}, since the objectives fix their own "
            "dtypes: it is good to about 1e-3."
        )
    return " ".join(said) or (
        "No single cause stands out: the reference's own accuracy may be the limit. Try a "
        "larger tol, or reference='dense'."
    )
