"""Preconditioners that outlive a solve, for any linear solver that takes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bilevax._core.types import PyTree
from bilevax.base import Bound, Linear


class Preconditioner(NamedTuple):
    """An approximate inverse with a state that outlives a solve: three pure functions and a count.

    Attributes:
      init: ``(b) -> state``, with which `apply` is the identity.
      refresh: ``(matvec, state) -> state``, adapted to the operator.
      apply: ``(state, v) -> v``, symmetric positive definite in v.
      cost: ``(b) -> int``, matvecs of one refresh.
    """

    init: Callable[[PyTree], PyTree]
    refresh: Callable[[Callable[[PyTree], PyTree], PyTree], PyTree]
    apply: Callable[[PyTree, PyTree], PyTree]
    cost: Callable[[PyTree], int]

    def __repr__(self) -> str:
        return repr(self.apply)


def applied(preconditioner: Preconditioner, state: PyTree) -> Bound:
    """The preconditioner in a given state as one function of a vector."""
    return Bound("applied", _applied, preconditioner=preconditioner, state=state)


def _applied(v: Any, *, preconditioner: Any, state: Any) -> Any:
    return preconditioner.apply(state, v)


def precondition(solver: Linear, state: PyTree) -> Linear:
    """`solver` with its `Preconditioner` fixed in a given state, so that the solve does not refresh it.

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
        raise TypeError(f"solver: got {solver!r}; expected one with a Preconditioner. Try linear.cg(preconditioner=linear.nystrom_preconditioner()).")
    return solver._replace(preconditioner=applied(held, state))
