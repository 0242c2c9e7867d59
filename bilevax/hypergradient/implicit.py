"""Implicit differentiation: one linear solve and one mixed product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import linear as linear_solvers
from bilevax import tree
from bilevax._core import numbers
from bilevax._core.jaxpr import reads
from bilevax._core.optimizer import accepted
from bilevax._core.precision import asked_by, under
from bilevax._core.types import Numeric
from bilevax.base import (
    Bound,
    Ctx,
    Feed,
    Hypergradient,
    InnerState,
    Linear,
    LinearSolver,
    Lower,
    Objective,
    Pullback,
    PyTree,
    Scalar,
)
from bilevax.hypergradient import _adjoint, _kkt
from bilevax.hypergradient._solve import forward_with
from bilevax.linear import Preconditioner
from bilevax.linear.preconditioner import at, without
from bilevax.results import RESULTS, warning

# loosest tolerance that `follow` may ask for: above it an adjoint is more noise than direction
CEILING = 0.1


class ImplicitState(NamedTuple):
    """What implicit differentiation keeps from call to call; parts that are not asked for are None.

    Attributes:
      adjoint: the last adjoint, where the next solve starts.
      preconditioner: the state of the linear solver's `Preconditioner`.
      calls: pullbacks done.
    """

    adjoint: PyTree
    preconditioner: PyTree
    calls: Any


def implicit(
    linear: LinearSolver | None = None,
    *,
    damping: Numeric = 0.0,
    warm_start: bool = True,
    max_residual: Numeric | None = None,
    low_memory: bool = False,
    refresh: int = 1,
    follow: Numeric | None = None,
) -> Hypergradient:
    r"""Implicit differentiation of the optimality condition ``∇_y g(y, x) = 0``.

    .. math::
        (\nabla^2_{yy} g + \rho I)\, q = w, \qquad dx = -\nabla^2_{xy} g \; q

    The gradient is linearised once, outside the solver's loop, together with its mixed part, so k
    iterations cost k Hessian-vector products and one gradient. The solution is taken to be a
    stationary point: the initial inner point gets no cotangent. Where the solve is not converged,
    ``inner_grad_norm`` says by how much, and the hypergradient is off by as many orders. Over a
    solver whose solutions are fixed points of a mapping (`inner.fixed_point`, a projected or
    proximal jaxopt solver) that mapping's own rule is used, as in `fixed_point`; over one with
    constraints (`inner.qp`, `inner.sqp`) that of `kkt`. An optimizer that holds parameters at a
    bound (``optax.keep_params_nonnegative``) gives the warning ``not_stationary``.

    A network's statistics (its model state) are taken as constants: the warning
    ``statistics_constant`` stands where the outer objective reads them.

    Args:
      linear: solver of the adjoint system, ``(matvec, b, x0) -> (x, info)``; default
        ``linear.cg()``. One with a `Preconditioner` (such as
        ``linear.cg(preconditioner=linear.nystrom_preconditioner())``) has its sketch kept in the
        method's state. Truncated Neumann series and Nyström approximations are solvers, too:
        ``implicit(linear.neumann(...), max_residual=jnp.inf)``.
      damping: ρ ≥ 0, added to the inner Hessian; biases the hypergradient by O(ρ).
      warm_start: start from the adjoint of the last call.
      max_residual: relative residual of the system solved above which the warning
        ``adjoint_not_converged`` stands; ``jnp.inf`` accepts anything. None: the linear solver's
        own tolerance, and 0.1 for one without; and, where the inner solver has an estimate B of
        the inverse Hessian (`inner.lbfgs`), ``⟨r, Br⟩ > 0.01 ⟨w, q⟩`` with ``r = w − Hq``: an
        error of a tenth, of which a residual says nothing where unknowns have units of their own.
      low_memory: linearise anew in each Hessian-vector product instead of keeping the
        linearisation: about one gradient more each, and memory flat in the depth of the model.
      refresh: calls between two refreshes of a kept preconditioner, at least 1.
      follow: an accuracy that follows the inner solve: the adjoint is solved to ``‖Hq − w‖ ≤ follow
        · ‖∇_y g‖``, but not beyond the relative `tol` of `linear` and not looser than 0.1, since a
        hypergradient is no better than the worse of its two solves. 1.0 is the rule of the source
        below, whose two tolerances are one sequence. None: `tol` alone.

    Returns:
      A `Hypergradient` whose info has ``inner_grad_norm``, ``cotangent_norm`` (``‖w‖``),
      ``adjoint_iterations``, ``adjoint_residual`` (``‖Hq − w‖/‖w‖``, without the damping), and the
      cost beyond the solve: ``gradients``, ``hvps``, ``mixed_products``.

    Raises:
      TypeError, ValueError: for arguments of another kind or outside their range.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> inner = lambda y, x, batch: jnp.sum((y - x) ** 2)
      >>> outer = lambda y, x, batch: jnp.sum(y**2)
      >>> solver = bx.inner.optax(optax.sgd(0.5), steps=1)
      >>> fn = bx.value_and_hypergrad(
      ...     inner, outer, solver=solver, hypergradient=bx.hypergradient.implicit()
      ... )
      >>> fn(jnp.zeros(2), jnp.ones(2)).grad.tolist()
      [2.0, 2.0]

    The derivative may be differentiated again (``order=2``), exactly at a solved point, with
    `linear` and its damping; not with a truncated or approximate solver (``linear.neumann``,
    ``nystrom``, ``identity``), whose answer is no inverse (``order=1``).

    Source: Bengio, "Gradient-based optimization of hyperparameters" (Neural Computation 2000);
    Pedregosa, "Hyperparameter optimization with approximate gradient" (ICML 2016), algorithm 1.
    Preconditioner: Frangella, Tropp and Udell, "Randomized Nyström preconditioning" (SIAM J. Matrix
    Anal. Appl. 2023).
    """
    damping = numbers.positive(damping, "damping", zero=True, example=1e-3)
    follow = None if follow is None else numbers.positive(follow, "follow", example=1.0)
    refresh = numbers.count(refresh, "refresh")
    linear, max_residual = _adjoint.check_settings(linear, max_residual, linear_solvers.cg())
    if follow is not None and linear.tol is None:
        raise TypeError(
            f"follow: got {follow!r} with {linear!r}, which has no tolerance to adapt; expected a "
            "solver such as linear.cg()."
        )
    if refresh > 1 and _preconditioner(linear) is None:
        raise ValueError(
            f"refresh: got {refresh} with {linear!r}, without a Preconditioner to keep. Try "
            "linear.nystrom_preconditioner(), or layers=."
        )
    alone = without(linear)  # those who solve other systems have no objective to show
    settings = dict(
        linear=linear,
        damping=None
        if isinstance(damping, float) and damping == 0
        else damping,  # None: no product is spent on the system without it
        warm_start=numbers.flag(warm_start, "warm_start"),
        max_residual=max_residual,
        low_memory=numbers.flag(low_memory, "low_memory"),
        refresh=refresh,
        follow=follow,
        precision=asked_by(linear),
    )
    return Hypergradient(
        init=Bound("implicit", _init, linear=linear, warm_start=warm_start),
        vjp=Bound("implicit", _vjp, **settings),
        order=1 if linear.approximate else 2,
        cost=Bound(
            "cost", _cost, products=None if _preconditioner(linear) is not None else linear.products
        ),
        linear=alone if settings["damping"] is None else damped(alone, linear, damping),
        max_residual=max_residual,
        precision=asked_by(linear),
        rows=None
        if linear.block is None or low_memory or follow is not None
        else Bound("implicit", _rows, **settings),
    )


def _cost(solver: Any, *, products: Any) -> dict[Any, Any]:
    return {"gradients": 1, "hvps": products, "mixed_products": 1}


def damped(alone: Linear, linear: Linear, damping: Any) -> Linear:
    """`alone`, solving ``(A + ρ I) x = b`` by `linear`."""
    return alone._replace(
        solve=Bound("damped", _damped, solve=linear.solve, damping=damping),
        damping=damping,
        undamped=alone,
    )


def _damped(
    matvec: Callable[[PyTree], PyTree],
    b: PyTree,
    x0: PyTree,
    *,
    solve: Any,
    damping: Any,
    **settings: Any,
) -> Any:
    return solve(lambda v: tree.axpy(damping, v, matvec(v)), b, x0, **settings)


def _preconditioner(linear: Linear) -> Preconditioner | None:
    """One whose state goes from call to call."""
    held = linear.preconditioner
    return held if isinstance(held, Preconditioner) and held.kept else None


def _init(inner: PyTree, *, linear: Linear, warm_start: bool) -> Any:
    held = _preconditioner(linear)
    return ImplicitState(
        tree.zeros_like(inner) if warm_start else None,
        None if held is None else held.init(inner),
        jnp.int32(0),
    )


def _vjp(
    lower: Lower,
    inner_state: InnerState,
    outer: PyTree,
    feed: Feed,
    ctx: Ctx,
    state: ImplicitState,
    *,
    precision: str | None,
    **settings: Any,
) -> tuple[InnerState, Pullback]:
    solution, info, multipliers = forward_with(lower, inner_state, outer, feed)
    ctx = ctx._replace(model=solution.model)
    if lower.solver.constraints is not None:
        held = partial(
            _through_constraints,
            lower,
            solution,
            outer,
            ctx,
            info,
            state,
            settings["max_residual"],
            multipliers,
        )
        return solution, under("highest", held)
    pullback = _pullback if lower.solver.optimality is None else _through_mapping
    return solution, under(
        precision, partial(pullback, lower, solution, outer, ctx, info, state, **settings)
    )


def _pullback(
    lower: Lower, solution: InnerState, outer: PyTree, ctx: Ctx, info: dict[str, Scalar],
    state: ImplicitState, w: PyTree, *, linear: Linear,
    damping: Any, warm_start: bool, max_residual: Any, low_memory: bool, refresh: int, follow: Any,
) -> tuple[PyTree, None, ImplicitState, dict[str, Scalar]]:  # fmt: skip
    """The implicit function theorem: ``(∇²_yy g + ρI) q = w``, and the cotangent ``−∇²_xy g q``."""
    point = _linearized(lower.objective, solution.params, outer, ctx, low_memory)
    hessian = _damped_products(point.products, damping)
    shown = at(linear, _adjoint.point(lower.objective, solution.params, outer, ctx, damping))
    solver, sketch, spent = _prepared(
        shown, state, refresh, follow, hessian, tree.norm(point.grad), w
    )
    q, said = solver(hessian, w, state.adjoint if warm_start else tree.zeros_like(w))
    hq, mixed = point.products(q)

    if (
        damping is not None
    ):  # what was solved is another system: say how far q is from the adjoint of this one
        said = _adjoint.as_rounding_allows(said, w)
        said = said._replace(residual=_relative(tree.norm(tree.sub(hq, w)), tree.norm(w)))
    entries = {
        # here it is free; the solve then need not take the value at each of its steps
        "inner_value": point.value,
        "inner_grad_norm": tree.norm(point.grad),
        "cotangent_norm": tree.norm(w),
        "hvps": jnp.asarray(said.iterations, jnp.int32) + spent.astype(jnp.int32),
    }
    held_back = _held_back(lower.solver, solution, point.value, point.grad, outer)
    said_more = info["warnings"] | held_back
    if damping is None and max_residual is None:
        said_more |= _adjoint.far_off(lower, solution.opt, w, hq, q)
    info = {**info, "warnings": said_more}
    after = ImplicitState(q if warm_start else None, sketch, state.calls + 1)
    return tree.neg(mixed), None, after, _adjoint.report(info, said, max_residual, w, **entries)


class _Point(NamedTuple):
    """The inner objective linearised at a point: its value and gradient, and ``v -> (∇²_yy g v,
    ∇²_xy g v)``.
    """

    value: Scalar
    grad: PyTree
    products: Callable[[PyTree], tuple[PyTree, PyTree]]


def _linearized(
    objective: Objective, params: PyTree, outer: PyTree, ctx: Ctx, low_memory: bool
) -> _Point:
    """One linear form serves the Hessian (its first part) and the mixed product (its second); the
    unused part is dead code.
    """

    def gradients(inner):
        (value, _), grads = jax.value_and_grad(objective, (0, 1), has_aux=True)(inner, outer, ctx)
        return grads, value

    if low_memory:
        (grad, _), value = gradients(params)
        return _Point(value, grad, lambda v: jax.jvp(gradients, (params,), (v,), has_aux=True)[1])
    (grad, _), products, value = jax.linearize(gradients, params, has_aux=True)
    return _Point(value, grad, products)


def _damped_products(products: Callable[..., Any], damping: Any) -> Callable[[PyTree], PyTree]:
    """``v -> (∇²_yy g + ρI) v``."""
    if damping is None:
        return lambda v: products(v)[0]
    return lambda v: tree.axpy(damping, v, products(v)[0])


def _prepared(
    linear: Linear,
    state: ImplicitState,
    refresh: int,
    follow: Any,
    hessian: Callable[..., Any],
    grad_norm: Scalar,
    w: PyTree,
) -> tuple[Linear, PyTree, Scalar]:
    """The linear solver with its preconditioner, refreshed where that is due, and the tolerance
    that follows; the sketch, and its cost.
    """
    held, sketch, spent = _preconditioner(linear), state.preconditioner, jnp.int32(0)
    if held is not None:
        due = state.calls % refresh == 0
        sketch = lax.cond(due, lambda s: held.refresh(hessian, s), lambda s: s, sketch)
        linear, spent = linear_solvers.precondition(linear, sketch), jnp.where(due, held.cost(w), 0)
    if follow is not None:
        w_norm = tree.norm(w)
        asked = _relative(follow * grad_norm.astype(w_norm.dtype), w_norm)
        linear = linear._replace(
            tol=jnp.maximum(jnp.minimum(asked, CEILING), jnp.asarray(linear.tol, w_norm.dtype))
        )
    return linear, sketch, spent


def _relative(part: Scalar, whole: Scalar) -> Scalar:
    return part / jnp.where(whole > 0, whole, 1)


def _through_constraints(
    lower: Lower, solution: InnerState, outer: PyTree, ctx: Ctx, info: dict[str, Scalar],
    state: ImplicitState, max_residual: Any,
    multipliers: PyTree, w: PyTree,
) -> tuple[PyTree, None, ImplicitState, dict[str, Scalar]]:  # fmt: skip
    """The pullback where the solver has constraints: that of `kkt`."""
    found, report = _kkt.pull_back(
        lower.solver.constraints,
        lower,
        solution,
        outer,
        ctx,
        info,
        multipliers,
        None,
        max_residual,
        w,
    )
    return found, None, state._replace(calls=state.calls + 1), report


def _rows(
    lower: Lower, inner_state: InnerState, outer: PyTree, feed: Feed, ctx: Ctx,
    state: ImplicitState, *, linear: Linear, damping: Any,
    max_residual: Any, precision: str | None, **settings: Any,
) -> tuple[InnerState, Pullback]:  # fmt: skip
    """Several cotangents by one block solve, from zero each time."""
    solution, info, _ = forward_with(lower, inner_state, outer, feed)
    ctx, block = ctx._replace(model=solution.model), linear.block
    assert block is not None  # what `implicit` looked for

    def pullback(w: PyTree) -> tuple[PyTree, None, ImplicitState, dict[str, Scalar]]:
        point = _linearized(lower.objective, solution.params, outer, ctx, False)
        q, said = block(_damped_products(point.products, damping), w, tol=linear.tol)
        hq, mixed = jax.vmap(point.products)(
            q
        )  # which says how far each row is from its own adjoint
        left = jax.vmap(lambda hq, w: _relative(tree.norm(tree.sub(hq, w)), tree.norm(w)))(hq, w)
        met = said._replace(residual=jnp.max(said.residual))
        entries = {"inner_grad_norm": tree.norm(point.grad), "adjoint_residual": jnp.max(left)}
        said_more = info["warnings"]
        if damping is None and max_residual is None:
            far = jax.vmap(partial(_adjoint.far_off, lower, solution.opt))(w, hq, q)
            said_more |= jnp.max(far)
        return (
            tree.neg(mixed),
            None,
            state._replace(calls=state.calls + 1),
            _adjoint.report({**info, "warnings": said_more}, met, max_residual, w, **entries),
        )

    return solution, under(precision, pullback)


def _through_mapping(
    lower: Lower, solution: InnerState, outer: PyTree, ctx: Ctx, info: dict[str, Scalar],
    state: ImplicitState, w: PyTree, *, warm_start: bool,
    max_residual: Any, **_: Any,
) -> tuple[PyTree, None, ImplicitState, dict[str, Scalar]]:  # fmt: skip
    """The pullback where the solver's solutions are fixed points of a mapping and no stationary
    points: that mapping's own rule.
    """
    mapping = lower.solver.optimality
    assert mapping is not None

    def image(inner, outer):
        return mapping(lower.objective, inner, outer, ctx)

    start = state.adjoint if warm_start else tree.zeros_like(w)
    found, q, report = _adjoint.through_fixed_point(
        image, linear_solvers.gmres(), solution.params, outer, info, w, start, max_residual
    )
    return (
        found,
        None,
        state._replace(adjoint=q if warm_start else None, calls=state.calls + 1),
        report,
    )


def _held_back(solver: Any, solution: Any, value: Any, grads: Any, outer: PyTree) -> Any:
    """The warning that an optimizer keeps parameters where they are against their gradient, as
    projections do.

    Such a coordinate does not move, and would if its gradient had the other sign (and were larger
    than what momentum remembers).
    """
    if solver.update is None:
        return jnp.int32(0)
    settings = {"outer": outer} if solver.sees_outer else {}
    taken = (
        accepted(solver.update, {"value": value, "grad": grads, "value_fn": lambda params: value})
        | settings
    )

    def moves(grads):
        return solver.update(grads, solution.opt, solution.params, **taken)[0]

    def stuck(g, ahead, back):
        return jnp.where((ahead == 0) & (back != 0), g, 0)

    if not any(
        reads(
            lambda params: solver.update(grads, solution.opt, params, **taken)[0], solution.params
        )
    ):
        return jnp.int32(0)  # it does not know where the parameters are
    if "while[" in str(jax.make_jaxpr(moves)(grads)):  # it searches: too dear, and no projection
        return jnp.int32(0)
    held = tree.norm(jax.tree.map(stuck, grads, moves(grads), moves(tree.scale(-100.0, grads))))
    return warning(held > 1e-3 * tree.norm(grads), RESULTS.not_stationary)
