"""HOAG: approximate hypergradients whose accuracy follows a schedule, with an adaptive step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Numeric
from bilevax.algorithms._parts import steps as _steps
from bilevax.algorithms._parts.directions import outer_pass
from bilevax.algorithms._parts.solving import (
    adjoint_to,
    check_solver,
    curvature,
    full_batch_only,
    solve_to,
)
from bilevax.base import (
    Algorithm,
    Bound,
    Draws,
    Feeds,
    InnerSolver,
    InnerState,
    Problem,
    PyTree,
    StepInfo,
)
from bilevax.inner.lbfgs import lbfgs
from bilevax.results import RESULTS, ladder

GROW, BACK, WORSE = (
    0.95,
    2.0,
    0.2,
    # factors of the Lipschitz estimate after a good step and an undone one; the relative increase
    # that undoes one
)
SLACK = 0.25  # weight of the accuracies in the test of a good step
ADJOINT = 500


class HoagState(NamedTuple):
    """Where HOAG stands: inner state, outer parameters, adjoint, the Lipschitz estimate, and the
    step before.
    """

    inner: InnerState
    outer: PyTree
    adjoint: PyTree
    lipschitz: Any
    last: tuple[Any, ...]


def hoag(
    inner_solver: InnerSolver | None = None, *, epsilon: Numeric = 0.1, rate: Numeric = 0.9
) -> Algorithm:
    """HOAG: inner and adjoint solves to accuracies on a summable schedule, and a step from an
    estimate of the Lipschitz constant.

    At step k: ``‖y − y*(x)‖ ≤ ε_k ‖y‖``, by the solver's estimate, and ``‖Hq − ∇_y f‖ ≤ ε_k ‖∇_y
    f‖``, with ``ε_k = epsilon rate^k``; ``x −= z / L``. L shrinks by 0.95 after a step that
    decreased f as a gradient step should, up to the accuracies, grows by as much after one that did
    not, and stays where the accuracies allow any outcome; it doubles, and the step is undone, where
    f grew by a fifth.

    For full batches. Early values belong to coarse inner points, so take ``solve_bilevel(...,
    keep="last")``. `maid` chooses its accuracies itself and certifies them.

    Args:
      inner_solver: ``inner.lbfgs``, ``inner.agd`` or ``inner.gradient_descent``; its tolerance is
        set by the schedule. Default ``inner.lbfgs()``.
      epsilon: accuracy at the start.
      rate: its factor from step to step, at most 1.

    Returns:
      An `Algorithm`. Its diagnostics are ``epsilon``, ``inner_grad_norm``, ``adjoint_residual``,
      ``step_size`` (``1/L``), ``lower_steps``, ``adjoint_steps``.

    Raises:
      TypeError, ValueError: for arguments of another kind; later, for data that is sampled.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.hoag(bx.inner.agd(), rate=0.8).draws
      Draws(inner=1, hyper=0, outer=1)

    Source: Pedregosa, "Hyperparameter optimization with approximate gradient" (ICML 2016),
    algorithm 1 and section 5 (the adaptive step).
    """
    solver = lbfgs() if inner_solver is None else inner_solver
    check_solver(solver, "inner_solver")
    settings = dict(
        solver=solver,
        epsilon=numbers.positive(epsilon, "epsilon"),
        rate=numbers.positive(rate, "rate", upper=1),
    )
    return Algorithm(
        Bound("hoag", _init, **settings), Bound("hoag", _step, **settings), Draws(1, 0, 1)
    )


def _init(
    problem: Problem, inner: InnerState, outer: PyTree, *, solver: Any, **_: Any
) -> HoagState:
    _steps.warm_only(problem, "hoag")
    full_batch_only(problem, "hoag")
    zero = jnp.zeros((), tree.norm((inner.params, outer)).dtype)
    inner = inner._replace(opt=solver.init(inner.params))
    return HoagState(
        inner,
        outer,
        tree.zeros_like(inner.params),
        zero,
        (outer, jnp.full_like(zero, jnp.inf), zero),
    )


def _step(
    problem: Problem, state: HoagState, feeds: Feeds, *, solver: Any, epsilon: Any, rate: Any
) -> tuple[HoagState, StepInfo]:
    x, dtype = state.outer, state.lipschitz.dtype
    unit = numbers.rounding_unit(dtype)
    inner_ctx, outer_ctx = problem.inner_draw(feeds.inner, 0), problem.outer_draw(feeds.outer, 0)
    eps = jnp.maximum(
        epsilon * jnp.power(jnp.asarray(rate).astype(dtype), jnp.asarray(feeds.done).astype(dtype)),
        10 * unit,
    )

    solved = solve_to(problem, solver, state.inner, x, inner_ctx, eps)
    y, model = solved.inner.params, solved.inner.model
    f = outer_pass(problem, y, x, outer_ctx._replace(model=model))
    products = curvature(problem, y, x, inner_ctx._replace(model=model))
    adjoint = adjoint_to(products.hessian, f.y, state.adjoint, eps, ADJOINT)
    z = tree.sub(f.x, products.cross(adjoint.q))
    size = tree.norm(z).astype(dtype)

    last_x, last_value, last_eps = state.last
    value = f.value.astype(dtype)
    begun = jnp.isfinite(last_value)
    length = tree.norm(tree.sub(x, last_x)).astype(dtype)
    lipschitz = jnp.where(
        state.lipschitz > 0, state.lipschitz, jnp.where(size > 0, size, jnp.ones_like(size))
    )  # a first step of unit length
    slack, predicted = SLACK * eps + last_eps * (SLACK + 1) * length, lipschitz * length**2
    telling = begun & (
        predicted > slack
    )  # else the accuracies allow any outcome, and L would shrink for ever
    good = value <= last_value + slack - predicted
    bad = begun & (value - last_value > WORSE * jnp.abs(last_value))
    lipschitz = lipschitz * jnp.where(
        bad, BACK, jnp.where(telling, jnp.where(good, GROW, 1 / GROW), 1.0)
    )
    moved = _steps.projected(problem, tree.axpy(-1 / lipschitz, z, x))
    back = tree.where(bad, last_x, moved)

    said = jnp.where(
        adjoint.code == RESULTS.adjoint_not_converged, jnp.int32(0), adjoint.code
    )  # the schedule asks for no more
    code = ladder(
        said, inner=tree.all_finite(y), value=jnp.isfinite(f.value), grad=jnp.isfinite(size)
    )
    diagnostics = {
        "epsilon": eps,
        "inner_grad_norm": solved.grad_norm,
        "adjoint_residual": adjoint.residual,
        "step_size": 1 / lipschitz,
        "lower_steps": solved.evaluations,
        "adjoint_steps": adjoint.products + 1,
    }
    # Back at the last point, f is measured anew: its old value belongs to a coarser inner point,
    # and would be undercut for ever.
    remembered = tree.where(
        bad, (last_x, jnp.full_like(value, jnp.inf), jnp.zeros_like(eps)), (x, value, eps)
    )
    new = HoagState(solved.inner, back, adjoint.q, lipschitz.astype(dtype), remembered)
    return new, StepInfo(f.value, size, (solved.inner, x), code, diagnostics, f.aux)


__all__ = ["HoagState", "hoag"]
