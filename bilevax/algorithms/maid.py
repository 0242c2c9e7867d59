"""MAID: descent with inexact hypergradients whose accuracy is chosen on the way, and certified."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import certificate, check, tree
from bilevax._core import numbers
from bilevax.algorithms._parts import steps as _steps
from bilevax.algorithms._parts.directions import inner_grad, outer_pass
from bilevax.algorithms._parts.solving import adjoint_to, check_solver, curvature, full_batch_only, solve_to
from bilevax.base import Algorithm, Bound, Draws, Feeds, InnerSolver, InnerState, Problem, PyTree, StepInfo
from bilevax.certificate import Constants, Probes
from bilevax.inner.lbfgs import _remember, inverse_hessian_product, lbfgs
from bilevax.results import RESULTS, first, unless

TIGHTEN = 30  # most tightenings of the accuracy for one hypergradient
ROUNDS = 3  # hypergradients in one step, where the search along the one before failed
SEARCH = 10  # trials in the first search; one more in each later one
ADJOINT = 500  # most products in one adjoint solve
BROKEN = 0.1  # largest relative residual at which a breakdown of the adjoint solve counts as rounding
FIRST_MOVE = 0.1  # length of the first trial move, relative to the outer parameters, where no step size is given


class MaidState(NamedTuple):
    """Where MAID stands.

    Attributes:
      inner: inner parameters with their solver's state.
      outer: outer parameters.
      adjoint: the last q.
      epsilon, delta: accuracies asked of the inner point and of the adjoint's residual.
      step_size: the next trial step, for plain gradient directions.
      scale: an upper bound of inner gradient norms at the starts of solves.
      memory: pairs of the quasi-Newton directions, or ().
      last: outer parameters and hypergradient of the step before.
      probes: what the constants' estimates go on from.
      stuck: rounding allowed the last step neither more accuracy nor a decrease, so that none is looked for again.
    """

    inner: InnerState
    outer: PyTree
    adjoint: PyTree
    epsilon: Any
    delta: Any
    step_size: Any
    scale: Any
    memory: PyTree
    last: tuple
    probes: Probes
    stuck: Any


class _Gradient(NamedTuple):
    inner: InnerState
    q: PyTree
    z: PyTree
    value: Any
    aux: PyTree
    f_y_norm: Any
    bound: Any
    residual: Any
    constants: Constants
    probes: Probes
    epsilon: Any
    delta: Any
    lower: Any
    adjoint: Any
    code: Any
    tries: Any
    floor: Any
    done: Any


class _Search(NamedTuple):
    size: Any
    count: Any
    inner: InnerState
    outer: PyTree
    lower: Any
    scale: Any
    accepted: Any


def maid(
    inner_solver: InnerSolver | None = None,
    *,
    memory: int = 10,
    constants: Constants | None = None,
    epsilon: float = 0.1,
    delta: float = 0.1,
    max_error: float = 0.5,
    decrease: float = 1e-4,
    shrink: float = 0.5,
    tighten: float = 0.5,
    loosen: float = 1.05,
    step_size: float = 0.1,
) -> Algorithm:
    """MAID: nothing to tune; accuracies and step sizes are found on the way, and each hypergradient carries an error bound.

    A hypergradient z is computed from an inner point with ``‖∇_y g‖/μ ≤ ε`` and a warm-started adjoint with residual ≤ δ; ε and δ are tightened
    until its error bound ω is at most ``max_error ‖z‖``. Then ``x⁺ = x − αp``, with α shrunk until the decrease is sufficient in spite of both
    errors: ``f(y⁺) + e(y⁺) ≤ f(y) − e(y) − decrease ⟨z, x − x⁺⟩``, ``e(y) = ‖∇_y f‖ε_y + L_f ε_y²/2``, ``ε_y = ‖∇_y g(y)‖/μ``. Where no α will do,
    ε and δ are tightened and z is taken again; where one does, they are loosened. The direction is ``p = Hz``, H from the last `memory` changes of
    z by BFGS, or ``p = z`` as in the paper with ``memory=0``.

    For full batches and a smooth, strongly convex lower level. The whole step is compiled. The bound is a certificate where `constants` are
    known; those that are None are estimated by a few products a step, and the bound then is an estimate.

    Args:
      inner_solver: ``inner.lbfgs``, ``inner.agd`` or ``inner.gradient_descent``; its tolerance is set by MAID. Default ``inner.lbfgs()``.
      memory: pairs of the quasi-Newton directions; 0 for gradient directions.
      constants: known `Constants`.
      epsilon: ε at the start.
      delta: δ at the start.
      max_error: largest ``ω/‖z‖``, below 1. The paper's is ``1 − 10⁻⁴``.
      decrease: share of the predicted decrease that is asked for. The paper's is ``10⁻⁸``.
      shrink: factor of α in the search.
      tighten: factor of ε and δ where they are too large.
      loosen: factor of ε and δ after a successful step.
      step_size: first trial α of gradient directions, which grows by 10/9 after each step.

    Returns:
      An `Algorithm`. The history's ``value`` is ``f(y) + e(y)``, an upper bound of ``f(y*(x), x)``. Diagnostics: ``error_bound`` (ω), ``epsilon``,
      ``delta``, ``inner_error`` (``ε_y``), ``adjoint_residual``, ``step_size``, ``accepted``, ``strong_convexity`` (as known or estimated), and
      what the step cost: ``lower_steps`` (inner gradients) and ``adjoint_steps`` (products with second derivatives, those for estimates included).

    Raises:
      TypeError, ValueError: for arguments of another kind; later, for data that is sampled.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> ridge = lambda w, lam, b: jnp.mean((b["X"] @ w - b["y"]) ** 2) + jnp.exp(lam) * jnp.sum(w * w)
      >>> loss = lambda w, lam, b: jnp.mean((b["X"] @ w - b["y"]) ** 2)
      >>> train, held_out = {"X": jnp.eye(3), "y": jnp.ones(3)}, {"X": jnp.eye(3), "y": 0.5 * jnp.ones(3)}
      >>> algorithm = bx.algorithms.maid()
      >>> data = dict(inner_data=train, outer_data=held_out)
      >>> solution = bx.solve_bilevel(ridge, loss, jnp.zeros(3), jnp.float32(0.0), **data, algorithm=algorithm, num_steps=20)
      >>> bool(jnp.allclose(solution.inner_params, 0.5, atol=1e-3))
      True

    Source: Salehi, Mukherjee, Roberts and Ehrhardt, "An adaptively inexact first-order method for bilevel optimization with application to
    hyperparameter learning" (arXiv 2308.10098), algorithms 3.1 and 3.2; the quasi-Newton direction and estimates from Ritz values are added here.
    """
    solver = lbfgs() if inner_solver is None else inner_solver
    check_solver(solver, "inner_solver")
    memory = numbers.count(memory, "memory", least=0)
    if constants is not None and not isinstance(constants, Constants):
        raise TypeError(f"constants: got {check.describe(constants)}; expected algorithms.Constants(...), or None.")
    settings = dict(
        solver=solver,
        pairs=memory,
        known=Constants() if constants is None else constants,
        epsilon=numbers.positive(epsilon, "epsilon"),
        delta=numbers.positive(delta, "delta"),
        max_error=numbers.positive(max_error, "max_error", upper=1),
        decrease=numbers.positive(decrease, "decrease", upper=1),
        shrink=numbers.positive(shrink, "shrink", upper=1),
        tighten=numbers.positive(tighten, "tighten", upper=1),
        loosen=numbers.positive(loosen, "loosen"),
        step_size=numbers.positive(step_size, "step_size"),
    )
    return Algorithm(Bound("maid", _init, **settings), Bound("maid", _step, **settings), Draws(1, 0, 1))


def _init(problem: Problem, inner: InnerState, outer: PyTree, *, solver, pairs, epsilon, delta, step_size, **_) -> MaidState:
    _steps.warm_only(problem, "maid")
    full_batch_only(problem, "maid")
    dtype = tree.norm((inner.params, outer)).dtype
    number = lambda value: jnp.asarray(value).astype(dtype)
    return MaidState(
        inner=inner._replace(opt=solver.init(inner.params)),
        outer=outer,
        adjoint=tree.zeros_like(inner.params),
        epsilon=number(epsilon),
        delta=number(delta),
        step_size=number(step_size),
        scale=jnp.zeros((), dtype),
        memory=lbfgs(memory=pairs).init(outer) if pairs else (),
        last=(outer, tree.zeros_like(outer)),
        probes=certificate.probes(inner.params),
        stuck=jnp.asarray(False),
    )


def _step(
    problem: Problem, state: MaidState, feeds: Feeds, *, solver, pairs, known, epsilon, delta, max_error, decrease, shrink, tighten, loosen, step_size
) -> tuple[MaidState, StepInfo]:
    dtype = state.epsilon.dtype
    unit = numbers.rounding_unit(state.inner.params)
    inner_ctx, outer_ctx = problem.inner_draw(feeds.inner, 0), problem.outer_draw(feeds.outer, 0)
    x = state.outer

    # The gradient here bounds the starts of this step's solves: trials move little of it.
    start_norm = tree.norm(inner_grad(problem, state.inner.params, x, inner_ctx._replace(model=state.inner.model))[0]).astype(dtype)
    scale = jnp.maximum(state.scale, start_norm)
    scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))

    def inexact(inner, q, probes, eps, dlt, lower, adjoint, tries):
        """Solve to (ε, δ), and bound what comes out."""
        mu = probes.modulus if known.strong_convexity is None else jnp.asarray(known.strong_convexity).astype(dtype)
        solved = solve_to(problem, solver, inner, x, inner_ctx, jnp.maximum(eps * mu, 10 * unit * scale), scale)
        y, model = solved.inner.params, solved.inner.model
        contexts = inner_ctx._replace(model=model), outer_ctx._replace(model=model)
        f = outer_pass(problem, y, x, contexts[1])
        products = curvature(problem, y, x, contexts[0])
        f_y_norm = tree.norm(f.y).astype(dtype)
        solution = adjoint_to(products.hessian, f.y, q, jnp.maximum(dlt, 10 * unit * f_y_norm), ADJOINT)
        z = tree.sub(f.x, products.cross(solution.q))
        fresh = (feeds.done == 0) & (tries == 0)
        k, probes, spent = certificate.estimate(problem, known, probes, y, x, solution.q, products, contexts, fresh)
        residual = solution.residual.astype(dtype)
        bound = certificate.bound(k, solved.grad_norm.astype(dtype), residual, adjoint_norm=tree.norm(solution.q).astype(dtype))
        size = tree.norm(z).astype(dtype)
        enough = bound.total <= max_error * size
        # Where rounding forbids more, more is not asked for.
        target = jnp.maximum(eps * mu, 10 * unit * scale)
        stalled = solved.grad_norm.astype(dtype) > target
        eps = jnp.where(stalled, jnp.maximum(eps, solved.grad_norm.astype(dtype) / k.strong_convexity), eps)
        least = 10 * unit * jnp.stack([scale / k.strong_convexity, f_y_norm])
        # A breakdown near the solution is rounding's: the bound counts the residual that is left, and less is not asked for.
        broken = (solution.code == RESULTS.adjoint_breakdown) & (residual <= BROKEN * f_y_norm)
        floor = (stalled | (eps <= least[0])) & (dlt <= least[1]) | broken
        failed = ~jnp.isfinite(size) | ~jnp.isfinite(f.value)
        done = enough | floor | failed | (tries + 1 >= TIGHTEN)
        # What the bound asks for, but no more than five tightenings at once: z itself is not to be trusted yet.
        half = 0.25 * max_error * size
        next_eps = jnp.clip(half / jnp.where(bound.slope > 0, bound.slope, jnp.ones_like(size)), eps * tighten**5, eps * tighten)
        next_dlt = jnp.clip(half / jnp.where(bound.weight > 0, bound.weight, jnp.ones_like(size)), dlt * tighten**5, dlt * tighten)
        code = first(
            unless(tree.all_finite(y), RESULTS.inner_nonfinite),
            unless(jnp.isfinite(f.value), RESULTS.outer_nonfinite),
            jnp.where((solution.code >= RESULTS.adjoint_breakdown) & ~broken, solution.code, jnp.int32(0)),
            unless(jnp.isfinite(size), RESULTS.hypergradient_nonfinite),
        )
        return _Gradient(
            solved.inner,
            solution.q,
            z,
            f.value,
            f.aux,
            f_y_norm,
            bound,
            residual,
            k,
            probes,
            jnp.where(done | stalled, eps, jnp.maximum(next_eps, least[0])),
            jnp.where(done, dlt, jnp.maximum(next_dlt, least[1])),
            lower + solved.evaluations,
            adjoint + solution.products + 1 + spent,
            code,
            tries + 1,
            floor,
            done,
        )

    def hypergradient(inner, q, probes, eps, dlt, lower, adjoint) -> _Gradient:
        begin = inexact_shape(inexact, inner, q, probes, eps, dlt, lower, adjoint)
        body = lambda g: inexact(g.inner, g.q, g.probes, g.epsilon, g.delta, g.lower, g.adjoint, g.tries)
        return lax.while_loop(lambda g: ~g.done, body, begin)

    def margin(k: Constants, f_y_norm, error):
        return f_y_norm * error + k.outer_smoothness * error**2 / 2

    def search(g: _Gradient, memory, p, size, limit, scale) -> _Search:
        here = margin(g.constants, g.f_y_norm, g.bound.distance)
        target = jnp.maximum(g.epsilon * g.constants.strong_convexity, 10 * unit * scale)

        def body(s: _Search) -> _Search:
            trial = _steps.projected(problem, tree.axpy(-s.size, p, x))
            solved = solve_to(problem, solver, g.inner, trial, inner_ctx, target, s.scale)
            f = outer_pass(problem, solved.inner.params, trial, outer_ctx._replace(model=solved.inner.model))
            error = solved.grad_norm.astype(dtype) / g.constants.strong_convexity
            there = margin(g.constants, tree.norm(f.y).astype(dtype), error)
            predicted = tree.dot(g.z, tree.sub(x, trial)).astype(dtype)
            change = (f.value - g.value).astype(dtype)
            blur = 10 * unit * jnp.abs(g.value).astype(dtype)
            # Below what rounding lets the values tell, no increase is all that can be asked for.
            good = (change + there + here <= -decrease * predicted) | ((predicted <= blur) & (change <= blur))
            accepted = good & jnp.isfinite(change) & tree.all_finite(solved.inner.params)
            return _Search(
                jnp.where(accepted, s.size, s.size * shrink),
                s.count + 1,
                tree.where(accepted, solved.inner, s.inner),
                tree.where(accepted, trial, s.outer),
                s.lower + solved.evaluations,
                s.scale,
                accepted,
            )

        begin = _Search(size, jnp.int32(0), g.inner, x, g.lower, scale, jnp.asarray(False))
        return lax.while_loop(lambda s: ~s.accepted & (s.count < limit), body, begin)

    def direction(g: _Gradient, memory):
        """The direction and the first trial step along it."""
        size = tree.norm(g.z).astype(dtype)
        if not pairs:
            return g.z, state.step_size
        p = inverse_hessian_product(memory, g.z)
        fresh = memory.gamma == 0
        along, length = tree.dot(g.z, p).astype(dtype), tree.norm(p).astype(dtype)
        # Whatever the error, p must descend: else the gradient, scaled.
        bad = ~(g.bound.total * length <= along) | ~(along >= 1e-4 * size * length)
        p = tree.where(bad & ~fresh, tree.scale(jnp.where(fresh, jnp.ones_like(size), memory.gamma.astype(dtype)), g.z), p)
        reach = FIRST_MOVE * jnp.maximum(1.0, tree.norm(x).astype(dtype)) / jnp.where(size > 0, size, jnp.ones_like(size))
        return p, jnp.where(fresh, reach, jnp.ones_like(reach))

    def remember(g: _Gradient):
        """The pair of the step before and this one, once z is known."""
        if not pairs:
            return ()
        s, u = tree.sub(x, state.last[0]), tree.sub(g.z, state.last[1])
        su, ss = tree.dot(s, u), tree.dot(s, s)
        keep = (feeds.done > 0) & (ss > 0) & (su > 1e-8 * jnp.sqrt(ss * tree.dot(u, u)))
        return _remember(state.memory, s, u, su.astype(state.memory.gamma.dtype), keep)

    def attempt(carry):
        j, g, s, memory = carry
        again = j > 0
        g = hypergradient(
            g.inner,
            g.q,
            g.probes,
            jnp.where(again, g.epsilon * tighten, g.epsilon),
            jnp.where(again, g.delta * tighten, g.delta),
            s.lower,
            g.adjoint,
        )
        memory = remember(g)
        p, size = direction(g, memory)
        limit = jnp.where((g.code >= 10) | (state.stuck & g.floor), 0, SEARCH + j)
        return j + 1, g, search(g, memory, p, size, limit, scale), memory

    zero = jnp.int32(0)
    blank = inexact_shape(inexact, state.inner, state.adjoint, state.probes, state.epsilon, state.delta, zero + 1, zero)
    nothing = _Search(state.step_size, zero, state.inner, x, zero + 1, scale, jnp.asarray(False))
    _, g, s, memory = lax.while_loop(
        lambda carry: (carry[0] < ROUNDS) & ~carry[2].accepted & (carry[1].code < 10) & ~carry[1].floor, attempt, (zero, blank, nothing, state.memory)
    )

    grow = jnp.where(s.accepted, loosen, 1.0)
    new = MaidState(
        inner=tree.where(s.accepted, s.inner, g.inner),
        outer=s.outer,
        adjoint=g.q,
        epsilon=g.epsilon * grow,
        delta=g.delta * grow,
        step_size=jnp.where(s.accepted, s.size * (10 / 9), state.step_size * shrink).astype(dtype),
        scale=scale,
        memory=memory,
        last=(x, g.z),
        probes=g.probes,
        stuck=g.floor & ~s.accepted,
    )
    diagnostics = {
        "error_bound": g.bound.total,
        "epsilon": g.epsilon,
        "delta": g.delta,
        "inner_error": g.bound.distance,
        "adjoint_residual": g.residual,
        "step_size": s.size,
        "accepted": s.accepted,
        "strong_convexity": g.constants.strong_convexity,
        "lower_steps": s.lower,
        "adjoint_steps": g.adjoint,
    }
    # Of an inexact point's values, the upper bound falls from step to step, and so may choose the iterate that is kept.
    upper = g.value + margin(g.constants, g.f_y_norm, g.bound.distance).astype(g.value.dtype)
    return new, StepInfo(upper, tree.norm(g.z), (g.inner, x), g.code, diagnostics, g.aux)


def inexact_shape(inexact, inner, q, probes, eps, dlt, lower, adjoint) -> _Gradient:
    """A `_Gradient` that holds the arguments, and otherwise zeros: where the loop starts, so that the solve stands in it once."""
    shapes = jax.eval_shape(inexact, inner, q, probes, eps, dlt, lower, adjoint, jnp.int32(0))
    blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return blank._replace(inner=inner, q=q, probes=probes, epsilon=eps, delta=dlt, lower=lower, adjoint=adjoint)


__all__ = ["MaidState", "maid"]
