"""Equations and fixed points as functions that can be differentiated any number of times."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import base, tree
from bilevax._core import numbers
from bilevax._core.transfers import by_intent
from bilevax._equations import Reached, anderson, newton
from bilevax._traced import Outer, Traceable, constant, is_zero, outputs, together
from bilevax.base import Bound, LinearSolver, PyTree, Static
from bilevax.linear.dense import lu
from bilevax.linear.gmres import gmres
from bilevax.results import failed

_FEW = 64  # unknowns up to which the default linear solver factorises the matrix


class RootInfo(NamedTuple):
    """How one solve ended.

    Attributes:
      residual: ``‖F(y)‖``, or ``‖T(y) − y‖``, where it ended.
      iterations: Newton steps, or applications of the mapping.
      code: a `RESULTS` code: ``success``, ``inner_not_converged`` or ``inner_nonfinite``.
    """

    residual: Any
    iterations: Any
    code: Any


def root(
    equation: Callable[..., Any],
    *,
    maxiter: int = 50,
    tol: float | None = None,
    linear_solver: LinearSolver | None = None,
    max_residual: float = 1e-2,
    strict: bool = True,
) -> Root:
    r"""Turn a system of equations into its solution as a function of everything that the equations
    read.

    .. math::
        F(y, \theta) = 0, \qquad \partial y = -(\partial_y F)^{-1} \,
        \partial_\theta F \; \partial\theta

    The result is an ordinary JAX function: ``grad``, ``jvp``, ``hessian``, ``vmap`` and ``jit``
    apply to any order, and it may stand inside another equation, an objective, or a layer of a
    network. Solved by Newton's method with a search along its direction, which runs
    undifferentiated. Arrays that the equations close over are differentiated like arguments. The
    derivative with respect to `inner_init` is zero; which of several solutions is found depends on
    it.

    Args:
      equation: pure function ``(inner, *args) -> residual``, a pytree of the structure and shapes
        of `inner`.
      maxiter: the most Newton steps.
      tol: relative error of the solution, estimated from the last two steps. Default: 10 rounding
        units.
      linear_solver: solves the systems of Newton's method and of the derivative, which are not
        symmetric; default ``linear.lu()`` for at most 64 unknowns, above ``linear.gmres`` close to
        the precision of the unknowns.
      max_residual: relative residual of a linear solve above which a derivative is NaN instead of
        wrong. ``jnp.inf`` accepts anything.
      strict: an unsolved point is NaN; with False it is returned as it was reached.

    Returns:
      ``fn(inner_init, *args) -> y``, a pytree like `inner_init`; ``fn.with_info(inner_init, *args)
      -> (y, RootInfo)`` returns the point as reached and how the solve ended. Under ``jit`` build
      it once; a new function is a new trace.

    Raises:
      TypeError: for equations that are no function, complex or non-array leaves.
      ValueError: for a residual of another structure or shape than the unknowns, and numbers
        outside their range.

    Examples:
      >>> import jax, jax.numpy as jnp, bilevax as bx
      >>> sqrt = bx.root(lambda y, a: y**2 - a)
      >>> y, dy = jax.value_and_grad(lambda a: sqrt(1.0, a))(2.0)
      >>> round(float(y), 4), round(float(dy), 4)  # and 1 / (2 y)
      (1.4142, 0.3536)

    Source: Blondel et al., "Efficient and modular implicit differentiation" (NeurIPS 2022), section
    2; Deuflhard, "Newton methods for nonlinear problems" (2004), for the rule that ends it.
    """
    settings = _settings(equation, "equation", tol, linear_solver, max_residual, strict)
    maxiter = numbers.count(maxiter, "maxiter")
    traceable, linear, tol, strict = settings
    return Root(
        "root", traceable, Bound("newton", _newton, maxiter=maxiter), _residual, linear, tol, strict
    )


def fixed_point(
    mapping: Callable[..., Any],
    *,
    maxiter: int = 1000,
    tol: float | None = None,
    memory: int = 5,
    linear_solver: LinearSolver | None = None,
    max_residual: float = 1e-2,
    strict: bool = True,
) -> Root:
    r"""Turn a mapping into its fixed point as a function of everything that the mapping reads: an
    equilibrium layer, for one.

    .. math::
        y = T(y, \theta), \qquad \partial y = (I - \partial_y T)^{-1} \,
        \partial_\theta T \; \partial\theta

    As `root`, with iteration in place of Newton's method: no linear system is solved on the way to
    the solution, and one for each derivative. For a mapping that is a contraction near its fixed
    point; accelerated, others often converge, too.

    Args:
      mapping: pure function ``(inner, *args) -> inner``.
      maxiter: the most applications of the mapping.
      tol: end at ``‖T(y) − y‖ ≤ tol ‖y‖``; with a contraction by q the error is at most ``q / (1 −
        q)`` times that. Default: 100 rounding units.
      memory: steps that Anderson's acceleration looks back on; 0 for plain iteration.
      linear_solver: as for `root`; ``linear.neumann(terms, step=1.0)`` is the classical iteration.
      max_residual: as for `root`.
      strict: as for `root`.

    Returns:
      As `root`.

    Raises:
      TypeError, ValueError: as `root`.

    Examples:
      >>> import jax, jax.numpy as jnp, bilevax as bx
      >>> layer = bx.fixed_point(lambda z, w, x: jnp.tanh(w * z + x))
      >>> z, dz = jax.value_and_grad(lambda w: layer(0.0, w, 0.5))(0.5)
      >>> round(float(z), 4), bool(abs(dz - z * (1 - z**2) / (1 - 0.5 * (1 - z**2))) < 1e-5)
      (0.6879, True)

    Source: Bai, Kolter and Koltun, "Deep equilibrium models" (NeurIPS 2019); Walker and Ni,
    "Anderson acceleration for fixed-point iterations" (SIAM J. Numer. Anal. 2011).
    """
    settings = _settings(mapping, "mapping", tol, linear_solver, max_residual, strict)
    maxiter, memory = numbers.count(maxiter, "maxiter"), numbers.count(memory, "memory", least=0)
    traceable, linear, tol, strict = settings
    return Root(
        "fixed_point",
        traceable,
        Bound("anderson", _anderson, maxiter=maxiter, memory=memory),
        _left,
        linear,
        tol,
        strict,
    )


def _settings(
    fn: Callable[..., Any], name: str, tol: Any, linear_solver: Any, max_residual: Any, strict: Any
) -> tuple[Any, ...]:
    if not callable(fn):
        raise TypeError(
            f"{name}: got {numbers.shown(fn)}; expected a function (inner, *args) -> a pytree like "
            "inner."
        )
    if not (linear_solver is None or callable(linear_solver)):
        raise TypeError(
            f"linear_solver: got {numbers.shown(linear_solver)}; expected (matvec, b, x0) -> (x, "
            "info). Try linear.gmres()."
        )
    tol = None if tol is None else numbers.positive(tol, "tol", example=1e-6)
    linear = _Linear(linear_solver, numbers.positive(max_residual, "max_residual", infinite=True))
    return _Equations(fn, linear_solver, name), linear, tol, numbers.flag(strict, "strict")


class _Equations(Traceable):
    def __init__(self, fn: Callable[..., Any], linear_solver: Any, argument: str):
        super().__init__(fn, linear_solver)
        self._argument = argument

    def trace(self, inner: PyTree, args: tuple[Any, ...]) -> tuple[Bound, PyTree, Outer]:
        closed, params, outer, shapes = self.traced(inner, args)
        like = jax.eval_shape(lambda: tree.strong(inner))
        same = jax.tree.structure(shapes) == jax.tree.structure(like)
        if not same or [a.shape for a in jax.tree.leaves(shapes)] != [
            a.shape for a in jax.tree.leaves(like)
        ]:
            got, expected = (
                jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", t) for t in (shapes, like)
            )
            raise ValueError(
                f"{self._argument}: {self.name} returned {got}; expected {expected}, what "
                "inner_init is. Try one equation an unknown."
            )
        if not jax.tree.leaves(params):
            raise ValueError(
                f"inner_init: got {inner!r}, which has no floating-point leaf; expected something "
                "to solve for."
            )
        return Bound(self.name, _floats, jaxpr=closed.jaxpr), params, outer


def _floats(inner: PyTree, outer: Outer, *, jaxpr: Any) -> PyTree:
    """The outputs in the places of float leaves, in their dtypes."""
    whole = tree.combine(inner, outer.fixed)
    found = jax.tree.unflatten(jax.tree.structure(whole), outputs(jaxpr, inner, outer))
    return jax.tree.map(lambda mine, new: new.astype(mine.dtype), inner, _at_floats(inner, found))


def _at_floats(inner: PyTree, whole: PyTree) -> PyTree:
    return jax.tree.map(
        lambda mine, new: None if mine is None else new,
        inner,
        whole,
        is_leaf=lambda leaf: leaf is None,
    )


class Root:
    """What `root` and `fixed_point` return: call it for the solution, or `with_info` for the
    solution and how the solve ended.
    """

    def __init__(
        self,
        kind: str,
        traceable: _Equations,
        solver: Bound,
        residual: Callable[..., Any],
        linear: _Linear,
        tol: Any,
        strict: bool,
    ):
        self._kind, self._traceable, self._solver, self._residual = (
            kind,
            traceable,
            solver,
            residual,
        )
        self._linear, self._tol, self._strict = linear, tol, strict

    def __repr__(self) -> str:
        return f"{self._kind}({self._traceable.name})"

    @by_intent
    def __call__(self, inner_init: PyTree, *args: PyTree) -> PyTree:
        y, info, fixed = self._solve(inner_init, args)
        return tree.combine(tree.nan_where(failed(info.code) & self._strict, y), fixed)

    @by_intent
    def with_info(self, inner_init: PyTree, *args: PyTree) -> tuple[PyTree, RootInfo]:
        """The point as reached, and how the solve ended; nothing is replaced by NaN."""
        y, info, fixed = self._solve(inner_init, args)
        return tree.combine(y, fixed), info

    def _solve(self, inner_init: PyTree, args: tuple[Any, ...]) -> tuple[PyTree, RootInfo, PyTree]:
        fn, inner, outer = self._traceable.trace(inner_init, args)
        static, dynamic = base.split((fn, self._solver, self._linear, self._tol))
        y, info = _solved(static, self._residual, dynamic, inner, outer)
        return y, info, outer.fixed


def _residual(fn: Callable[..., Any], inner: PyTree, outer: Outer) -> PyTree:
    return fn(inner, outer)


def _left(fn: Callable[..., Any], inner: PyTree, outer: Outer) -> PyTree:
    return tree.sub(inner, fn(inner, outer))


def _newton(
    fn: Callable[..., Any], start: Any, outer: PyTree, linear: _Linear, tol: Any, *, maxiter: int
) -> Reached:
    tol = 10 * numbers.rounding_unit(start) if tol is None else tol

    def solve(products, right):
        direction, info = _default(linear, right)(products, right, tree.zeros_like(right))
        return direction, info.residual

    return newton(lambda y: fn(y, outer), start, solve, maxiter=maxiter, tol=tol)


def _anderson(
    fn: Callable[..., Any],
    start: Any,
    outer: PyTree,
    linear: _Linear,
    tol: Any,
    *,
    maxiter: int,
    memory: Any,
) -> Reached:
    unit = numbers.rounding_unit(start)
    tol = (2 if unit > 1e-4 else 100) * unit if tol is None else tol
    return anderson(lambda y: fn(y, outer), start, memory=memory, maxiter=maxiter, tol=tol)


@partial(jax.jit, static_argnums=(0, 1))
def _solved(
    static: Static,
    residual: Callable[..., Any],
    dynamic: tuple[Any, ...],
    inner: PyTree,
    outer: Outer,
) -> tuple[PyTree, RootInfo]:
    fn, solver, linear, tol = base.join(static, dynamic)
    start, given, tol = jax.tree.map(constant, (inner, outer, tol))
    reached = lax.stop_gradient(solver(fn, start, given, linear, tol))
    static, dynamic = base.split((fn, linear))
    y = _solution(static, residual, dynamic, reached.point, outer)
    return y, RootInfo(reached.residual, reached.iterations, reached.code)


# ---- the one rule


class _Linear(NamedTuple):
    solver: Any
    max_residual: Any


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _solution(
    static: Static,
    residual: Callable[..., Any],
    dynamic: tuple[Any, ...],
    inner: PyTree,
    outer: Outer,
) -> PyTree:
    return inner


def _solution_jvp(static: Static, residual: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    dynamic, inner, outer = primals
    inner = _solution(
        static, residual, dynamic, inner, outer
    )  # through the rule again: derivatives of the derivative move the point, too
    fn, linear = base.join(static, dynamic)
    operands, treedef = jax.tree.flatten(outer)
    moves = jax.tree.leaves(tangents[2], is_leaf=is_zero)
    moving = [i for i, t in enumerate(moves) if not is_zero(t)]
    if not moving:
        return inner, tree.zeros_like(inner)

    def equations(inner, moved):
        full = list(operands)
        for i, leaf in zip(moving, moved, strict=True):
            full[i] = leaf
        return residual(fn, inner, treedef.unflatten(full))

    moved, direction = [operands[i] for i in moving], [moves[i] for i in moving]
    still, held = tree.zeros_like(inner), tree.zeros_like(moved)
    _, products = jax.linearize(equations, inner, moved)
    right = tree.neg(products(still, direction))
    # Linear already: linearized again, what the matrix does not need of it is dead code.
    _, by_inner = jax.linearize(lambda v: products(v, held), still)
    solve = partial(_linear_solve, linear)
    return inner, together(
        lax.custom_linear_solve(
            lambda v: together(by_inner(v)), together(right), solve, transpose_solve=solve
        )
    )


_solution.defjvp(_solution_jvp, symbolic_zeros=True)


def _default(linear: _Linear, b: PyTree) -> Any:
    if linear.solver is not None:
        return linear.solver
    unit = numbers.rounding_unit(b)
    return (
        lu()
        if tree.size(b) <= _FEW
        else gmres(maxiter=1000, tol=unit / 2 if unit > 1e-4 else 100 * unit, restart=50)
    )


def _linear_solve(linear: _Linear, matvec: Callable[[PyTree], PyTree], b: PyTree) -> Any:
    unit = numbers.rounding_unit(b)
    x, info = _default(linear, b)(matvec, b, tree.zeros_like(b))
    bound = (
        jnp.maximum(linear.max_residual, min(20 * unit, 0.2))
        if unit > 1e-4
        else linear.max_residual
    )
    return tree.nan_where(~(info.residual <= bound), x)
