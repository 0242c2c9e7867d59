"""Transfers between host and device that the library makes by intent: its own numbers, and the data
that it is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def by_intent(fn: Callable[P, R]) -> Callable[P, R]:
    """`fn`, not disturbed by a ``jax.transfer_guard`` that looks for transfers that nobody
    meant.
    """

    @functools.wraps(fn)
    def allowed(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.transfer_guard("allow"):
            return fn(*args, **kwargs)

    return allowed
