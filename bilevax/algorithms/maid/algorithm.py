"""MAID as an algorithm: what is set, and one step."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from bilevax import certificate, check, tree
from bilevax._core import numbers
from bilevax._core.types import Numeric
from bilevax.algorithms._parts import steps
from bilevax.algorithms._parts.solving import check_solver, full_batch_only
from bilevax.algorithms.maid import direction as directions
from bilevax.algorithms.maid.direction import Model
from bilevax.algorithms.maid.gradient import Certificate, Gradient, certified, hypergradient
from bilevax.algorithms.maid.search import Point, Trial, search
from bilevax.algorithms.maid.state import (
    FAILED,
    GIVEN_UP,
    MaidState,
    advanced,
    finer,
    finest,
    report,
    taken_back,
)
from bilevax.base import (
    Algorithm,
    Bound,
    Ctx,
    Draws,
    Feeds,
    InnerSolver,
    InnerState,
    Problem,
    PyTree,
    StepInfo,
)
from bilevax.certificate import Constants
from bilevax.inner.lbfgs import lbfgs


def maid(
    inner_solver: InnerSolver | None = None,
    *,
    memory: int = 10,
    certificate: bool = False,
    constants: Constants | None = None,
    epsilon: Numeric = 1e-2,
    delta: Numeric = 1e-2,
    max_error: Numeric = 0.5,
    decrease: Numeric = 1e-4,
) -> Algorithm:
    r"""MAID: nothing to tune; accuracies and steps are found on the way, and no step is taken along
    which the value rose.

    .. math::
        x^+ = \mathrm{project}(x - \alpha p), \qquad
        f(y^+, x^+) \le f(y, x) - \text{decrease} \cdot \langle z, x - x^+ \rangle

    with y and y⁺ solved to a relative distance ε, z the hypergradient from an adjoint solved to a
    relative residual δ, both from where the last solve ended. Where the inner solver knows the
    units of its unknowns (L-BFGS learns them while it solves), the adjoint's system and residual
    are in those units: features in dollars and in years, or penalties of useless features that grow
    without bound, then cost it nothing. α is shrunk until the lower level is solved and the value
    there has decreased enough; its first trial is 1, or as far as a radius allows that grows with
    steps that pass at once. ε and δ are tightened where ``|⟨q, ∇_y g⟩|``, the value's own error to
    first order, is more than a tenth of the decrease that the next step promises, and where a
    search fails. The direction is ``p = Hz``, H from the last `memory` changes of z by BFGS; a
    Barzilai-Borwein gradient where that does not descend, and always under ``project=``, where a
    quasi-Newton step need not.

    For full batches and a lower level that is convex near its solution. The whole step is compiled,
    with one inner solve in it.

    With a certificate, each hypergradient has a bound ω of its error, ε and δ are tightened until ω
    is at most ``max_error ‖z‖``, and a step must
    decrease the value in spite of both points' inner errors: ``f(y⁺) + e(y⁺) ≤ f(y) − e(y) −
    decrease ⟨z, x − x⁺⟩`` with ``e(y) = ‖∇_y f‖ε_y + L_f ε_y²/2``, ``ε_y = ‖∇_y g(y)‖/μ``. That is
    the paper's rule for strongly convex lower levels. The bound is proven where `constants` are
    known, rounding included where their ``smoothness`` is; those that are None are estimated by a
    few products a step, and the bound then is an estimate.

    Args:
      inner_solver: a solver to a tolerance (``inner.lbfgs``, ``inner.agd``,
        ``inner.gradient_descent``), which MAID sets. Default ``inner.lbfgs()``.
      memory: pairs of the quasi-Newton directions; 0 for gradient directions.
      certificate: bound the error of each hypergradient. It makes a larger program.
      constants: known `Constants`, for a certificate.
      epsilon: ε at the start.
      delta: δ at the start.
      max_error: largest ``ω/‖z‖``, below 1. The paper's is ``1 − 10⁻⁴``.
      decrease: share of the predicted decrease that is asked for. The paper's is ``10⁻⁸``.

    Returns:
      An `Algorithm`. The first step evaluates the start, and each later one a point that was moved
      to: ``value`` and ``grad_norm`` of the history are of the point that the state holds. A step
        that does not move, although a decrease was promised that values can tell, has the warning
      ``no_step_accepted``. Diagnostics: ``accepted``, ``step_size`` (the length of the move),
      ``trials``, ``epsilon``, ``delta``, ``inner_grad_norm``, ``adjoint_residual``, and what the
      step cost: ``lower_steps`` (inner gradients) and ``adjoint_steps`` (products with second
      derivatives). With a certificate also ``error_bound`` (ω), ``inner_error`` (``ε_y``) and
      ``strong_convexity`` (known or estimated), and ``value`` is ``f(y) + e(y)``, an upper bound of
      ``f(y*(x), x)``.

    Raises:
      TypeError, ValueError: for arguments of another kind; later, for data that is sampled.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> ridge = lambda w, lam, b: (
      ...     jnp.mean((b["X"] @ w - b["y"]) ** 2) + jnp.exp(lam) * jnp.sum(w * w)
      ... )
      >>> loss = lambda w, lam, b: jnp.mean((b["X"] @ w - b["y"]) ** 2)
      >>> train, held_out = (
      ...     {"X": jnp.eye(3), "y": jnp.ones(3)},
      ...     {"X": jnp.eye(3), "y": 0.5 * jnp.ones(3)},
      ... )
      >>> algorithm = bx.algorithms.maid()
      >>> solution = bx.solve_bilevel(
      ...     ridge,
      ...     loss,
      ...     jnp.zeros(3),
      ...     jnp.float32(0.0),
      ...     inner_data=train,
      ...     outer_data=held_out,
      ...     algorithm=algorithm,
      ...     num_steps=20,
      ... )
      >>> bool(jnp.allclose(solution.inner_params, 0.5, atol=1e-3))
      True

    Source: Salehi, Mukherjee, Roberts and Ehrhardt, "An adaptively inexact first-order method for
    bilevel optimization with application to hyperparameter learning" (arXiv 2308.10098), algorithms
    3.1 and 3.2, for the certified rule. The quasi-Newton direction, the first-order estimate of the
    value's error, the radius and estimates from Ritz values are this library's.
    """
    solver = lbfgs() if inner_solver is None else inner_solver
    check_solver(solver, "inner_solver")
    if constants is not None and not isinstance(constants, Constants):
        raise TypeError(
            f"constants: got {check.describe(constants)}; expected algorithms.Constants(...), or "
            "None."
        )
    asked = numbers.flag(certificate, "certificate") or constants is not None
    settings = dict(
        solver=solver,
        pairs=numbers.count(memory, "memory", least=0),
        known=(Constants() if constants is None else constants) if asked else None,
        epsilon=numbers.positive(epsilon, "epsilon", upper=1),
        delta=numbers.positive(delta, "delta", upper=1),
        max_error=numbers.positive(max_error, "max_error", upper=1),
        decrease=numbers.positive(decrease, "decrease", upper=1),
    )
    return Algorithm(
        Bound("maid", _init, **settings),
        Bound("maid", _step, **settings),
        Draws(1, 0, 1),
        descends=True,
    )


def _init(
    problem: Problem,
    inner: InnerState,
    outer: PyTree,
    *,
    solver: Any,
    pairs: Any,
    known: Any,
    epsilon: Any,
    delta: Any,
    **_: Any,
) -> MaidState:
    steps.warm_only(problem, "maid")
    full_batch_only(problem, "maid")
    dtype = tree.norm((inner.params, outer)).dtype
    number = lambda value: jnp.asarray(value).astype(dtype)
    extra: tuple[Any, ...] = ()
    if known is not None:
        found = [
            name
            for name in known._fields
            if name != "guaranteed" and (name != "smoothness" or known.smoothness is not None)
        ]
        unknown: dict[str, Any] = {name: number(1.0) for name in found}
        extra = (
            Constants(guaranteed=False)._replace(**unknown),
            certificate.probes(inner.params),
            number(0.0),
        )
    zero = tree.zeros_like(outer)
    return MaidState(
        inner=inner._replace(opt=solver.init(inner.params)),
        outer=outer,
        adjoint=tree.zeros_like(inner.params),
        z=zero,
        p=zero,
        value=number(jnp.inf),
        error=number(0.0),
        told=jnp.asarray(False),
        promised=number(0.0),
        model=directions.first_model(outer, pairs, dtype),
        epsilon=number(epsilon),
        delta=number(delta),
        started=jnp.asarray(False),
        solved=jnp.asarray(False),
        stuck=jnp.int32(0),
        lost=jnp.asarray(False),
        certified=extra,
    )


def _step(
    problem: Problem,
    state: MaidState,
    feeds: Feeds,
    *,
    solver: Any,
    pairs: Any,
    known: Any,
    epsilon: Any,
    delta: Any,
    max_error: Any,
    decrease: Any,
) -> tuple[MaidState, StepInfo]:
    contexts = problem.inner_draw(feeds.inner, 0), problem.outer_draw(feeds.outer, 0)
    trial, stays = _moved(problem, state, solver, decrease, known, contexts)
    failed = ~stays & (trial.length == 0)
    delta = jnp.where(failed, finer(state.delta, FAILED), state.delta)
    accuracies = trial.tol, delta
    g, made = _gradient(problem, state, trial, solver, known, max_error, accuracies, contexts)
    if made is not None:
        accuracies = made.epsilon, made.delta
    model, length = _learned(state, trial, g, stays, failed)
    p, size, promised = _direction(problem, model, trial.outer, g.z)
    new = advanced(state, trial, g, made, model, p, promised, accuracies, stays, failed)
    back = (length > 0) & state.told & ~new.told
    new = tree.where(back, taken_back(state, length), new)
    return new, report(
        new,
        state,
        trial,
        g,
        made,
        jnp.where(back, tree.norm(state.z).astype(size.dtype), size),
        jnp.where(back, 0.0, length),
        back,
    )


def _moved(
    problem: Problem,
    state: MaidState,
    solver: Any,
    decrease: Any,
    known: Any,
    contexts: tuple[Ctx, Ctx],
) -> tuple[Trial, Any]:
    """The search from where the state stands; the point itself at the start, where its value is too
    rough to search from, and at the end.
    """
    outer = tree.where(state.started, state.outer, steps.projected(problem, state.outer))
    end = finest(state)
    stays = (
        ~state.started
        | ~(state.promised > 0)
        | jnp.where(end, state.stuck >= GIVEN_UP, jnp.abs(state.error) > state.promised)
    )
    constants, slack = (
        (state.certified[0], state.certified[2])
        if known is not None
        else (None, jnp.zeros_like(state.value))
    )
    q = tree.where(state.told, state.adjoint, tree.zeros_like(state.adjoint))
    point = Point(outer, state.inner, q, state.value, state.error, state.z, slack, state.solved)
    tols = state.epsilon, finer(state.epsilon, FAILED)
    length = directions.capped(state.model, state.p)
    return search(
        problem, solver, point, state.p, length, tols, stays, decrease, constants, contexts
    ), stays


def _gradient(
    problem: Problem,
    state: MaidState,
    trial: Trial,
    solver: Any,
    known: Any,
    max_error: Any,
    accuracies: tuple[Any, ...],
    contexts: tuple[Ctx, Ctx],
) -> tuple[Gradient, Certificate | None]:
    """The hypergradient where the search ended, certified if that is asked for."""
    if known is None:
        told = solver.inverse_diagonal
        scale = None if told is None else told(trial.inner.opt)
        return hypergradient(
            problem, trial.inner, trial.outer, state.adjoint, accuracies[1], contexts, scale
        )[0], None
    start = trial.inner, state.adjoint, state.certified[1]
    return certified(
        problem, solver, known, max_error, start, trial.outer, accuracies, contexts, ~state.started
    )


def _learned(
    state: MaidState, trial: Trial, g: Gradient, stays: Any, failed: Any
) -> tuple[Model, Any]:
    """The model after this step, and the length of its move."""
    move = tree.sub(trial.outer, state.outer)
    length = jnp.where(
        state.started, tree.norm(move).astype(state.value.dtype), jnp.zeros_like(state.value)
    )
    # Where the finer solve changes the value by more than was promised, it was the accuracy that
    # failed, and not the model.
    blurred = jnp.abs(g.value.astype(state.value.dtype) - state.value) > state.promised
    failed = failed & ~blurred
    searched = directions.learned(state.model, move, tree.sub(g.z, state.z), failed)
    was_capped = directions.capped(state.model, state.p) < 1
    radius = directions.resized(state.model.radius, length, trial.count, was_capped, failed)
    return tree.where(stays, state.model, searched._replace(radius=radius)), length


def _direction(problem: Problem, model: Model, x: PyTree, z: PyTree) -> tuple[PyTree, Any, Any]:
    """The next direction, the norm of the (projected) hypergradient, and the decrease that the
    first trial predicts.
    """
    p = directions.direction(model, z, problem.project is None)
    if problem.project is None:
        size = tree.norm(z)
    else:
        size = tree.norm(z).astype(model.step.dtype)
        unit = directions.gradient_step(model, size)
        reach = tree.norm(tree.sub(x, problem.project(tree.axpy(-1.0, p, x)))).astype(size.dtype)
        size = jnp.where(size > 0, reach / jnp.where(unit > 0, unit, jnp.ones_like(unit)), size)
    ahead = steps.projected(problem, tree.axpy(-directions.capped(model, p), p, x))
    return p, size, tree.dot(z, tree.sub(x, ahead)).astype(model.step.dtype)


__all__ = ["maid"]
