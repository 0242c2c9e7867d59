"""The Gauss-Newton matrix in place of the Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import PyTree
from bilevax.base import Bound, Linear, LinearInfo, LinearSolver, as_linear
from bilevax.linear.preconditioner import Point, Preconditioner, at


def gauss_newton(
    network: Callable[..., Any],
    loss: Callable[..., Any],
    linear: LinearSolver,
    *,
    regularizer: Callable[..., Any] | None = None,
) -> Linear:
    r"""Solve with the Gauss-Newton matrix of an objective that is a loss of a network's outputs, in
    place of its Hessian.

    .. math::
        A = J^\top \nabla^2 L(z) J + \nabla^2 r + \rho I, \qquad
        z = N(y, \cdot), \; J = \partial_y N

    Positive semidefinite where the loss is convex in the outputs, however far the network is from a
    solution: CG meets no negative curvature. At a perfect fit it is the Hessian. A product costs
    about what one with the Hessian does.

    Args:
      network: takes the objective's arguments and returns the outputs, any pytree.
      loss: takes those outputs in place of the inner parameters, ``loss(outputs, outer, batch)``;
        what it returns is averaged.
      linear: solves the system: ``linear.cg(maxiter=20)``, ``linear.cholesky()``, ...
      regularizer: a term of the objective beside the loss, ``(inner, outer, batch) -> scalar``,
        whose Hessian is taken as it is.

    Returns:
      A `LinearSolver` for `hypergradient.implicit` and `attribution.implicit`, which show it the
      objective. Its residual is that of the system it solves. The products that it is given are not
      used.

    Raises:
      TypeError: for what is no function; where only products are known.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> network = lambda w, rows: rows["x"] @ w
      >>> loss = lambda out, rows: 0.5 * (out - rows["y"]) ** 2
      >>> rows = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.ones(2)}
      >>> found = bx.attribution.implicit(
      ...     lambda w, rows: loss(network(w, rows), rows),
      ...     lambda w, _: jnp.sum(w),
      ...     jnp.zeros(2),
      ...     rows,
      ...     linear=bx.linear.gauss_newton(network, loss, bx.linear.cg()),
      ... )
      >>> found.scores.tolist()  # linear in w: the Hessian itself
      [1.0, 0.5]

    Source: Schraudolph 2002, Fast Curvature Matrix-Vector Products for Second-Order Gradient
    Descent; Martens 2020, New Insights and Perspectives on the Natural Gradient Method.
    """
    for name, fn in (("network", network), ("loss", loss)):
        if not callable(fn):
            raise TypeError(f"{name}: got {numbers.shown(fn)}; expected a function.")
    if not callable(linear):
        raise TypeError(
            f"linear: got {numbers.shown(linear)}; expected a linear solver. Try linear.cg()."
        )
    if not (regularizer is None or callable(regularizer)):
        raise TypeError(
            f"regularizer: got {numbers.shown(regularizer)}; expected a function of the "
            "objective's arguments, or None."
        )
    own = as_linear(linear)
    settings = dict(network=network, loss=loss, solver=own, regularizer=regularizer)
    return Linear(
        Bound("gauss_newton", _blind, **settings),
        own.tol,
        own.products,
        approximate=True,
        preconditioner=own.preconditioner,
        at=Bound("at", _at, **settings),
    )


def _blind(
    matvec: Callable[[PyTree], PyTree],
    b: PyTree,
    x0: PyTree = None,
    *,
    network: Any,
    loss: Any,
    solver: Any,
    regularizer: Any,
    tol: Any = None,
    preconditioner: Any = None,
) -> None:
    raise TypeError(
        "linear.gauss_newton: got products with a matrix and not the objective behind it; expected "
        "to be called by hypergradient.implicit or "
        "attribution.implicit. Try its solver alone here."
    )


def _at(point: Point, *, network: Any, loss: Any, solver: Any, regularizer: Any) -> Linear:
    solver = at(solver, point)
    held = solver.preconditioner
    if isinstance(
        held, Preconditioner
    ):  # of this matrix, and not of the one whose products are given
        own = Bound(
            "refresh",
            _refreshed,
            refresh=held.refresh,
            point=point,
            network=network,
            loss=loss,
            regularizer=regularizer,
        )
        solver = solver._replace(preconditioner=held._replace(refresh=own))
    solve = Bound(
        "gauss_newton",
        _solve,
        point=point,
        network=network,
        loss=loss,
        solver=solver,
        regularizer=regularizer,
    )
    return Linear(
        solve, solver.tol, solver.products, approximate=True, preconditioner=solver.preconditioner
    )


def _refreshed(
    matvec: Callable[[PyTree], PyTree],
    state: Any,
    *,
    refresh: Any,
    point: Any,
    network: Any,
    loss: Any,
    regularizer: Any,
) -> Any:
    return refresh(product(point, network, loss, regularizer), state)


def _solve(
    matvec: Callable[[PyTree], PyTree],
    b: PyTree,
    x0: PyTree = None,
    *,
    point: Any,
    network: Any,
    loss: Any,
    solver: Any,
    regularizer: Any,
    tol: Any = None,
    preconditioner: Any = None,
) -> tuple[PyTree, LinearInfo]:
    solver = solver._replace(tol=tol, preconditioner=preconditioner)
    return solver(product(point, network, loss, regularizer), b, x0)


def product(
    point: Point,
    network: Callable[..., Any],
    loss: Callable[..., Any],
    regularizer: Callable[..., Any] | None = None,
) -> Callable[[PyTree], PyTree]:
    """The product of a vector with the Gauss-Newton matrix at a point."""

    def mean(out):
        values = point.call(loss, out, point.batch)
        return jnp.mean(values)

    out, forward = jax.linearize(
        lambda params: point.call(network, params, point.batch), point.params
    )
    backward = jax.linear_transpose(forward, point.params)
    _, curve = jax.linearize(jax.grad(mean), out)
    extra = None
    if regularizer is not None:
        _, extra = jax.linearize(
            jax.grad(lambda params: point.call(regularizer, params, point.batch)), point.params
        )

    def multiplied(v: PyTree) -> PyTree:
        (found,) = backward(curve(forward(v)))
        found = found if extra is None else tree.add(found, extra(v))
        return found if point.damping is None else tree.axpy(point.damping, v, found)

    return multiplied
