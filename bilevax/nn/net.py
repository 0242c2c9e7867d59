"""A model taken apart for a run: what is learned, what moves with it, and how to put it together
again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from bilevax import tree
from bilevax._core.types import Key
from bilevax.base import PyTree


class Bind(Protocol):
    """Put a model together: ``(params, state, key, train) -> (model, collect)``, with ``collect()``
    its state after it was called.
    """

    def __call__(
        self, params: PyTree, state: PyTree, key: Key | None, train: bool
    ) -> tuple[Any, Callable[[], PyTree]]: ...


class Net(NamedTuple):
    """A model of either style, taken apart by `from_nnx` or `from_linen`.

    Attributes:
      params: what is learned; a tuple or a dict of such where the parameters were divided between
        levels.
      state: what moves with real training steps (BatchNorm's statistics); without leaves where the
        model has none.
      bind: how an objective calls it. The parameters that are not learned are bound here as leaves,
        hence arguments of compiled code.
      merge: ``(params, state=None)`` to what the user had: an nnx module, or a dict of linen
        variables.
      keyed: the model has random streams, so that its objectives take a key.
      form: how `params` is divided: None (not at all), the number of levels, or their names.
    """

    params: PyTree
    state: PyTree
    bind: Bind
    merge: Callable[..., Any]
    keyed: bool
    form: int | tuple[str, ...] | None = None

    def __repr__(self) -> str:
        size = f"{tree.size(self.params):,} learned numbers"
        more = [", with state"] * self.has_state + [", with random streams"] * self.keyed
        return f"Net({size}{''.join(more)})"

    @property
    def has_state(self) -> bool:
        """Whether anything moves besides the parameters."""
        return bool(jax.tree.leaves(self.state))


# ---- what is learned, and at which level


class Paths(NamedTuple):
    """A filter by path; see `paths`."""

    patterns: tuple[str, ...]

    def __call__(self, path: tuple[Any, ...], value: Any = None) -> bool:
        whole = "/".join(map(str, path))
        return any(re.search(f"(^|/){pattern}(/|$)", whole) for pattern in self.patterns)


def paths(*patterns: str) -> Paths:
    """A filter that takes the parameters whose path matches: ``paths("head", "layers/3")``.

    A path is ``layers/3/attention/kernel``; a pattern is one or more whole parts of it in a row,
    each of which may be a regular expression.
    It is a filter of nnx as well: ``nnx.Not(paths("head"))``.

    Args:
      *patterns: strings, of which one has to match.

    Returns:
      A predicate ``(path, value) -> bool`` that compares equal to another one of the same patterns.

    Raises:
      TypeError: for anything but strings.

    Examples:
      >>> from bilevax import nn
      >>> head = nn.paths("head", r"layers/[0-2]")
      >>> (
      ...     head(("head", "kernel")),
      ...     head(("layers", 2, "bias")),
      ...     head(("layers", 3, "bias")),
      ...     head(("ahead", "kernel")),
      ... )
      (True, True, False, False)
    """
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"patterns: got {patterns!r}; expected strings such as 'head' or 'layers/3'."
        )
    return Paths(patterns)


Form = (
    int | tuple[str, ...] | None
)  # of the learned parameters: one tree, a tuple of n, or a dict with these names


def divided(wrt: Any) -> tuple[tuple[Any, ...], Form]:
    """The filters in `wrt` and their form: one filter, a tuple of filters, or a dict of filters by
    level name.
    """
    if isinstance(wrt, dict):
        if not wrt or not all(isinstance(name, str) for name in wrt):
            raise TypeError(
                f"wrt: got {wrt!r}; expected a dict of filters with level names as keys."
            )
        return tuple(wrt.values()), tuple(wrt)
    if isinstance(wrt, tuple) and not isinstance(wrt, Paths):
        if len(wrt) < 2:
            raise ValueError(
                f"wrt: got {wrt!r}; expected one filter, or a tuple of at least two, a filter a "
                "level."
            )
        return wrt, len(wrt)
    return (wrt,), None


def pack(groups: tuple[Any, ...], form: Form) -> PyTree:
    """The groups in their form."""
    if form is None:
        return groups[0]
    return groups if isinstance(form, int) else dict(zip(form, groups, strict=True))


def unpack(params: PyTree, form: Form) -> tuple[Any, ...]:
    """Undo `pack`."""
    if form is None:
        return (params,)
    return tuple(params) if isinstance(form, int) else tuple(params[name] for name in form)


def check_groups(groups: tuple[Any, ...], filters: tuple[Any, ...], names: list[str]) -> None:
    """Every group holds something to learn."""
    for group, chosen in zip(groups, filters, strict=True):
        if not any(tree.is_float(leaf) for leaf in jax.tree.leaves(group)):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(
                f"wrt: got {chosen!r}, which takes no floating-point parameter after those before; "
                "expected at least one. The model has "
                f"{shown or 'none'}. Try nn.paths('part/of/a/path')."
            )
