"""Settings bound to functions, as pytrees: numbers are leaves, everything else is static
structure.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax._core.types import PyTree


@jax.tree_util.register_pytree_node_class
class Bound:
    """A function with some keyword arguments bound: ``Bound("cg", _cg, maxiter=20)(matvec, b,
    x0)``.

    The bound values are pytree children, so floats and arrays among them can change without a new
    trace, and two factories called with equal settings compare equal as static structure. `name`
    and the settings are what `repr` shows.
    """

    def __init__(self, name: str, fn: Callable[..., Any], /, **settings: Any):
        self.name, self.fn, self.settings = name, fn, settings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **self.settings, **kwargs)

    def rebound(self, **settings: Any) -> Bound:
        """The same function with some of its settings replaced."""
        return Bound(self.name, self.fn, **{**self.settings, **settings})

    def __repr__(self) -> str:
        return shown(self)

    def tree_flatten(self) -> Any:
        return tuple(self.settings.values()), (self.name, self.fn, tuple(self.settings))

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Any:
        name, fn, keys = aux
        return cls(name, fn, **dict(zip(keys, children, strict=True)))


def _short(value: Any) -> str:
    if isinstance(value, jax.core.Tracer):
        return f"<{value.aval.str_short()}>"
    if isinstance(value, (jax.Array, np.ndarray)) and jnp.ndim(value):
        return f"<{value.dtype}{list(value.shape)}>"
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    if isinstance(value, tuple) and value and all(inspect.isfunction(part) for part in value):
        return value[0].__qualname__.split(".")[
            0
        ]  # a pair of functions, such as optax's, by who made it
    return repr(value)


# ---- what is shown of a piece


def name_of(piece: Any) -> str:
    """A piece's name, for people: that of the function behind it."""
    if isinstance(piece, Bound):
        return piece.name
    return getattr(piece, "__name__", None) or type(piece).__name__


def shown(piece: Any, **more: Any) -> str:
    """A function's name with its settings, and `more`."""
    settings = piece.settings if isinstance(piece, Bound) else {}
    said = ", ".join(f"{name}={_short(value)}" for name, value in {**settings, **more}.items())
    return f"{name_of(piece)}({said})"


def wrapped(fn: Any) -> Any:
    """The function that was bound as ``fn=`` to this one; None where there is none."""
    return fn.settings.get("fn") if isinstance(fn, Bound) else None


def innermost(fn: Any) -> Any:
    """The user's function inside those that were bound around it as ``fn=``."""
    while (inside := wrapped(fn)) is not None:
        fn = inside
    return fn


def parameters(fn: Any) -> Any:
    """The parameters of a function, those that are bound included."""
    return inspect.signature(fn.fn if isinstance(fn, Bound) else fn).parameters


def asks(fn: Any, name: str) -> bool:
    """Whether a function has a parameter of this name which nothing is bound to."""
    return name in parameters(fn) and not (isinstance(fn, Bound) and name in fn.settings)


class _Same:
    """A callable without a hash (an instance of a dataclass, say), which is equal to itself
    alone.
    """

    def __init__(self, value: Callable[..., Any]):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self.value is other.value


class Static:
    """The hashable half of `split`."""

    def __init__(self, treedef: Any, leaves: tuple[Any, ...]):
        self.treedef, self.leaves = treedef, leaves
        self._keys = tuple(
            leaf if _hashable(leaf) or not callable(leaf) else _Same(leaf) for leaf in leaves
        )
        try:
            self._hash = hash((treedef, self._keys))
        except TypeError as error:
            bad = next(leaf for leaf in leaves if not _hashable(leaf))
            raise TypeError(
                f"settings: got an unhashable {type(bad).__name__} ({bad!r}); expected functions, "
                "numbers, strings or arrays. "
                "Try a tuple in place of a list, or pass the value as data."
            ) from error

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, Static)
            and self.treedef == other.treedef
            and self._keys == other._keys
        )


def _hashable(leaf: Any) -> bool:
    try:
        hash(leaf)
    except TypeError:
        return False
    return True


class _Hole:
    def __repr__(self) -> str:
        return "<dynamic>"


_HOLE = _Hole()


def split(tree: PyTree) -> tuple[Static, tuple[Any, ...]]:
    """Separate configuration into a hashable static part and its dynamic leaves (floats and
    arrays).

    Concrete scalars become Python floats, hence weakly typed when traced: a float32 step size does
    not promote bfloat16 parameters.
    """
    leaves, treedef = jax.tree.flatten(tree)
    static, dynamic = [], []
    for leaf in leaves:
        if isinstance(leaf, (float, np.floating, np.ndarray, jax.Array)):
            static.append(_HOLE)
            dynamic.append(_weak(leaf))
        else:
            static.append(leaf)
    return Static(treedef, tuple(static)), tuple(dynamic)


def _weak(leaf: Any) -> Any:
    scalar = isinstance(leaf, (float, np.floating)) or (
        not isinstance(leaf, jax.core.Tracer)
        and jnp.ndim(leaf) == 0
        and jnp.issubdtype(leaf.dtype, jnp.floating)
    )
    return float(leaf) if scalar else leaf


def join(static: Static, dynamic: tuple[Any, ...]) -> PyTree:
    """Undo `split`."""
    values = iter(dynamic)
    return static.treedef.unflatten(
        [next(values) if leaf is _HOLE else leaf for leaf in static.leaves]
    )
