"""Measures on held-out data, taken inside the compiled loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bilevax import check, functions
from bilevax._core import numbers
from bilevax._core.settings import innermost
from bilevax.base import PyTree


class Metrics(NamedTuple):
    """A function of an iterate and held-out data, how often it is evaluated, and which of its
    values chooses the kept iterate.
    """

    fn: Callable[..., dict[Any, Any]]
    data: PyTree = None
    every: int = 1
    select: str | None = None
    mode: str = "min"
    stateful: bool = False
    names: tuple[str, ...] = ()  # of its values, which a run finds out before its first step

    def row(self, inner: PyTree, outer: PyTree, model: PyTree, step: Any) -> dict[Any, Any]:
        """The metrics at this step, NaN where it is not one of the n-th."""

        def evaluate():
            return jax.tree.map(
                jnp.asarray, self.fn(inner, outer, self.data, *((model,) if self.stateful else ()))
            )

        if self.every == 1:
            return evaluate()
        shapes = jax.eval_shape(evaluate)
        nan = {k: jnp.full(v.shape, jnp.nan, v.dtype) for k, v in shapes.items()}
        return lax.cond(step % self.every == 0, evaluate, lambda: nan)

    def written(self, row: dict[Any, Any], step: Any) -> dict[Any, Any]:
        """The row as compiled code returns it: no NaN that means no fault, which `jax_debug_nans`
        would take for one.
        """
        return self._between(row, step, 0, jnp)

    def read(self, rows: dict[Any, Any], first: Any, xp: Any) -> dict[Any, Any]:
        """Rows from step `first` on as they are kept, NaN between the n-th steps; `xp` is numpy, or
        jax.numpy inside another program.
        """
        return self._between(
            rows, first + xp.arange(len(rows["code"]), dtype=jnp.result_type(first)), np.nan, xp
        )

    def _between(self, rows: dict[Any, Any], step: Any, fill: Any, xp: Any) -> dict[Any, Any]:
        if self.every == 1:
            return rows
        found = {
            name: xp.where(step % self.every == 0, rows[name], xp.asarray(fill, rows[name].dtype))
            for name in self.names
        }
        return {**rows, **found}


def metrics(
    fn: Callable[..., dict[Any, Any]],
    data: PyTree = None,
    *,
    every: int = 1,
    select: str | None = None,
    mode: str = "min",
    stateful: bool = False,
) -> Metrics:
    """Evaluate `fn` on held-out data every n steps, inside the compiled loop; its values are
    columns of the history.

    Args:
      fn: pure function ``(inner_params, outer_params, data) -> {name: scalar}``.
      data: pytree of arrays handed to `fn` whole.
      every: steps between evaluations (at steps 0, n, 2n, ...); rows between hold NaN.
      select: name of the metric that ``keep="best"`` goes by, in place of the outer value.
      mode: ``"min"`` or ``"max"``, of `select`.
      stateful: `fn` takes the model state as fourth argument.

    Returns:
      A `Metrics` for ``solve_bilevel(..., metrics=...)``.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> held_out = jnp.arange(4.0)
      >>> bx.metrics(
      ...     lambda w, lam, y: {"error": jnp.mean((w - y) ** 2)}, held_out, every=5, select="error"
      ... ).every
      5
    """
    if not callable(fn):
        raise TypeError(
            f"metrics: got {check.describe(fn)}; expected a function (inner_params, outer_params, "
            "data) -> dict of scalars."
        )
    numbers.choice(mode, "mode", ("min", "max"))
    numbers.arrays(data, "data")
    if select is not None and not isinstance(select, str):
        raise TypeError(
            f"select: got {check.describe(select)}; expected the name of a metric, or None."
        )
    return Metrics(
        fn,
        jax.tree.map(jnp.asarray, data),
        numbers.count(every, "every"),
        select,
        mode,
        numbers.flag(stateful, "stateful"),
    )


def check_metrics(
    value: Metrics, inner: PyTree, outer: PyTree, model: PyTree, taken: set[str]
) -> Metrics:
    """The metrics with their names, when they are a dict of floating-point scalars with names of
    their own.
    """
    fn = innermost(value.fn)
    name = getattr(fn, "__name__", repr(fn))
    form = (
        f"(inner_params, outer_params, data{', model_state' if value.stateful else ''}) -> dict of "
        "scalars"
    )
    numbers.takes(value.fn, f"metrics ({name})", form)
    given = (inner, outer, value.data, *((model,) if value.stateful else ()))
    with functions.told(f"metrics ({name})", form):
        out = functions.shape(value.fn, f"metrics ({name})", given)
    if not isinstance(out, dict) or not out:
        raise TypeError(
            f"metrics ({name}): returned {check.describe(out)}; expected a dict of scalars by name."
        )
    for key, leaf in out.items():
        if not isinstance(key, str) or not key:
            raise TypeError(f"metrics ({name}): got the name {key!r}; expected a text.")
        if getattr(leaf, "shape", None) != () or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"metrics ({name})[{key!r}]: got {check.describe(leaf)}; expected a floating-point "
                "scalar. Try jnp.mean(...)."
            )
        if key in {*taken, "step"}:  # which logs call their rows by
            raise ValueError(
                f"metrics ({name}): got the name {key!r}, which is a column of the history "
                f"already; expected another one than {sorted(taken)}."
            )
    if value.select is not None and value.select not in out:
        raise ValueError(
            f"select: got {value.select!r}; expected one of the metrics {sorted(out)}."
        )
    return value._replace(names=tuple(out))
