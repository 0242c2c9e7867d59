"""The precision of matrix products that a tolerance asks for.

An accelerator multiplies float32 matrices in a shorter format where nobody says otherwise: about 3e-4 of relative error on
recent GPUs, 4e-3 on TPUs. That is right for training steps, and a linear solve that is asked for 1e-6 never gets there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from bilevax.base import Linear

LOOSE = 1e-3  # tolerances from here on are met by products in a shorter format


def asked_by(linear: Linear) -> str | None:
    """The `jax.default_matmul_precision` of the products that a linear solver is given, or None for the user's own.

    A solver with a tolerance, or an exact one, asks for all of float32. A truncation promises nothing.
    """
    if linear.exact:
        return "highest"
    if linear.tol is None:
        return None
    return "highest" if isinstance(linear.tol, jax.core.Tracer) or linear.tol < LOOSE else None


def under(precision: str | None, fn: Callable) -> Callable:
    """`fn`, traced with that precision. A precision that the user has set, for all of JAX or around the call, stands."""
    if precision is None:
        return fn

    @functools.wraps(fn)
    def traced(*args):
        if jax.config.jax_default_matmul_precision is not None:
            return fn(*args)
        with jax.default_matmul_precision(precision):
            return fn(*args)

    return traced
