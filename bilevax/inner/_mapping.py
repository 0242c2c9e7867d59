"""Mappings ``(inner, outer, batch) -> inner``, called the way objectives are."""

from __future__ import annotations

from typing import Any

from bilevax import tree
from bilevax.base import Ctx, Objective, PyTree, objective


def as_mapping(mapping: Any, name: str = "mapping") -> Objective:
    """The `Objective` form of a mapping, or a refusal."""
    if not callable(mapping):
        raise TypeError(
            f"{name}: got {type(mapping).__name__}; expected a function (inner_params, "
            "outer_params, batch) -> inner_params."
        )
    return objective(mapping)


def bound_like(mapping: Objective, like: Objective) -> Objective:
    """The mapping with the arguments that the level's objective gets: on floating-point leaves
    only, say, where others are bound to that.
    """
    return mapping if like.adapt is None else like.adapt(mapping)


def apply(mapping: Objective, like: Objective, inner: PyTree, outer: PyTree, ctx: Ctx) -> PyTree:
    """The mapping's value on floating-point leaves."""
    return tree.partition(bound_like(mapping, like)(inner, outer, ctx)[0])[0]
