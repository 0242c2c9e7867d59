"""Three scalar levels whose answers are derived by hand: nested (each level reacts to the one
above) and a chain (it does not)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from tests.closed_form import newton


class MultilevelForm(NamedTuple):
    """Scalar levels, lowest first, with hand-derived answers.

    Attributes:
      name: its key in `MULTILEVEL`.
      objectives: ``(params, batch) -> scalar`` by level name, lowest first; `params` is a dict by
        level name and `batch` None.
      params: where to start.
      solution: ``top -> params`` with every lower level solved.
      value: ``top ->`` value of the top objective there.
      gradient: ``top ->`` its total derivative.
    """

    name: str
    objectives: dict[str, Callable]
    params: dict[str, np.ndarray]
    solution: Callable
    value: Callable
    gradient: Callable


_B, _C, _E, _T = 1.5, 0.7, 0.1, 2.0


def _nested_z(params, batch):
    return (params["z"] - params["y"]) ** 2 / 2 + _C * params["z"] ** 2 / 2


def _nested_y(params, batch):
    return (params["y"] - params["x"]) ** 2 / 2 + _B * params["z"] ** 2 / 2


def _top(params, batch):
    return (params["z"] - _T) ** 2 / 2 + _E * params["x"] ** 2 / 2


def _cosh_z(params, batch):
    return (params["z"] - params["y"]) ** 2 / 2 + jnp.cosh(params["z"])


def _chain_z(params, batch):
    return (params["z"] - params["x"]) ** 2 / 2 + _C * params["z"] ** 2 / 2


def _chain_y(params, batch):
    return (params["y"] - params["z"]) ** 2 / 2 + _B * (params["y"] - params["x"]) ** 2 / 2


def _chain_top(params, batch):
    return (params["y"] - _T) ** 2 / 2 + params["z"] ** 2 / 2 + _E * params["x"] ** 2 / 2


def _scalars(**params):
    return {name: np.asarray(value, np.float64) for name, value in params.items()}


def _nested_scalar() -> MultilevelForm:
    """`z = y/(1+c)`, `y = x/(1+b/(1+c)²)`: z reacts to y, so y's own problem goes through z."""
    rate_y = 1 / (1 + _B / (1 + _C) ** 2)
    rate_z = rate_y / (1 + _C)
    return MultilevelForm(
        "nested_scalar",
        {"z": _nested_z, "y": _nested_y, "x": _top},
        _scalars(z=0.1, y=-0.2, x=0.8),
        solution=lambda x: _scalars(z=rate_z * x, y=rate_y * x, x=x),
        value=lambda x: float((rate_z * x - _T) ** 2 / 2 + _E * x**2 / 2),
        gradient=lambda x: float((rate_z * x - _T) * rate_z + _E * x),
    )


def _nested_cosh() -> MultilevelForm:
    """`z + sinh z = y` and `y − x + b z z' = 0`, with `z' = 1/(1 + cosh z)` and
    `z'' = −sinh(z) z'³`: third derivatives count."""

    def best_z(y):
        return newton(lambda z: z + np.sinh(z) - y, lambda z: np.diag(1 + np.cosh(z)), np.zeros(1))

    def rates(z):
        first = 1 / (1 + np.cosh(z))
        return first, -np.sinh(z) * first**3

    def curvature(z):  # d²/dy² of y's total objective
        first, second = rates(z)
        return 1 + _B * (first**2 + z * second)

    def solve(x):
        y = newton(
            lambda y: y - x + _B * best_z(y) * rates(best_z(y))[0],
            lambda y: np.diag(curvature(best_z(y))),
            np.zeros(1),
        )
        return best_z(y), y

    def solution(x):
        z, y = solve(x)
        return _scalars(z=z[0], y=y[0], x=x)

    def gradient(x):
        z = solve(x)[0]
        return float(((z - _T) * rates(z)[0] / curvature(z))[0] + _E * x)

    return MultilevelForm(
        "nested_cosh",
        {"z": _cosh_z, "y": _nested_y, "x": _top},
        _scalars(z=0.1, y=-0.2, x=1.7),
        solution,
        lambda x: float((solve(x)[0][0] - _T) ** 2 / 2 + _E * x**2 / 2),
        gradient,
    )


def _chain_scalar() -> MultilevelForm:
    """`z = x/(1+c)`, `y = (z + bx)/(1+b)`: z does not react to y, and is a constant of y's
    problem."""
    rate_z = 1 / (1 + _C)
    rate_y = (rate_z + _B) / (1 + _B)
    return MultilevelForm(
        "chain_scalar",
        {"z": _chain_z, "y": _chain_y, "x": _chain_top},
        _scalars(z=0.1, y=-0.2, x=0.8),
        solution=lambda x: _scalars(z=rate_z * x, y=rate_y * x, x=x),
        value=lambda x: float((rate_y * x - _T) ** 2 / 2 + (rate_z * x) ** 2 / 2 + _E * x**2 / 2),
        gradient=lambda x: float((rate_y * x - _T) * rate_y + rate_z**2 * x + _E * x),
    )


MULTILEVEL = {form.name: form for form in (_nested_scalar(), _nested_cosh(), _chain_scalar())}
