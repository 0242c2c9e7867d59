"""Mappings ``(inner, outer, batch) -> inner``, called the way objectives are."""

from __future__ import annotations

import dataclasses
from typing import Any

from bilevax import tree
from bilevax.base import Bound, Ctx, Objective, PyTree, objective


def as_mapping(mapping: Any, name: str = "mapping") -> Objective:
    """The `Objective` form of a mapping, or a refusal."""
    if not callable(mapping):
        raise TypeError(f"{name}: got {type(mapping).__name__}; expected a function (inner_params, outer_params, batch) -> inner_params.")
    return objective(mapping)


def bound_like(mapping: Objective, like: Objective) -> Objective:
    """The mapping on floating-point leaves only, as the level's objective is: where others are bound to that, they are bound to this, too."""
    settings = like.fn.settings if isinstance(like.fn, Bound) else {}
    if "inner_fixed" not in settings or "outer_fixed" not in settings:
        return mapping
    fixed = {name: settings[name] for name in ("inner_fixed", "outer_fixed")}
    return dataclasses.replace(mapping, fn=Bound(mapping.name, _with_fixed, fn=mapping.fn, **fixed))


def _with_fixed(inner, outer, *args, fn, inner_fixed, outer_fixed, **kwargs):
    return fn(tree.combine(inner, inner_fixed), tree.combine(outer, outer_fixed), *args, **kwargs)


def apply(mapping: Objective, like: Objective, inner: PyTree, outer: PyTree, ctx: Ctx) -> PyTree:
    """The mapping's value on floating-point leaves."""
    return tree.partition(bound_like(mapping, like)(inner, outer, ctx)[0])[0]
