"""The precision of matrix products that a tolerance asks for.

An accelerator multiplies float32 matrices in a shorter format where nobody says otherwise: about
3e-4 of relative error on recent GPUs, 4e-3 on TPUs. That is right for training steps, and a solve
that is asked for 1e-6 never gets there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

F = TypeVar("F", bound=Callable[..., Any])

LOOSE = 1e-3  # tolerances from here on are met by products in a shorter format


def needed(tol: Any) -> str | None:
    """The `jax.default_matmul_precision` that a solve to `tol` needs, or None for the user's own. A
    traced tolerance counts as tight.
    """
    return "highest" if isinstance(tol, jax.core.Tracer) or tol < LOOSE else None


def asked_by(linear: Any) -> str | None:
    """What the products need that a linear solver is given, and its right side.

    A solver with a tolerance, or an exact one, asks for all of float32. A truncation promises
    nothing.
    """
    if linear.exact:
        return "highest"
    return None if linear.tol is None else needed(linear.tol)


def under(precision: str | None, fn: F) -> F:
    """`fn`, traced with that precision. A precision that the user has set, for all of JAX or around
    the call, stands.
    """
    if precision is None:
        return fn

    config: Any = jax.config  # its flags are attributes that no type checker knows

    @functools.wraps(fn)
    def traced(*args: Any, **kwargs: Any) -> Any:
        if config.jax_default_matmul_precision is not None:
            return fn(*args, **kwargs)
        with jax.default_matmul_precision(precision):
            return fn(*args, **kwargs)

    return cast(F, traced)
