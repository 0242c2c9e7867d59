"""Ridge regression whose features have units of their own, a penalty each, in float32."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Units(NamedTuple):
    inner: Any
    outer: Any
    start: tuple[Any, Any]
    train: Any
    held_out: Any
    hypergradient: Any  # of penalties, by a dense solve in float64


def ridge_in_units(span: int) -> Units:
    """24 features in units from ``10^-span`` to ``10^span``, the penalties in theirs: the inner
    Hessian's condition is above ``10^(4 span)``."""
    rng, units = np.random.default_rng(0), np.logspace(-span, span, 24)
    x = rng.standard_normal((120, 24)) * units
    y = (x / units)[:, ::3].sum(1) + 0.5 * rng.standard_normal(120)
    train, held_out = (
        tuple(jnp.asarray(a[half], jnp.float32) for a in (x, y))
        for half in (slice(60), slice(60, 120))
    )

    def fit(w, penalty, batch):
        return jnp.mean((batch[0] @ w - batch[1]) ** 2)

    def ridge(w, penalty, batch):
        return fit(w, penalty, batch) + jnp.sum(jnp.exp(penalty) * w**2)

    def hypergradient(penalty):
        penalty = np.asarray(penalty, np.float64)
        (a, b), (c, d) = (
            tuple(np.asarray(part, np.float64) for part in half) for half in (train, held_out)
        )
        matrix = a.T @ a / 60 + np.diag(np.exp(penalty))
        w = np.linalg.solve(matrix, a.T @ b / 60)
        q = np.linalg.solve(matrix, c.T @ (c @ w - d) / 60)
        return -2 * np.exp(penalty) * w * q

    start = jnp.zeros(24, jnp.float32), jnp.asarray(2 * np.log(units) - 3, jnp.float32)
    return Units(ridge, fit, start, train, held_out, hypergradient)
