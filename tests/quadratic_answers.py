"""What approximate methods must return on the quadratics: unrolling, truncation, Neumann series,
one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.closed_form import ClosedForm, Quadratic, flatten, unflatten


class Unrolled(NamedTuple):
    """Gradient descent on a quadratic after T steps.

    Attributes:
      inner_params: `y_T`.
      jacobian: `dy_T/dx` as the method sees it, flat, (inner, outer).
      hypergradient: `f_x + jacobian' f_y` at `y_T`.
      init_cotangent: `f_y` pulled back to the initial point, or, truncated, to where the last steps
        begin.
    """

    inner_params: Any
    jacobian: np.ndarray
    hypergradient: Any
    init_cotangent: Any


def unrolled_quadratic(
    form: ClosedForm,
    step: float,
    T: int,
    last: int | None = None,
    inner_params=None,
    outer_params=None,
) -> Unrolled:
    """`y_T = P^T y0 + (I − P^T) y*` and `J = (I − P^k)(−A⁻¹C')` with `P = I − αA`; `k = T`, or
    `last` if only the last steps are seen."""
    (A, _, C, a, *_), k = _coefficients(form), T if last is None else last
    y0 = flatten(form.inner_params if inner_params is None else inner_params)
    x = flatten(form.outer_params if outer_params is None else outer_params)
    one = np.eye(len(A))
    power, power_last = (np.linalg.matrix_power(one - step * A, n) for n in (T, k))
    y = power @ y0 - (one - power) @ np.linalg.solve(A, a + C.T @ x)
    jacobian = -(one - power_last) @ np.linalg.solve(A, C.T)
    f_y, f_x = outer_gradients(form, y, x)
    grad = unflatten(form.outer_params, f_x + jacobian.T @ f_y)
    return Unrolled(
        unflatten(form.inner_params, y),
        jacobian,
        grad,
        unflatten(form.inner_params, power_last @ f_y),
    )


def neumann_quadratic(
    form: ClosedForm, step: float, terms: int, inner_params=None, outer_params=None
):
    """Hypergradient with the adjoint `q = α Σ_{i<K} P^i w = (I − P^K) A⁻¹ w`, at `inner_params`
    (default: `y*`)."""
    A = _coefficients(form).A
    kept = np.eye(len(A)) - np.linalg.matrix_power(np.eye(len(A)) - step * A, terms)
    return adjoint_quadratic(
        form, lambda w: kept @ np.linalg.solve(A, w), inner_params, outer_params
    )


def one_step_quadratic(form: ClosedForm, scale: float = 1.0, inner_params=None, outer_params=None):
    """Hypergradient with the adjoint `q = scale · w`: one-step and T1-T2; finite differences too,
    being exact on a quadratic."""
    return adjoint_quadratic(form, lambda w: scale * w, inner_params, outer_params)


def adjoint_quadratic(form: ClosedForm, solve: Callable, inner_params=None, outer_params=None):
    """Hypergradient `f_x − C solve(f_y)` for any map `solve` of flat adjoint right-hand sides, at
    `inner_params` (default: `y*`)."""
    outer_params = form.outer_params if outer_params is None else outer_params
    y, x = (
        flatten(form.solution(outer_params) if inner_params is None else inner_params),
        flatten(outer_params),
    )
    f_y, f_x = outer_gradients(form, y, x)
    return unflatten(form.outer_params, f_x - _coefficients(form).C @ solve(f_y))


def outer_gradients(form: ClosedForm, y, x) -> tuple[np.ndarray, np.ndarray]:
    """`(f_y, f_x)` of a quadratic at flat `y` and `x`."""
    *_, F, H, K, h, k = _coefficients(form)
    return F @ y + K.T @ x + k, H @ x + K @ y + h


def _coefficients(form: ClosedForm) -> Quadratic:
    if form.coefficients is None:
        raise ValueError(
            f"form: got {form.name!r}, which is no quadratic; expected one of problems.QUADRATICS."
        )
    return form.coefficients
