"""Linear solvers as the library calls them, and what each says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from bilevax._core.settings import shown
from bilevax._core.types import PyTree


class LinearInfo(NamedTuple):
    """What a linear solver says of its answer: matvecs done, ``‖Ax − b‖/‖b‖`` at the returned
    point, and a `RESULTS` code.
    """

    iterations: Any
    residual: Any
    code: Any


@runtime_checkable
class LinearSolver(Protocol):
    """``(matvec, b, x0) -> (x, LinearInfo)`` on pytrees."""

    def __call__(
        self, matvec: Callable[[PyTree], PyTree], b: PyTree, x0: PyTree
    ) -> tuple[PyTree, LinearInfo]: ...


class Linear(NamedTuple):
    """A linear solver with what else is known of it. A plain function ``(matvec, b, x0) -> (x,
    LinearInfo)`` is one that says nothing.

    Attributes:
      solve: the function; it also takes what stands in `tol` and `preconditioner`, as keywords,
        where that is not None.
      tol: the relative residual at which it stops; ``linear._replace(tol=...)`` stops at another.
        None: it has no tolerance.
      products: the most products with the matrix in one solve. None: not known.
      exact: its answer is exact up to rounding.
      indefinite: it solves symmetric systems that are not definite.
      approximate: its answer is no inverse applied, whatever its settings: a truncation or a
        sketch.
      preconditioner: a function of a vector, or a `linear.Preconditioner`.
      at: ``(Point) -> Linear``, this solver where the objective behind the matrix is known
        (`linear.preconditioner.Point`). None: it reads products alone.
      block: solves for several right sides at once: ``(matvec, B, X0) -> (X, LinearInfo)`` on
        pytrees with a leading axis, also with `tol`; its ``residual`` has an entry a row, and its
        ``iterations`` count products with the matrix. None: it cannot.
      damping: what `solve` adds to the diagonal; ``undamped`` is the solver that adds nothing.
    """

    solve: Callable[..., tuple[PyTree, LinearInfo]]
    tol: Any = None
    products: int | None = None
    exact: bool = False
    indefinite: bool = False
    approximate: bool = False
    preconditioner: Any = None
    at: Callable[[Any], Linear] | None = None
    block: Callable[..., tuple[PyTree, LinearInfo]] | None = None
    damping: Any = None
    undamped: Any = None

    def __call__(
        self, matvec: Callable[[PyTree], PyTree], b: PyTree, x0: PyTree = None
    ) -> tuple[PyTree, LinearInfo]:
        return self.solve(matvec, b, x0, **self._given())

    def _given(self) -> dict[str, Any]:
        given = {"tol": self.tol, "preconditioner": self.preconditioner}
        return {name: value for name, value in given.items() if value is not None}

    def __repr__(self) -> str:
        return shown(self.solve, **self._given())


def as_linear(solver: Callable[..., Any]) -> Linear:
    """A linear solver as a `Linear`."""
    return solver if isinstance(solver, Linear) else Linear(solver)
