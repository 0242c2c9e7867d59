"""Objectives in the one form that the library calls, and what an evaluation of one is given."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bilevax._core import numbers
from bilevax._core.settings import innermost
from bilevax._core.types import PyTree, Scalar


class Ctx(NamedTuple):
    """What one evaluation of an objective is given besides the parameters. Methods hand it on and
    never look inside.

    `index` is the batch's number where the data is a fixed partition (`data.partitioned`), for
    methods that keep a table of batches. `inner_step` is the number of the inner step within its
    outer step, for objectives that were declared `indexed`; None where nothing counts.
    """

    batch: PyTree = None
    key: jax.Array | None = None
    model: PyTree = None
    index: Any = None
    inner_step: Any = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["fn", "has_aux", "stateful", "keyed", "indexed", "trajectory", "adapt"],
    meta_fields=["tasks"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class Objective:
    """A user's function in the one form that the library calls: ``(inner, outer, ctx) -> (value,
    (model, aux))``.

    Made by `bilevax.objective`; equal functions with equal flags are equal objectives. `adapt`
    gives a mapping or a constraint that a
    method was given the arguments that this objective gets: ``(Objective) -> Objective``. None:
    they are the same. `tasks` says how the value combines those of independent tasks along a
    leading axis ("sum" or "mean"), where it does.
    """

    fn: Callable[..., Any]
    has_aux: bool = False
    stateful: bool = False
    keyed: bool = False
    indexed: bool = False
    trajectory: bool = False
    adapt: Callable[..., Any] | None = None
    tasks: str = ""

    def __call__(
        self, inner: PyTree, outer: PyTree, ctx: Ctx
    ) -> tuple[Scalar, tuple[PyTree, PyTree]]:
        args, extra = self.arguments(inner, outer, ctx)
        out = self.fn(*args, **extra)
        if not (self.has_aux or self.stateful):
            return out, (ctx.model, None)
        value, rest = out
        if self.has_aux and self.stateful:
            return value, tuple(rest)
        return value, ((rest, None) if self.stateful else (ctx.model, rest))

    def arguments(
        self, inner: PyTree, outer: PyTree, ctx: Ctx
    ) -> tuple[tuple[PyTree, ...], dict[str, Any]]:
        """What the user's function is called with."""
        args = (inner, outer, ctx.batch) + ((ctx.model,) if self.stateful else ())
        extra = {"key": ctx.key} if self.keyed else {}
        if self.indexed:
            extra["inner_step"] = ctx.inner_step
        return args, extra

    @property
    def name(self) -> str:
        """The user's function's name, for messages."""
        fn = innermost(self.fn)
        return getattr(fn, "__name__", None) or repr(fn)

    def __repr__(self) -> str:
        names = ("has_aux", "stateful", "keyed", "indexed", "trajectory")
        flags = [flag for flag in names if getattr(self, flag)]
        return f"objective({', '.join([self.name] + [f'{flag}=True' for flag in flags])})"


def objective(
    fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    stateful: bool = False,
    keyed: bool = False,
    indexed: bool = False,
    trajectory: bool = False,
) -> Objective:
    """Declare what an objective takes and returns beyond ``fn(inner_params, outer_params, batch) ->
    scalar``.

    A plain three-argument function needs no wrapping. Wrap once, at module level: a run is compiled
    once for each objective.

    Args:
      fn: pure function of ``(inner_params, outer_params, batch[, model_state][, key=])``, the same
        order at both levels.
      has_aux: `fn` returns ``(value, aux)``. The history stacks both, a row a step: the outer
        objective's as ``aux``, that of the last step of `inner.optax` as ``inner_aux``.
      stateful: `fn` takes ``model_state`` as fourth argument and returns ``(value, model_state)``
        (``(value, (model_state, aux))`` with `has_aux`). The state moves on real inner steps only,
        never on hypergradient passes.
      keyed: `fn` takes a PRNG key as ``key=``; evaluations that are differenced share one key.
      indexed: `fn` takes the number of the inner step within its outer step as ``inner_step=``.
      trajectory: `fn`, an outer objective, takes in place of the inner parameters those after every
        inner step, stacked along a new leading axis.

    Returns:
      An `Objective`. Wrapping one again returns it unchanged when no flag is given.

    Raises:
      TypeError: if `fn` is not callable, or is an `Objective` already and flags are given.

    Examples:
      >>> import bilevax as bx
      >>> bx.objective(lambda w, lam, batch: ((w - lam) ** 2, {"w": w}), has_aux=True)
      objective(<lambda>, has_aux=True)
    """
    flags = {
        "has_aux": has_aux,
        "stateful": stateful,
        "keyed": keyed,
        "indexed": indexed,
        "trajectory": trajectory,
    }
    has_aux, stateful, keyed, indexed, trajectory = (
        numbers.flag(value, name) for name, value in flags.items()
    )
    if isinstance(fn, Objective):
        if has_aux or stateful or keyed or indexed or trajectory:
            raise TypeError(
                f"fn: got {fn!r}, which is wrapped already; expected a plain function. Give all "
                "flags in one call of objective."
            )
        return fn
    if not callable(fn):
        raise TypeError(
            f"fn: got {numbers.describe(fn)}; expected a function (inner_params, outer_params, "
            "batch) -> scalar."
        )
    return Objective(fn, has_aux, stateful, keyed, indexed, trajectory)
