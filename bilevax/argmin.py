"""The solution map of a minimization as a function that can be differentiated any number of
times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bilevax import base, tree
from bilevax._core import numbers
from bilevax._core.jaxpr import has_rule_of_its_own
from bilevax._core.transfers import by_intent
from bilevax._traced import Outer, Traceable, constant, is_zero, outputs, together
from bilevax.base import (
    Bound,
    Ctx,
    Feed,
    InnerSolver,
    InnerState,
    LinearSolver,
    Lower,
    Objective,
    PyTree,
    Static,
)
from bilevax.hypergradient.parts import chosen
from bilevax.inner.parts import active, come_apart, lagrangian, unvector
from bilevax.linear.cg import cg
from bilevax.results import (
    RESULTS,
    SolveError,
    as_warning,
    failed,
    mask_of,
    strictly,
    strictness,
    worst,
)


class ArgminInfo(NamedTuple):
    """How one inner solve ended.

    Attributes:
      value: the objective at the returned point.
      grad_norm: ``‖∇_y g‖`` there. The derivative is off by about this over the smallest curvature.
      code: a `RESULTS` code: ``success``, ``inner_not_converged`` or ``inner_nonfinite``.
      warnings: a mask of what is rough about the point (`results.warnings_in`): an unsolved one
        that `strict` let pass.
    """

    value: Any
    grad_norm: Any
    code: Any
    warnings: Any = 0


def argmin(
    objective: Callable[..., Any],
    solver: InnerSolver,
    *,
    linear_solver: LinearSolver | None = None,
    tol: float | None = None,
    max_residual: float = 1e-2,
    strict: bool | Collection[RESULTS] = True,
    throw: bool = False,
) -> Argmin:
    r"""Turn a minimization into a function of everything that its objective reads.

    .. math::
        y^*(\theta) = \operatorname{argmin}_y g(y, \theta), \qquad
        \partial y^* = -(\nabla^2_{yy} g)^{-1} \nabla^2_{y\theta} g \; \partial\theta

    The result is an ordinary JAX function: ``grad``, ``jvp``, ``jacrev``, ``jacfwd``, ``hessian``,
    ``vmap`` and ``jit`` apply to any order, and it may be called inside the objective of another
    `argmin`, to any depth. The solver runs undifferentiated, so a ``while_loop`` inside it is
    welcome. Arrays that the objective closes over are differentiated like arguments, traced ones
    included.

    The derivative with respect to `inner_init` is zero: a solution does not depend on where the
    search for it began. Where it should (meta-learning an initialisation), unroll the solve, or add
    a proximal term to the objective and pass the initialisation as an argument.

    Args:
      objective: pure function ``(inner, *args) -> scalar``; any number of arguments, any pytrees.
        As with ``jax.jit`` and ``jax.lax.scan``, what it captures is read when it is first traced:
        what changes from call to call is an argument, or captured by a function made anew.
      solver: an `InnerSolver`; it is run for its `steps` from `inner_init`, without batches. One
        with constraints (`inner.qp`, `inner.sqp`) or a residual calls them as the objective,
        ``(inner, *args)``. Under constraints the solution is differentiated through all conditions
        of optimality; where it has one-sided derivatives only (an active constraint without a
        multiplier, dependent ones that the arguments move apart), its derivative is NaN, or with
        ``strict=False`` one of them or, for dependent ones, their mean.
      linear_solver: solver of the symmetric systems in the inner Hessian; default ``linear.cg``
        close to the precision of the inner parameters. ``linear.minres()`` takes an indefinite
        Hessian, which a stationary point that is no minimum has.
      tol: the largest ``‖∇_y g‖`` that counts as solved, one gradient more. Default: the solver's
        own word, if it gives one (a fixed number of optax steps does not: give `tol` there).
        ``jnp.inf`` takes any finite point.
      max_residual: relative residual of a linear solve above which the derivative is NaN instead of
        wrong. ``jnp.inf`` accepts anything.
      strict: warnings that are failures: True for all, False for none, or a set of `RESULTS`. All
        by default, since a bare solution can carry no warning; ``strict=False`` takes an unsolved
        point as it is.
      throw: raise where a solve failed, under ``jit`` too. Costs a host callback in the program
        (taken on failure, and always under ``vmap``), and a program with one is not kept in JAX's
        persistent compilation cache.

    Returns:
      ``fn(inner_init, *args) -> y*``, a pytree like `inner_init`. A solve that failed (left the
      finite numbers, or missed its tolerance) is NaN in every floating-point leaf, its derivatives
      too, in its own lane under ``vmap``: no line search above accepts it and no result hides it.
      ``fn.with_info(inner_init, *args) -> (y, ArgminInfo)`` returns the point as reached and the
      code that says what happened. Under ``jit`` build it once; a new objective function is a new
      trace.

    Raises:
      TypeError: for an objective or solver of another kind, complex or non-array leaves.
      ValueError: for an objective that is not a real scalar, an `inner_init` without floating-point
        leaves, a `tol` that is not positive.
      SolveError: with `throw`, when a solve failed. From compiled code it comes as
        ``jax.errors.JaxRuntimeError`` with the same text.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, bilevax as bx
      >>> ridge = lambda w, lam: jnp.sum((w - 1.0) ** 2) + lam * jnp.sum(w**2)
      >>> fn = bx.argmin(ridge, bx.inner.optax(optax.sgd(0.1), steps=100))  # w* = 1 / (1 + lam)
      >>> w, dw = jax.jvp(lambda lam: fn(jnp.zeros(2), lam), (1.0,), (1.0,))
      >>> w.round(4).tolist(), dw.round(4).tolist()
      ([0.5, 0.5], [-0.25, -0.25])

    Source: Blondel et al., "Efficient and modular implicit differentiation" (NeurIPS 2022, arXiv
    2105.15183), section 2. The composition with ``jax.lax.custom_linear_solve``, which keeps every
    derivative symmetric and exact, is this library's.
    """
    if not (
        isinstance(solver, InnerSolver)
        or (callable(getattr(solver, "init", None)) and callable(getattr(solver, "step", None)))
    ):
        raise TypeError(
            f"solver: got {numbers.shown(solver)}; expected an InnerSolver such as "
            "inner.optax(optax.sgd(0.1), steps=100)."
        )
    if getattr(solver, "optimality", None) is not None:
        raise TypeError(
            f"solver: got {solver!r}, whose solutions are fixed points of a mapping and need not "
            "be stationary points of the objective; expected "
            "an unconstrained solver. Try value_and_hypergrad with hypergradient.fixed_point."
        )
    if tol is not None:
        tol = numbers.positive(tol, "tol", infinite=True, example=1e-6)
    throw = numbers.flag(throw, "throw")
    return Argmin(
        _Traceable(objective, linear_solver, getattr(solver, "constraints", None)),
        solver,
        _linear(linear_solver, max_residual),
        tol,
        throw,
        strictness(strict),
    )


def attach(
    objective: Callable[..., Any],
    linear_solver: LinearSolver | None = None,
    *,
    max_residual: float = 1e-2,
) -> Callable[..., Any]:
    r"""The identity on a solved point, with the implicit derivative of the point.

    .. math::
        \mathrm{attach}(y, \theta) = y, \qquad
        \partial\,\mathrm{attach} = -(\nabla^2_{yy} g)^{-1} \nabla^2_{y\theta} g \; \partial\theta

    `argmin` is a solve and this. Use it where the solve is your own: in a training loop that
    carries warm starts, say.

    Args:
      objective: ``(inner, *args) -> scalar`` that `y` minimizes.
      linear_solver: as for `argmin`.
      max_residual: as for `argmin`.

    Returns:
      ``fn(y, *args) -> y``, differentiable in `args` and in what `objective` closes over, any
      number of times. The tangent of `y` itself is dropped.

    Examples:
      >>> import jax, jax.numpy as jnp, bilevax as bx
      >>> from bilevax.argmin import attach
      >>> fn = attach(lambda y, x: (y - x**2) ** 2)
      >>> float(jax.grad(lambda x: fn(x**2, x))(3.0))
      6.0

    Source: as `argmin`.
    """
    traceable, linear = _Traceable(objective, linear_solver), _linear(linear_solver, max_residual)

    def attached(y: PyTree, *args: PyTree) -> PyTree:
        traced = traceable.trace(y, args)
        static, dynamic = base.split((traced.value, linear))
        return tree.combine(
            _attached(static, dynamic, traced.inner, traced.outer), traced.outer.fixed
        )

    return attached


class Argmin:
    """What `argmin` returns: call it for the solution, or `with_info` for the solution and how the
    solve ended.
    """

    def __init__(
        self,
        traceable: _Traceable,
        solver: InnerSolver,
        linear: _Linear,
        tol: Any,
        throw: bool,
        strict: int,
    ) -> None:
        self._traceable, self._solver, self._linear, self._tol, self._throw = (
            traceable,
            solver,
            linear,
            tol,
            throw,
        )
        self._strict = strict

    def __repr__(self) -> str:
        return f"argmin({self._traceable.name}, {self._solver!r})"

    @by_intent
    def __call__(self, inner_init: PyTree, *args: PyTree) -> PyTree:
        traced = self._traceable.trace(inner_init, args)
        y, info = self._solve("guarded", traced)
        if self._throw and isinstance(info.code, jax.core.Tracer):
            y, _ = self._solve("throwing", traced)  # the solve above is dead code
        elif self._throw:
            _raise(info.code, info.grad_norm, name=self._traceable.name)
        return tree.combine(y, traced.outer.fixed)

    @by_intent
    def with_info(self, inner_init: PyTree, *args: PyTree) -> tuple[PyTree, ArgminInfo]:
        """The point as reached, and what is known of it; nothing is raised or replaced by NaN."""
        traced = self._traceable.trace(inner_init, args)
        y, info = self._solve("informed", traced)
        return tree.combine(y, traced.outer.fixed), info

    def _solve(self, mode: str, traced: _Traced) -> tuple[PyTree, ArgminInfo]:
        static, dynamic = base.split((traced.value, self._solver, self._linear, self._tol))
        return _solved(
            static, mode, self._strict, self._traceable.name, dynamic, traced.inner, traced.outer
        )


# ---- the objective with nothing captured


class _Traced(NamedTuple):
    value: Objective
    inner: PyTree  # its float leaves
    outer: Any  # an Outer, or a _Limited


class _Limited(NamedTuple):
    """What an objective and the constraints of its solver read."""

    own: Outer
    limits: Outer

    @property
    def fixed(self) -> PyTree:
        return self.own.fixed


class _Held(NamedTuple):
    given: _Limited
    mask: PyTree  # of the inequalities, 1 where active
    tied: Any = None  # where active constraints are dependent, directions of their multipliers
    asked: Any = None  # one of them, at random: the derivative is NaN unless it changes nothing


class _Traceable(Traceable):
    """A user's objective, traced to a scalar whose captured arrays are operands; with the solver's
    constraints, called as it is.
    """

    def __init__(
        self,
        objective: Callable[..., Any],
        linear_solver: LinearSolver | None,
        constraints: Objective | None = None,
    ) -> None:
        if isinstance(objective, Objective) and (
            objective.has_aux or objective.stateful or objective.keyed
        ):
            raise TypeError(
                f"objective: got {objective!r}; expected a plain function (inner, *args) -> "
                "scalar. Pass state and keys as arguments."
            )
        if not callable(objective):
            raise TypeError(
                f"objective: got {type(objective).__name__}; expected a function (inner, *args) -> "
                "scalar."
            )
        if constraints is not None and (
            constraints.stateful or constraints.keyed or constraints.indexed
        ):
            raise TypeError(
                f"solver: got constraints {constraints!r}; expected plain functions (inner, *args) "
                "-> arrays. Pass state and keys as arguments."
            )
        super().__init__(objective, linear_solver)
        self._limits = None if constraints is None else Traceable(constraints, linear_solver)

    def trace(self, inner: PyTree, args: tuple[Any, ...]) -> _Traced:
        closed, params, outer, _ = self.traced(inner, args)
        if not jax.tree.leaves(params):
            raise ValueError(
                f"inner_init: got {inner!r}, which has no floating-point leaf; expected something "
                "to minimize over."
            )
        if (
            len(closed.out_avals) != 1
            or closed.out_avals[0].shape != ()
            or not jnp.issubdtype(closed.out_avals[0].dtype, jnp.floating)
        ):
            shapes = ", ".join(str(aval) for aval in closed.out_avals)
            raise ValueError(
                f"objective: {self.name} returned ({shapes}); expected one real scalar. Try "
                "jnp.sum or jnp.mean, and no aux."
            )
        if self._limits is None:
            value = Bound(self.name, _evaluate, jaxpr=closed.jaxpr)
            return _Traced(Objective(value, adapt=_of_arguments), params, outer)
        limits, _, read, form = self._limits.traced(inner, args)
        adapt = Bound("limits", _adapted, jaxpr=limits.jaxpr, form=jax.tree.structure(form))
        return _Traced(
            Objective(Bound(self.name, _evaluate_own, jaxpr=closed.jaxpr), adapt=adapt),
            params,
            _Limited(outer, read),
        )


def _evaluate(inner: PyTree, outer: Outer, batch: PyTree, *, jaxpr: Any) -> Any:
    return outputs(jaxpr, inner, outer)[0]


def _of_arguments(mapping: Objective) -> Objective:
    """A mapping of the solver (its residual, say), called as the objective is: ``(inner,
    *args)``.
    """
    return dataclasses.replace(mapping, fn=Bound(mapping.name, _unpacked, fn=mapping.fn))


def _unpacked(inner: PyTree, outer: Outer, batch: PyTree, *, fn: Callable[..., Any]) -> Any:
    return fn(tree.combine(inner, outer.fixed), *outer.args)


def _evaluate_own(inner: PyTree, outer: _Limited, batch: Any, *, jaxpr: Any) -> Any:
    return outputs(jaxpr, inner, outer.own)[0]


def _adapted(mapping: Objective, *, jaxpr: Any, form: Any) -> Objective:
    """The solver's constraints, which are those that were traced, with the objective's
    arguments.
    """
    return Objective(Bound("limits", _evaluate_limits, jaxpr=jaxpr, form=form))


def _evaluate_limits(inner: PyTree, outer: _Limited, batch: Any, *, jaxpr: Any, form: Any) -> Any:
    return form.unflatten(outputs(jaxpr, inner, outer.limits))


def _lagrangian(point: Any, outer: _Held, batch: Any, *, value: Any, constraints: Any) -> Any:
    return lagrangian(value, constraints)(point, outer.given, outer.mask, Ctx(), outer.tied)


# ---- the solve


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _solved(
    static: Static,
    mode: str,
    strict: int,
    name: str,
    dynamic: tuple[Any, ...],
    inner: PyTree,
    outer: Any,
) -> tuple[PyTree, ArgminInfo]:
    value, solver, linear, tol = base.join(static, dynamic)
    start, given, solver, tol = jax.tree.map(constant, (inner, outer, solver, tol))
    state, report = Lower(value, solver, _no_batch).run(
        InnerState(start, solver.init(start)), given, Feed()
    )
    y, report = lax.stop_gradient((state.params, report))

    own_word = report["code"][-1] if "code" in report else jnp.int32(RESULTS.success)
    reached, grad_norm = report["value"][-1], jnp.full((), -1.0)
    constraints = getattr(solver, "constraints", None)
    if constraints is not None:
        grad_norm = report["grad_norm"][-1]
        multipliers = jax.tree.map(lambda a: a[-1], report["multipliers"])
        found = lax.stop_gradient(active(value, constraints, y, given, Ctx(), multipliers))
    if mode == "informed" or (tol is not None and constraints is None):
        (reached, _), gradient = jax.value_and_grad(value, has_aux=True)(y, given, Ctx())
        grad_norm = grad_norm if constraints is not None else tree.norm(gradient)
    if tol is not None:
        own_word = jnp.where(grad_norm <= tol, RESULTS.success, RESULTS.inner_not_converged)
    own_word, warnings = as_warning(own_word)
    code = worst(own_word, jnp.where(tree.all_finite(y), RESULTS.success, RESULTS.inner_nonfinite))
    info = lax.stop_gradient(
        ArgminInfo(reached, grad_norm, strictly(code, warnings, strict), warnings)
    )

    if mode != "informed":
        bad = failed(info.code)
        if mode == "throwing":
            report_failure = partial(_raise, name=name)
            flag = jax.ShapeDtypeStruct((), jnp.bool_)
            bad = lax.cond(
                bad,
                lambda: jax.pure_callback(
                    report_failure, flag, info.code, info.grad_norm, vmap_method="broadcast_all"
                ),
                lambda: jnp.asarray(False),
            )
        y = jax.tree.map(lambda leaf: jnp.where(bad, jnp.asarray(jnp.nan, leaf.dtype), leaf), y)
    if constraints is None:
        return _solution(*base.split((value, linear)), y, outer), info
    info = info._replace(warnings=info.warnings | found.warnings)
    # At a point with one-sided derivatives the solution stands, and a derivative of it is NaN where
    # nobody could hear a warning. Dependent constraints are asked for where it is taken: those that
    # stay dependent however the arguments move leave it as it is.
    silent = strict if mode != "informed" else 0
    dependent = mask_of(RESULTS.dependent_constraints)
    mask = found.mask
    if silent & ~dependent:
        mask = tree.nan_where(found.warnings & silent & ~dependent != 0, mask)
    tied, asked = found.tied, None
    if tied is not None and silent & dependent:
        asked = unvector(tied @ jax.random.normal(jax.random.key(0), tied.shape[1:]), multipliers)
    saddle = Objective(Bound("lagrangian", _lagrangian, value=value, constraints=constraints))
    linear = linear._replace(solver=chosen(linear.solver, (y, multipliers)))
    return _solution(
        *base.split((saddle, linear)), (y, *multipliers), _Held(outer, mask, tied, asked)
    )[0], info


def _no_batch(feed: Feed, i: Any) -> Ctx:
    return Ctx()


def _raise(codes: Any, grad_norms: Any, *, name: str) -> Any:
    codes, grad_norms = np.asarray(codes), np.asarray(grad_norms)
    if np.any(failed(codes)):
        worst_code = RESULTS(int(np.max(codes)))
        norm = float(np.max(grad_norms))
        raise SolveError(
            worst_code,
            None,
            f" in argmin({name})" + ("" if norm < 0 else f", gradient norm {norm:.2e}"),
        )
    return np.zeros(codes.shape, np.bool_)


# ---- the one rule


class _Linear(NamedTuple):
    solver: Any
    max_residual: Any


def _linear(solver: Any, max_residual: Any) -> _Linear:
    if not (solver is None or callable(solver)):
        raise TypeError(
            f"linear_solver: got {numbers.shown(solver)}; expected (matvec, b, x0) -> (x, info), "
            "such as linear.cg()."
        )
    return _Linear(solver, numbers.positive(max_residual, "max_residual", infinite=True))


@partial(jax.jit, static_argnums=(0,))
def _attached(static: Static, dynamic: tuple[Any, ...], inner: PyTree, outer: Outer) -> PyTree:
    return _solution(static, dynamic, lax.stop_gradient(inner), outer)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solution(static: Static, dynamic: tuple[Any, ...], inner: PyTree, outer: Outer) -> PyTree:
    return inner


def _solution_jvp(static: Static, primals: Any, tangents: Any) -> Any:
    dynamic, inner, outer = primals
    inner = _solution(
        static, dynamic, inner, outer
    )  # through the rule again: derivatives of the derivative move the point, too
    value, linear = base.join(static, dynamic)
    operands, treedef = jax.tree.flatten(outer)
    moves = jax.tree.leaves(tangents[2], is_leaf=is_zero)
    moving = [i for i, t in enumerate(moves) if not is_zero(t)]
    if not moving:
        return inner, tree.zeros_like(inner)

    def objective(inner, moved):
        full = list(operands)
        for i, leaf in zip(moving, moved, strict=True):
            full[i] = leaf
        return value(inner, treedef.unflatten(full), Ctx())[0]

    moved, direction = [operands[i] for i in moving], [moves[i] for i in moving]
    derive = (
        _by_symmetry
        if has_rule_of_its_own(jax.make_jaxpr(objective)(inner, moved).jaxpr)
        else _by_transposition
    )
    moving_along = derive(objective, partial(_linear_solve, linear), inner, moved, direction)
    if isinstance(outer, _Held) and outer.asked is not None:
        parts = lax.stop_gradient((inner, moved, outer.asked))
        # a factor, which is linear and so has a transpose
        known = jnp.where(come_apart(objective, *parts), jnp.nan, 1.0)
        moving_along = jax.tree.map(lambda a: a * known.astype(a.dtype), moving_along)
    return inner, moving_along


def _by_transposition(
    objective: Callable[..., Any], solve: Any, inner: PyTree, moved: Any, direction: Any
) -> Any:
    """``-H⁻¹ M ẋ``, whose reverse mode transposes the product with the mixed derivative ``M``."""
    still, held = tree.zeros_like(inner), tree.zeros_like(moved)
    # The gradient holds the solves of all levels below, so it is written into the program once.
    _, products = jax.linearize(jax.grad(objective), inner, moved)
    mixed = products(still, direction)
    # Linear already: linearized again, what the Hessian does not need of it is dead code instead of
    # arithmetic on zeros.
    _, hvp = jax.linearize(lambda v: products(v, held), still)
    return together(
        lax.custom_linear_solve(
            lambda v: together(hvp(v)), together(tree.neg(mixed)), solve, symmetric=True
        )
    )


def _by_symmetry(
    objective: Callable[..., Any], solve: Any, inner: PyTree, moved: Any, direction: Any
) -> Any:
    r"""``-H⁻¹ M ẋ``, whose reverse mode is a forward product, too.

    The symmetric system ``(H, M, 0; M', 0, 1; 0, 1, 0) (u, s, n) = (0, 0, ẋ)`` has ``u = -H⁻¹ M
    ẋ``, and with the cotangent of ``u`` on its right side its last unknown is what the transposed
    product would give: ``n = -M' H⁻¹ w``. What can be differentiated backwards only once (a loop
    that keeps checkpoints) is differentiated backwards once.
    """
    still, held = tree.zeros_like(inner), tree.zeros_like(moved)
    _, products = jax.linearize(jax.grad(objective, (0, 1)), inner, moved)
    _, by_inner = jax.linearize(lambda v: products(v, held), still)
    _, mixed = jax.linearize(lambda s: products(still, s)[0], held)

    def matvec(unknowns):
        u, s, n = unknowns
        own, crossed = by_inner(u)
        return together((tree.add(own, mixed(s)), tree.add(crossed, n), s))

    def solved(_, right):
        first, second, s = right
        u = solve(lambda v: by_inner(v)[0], tree.sub(first, mixed(s)))
        return u, s, tree.sub(second, by_inner(u)[1])

    return together(
        lax.custom_linear_solve(matvec, together((still, held, direction)), solved, symmetric=True)
    )[0]


_solution.defjvp(_solution_jvp, symbolic_zeros=True)


def _linear_solve(linear: _Linear, matvec: Callable[[PyTree], PyTree], b: PyTree) -> Any:
    # A default near the rounding unit: what is differentiated again should not carry a looser error
    # than it must.
    unit = numbers.rounding_unit(b)
    # In half precision that is no accuracy at all: there the solve goes on to where rounding stops
    # it.
    half = unit > 1e-4
    solver = (
        cg(maxiter=1000, tol=unit / 2 if half else 100 * unit)
        if linear.solver is None
        else linear.solver
    )
    x, info = solver(matvec, b, tree.zeros_like(b))
    bound = jnp.maximum(linear.max_residual, min(20 * unit, 0.2)) if half else linear.max_residual
    bad = ~(info.residual <= bound)
    return jax.tree.map(lambda leaf: jnp.where(bad, jnp.asarray(jnp.nan, leaf.dtype), leaf), x)
