"""Lower levels with several solutions: the penalty of the value function, optimistic or
pessimistic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import check, tree
from bilevax._core import numbers, optimizer
from bilevax.algorithms._parts import steps as _steps
from bilevax.algorithms._parts.directions import drawn_finite
from bilevax.base import (
    Algorithm,
    Bound,
    Ctx,
    Draws,
    Feed,
    Feeds,
    InnerSolver,
    InnerState,
    Lower,
    Objective,
    Problem,
    PyTree,
    StepInfo,
)
from bilevax.inner.parts import bound_like
from bilevax.results import RESULTS, failed, first, unless, warning

VIEWS = ("optimistic", "pessimistic")


class ValueFunctionState(NamedTuple):
    """Where the run stands.

    Attributes:
      inner: the inner point that the view chooses.
      outer: outer parameters.
      outer_opt: their optimizer's state.
      lowest: a minimizer of the lower level.
      places: what searches start from (a leading axis).
    """

    inner: InnerState
    outer: PyTree
    outer_opt: PyTree
    lowest: PyTree
    places: PyTree


def value_function(
    inner_solver: InnerSolver,
    outer_optimizer: optax.GradientTransformation,
    *,
    view: str = "optimistic",
    penalty: float = 10.0,
    growth: float = 1.0,
    candidates: int = 1,
    spread: float = 1.0,
) -> Algorithm:
    r"""Solve problems whose lower level has several solutions, for the best of them or the worst.
    First derivatives only.

    .. math::
        \min_x \min_{y \in S(x)} f(y, x) \quad \text{or} \quad
        \min_x \max_{y \in S(x)} f(y, x), \qquad S(x) = \operatorname{argmin}_y g(y, x)

    In each step, with ``λ_t = λ t^{growth}``: ``y`` minimizes ``g ± f/λ`` (plus: optimistic; minus:
    pessimistic), ``z`` minimizes ``g``, both by `inner_solver` from several starts at once, the
    best kept; then the outer optimizer steps along ``∇_x f(y, x) ± λ (∇_x g(y, x) − ∇_x g(z, x))``,
    the gradient of ``f ± λ (g − min g)`` at y. Where the lower level has one solution this is F2SA
    with whole solves. At a jump of the best response it ends beside the jump, on the side of the
    better value.

    Args:
      inner_solver: an `InnerSolver` that solves (a fixed number of steps is as good as it is);
        `inner.sqp` for bounded lower levels, whose constraints may depend on x.
      outer_optimizer: any optax transformation; beside a jump of the best response slopes differ by
        λ, where a large step is thrown off.
      view: "optimistic" or "pessimistic".
      penalty: λ. The value is off by ``O(1/λ_t)``.
      growth: exponent of its growth.
      candidates: starts of each search beside the last two points: the first inner parameters, and
        points drawn around them.
      spread: standard deviation of those draws.

    Returns:
      An `Algorithm`; the history has ``penalty`` and ``gap`` (``g(y, x) − min g``). Take
      ``keep="last"``: values of early steps are those of points that do not solve the lower level.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> two = lambda y, x, batch: jnp.sum((y**2 - 1.0) ** 2)  # y is 1 or -1
      >>> near = lambda y, x, batch: jnp.sum((y - x) ** 2)
      >>> best = bx.algorithms.value_function(bx.inner.lbfgs(), optax.sgd(0.1), candidates=4)
      >>> out = bx.solve_bilevel(
      ...     two,
      ...     near,
      ...     jnp.array([0.5]),
      ...     jnp.array([0.2]),
      ...     algorithm=best,
      ...     num_steps=100,
      ...     keep="last",
      ... )
      >>> [round(float(a[0]), 2) for a in (out.outer_params, out.inner_params)]
      [1.0, 1.0]

    Source: Ye and Zhu, "Optimality conditions for bilevel programming problems" (Optimization
    1995), on the value function; Kwon et al., "A fully first-order method for stochastic bilevel
    optimization" (ICML 2023); Dempe, Foundations of Bilevel Programming (2002), on both views.
    """
    if not isinstance(inner_solver, InnerSolver):
        raise TypeError(
            f"inner_solver: got {check.describe(inner_solver)}; expected an InnerSolver. Try "
            "inner.lbfgs()."
        )
    check.transformation(outer_optimizer, "outer_optimizer")
    settings = dict(
        inner_solver=inner_solver,
        outer_optimizer=outer_optimizer,
        view=numbers.choice(view, "view", VIEWS),
        penalty=numbers.positive(penalty, "penalty"),
        growth=numbers.positive(growth, "growth", zero=True),
        candidates=numbers.count(candidates, "candidates"),
        spread=numbers.positive(spread, "spread"),
    )
    init, step = (
        Bound("value_function", _init, **settings),
        Bound("value_function", _step, **settings),
    )
    # constraints may read outer parameters that no objective does
    return Algorithm(init, step, Draws(1, 0, 1), finite=drawn_finite, differentiates=False)


def _init(
    problem: Problem,
    inner: InnerState,
    outer: PyTree,
    *,
    outer_optimizer: Any,
    candidates: Any,
    spread: Any,
    **_: Any,
) -> ValueFunctionState:
    _steps.warm_only(problem, "value_function")
    if problem.inner.stateful or problem.outer.stateful:
        raise ValueError(
            "inner_objective: got a stateful one with value_function, which searches from several "
            "starts; expected none. Try f2sa."
        )
    y = inner.params

    def place(i, key):  # the same draws for everyone: what they are for is to be apart
        return tree.axpy(jnp.where(i == 0, 0.0, spread), tree.normal_like(key, y), y)

    places = jax.vmap(place)(
        jnp.arange(candidates), jax.random.split(jax.random.key(0), candidates)
    )
    return ValueFunctionState(inner, outer, optimizer.init(outer_optimizer, outer), y, places)


class _Found(NamedTuple):
    params: PyTree
    multipliers: PyTree
    code: Any


def _search(
    objective: Objective, solver: InnerSolver, starts: PyTree, outer: PyTree, ctx: Ctx
) -> _Found:
    """The best of the solutions that are found from several starts."""

    def one(start):
        lower = Lower(objective, solver, lambda feed, i: ctx)
        state, info = lower.run(InnerState(start, solver.first(start, outer)), outer, Feed())
        value = objective(state.params, outer, ctx)[0]
        code = info["code"][-1] if "code" in info else jnp.int32(RESULTS.success)
        held = (
            jax.tree.map(lambda a: a[-1], info["multipliers"])
            if solver.constraints is not None
            else ()
        )
        return _Found(state.params, held, code), jnp.where(jnp.isfinite(value), value, jnp.inf)

    found, values = jax.vmap(one)(starts)
    solved = found.code == RESULTS.success
    ranked = jnp.where(solved | ~jnp.any(solved), values, jnp.inf)
    return jax.tree.map(lambda a: a[jnp.argmin(ranked)], found)


def _step(
    problem: Problem,
    state: ValueFunctionState,
    feeds: Feeds,
    *,
    inner_solver: Any,
    outer_optimizer: Any,
    view: Any,
    penalty: Any,
    growth: Any,
    candidates: Any,
    spread: Any,
) -> Any:
    x, sign = state.outer, 1.0 if view == "optimistic" else -1.0
    strength = penalty / _steps.decayed(feeds.done, growth)  # λ t^growth
    inner_ctx, outer_ctx = problem.inner_draw(feeds.inner, 0), problem.outer_draw(feeds.outer, 0)
    starts = jax.tree.map(
        lambda places, *more: jnp.concatenate([places, jnp.stack(more)]),
        state.places,
        state.inner.params,
        state.lowest,
    )
    tilted = Objective(
        Bound("tilted", _tilted, g=problem.inner, f=problem.outer, weight=sign / strength),
        adapt=Bound("tilted", _adapted, like=problem.inner),
    )
    both = Ctx(batch=(inner_ctx, outer_ctx))
    low = _search(problem.inner, inner_solver, starts, x, inner_ctx)
    chosen = _search(tilted, inner_solver, starts, x, both)
    y, z = chosen.params, low.params

    (value, (_, aux)), f_x = jax.value_and_grad(problem.outer, 1, has_aux=True)(y, x, outer_ctx)
    g_y, at_y = jax.value_and_grad(_lagrangian)(
        x, problem.inner, inner_solver, y, chosen.multipliers, inner_ctx
    )
    g_z, at_z = jax.value_and_grad(_lagrangian)(
        x, problem.inner, inner_solver, z, low.multipliers, inner_ctx
    )
    direction = tree.axpy(sign * strength, tree.sub(at_y, at_z), f_x)
    gap = problem.inner(y, x, inner_ctx)[0] - problem.inner(z, x, inner_ctx)[0]
    updates, outer_opt = optimizer.update(
        outer_optimizer, direction, state.outer_opt, x, value=value, grad=direction
    )
    moved = _steps.projected(problem, optimizer.apply(x, updates))
    norm = tree.norm(direction)
    worst = jnp.maximum(chosen.code, low.code)
    code = first(
        jnp.where(failed(worst), worst, 0),
        unless(jnp.isfinite(g_y) & jnp.isfinite(g_z), RESULTS.inner_nonfinite),
        unless(jnp.isfinite(value), RESULTS.outer_nonfinite),
        unless(jnp.isfinite(norm), RESULTS.hypergradient_nonfinite),
    )
    code = jnp.where(code == RESULTS.inner_not_converged, 0, code)
    rough = warning(worst == RESULTS.inner_not_converged, RESULTS.inner_not_converged)
    inner = state.inner._replace(params=y)
    close = strength * jnp.abs(gap) <= 0.01 * jnp.abs(value)
    info = StepInfo(
        value,
        norm,
        (inner, x),
        code,
        {"penalty": jnp.asarray(strength, norm.dtype), "gap": gap},
        aux,
        rough,
        scored=close,
    )
    return ValueFunctionState(inner, moved, outer_opt, z, state.places), info


def _tilted(y: PyTree, x: PyTree, batch: Any, *, g: Any, f: Any, weight: Any) -> Any:
    value = g(y, x, batch[0])[0]
    return value + jnp.asarray(weight, value.dtype) * f(y, x, batch[1])[0].astype(value.dtype)


def _adapted(mapping: Objective, *, like: Objective) -> Objective:
    """A constraint of the lower level, under the tilted objective's batches."""
    return Objective(Bound("under", _under, mapping=bound_like(mapping, like)))


def _under(y: PyTree, x: PyTree, batch: Any, *, mapping: Objective) -> Any:
    return mapping(y, x, batch[0])[0]


def _lagrangian(
    x: PyTree, objective: Objective, solver: InnerSolver, y: PyTree, multipliers: PyTree, ctx: Ctx
) -> Any:
    """The lower objective and what its constraints push, as a function of x."""
    value = objective(y, x, ctx)[0]
    if solver.constraints is None:
        return value
    limits = bound_like(solver.constraints, objective)(y, x, ctx)[0]
    return value + tree.dot(multipliers, limits).astype(value.dtype)
