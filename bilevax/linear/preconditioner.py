"""Preconditioners that outlive a solve, for any linear solver that takes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bilevax._core import numbers
from bilevax._core.types import PyTree
from bilevax.base import Bound, Linear


class Point(NamedTuple):
    """What stands behind a matrix: the objective whose Hessian it is, and where it was taken.

    Attributes:
      value: ``(params, batch) -> scalar``, a mean over the leading axis of the batch.
      params: the floating-point parameters, as the right-hand side.
      batch: the batch.
      call: ``(fn, params, batch, **keywords)``, a user's function called with the arguments that
        the objective gets, `params` in place of the inner parameters (whatever they are).
      damping: what was added to the Hessian's diagonal; None for nothing.
    """

    value: Callable[[PyTree, PyTree], Any]
    params: PyTree
    batch: PyTree
    call: Callable[..., Any]
    damping: Any = None


class Preconditioner(NamedTuple):
    """An approximate inverse with a state that outlives a solve: three pure functions and a count.

    Attributes:
      init: ``(b) -> state``, with which `apply` is the identity.
      refresh: ``(matvec, state) -> state``, adapted to the operator.
      apply: ``(state, v) -> v``, symmetric positive definite in v.
      cost: ``(b) -> int``, matvecs of one refresh.
      at: ``(Point) -> Preconditioner``, this one for a matrix of which the objective is known.
        None: it reads products alone.
      kept: its state may go from solve to solve. False: `init` cannot tell what it will look like,
        and each solve makes its own.
    """

    init: Callable[[PyTree], PyTree]
    refresh: Callable[[Callable[[PyTree], PyTree], PyTree], PyTree]
    apply: Callable[[PyTree, PyTree], PyTree]
    cost: Callable[[PyTree], int]
    at: Callable[[Point], Preconditioner] | None = None
    kept: bool = True

    def __repr__(self) -> str:
        return repr(self.apply)


def applied(preconditioner: Preconditioner, state: PyTree) -> Bound:
    """The preconditioner in a given state as one function of a vector."""
    return Bound("applied", _applied, preconditioner=preconditioner, state=state)


def _applied(v: Any, *, preconditioner: Any, state: Any) -> Any:
    return preconditioner.apply(state, v)


def started(
    preconditioner: Any, matvec: Callable[..., Any], b: PyTree
) -> tuple[Callable[[PyTree], PyTree] | None, int]:
    """A solver's preconditioner as a function of a vector, and the matvecs that this took."""
    if not isinstance(preconditioner, Preconditioner):
        return preconditioner, 0
    state = preconditioner.refresh(matvec, preconditioner.init(b))
    return applied(preconditioner, state), preconditioner.cost(b)


def checked(preconditioner: Any) -> Any:
    """What solvers take as preconditioner: a function of a vector, a `Preconditioner`, a linear
    solver that holds one, or None.
    """
    held = preconditioner.preconditioner if isinstance(preconditioner, Linear) else preconditioner
    empty = isinstance(preconditioner, Linear) and held is None
    if empty or not (held is None or callable(held) or isinstance(held, Preconditioner)):
        raise TypeError(
            f"preconditioner: got {numbers.shown(preconditioner)}; expected a function of a "
            "vector, a Preconditioner or None. "
            "Try linear.nystrom_preconditioner(rank=10)."
        )
    return held


def at(solver: Linear, point: Point) -> Linear:
    """`solver` for a matrix of which the objective is known: for those that read more than
    products.
    """
    held = solver.preconditioner
    if isinstance(held, Preconditioner) and held.at is not None:
        solver = solver._replace(preconditioner=held.at(point))
    return solver if solver.at is None else solver.at(point)


def without(solver: Linear) -> Linear:
    """`solver` without a preconditioner that must know the objective: for systems of which only
    products are known.
    """
    held = solver.preconditioner
    return (
        solver._replace(preconditioner=None)
        if isinstance(held, Preconditioner) and held.at is not None and not solver.approximate
        else solver
    )


def precondition(solver: Linear, state: PyTree) -> Linear:
    """`solver` with its `Preconditioner` fixed in a given state, so that the solve does not refresh
    it.

    Args:
      solver: a linear solver made with a `Preconditioner`.
      state: of that preconditioner, from its `init` and `refresh`.

    Returns:
      A linear solver.

    Raises:
      TypeError: if the solver was not made with a `Preconditioner`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import linear
      >>> kept = linear.nystrom_preconditioner(rank=2)
      >>> matvec, b = lambda v: jnp.array([100.0, 1.0, 1.0]) * v, jnp.ones(3)
      >>> state = kept.refresh(matvec, kept.init(b))
      >>> x, info = linear.precondition(linear.cg(preconditioner=kept), state)(matvec, b, None)
      >>> bool(info.residual < 1e-4)
      True
    """
    held = solver.preconditioner if isinstance(solver, Linear) else None
    if not isinstance(held, Preconditioner):
        raise TypeError(
            f"solver: got {numbers.describe(solver)}; expected one with a Preconditioner. Try "
            "linear.cg(preconditioner=linear.nystrom_preconditioner())."
        )
    return solver._replace(preconditioner=applied(held, state))
