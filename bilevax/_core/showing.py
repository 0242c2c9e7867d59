"""How values are shown to people: a screenful at most, whatever is in them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LEAVES = 8  # of one field that are listed; a larger field is counted
WIDTH = 100


def screenful(value: Any) -> str:
    """A named tuple, a field a line where it is long: small numbers by value, arrays by type and
    shape, large trees counted.
    """
    parts = [f"{name}={_field(field)}" for name, field in zip(value._fields, value, strict=True)]
    name = type(value).__name__
    line = f"{name}({', '.join(parts)})"
    return line if len(line) <= WIDTH else f"{name}(\n    " + ",\n    ".join(parts) + ",\n)"


def _field(value: Any) -> str:
    if callable(value):
        return leaf(value) if hasattr(value, "__name__") else repr(value)
    leaves = jax.tree.leaves(value)
    if not leaves:
        return repr(value) if value is None or value == () or value == {} else type(value).__name__
    if leaves[0] is value:
        return leaf(value)
    if len(leaves) > LEAVES:
        return f"<{type(value).__name__}: {len(leaves)} leaves, {_bytes(leaves)}>"
    shown = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {leaf(a)}"
        for path, a in jax.tree_util.tree_leaves_with_path(value)
    ]
    return "{" + ", ".join(shown) + "}"


def leaf(value: Any) -> str:
    """An array's type and shape; a number's value, where it has one."""
    if not hasattr(value, "dtype"):
        return (
            repr(value)
            if isinstance(value, (int, float, str, type(None)))
            else getattr(value, "__name__", type(value).__name__)
        )
    number = (
        np.ndim(value) == 0
        and not isinstance(value, jax.core.Tracer)
        and not jnp.issubdtype(value.dtype, jax.dtypes.extended)
    )
    if (
        number
        and getattr(value, "is_fully_addressable", True)
        and not getattr(value, "is_deleted", bool)()
    ):
        return (
            f"{np.asarray(value).item():.6g}"
            if np.issubdtype(value.dtype, np.floating)
            else str(np.asarray(value).item())
        )
    return f"{value.dtype}{list(value.shape)}"


def _bytes(leaves: list[Any]) -> str:
    size: float = sum(
        np.size(a) * getattr(getattr(a, "dtype", None), "itemsize", 8) for a in leaves
    )
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def tidy(module: ModuleType) -> ModuleType:
    """`tidy_class` of the public named tuples of a module."""
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields"):
            tidy_class(value)
    return module


def tidy_class(value: Any) -> None:
    """`help` of a named tuple tells types by their names: where annotations are strings, it would
    print references.
    """
    plain = {
        field: getattr(kind, "__forward_arg__", kind)
        for field, kind in value.__annotations__.items()
    }
    value.__annotations__ = value.__new__.__annotations__ = plain
