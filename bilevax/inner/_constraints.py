"""Constraints as solvers and methods call them: one function that gives both kinds, and vectors in
place of pytrees.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import tree
from bilevax.base import Bound, Linear, Objective, PyTree
from bilevax.inner._mapping import as_mapping


def as_constraints(equality: Any, inequality: Any) -> Objective:
    """Both constraints as the `Objective` form of one function ``(inner, outer, batch) ->
    (equality, inequality)``; ``()`` for none.
    """
    parts = []
    for name, given in (("equality", equality), ("inequality", inequality)):
        if isinstance(given, Linear):
            raise TypeError(
                f"{name}: got {given!r}, a linear solver; expected a function (inner_params, "
                "outer_params, batch) -> arrays. Try linear=."
            )
        parts.append(None if given is None else as_mapping(given, name))
    given = [part for part in parts if part is not None]
    flags = {
        name: any(getattr(part, name) for part in given)
        for name in ("stateful", "keyed", "indexed")
    }
    fn = Bound("constraints", _both, parts=tuple(parts))
    return Objective(fn, stateful=flags["stateful"], keyed=flags["keyed"], indexed=flags["indexed"])


def _both(*args: Any, parts: Any, key: Any = None, inner_step: Any = None) -> Any:
    """Both values, called as objectives are, or with the arguments of an `argmin`."""
    stateful = any(part is not None and part.stateful for part in parts)

    def value(part):
        if part is None:
            return ()
        given = args if part.stateful or not stateful else args[:3]
        extra = {
            name: arg
            for name, arg, taken in (
                ("key", key, part.keyed),
                ("inner_step", inner_step, part.indexed),
            )
            if taken
        }
        out = part.fn(*given, **extra)
        return out[0] if part.stateful or part.has_aux else out

    values = tuple(map(value, parts))
    return (values, args[3]) if stateful else values


def vector(values: PyTree, dtype: Any) -> Any:
    """All leaves of a pytree, one after the other."""
    leaves = [jnp.ravel(leaf).astype(dtype) for leaf in jax.tree.leaves(values)]
    return jnp.concatenate(leaves) if leaves else jnp.zeros((0,), dtype)


def unvector(flat: Any, like: PyTree) -> PyTree:
    """A vector in the form of a pytree (of arrays or of their shapes)."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([int(np.prod(leaf.shape)) for leaf in leaves])
    parts = [
        flat[end - int(np.prod(leaf.shape)) : end] for leaf, end in zip(leaves, ends, strict=True)
    ]
    return treedef.unflatten(
        [
            part.reshape(leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
    )


def dense_dtype(params: PyTree) -> Any:
    """The dtype that dense factorisations of a problem in these parameters are done in."""
    return tree.accumulator(*jax.tree.leaves(params))
