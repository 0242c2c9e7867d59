"""Optax transformations whose numbers are leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optax

from bilevax import base
from bilevax._core import numbers
from bilevax.base import PyTree


def tunable(
    factory: Callable[..., optax.GradientTransformation], /, **hyperparams: Any
) -> optax.GradientTransformation:
    """Build ``factory(**hyperparams)`` so that other numbers do not compile again.

    ``optax.sgd(0.1)`` is a closure over its number: a second one is another function, and whatever
    it is part of compiles again. Here the numbers are leaves, and the transformation is rebuilt
    from them inside the compiled program. Floats and arrays are leaves; integers, booleans, strings
    and functions are static. Write ``learning_rate=1.0``, not ``1``, for a number that is to
    change.

    Args:
      factory: a function of keyword arguments that returns a ``GradientTransformation``:
        ``optax.adam``, or your own chain. It must not branch on the values of its floats.
      **hyperparams: its arguments.

    Returns:
      A ``GradientTransformation`` that is a pytree of its numbers. Use it wherever optax's own are
      used.

    Raises:
      TypeError: if `factory` is not callable, or does not return a ``GradientTransformation``; for
        a number as text.
      ValueError: for a float that is not finite.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> from bilevax.inner.tunable import tunable
      >>> from bilevax import base
      >>> base.split(tunable(optax.sgd, learning_rate=0.1))[0] == base.split(
      ...     tunable(optax.sgd, learning_rate=0.3)
      ... )[0]
      True
      >>> opt = tunable(
      ...     lambda lr, clip: optax.chain(optax.clip_by_global_norm(clip), optax.adam(lr)),
      ...     lr=1e-2,
      ...     clip=1.0,
      ... )
      >>> solver = bx.inner.optax(opt, steps=5)
    """
    if not callable(factory):
        raise TypeError(
            f"factory: got {numbers.describe(factory)}; expected a function such as optax.adam, "
            "not what it returns."
        )
    for name, value in hyperparams.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: got {value}; expected a finite number.")
        if isinstance(value, str) and value.replace(".", "").replace("e-", "").isdigit():
            raise TypeError(
                f"{name}: got the text {value!r}; expected a number. Try {name}={value}."
            )
    built = factory(**hyperparams)
    if not isinstance(built, optax.GradientTransformation):
        raise TypeError(
            f"factory: {getattr(factory, '__name__', factory)!r} returned {type(built).__name__}; "
            "expected an optax.GradientTransformation. "
            "Try optax.adam, or a function that returns an optax.chain."
        )
    name = getattr(factory, "__name__", "tunable")
    return optax.GradientTransformationExtraArgs(
        base.Bound(name, _init, factory=factory, hyperparams=hyperparams),
        base.Bound(name, _update, factory=factory, hyperparams=hyperparams),
    )


def _init(params: PyTree, *, factory: Any, hyperparams: Any) -> PyTree:
    return factory(**hyperparams).init(params)


def _update(
    updates: PyTree,
    state: PyTree,
    params: PyTree = None,
    *,
    factory: Any,
    hyperparams: Any,
    **extra: Any,
) -> tuple[PyTree, PyTree]:
    return optax.with_extra_args_support(factory(**hyperparams)).update(
        updates, state, params, **extra
    )
