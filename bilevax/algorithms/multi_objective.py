"""Several outer objectives over one lower level: a double loop whose outer direction is made of
each objective's own hypergradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import check, starts, tree
from bilevax._core import numbers, optimizer
from bilevax._core.precision import under
from bilevax.algorithms._parts.directions import drawn_finite
from bilevax.base import (
    Algorithm,
    Bound,
    Draws,
    Feeds,
    Hypergradient,
    InnerSolver,
    InnerState,
    Lower,
    Problem,
    PyTree,
    StepInfo,
    as_cotangent,
)
from bilevax.inner.parts import Program, minimize
from bilevax.results import RESULTS, as_warning, first, unless

RULES = ("min_norm", "conflict_free", "tchebycheff", "mean")


class MultiObjectiveState(NamedTuple):
    """Where the run stands: inner state, outer parameters, outer optimizer's state, the method's
    state.
    """

    inner: InnerState
    outer: PyTree
    outer_opt: PyTree
    method: PyTree


def multi_objective(
    inner_solver: InnerSolver,
    hypergradient: Hypergradient,
    outer_optimizer: optax.GradientTransformation,
    *,
    rule: str = "min_norm",
    preference: Sequence[float] | None = None,
    smoothing: float = 0.1,
    normalized: bool = False,
) -> Algorithm:
    r"""A double loop for several outer objectives: one solve, each objective's hypergradient, one
    direction for all.

    .. math::
        x_{t+1} = \mathrm{optimizer}\Big(x_t, \sum_j \omega_j \nabla F_j(x_t)\Big), \qquad
        F_j(x) = f_j(y^*(x), x)

    The outer objective has `aux`, the vector of the objectives' values: ``bx.objective(fn,
    has_aux=True)`` of ``fn(inner, outer, batch) -> (value, values)``; its own value is what is
    reported and judged. All adjoints are one block solve where the method's linear solver can
    (``implicit(linear.cg())``). The weights ω by `rule`:

    * ``"min_norm"`` (MGDA): of ``‖Σ ω_j ∇F_j‖`` least on the simplex; a direction that ascends no
      objective, zero at Pareto-stationary points.
    * ``"conflict_free"`` (UPGrad): each gradient projected onto what descends with all of them, to
      first order, and the mean of these.
    * ``"tchebycheff"``: softmax of ``F/τ``: descends the largest of the weighted objectives, and
      reaches every point of a front, those of a concave part included.
    * ``"mean"``: fixed weights, of which a front's concave part is out of reach.

    Args:
      inner_solver: an `InnerSolver`.
      hypergradient: a `Hypergradient` method.
      outer_optimizer: any optax transformation.
      rule: as above.
      preference: a positive weight for each objective, which multiplies it before anything else;
        None for one each. A point of the front for each
        preference: an array, so that other values cost no new trace, and `vmap` takes many at once.
      smoothing: τ of ``"tchebycheff"``, in units of the weighted objectives.
      normalized: divide each hypergradient by its norm first, so that no objective's unit counts;
        without it, ``"min_norm"`` leans to the objective whose gradient is short.

    Returns:
      An `Algorithm`; the history has ``weight_j`` of every objective and ``cosine``, the least
      between two hypergradients.

    Raises:
      TypeError, ValueError: for arguments of another kind; at the first step, for an outer
        objective without a vector of values.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> def both(y, x, batch):
      ...     values = jnp.stack([jnp.sum((y - 1.0) ** 2), jnp.sum((y + 1.0) ** 2)])
      ...     return jnp.sum(values), values
      >>> loop = bx.algorithms.multi_objective(
      ...     bx.inner.lbfgs(),
      ...     bx.hypergradient.implicit(),
      ...     optax.sgd(0.01),
      ...     rule="tchebycheff",
      ...     preference=[1.0, 3.0],
      ... )
      >>> inner = lambda y, x, batch: jnp.sum((y - x) ** 2)
      >>> out = bx.solve_bilevel(
      ...     inner,
      ...     bx.objective(both, has_aux=True),
      ...     jnp.zeros(1),
      ...     jnp.ones(1),
      ...     algorithm=loop,
      ...     num_steps=300,
      ...     keep="last",
      ... )
      >>> [
      ...     round(float(v), 1) for v in out.history["aux"][-1]
      ... ]  # three times the second is the first
      [1.6, 0.5]

    Source: Désidéri, "Multiple-gradient descent algorithm" (C. R. Math. 2012); Quinton and Rey,
    "Jacobian descent for multi-objective optimization" (arXiv 2406.16232), UPGrad; Lin et al.,
    "Smooth Tchebycheff scalarization for multi-objective optimization" (ICML 2024).
    """
    check.pieces(inner_solver, hypergradient, "inner_solver")
    check.transformation(outer_optimizer, "outer_optimizer")
    settings = dict(
        inner_solver=inner_solver,
        hypergradient=hypergradient,
        outer_optimizer=outer_optimizer,
        rule=numbers.choice(rule, "rule", RULES),
        preference=None if preference is None else _preference(preference),
        smoothing=numbers.positive(smoothing, "smoothing"),
        normalized=numbers.flag(normalized, "normalized"),
    )
    init, step = (
        Bound("multi_objective", _init, **settings),
        Bound("multi_objective", _step, **settings),
    )
    return Algorithm(
        init,
        step,
        Draws(inner_solver.steps, 1, 1),
        finite=drawn_finite,
        around=Bound("multi_objective", _around, **settings),
    )


def _preference(given: Any) -> jax.Array:
    expected = "expected a positive number for each objective, two or more. Try [1.0, 2.0]."
    numbers.arrays(given, "preference")
    try:
        weights = jnp.asarray(given)
    except (TypeError, ValueError) as error:
        raise TypeError(f"preference: got {numbers.describe(given)}; {expected}") from error
    if not jnp.issubdtype(weights.dtype, jnp.number) or jnp.iscomplexobj(weights):
        raise TypeError(f"preference: got {numbers.describe(given)}; {expected}")
    if (
        weights.ndim != 1
        or weights.size < 2
        or (
            not isinstance(weights, jax.core.Tracer)
            and not bool(jnp.all((weights > 0) & jnp.isfinite(weights)))
        )
    ):
        raise ValueError(f"preference: got {numbers.describe(given)}; {expected}")
    return weights.astype(jnp.result_type(float))


def _around(
    wrap: Any, *, inner_solver: Any, hypergradient: Any, outer_optimizer: Any, **settings: Any
) -> Any:
    return multi_objective(
        inner_solver, wrap(hypergradient)._replace(rows=None), outer_optimizer, **settings
    )


def _many(problem: Problem, inner: InnerState, outer: PyTree, ctx: Any) -> int:
    """The number of objectives; a refusal where the outer objective does not say."""
    shape = jax.eval_shape(lambda: problem.outer(inner.params, outer, ctx)[1][1])
    if not (
        isinstance(shape, jax.ShapeDtypeStruct)
        and len(shape.shape) == 1
        and shape.shape[0] > 1
        and jnp.issubdtype(shape.dtype, jnp.floating)
    ):
        raise TypeError(
            f"outer_objective: got {problem.outer!r} whose aux is {shape}; expected a vector of "
            "two or more objectives. Try "
            "bx.objective(fn, has_aux=True) of a function that returns (jnp.sum(values), values)."
        )
    return shape.shape[0]


def _init(
    problem: Problem,
    inner: InnerState,
    outer: PyTree,
    *,
    inner_solver: Any,
    hypergradient: Any,
    outer_optimizer: Any,
    **_: Any,
) -> MultiObjectiveState:
    check.trajectory(problem, hypergradient)
    inner = inner._replace(opt=inner_solver.first(inner.params, outer))
    return MultiObjectiveState(
        inner, outer, optimizer.init(outer_optimizer, outer), hypergradient.init(inner.params)
    )


def _step(
    problem: Problem,
    state: MultiObjectiveState,
    feeds: Feeds,
    *,
    inner_solver: Any,
    hypergradient: Any,
    outer_optimizer: Any,
    rule: str,
    preference: Any,
    smoothing: Any,
    normalized: bool,
) -> Any:
    starts.structure(problem, inner_solver, hypergradient, state.inner, state.outer, feeds)
    method, outer = hypergradient, state.outer
    inner, init_pullback = starts.started(problem, inner_solver, method, state.inner, outer, feeds)
    lower = Lower(problem.inner, inner_solver, problem.inner_draw, problem.outer.trajectory)
    held = method.init(inner.params) if starts.takes_key(problem.inner_init) else state.method
    hyper_ctx, outer_ctx = problem.hyper_draw(feeds.hyper, 0), problem.outer_draw(feeds.outer, 0)
    many = _many(problem, inner, outer, outer_ctx._replace(model=inner.model))
    if preference is not None and preference.shape != (many,):
        raise ValueError(
            f"preference: got {preference.size} numbers for {many} objectives; expected one each."
        )
    together = (
        method.rows is not None
        and inner_solver.constraints is None
        and inner_solver.optimality is None
    )
    vjp = method.rows if together and method.rows is not None else method.vjp
    solution, pullback = vjp(lower, inner, outer, feeds.inner, hyper_ctx, held)

    floats, rest = tree.partition(solution.model)

    def values_of(params, outer, floats):
        value, (_, aux) = problem.outer(
            params, outer, outer_ctx._replace(model=tree.combine(floats, rest))
        )
        return aux, value

    still = 0
    if not method.sees_model:
        floats = jax.lax.stop_gradient(floats)
        still = starts.constant_statistics(problem, solution, outer, outer_ctx)
    values, back, value = under(method.precision, lambda *a: jax.vjp(values_of, *a, has_aux=True))(
        solution.params, outer, floats
    )
    cotangents, direct, models = jax.vmap(back)(jnp.eye(many, dtype=values.dtype))
    stacked = as_cotangent(method, cotangents, models)
    if together:
        grads, init_cotangent, held, info = pullback(stacked)
    else:
        grads, init_cotangent, states, infos = jax.vmap(pullback)(stacked)
        held = jax.tree.map(lambda a: a[0], states)
        info = _together(infos)
    grads = tree.add(direct, grads)
    if init_pullback is not None:
        grads = tree.add(grads, jax.vmap(init_pullback)(init_cotangent))

    factors = _factors(grads, preference, normalized)
    weights, cosine = combine(
        rule,
        grads if factors is None else jax.vmap(tree.scale)(factors, grads),
        values if preference is None else values * preference.astype(values.dtype),
        smoothing,
    )
    weights = weights if factors is None else weights * factors.astype(weights.dtype)
    direction = tree.rows_sum(weights, grads)
    updates, outer_opt = optimizer.update(
        outer_optimizer, direction, state.outer_opt, outer, value=value, grad=direction
    )
    moved = optimizer.apply(outer, updates)
    moved = moved if problem.project is None else problem.project(moved)
    norm = tree.norm(direction)
    said, warned = as_warning(info["code"])
    code = first(
        said,
        unless(jnp.isfinite(value) & jnp.all(jnp.isfinite(values)), RESULTS.outer_nonfinite),
        unless(jnp.isfinite(norm), RESULTS.hypergradient_nonfinite),
    )
    diagnostics = {k: v for k, v in info.items() if k not in ("code", "warnings", "grad_norm")}
    diagnostics |= {f"weight_{j}": weights[j] for j in range(many)} | {"cosine": cosine}
    last = (
        solution
        if not problem.outer.trajectory
        else solution._replace(params=jax.tree.map(lambda a: a[-1], solution.params))
    )
    info = StepInfo(
        value,
        norm,
        (last, outer),
        code,
        diagnostics,
        values,
        warned | info.get("warnings", 0) | still,
    )
    return MultiObjectiveState(last, moved, outer_opt, held), info


def _together(infos: dict[str, Any]) -> dict[str, Any]:
    """One info for all rows: the worst code and residual, all warnings, work in all."""
    warnings = jax.lax.reduce(infos["warnings"], jnp.int32(0), jax.lax.bitwise_or, (0,))
    counted = ("hvps", "gradients", "mixed_products", "adjoint_iterations")
    out = {
        name: jnp.sum(v) if name in counted else jnp.max(v)
        for name, v in infos.items()
        if name != "warnings"
    }
    return {**out, "warnings": warnings}


def _factors(grads: PyTree, preference: Any, normalized: bool) -> Any:
    """What each gradient is multiplied by before the rule; None for nothing."""
    if not normalized:
        return preference
    sizes = jax.vmap(tree.norm)(grads)
    ones = 1 / jnp.where(sizes > 0, sizes, 1)
    return ones if preference is None else ones * preference.astype(ones.dtype)


def combine(rule: str, grads: PyTree, values: Any, smoothing: Any) -> tuple[Any, Any]:
    """Weights of some gradients (a leading axis) by one of `RULES`, and the least cosine between
    two of them.
    """
    products = jax.vmap(lambda g: tree.rows_dot(grads, g))(grads)
    many, dtype = len(products), products.dtype
    sizes = jnp.sqrt(jnp.diagonal(products))
    unit = jnp.where(sizes > 0, sizes, 1)
    cosine = jnp.min(products / (unit[:, None] * unit[None, :]))
    scaled = products / jnp.max(unit) ** 2
    identity, none = jnp.eye(many, dtype=dtype), jnp.zeros((0, many), dtype)
    if rule == "min_norm":
        point = minimize(
            Program(scaled, jnp.zeros(many, dtype), jnp.ones((1, many), dtype), jnp.ones(1, dtype),
            -identity, jnp.zeros(many, dtype)),
            maxiter=50, tol=1e-9,
        )  # fmt: skip
        return jnp.maximum(point.y, 0), cosine
    if rule == "conflict_free":

        def projected(kept):
            return minimize(
                Program(
                    scaled, jnp.zeros(many, dtype), none, jnp.zeros(0, dtype), -identity, -kept
                ),
                maxiter=50,
                tol=1e-9,
            ).y

        return jnp.mean(jnp.maximum(jax.vmap(projected)(identity), identity), axis=0), cosine
    if rule == "tchebycheff":
        return jax.nn.softmax(values.astype(dtype) / jnp.asarray(smoothing, dtype)), cosine
    return jnp.full((many,), 1 / many, dtype), cosine
