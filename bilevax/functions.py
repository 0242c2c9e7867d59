"""Users' functions: whether they are ones, what they return on shapes, and how they were called
where they raise.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bilevax._core import numbers
from bilevax._core.numbers import describe
from bilevax.base import Bound, Ctx, Objective, PyTree


@contextlib.contextmanager
def told(name: str, form: str, more: str = ".", **given: PyTree) -> Iterator[None]:
    """What a user's function raises, with how it was called."""
    try:
        yield
    except Exception as error:
        values = ", ".join(f"{key}={shapes(value)}" for key, value in given.items())
        error.add_note(
            f"{name}: raised this when called as {form}{f' with {values}' if values else ''}{more}"
        )
        raise


def shape(
    fn: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> Any:
    """What `fn` returns, as shapes. JAX remembers the trace by the user's own function, so that a
    second call of the driver costs none; only what JAX refuses is traced again, for its words.
    """
    try:
        return jax.eval_shape(fn, *args, **(kwargs or {}))
    except TypeError:
        pass
    return jax.eval_shape(Bound("returned", _called, fn=fn, name=name), *args, **(kwargs or {}))


def _called(*args: Any, fn: Callable[..., Any], name: str, **kwargs: Any) -> Any:
    out = fn(*args, **kwargs)
    for path, leaf in jax.tree_util.tree_leaves_with_path(out):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            where = f" at {jax.tree_util.keystr(path)}" if path else ""
            raise TypeError(
                f"{name}: returned {describe(leaf)}{where}; expected arrays and numbers."
            )
    return out


def evaluate(
    obj: Objective, argument: str, inner: PyTree, outer: PyTree, ctx: Ctx
) -> tuple[jnp.dtype, PyTree]:
    """One objective on these shapes: the dtype of its value, and its new model state."""
    name = f"{argument} ({obj.name})"
    if obj.stateful and ctx.model is None:
        raise ValueError(
            f"model_state: got None although {name} is stateful; expected its initial model state."
        )
    args, kwargs = obj.arguments(inner, outer, ctx)
    named = "".join(f", {name}" for name in kwargs)
    form = (
        "(inner_params, outer_params, "
        f"batch{', model_state' if obj.stateful else ''}{', *' + named if named else ''})"
    )
    numbers.no_type(obj.fn, name, form)
    try:
        inspect.signature(obj.fn).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{name}: got a function of {inspect.signature(obj.fn)}; expected one of {form}. Say "
            "by objective(fn, stateful=, keyed=) what it takes."
        ) from error
    except ValueError:  # no signature to read (some builtins): the call itself will tell
        pass
    missing = " No data was given for this level." if ctx.batch is None else ""
    more = f"; expected a function that takes these.{missing}{_by_example(outer, ctx.batch)}"
    with told(name, form, more, inner_params=inner, outer_params=outer, batch=ctx.batch):
        out = shape(obj.fn, name, args, kwargs)
    if obj.has_aux or obj.stateful:
        extra = (
            "(model_state, aux)"
            if obj.has_aux and obj.stateful
            else "aux"
            if obj.has_aux
            else "model_state"
        )
        want = f"(value, {extra})"
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                f"{name}: returned {shapes(out)}; expected {want}, since it was wrapped with "
                f"{_flags(obj)}."
            )
        value, rest = out
        if (
            obj.has_aux
            and obj.stateful
            and not (isinstance(rest, (tuple, list)) and len(rest) == 2)
        ):
            raise TypeError(f"{name}: returned (value, {shapes(rest)}); expected {want}.")
    else:
        value, rest = out, None
        if isinstance(out, (tuple, list, dict)):
            raise TypeError(
                f"{name}: returned {shapes(out)}; expected a scalar. Wrap it: "
                f"objective({obj.name}, has_aux=True) if the rest is auxiliary."
            )
    if not hasattr(value, "shape"):
        several = isinstance(value, (tuple, list, dict)) and not obj.has_aux
        wrap = " Wrap it: objective(fn, has_aux=True) if the rest is auxiliary." if several else ""
        raise TypeError(f"{name}: returned {shapes(value)}; expected a scalar array.{wrap}")
    if value.shape != ():
        raise ValueError(
            f"{name}: returned {describe(value)}; expected a scalar (shape ()). Try jnp.mean or "
            "jnp.sum over the batch."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{name}: returned {value.dtype}; expected a real floating-point scalar, since it is "
            "differentiated."
        )
    return value.dtype, (rest[0] if obj.has_aux else rest) if obj.stateful else None


def _by_example(outer: PyTree, batch: PyTree) -> str:
    """What to try where outer parameters may have an entry an example, and the batch has fewer."""
    rows = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if jnp.ndim(leaf)}
    longer = any(
        jnp.ndim(leaf) == 1 and jnp.shape(leaf)[0] > max(rows, default=0)
        for leaf in jax.tree.leaves(outer)
    )
    if not (longer and len(rows) == 1):
        return ""
    return (
        " If outer parameters have an entry an example, let the batch hold the examples' numbers: "
        'scores[batch["i"]].'
    )


def _flags(obj: Objective) -> str:
    return ", ".join(f"{flag}=True" for flag in ("has_aux", "stateful") if getattr(obj, flag))


def shapes(out: PyTree) -> str:
    """A tree as a message shows it: a dtype and a shape a leaf."""
    return str(
        jax.tree.map(
            lambda a: f"{a.dtype}{list(a.shape)}" if hasattr(a, "dtype") else type(a).__name__, out
        )
    ).replace("'", "")
