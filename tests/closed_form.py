"""What a problem with known answers is: a `ClosedForm`, made by `make` from derivatives in numpy,
worked out by hand.

The references share no code with the jax objectives: a Newton iteration (one step where the lower
level is quadratic) finds `y*`, and the hypergradient is `∇ = f_x − ∇_x(∇_y g · q)` with a dense
solve `H q = f_y`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

ROWS = 16  # of every batch: eight devices divide it


class Spectrum(NamedTuple):
    """Extreme eigenvalues of the inner Hessian: `1 / largest` is a safe step of gradient
    descent."""

    largest: float
    smallest: float


class Quadratic(NamedTuple):
    """`g = ½y'Ay + ½x'Bx + x'Cy + a'y` and `f = ½y'Fy + ½x'Hx + x'Ky + h'x + k'y`, on flattened
    parameters."""

    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    a: np.ndarray
    F: np.ndarray
    H: np.ndarray
    K: np.ndarray
    h: np.ndarray
    k: np.ndarray


class ClosedForm(NamedTuple):
    """A bilevel problem with its exact answers.

    Attributes:
      name: its key in `PROBLEMS`.
      inner, outer: objectives ``(inner_params, outer_params, batch) -> scalar`` in jax, in any
        float dtype.
      inner_params, outer_params: where to start; numpy float64.
      inner_batch, outer_batch: the full data, `ROWS` rows in each leaf, or None.
      solution: ``outer_params -> y*``.
      value: ``outer_params -> f(y*(x), x)``.
      hypergradient: ``outer_params -> d/dx f(y*(x), x)``, shaped as the outer parameters.
      inner_hessian: ``outer_params ->`` dense inner Hessian at `y*` (flattened in the order of
        `jax.tree.leaves`).
      smoothness: extreme eigenvalues of the inner Hessian at the start.
      linear_in_inner: the inner gradient is affine in the inner parameters.
      sampled: both objectives are means over their rows, up to terms without rows: batches of equal
        size average to the full one.
      coefficients: the matrices, for quadratics only.
    """

    name: str
    inner: Callable
    outer: Callable
    inner_params: Any
    outer_params: Any
    inner_batch: Any
    outer_batch: Any
    solution: Callable
    value: Callable
    hypergradient: Callable
    inner_hessian: Callable
    smoothness: Spectrum
    linear_in_inner: bool
    sampled: bool
    coefficients: Quadratic | None = None


class Reference(NamedTuple):
    """Hand-derived derivatives in numpy; `y`, `q` and inner gradients flat, `x` and outer gradients
    as pytrees."""

    gradient: Callable  # ∇_y g(y, x)
    hessian: Callable  # ∇²_yy g(y, x)
    cross: Callable  # ∇_x (∇_y g(y, x) · q)
    value: Callable  # f(y, x)
    value_y: Callable
    value_x: Callable | None = None  # None: the outer objective does not read x


def flatten(tree) -> np.ndarray:
    """One float64 vector, leaves in the order of `jax.tree.leaves`."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def unflatten(like, flat):
    """Undo `flatten`."""
    leaves, treedef = jax.tree.flatten(like)
    cuts = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]
    return treedef.unflatten(
        [
            part.reshape(np.shape(leaf))
            for part, leaf in zip(np.split(flat, cuts), leaves, strict=True)
        ]
    )


def newton(gradient, hessian, y):
    """Newton's method, each step halved until the gradient shrinks, down to rounding."""
    residual = gradient(y)
    for _ in range(100):
        direction, step = np.linalg.solve(hessian(y), residual), 1.0
        while step > 1e-6 and not np.linalg.norm(gradient(y - step * direction)) < np.linalg.norm(
            residual
        ):
            step *= 0.5
        if step <= 1e-6:  # no further decrease: the rounding floor
            break
        y = y - step * direction
        residual = gradient(y)
    if not np.linalg.norm(residual) < 1e-11:
        raise ArithmeticError(
            f"Newton's method stopped at a gradient norm of {np.linalg.norm(residual):.1e}"
        )
    return y


def make(
    name, inner, outer, params, batches, reference, *, linear, sampled, decay=0.0, coefficients=None
) -> ClosedForm:
    """`decay` adds `½ decay ‖x‖²` to the outer value of the reference; the jax objective has it
    already."""
    inner_params, outer_params = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree) for tree in params
    )
    start = flatten(inner_params)

    def prepare(x):
        x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), x)
        return x, newton(
            lambda y: reference.gradient(y, x), lambda y: reference.hessian(y, x), start
        )

    def solution(x):
        return unflatten(inner_params, prepare(x)[1])

    def value(x):
        x, y = prepare(x)
        return float(reference.value(y, x) + decay * (flatten(x) @ flatten(x)) / 2)

    def hypergradient(x):
        x, y = prepare(x)
        q = np.linalg.solve(reference.hessian(y, x), reference.value_y(y, x))
        direct = reference.value_x(y, x) if reference.value_x else jax.tree.map(np.zeros_like, x)
        return jax.tree.map(
            lambda d, c, leaf: d - c + decay * leaf, direct, reference.cross(y, x, q), x
        )

    def inner_hessian(x):
        x, y = prepare(x)
        return reference.hessian(y, x)

    eigenvalues = np.linalg.eigvalsh(reference.hessian(start, outer_params))
    spectrum = Spectrum(float(eigenvalues[-1]), float(eigenvalues[0]))
    answers = (solution, value, hypergradient, inner_hessian)
    return ClosedForm(
        name,
        inner,
        outer,
        inner_params,
        outer_params,
        *batches,
        *answers,
        spectrum,
        linear,
        sampled,
        coefficients,
    )
