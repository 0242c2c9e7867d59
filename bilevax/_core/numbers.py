"""Checks of arguments that are numbers, flags and keys, and the rounding unit: one home for all
factories.

A check is called before anything is compiled, with the value first and the argument's name after
it, and returns what is to be used. What cannot be meant is a TypeError, what lies outside a
ValueError; both read *argument: got value; expected what. Try this.* Booleans are no numbers, NumPy
scalars are. Traced scalars pass: what they hold is not known yet.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def describe(value: Any) -> str:
    """A short description of what was given."""
    if isinstance(value, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        return f"{value.dtype}{list(value.shape)}"
    kind, text = type(value).__name__, repr(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return text if text.startswith(kind) else f"{kind} {text}"


def takes(fn: Any, argument: str, form: str) -> None:
    """A function that can be called as `form` says, ``(inner_params, outer_params, data) ->
    dict``.
    """
    no_type(fn, argument, form)
    names = form[form.index("(") + 1 : form.index(")")].split(",")
    try:
        inspect.signature(fn).bind(*[name for name in names if name.strip()])
    except TypeError as error:
        raise TypeError(
            f"{argument}: got a function of {inspect.signature(fn)}; expected one of {form}."
        ) from error
    except ValueError:  # no signature to read (some builtins): the call itself will tell
        return


def function(fn: Any, argument: str, form: str) -> None:
    """A function that can be called as `form` says."""
    if not callable(fn):
        raise TypeError(f"{argument}: got {describe(fn)}; expected a function {form}.")
    takes(fn, argument, form)


def no_type(fn: Any, argument: str, form: str) -> None:
    """Not ``float`` or the like, which can be called and is never meant; their signatures do not
    tell.
    """
    if isinstance(fn, type) and fn.__module__ == "builtins":
        raise TypeError(f"{argument}: got the type {fn.__name__}; expected a function {form}.")


def shown(value: Any) -> str:
    """What was given; what shows its kind by itself, without the kind."""
    return repr(value) if isinstance(value, (bool, int, float, str)) else describe(value)


def positive(
    value: Any,
    name: str,
    *,
    upper: float = math.inf,
    zero: bool = False,
    infinite: bool = False,
    example: float | None = None,
) -> Any:
    """A positive, finite number as a float; a traced scalar as it is.

    Args:
      value: what was given.
      name: the argument's name, for messages.
      upper: the largest allowed.
      zero: 0 is allowed, too.
      infinite: infinity is allowed, where it means something.
      example: what the message says to try.
    """
    if example is None:
        example = min(0.1, upper)
    kind = (
        f"{'' if infinite else 'finite '}number of at least 0"
        if zero
        else f"positive{'' if infinite else ', finite'} number"
    )
    limit = "" if upper == math.inf else f", at most {upper}"
    expected = (
        f"expected a {kind}{limit}{'; jnp.inf accepts any' if infinite else ''}. Try "
        f"{name}={example}."
    )
    if not _is_number(value):
        raise TypeError(f"{name}: got {shown(value)}; {expected}")
    if isinstance(value, jax.core.Tracer):
        return value
    number = float(value)
    above = number >= 0 if zero else number > 0  # NaN is neither
    if not above or number > upper or (math.isinf(number) and not infinite):
        raise ValueError(f"{name}: got {number}; {expected}")
    return number


def real(value: Any, name: str, example: float) -> float:
    """A finite number of either sign."""
    if not _is_number(value):
        raise TypeError(
            f"{name}: got {shown(value)}; expected a finite number. Try {name}={example}."
        )
    if not math.isfinite(float(value)):
        raise ValueError(
            f"{name}: got {float(value)}; expected a finite number. Try {name}={example}."
        )
    return float(value)


def _is_number(value: Any) -> bool:
    """A real number: of Python, of NumPy, or an array without axes, traced or not. Booleans are
    none.
    """
    if isinstance(value, (jax.Array, np.ndarray)):
        kinds = (jnp.floating, jnp.integer)
        return value.ndim == 0 and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def count(value: Any, name: str, *, least: int = 1, most: int | None = None, why: str = "") -> int:
    """An integer of at least `least` and at most `most`, which `why` explains."""
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"
    expected = f"expected an integer {limits}{why}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: got {shown(value)}; {expected}.")
    number = int(value)
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name}: got {number}; {expected}.")
    return number


def choice(value: Any, name: str, options: Sequence[Any]) -> Any:
    """One of a few words."""
    if not any(
        value is option or (isinstance(value, type(option)) and value == option)
        for option in options
    ):
        *others, last = (repr(option) for option in options)
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(
            f"{name}: got {shown(value)}; expected "
            f"{', '.join(others)}{' or ' if others else ''}{last}."
        )
    return value


def word(value: Any, name: str, example: str) -> str:
    """A text that says something."""
    if not isinstance(value, str) or not value:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name}: got {shown(value)}; expected a name. Try {example!r}.")
    return value


def arrays(value: Any, name: str) -> None:
    """A pytree of arrays and numbers that can be computed with: no texts, no objects, nothing that
    was deleted or donated.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        place = name + jax.tree_util.keystr(path)
        array = isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))
        if not array and not isinstance(leaf, (bool, int, float, complex)):
            raise TypeError(f"{place}: got {describe(leaf)}; expected an array or a number.")
        if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind not in "biufcV":
            raise TypeError(
                f"{place}: got {describe(leaf)}; expected numbers. Try codes for texts, and "
                "seconds for times."
            )
        if isinstance(leaf, np.ndarray) and leaf.dtype.fields is not None:
            raise TypeError(
                f"{place}: got an array with the fields {sorted(leaf.dtype.fields)}; expected "
                "numbers. Try a dict of arrays."
            )
        if (
            isinstance(leaf, jax.Array)
            and not isinstance(leaf, jax.core.Tracer)
            and leaf.is_deleted()
        ):
            raise ValueError(
                f"{place}: got {describe(leaf)}, which was deleted or donated; expected one that "
                "is still there. Try a copy."
            )


def flag(value: Any, name: str) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {shown(value)}; expected True or False.")
    return bool(value)


def key(value: Any, name: str = "key") -> Any:
    """A PRNG key of either style."""
    old_style = (
        isinstance(value, (jax.Array, np.ndarray))
        and value.dtype == np.uint32
        and value.shape[-1:] in ((2,), (4,))
    )  # threefry, rbg
    if not old_style and not (
        isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    ):
        seed = value if isinstance(value, int) and not isinstance(value, bool) else 0
        raise TypeError(
            f"{name}: got {shown(value)}; expected a PRNG key. Try jax.random.key({seed})."
        )
    if value.ndim != (1 if old_style else 0):
        raise ValueError(
            f"{name}: got keys of shape {list(value.shape)}; expected one key. Try {name}[0], or "
            "jax.vmap over them."
        )
    return value


def floating(value: Any, name: str) -> Any:
    """A floating-point dtype, as given."""
    try:
        array = value is None or isinstance(value, (jax.Array, np.ndarray))
        good = not array and jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise TypeError(
            f"{name}: got {describe(value)}; expected a floating-point dtype. Try jnp.float32."
        )
    return value


def rounding_unit(values: Any) -> float:
    """The coarsest rounding unit among the leaves of a pytree (arrays, shapes or dtypes); 0 where
    there is none.
    """
    dtypes = (leaf.dtype if hasattr(leaf, "dtype") else leaf for leaf in jax.tree.leaves(values))
    return max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)
