"""One node of a multilevel problem, and the refusals of levels that cannot work together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from bilevax import check, tree
from bilevax._core import numbers
from bilevax._core.settings import name_of
from bilevax.base import Hypergradient, InnerSolver, Objective, PyTree, objective
from bilevax.data.episodes import Episodes
from bilevax.data.sources import Source
from bilevax.starts import takes_key, takes_states


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """One level: the objective that its variable minimizes, how it is solved, and how its solution
    is differentiated.

    Args:
      name: the key of its variable in `params`.
      objective: ``fn(params, batch) -> scalar`` with `params` a dict by level name, or `objective`
        of one (with its flags). It is minimized over ``params[name]``; it may read any of the
        others.
      solver: an `InnerSolver`, run for its `steps` in each step of the level that waits for it,
        from where it stood. An optax transformation is
        one step of it. For the top level: an optax transformation, the only thing that moves it.
      hypergradient: the `Hypergradient` method that differentiates its solution. None for the top
        level.
      reads: names of the levels that its objective depends on. Default: found from the objective's
        jaxpr. Given, every other one is a constant to this level, and nothing of it is
        differentiated.
      start: ``params -> params[name]``, where each of its solves begins: a function of the other
        levels' variables (another level's solution, the top level's initialisation, a constant),
        with ``key=`` where it draws, and ``model_state=``, a dict by level name, where it takes
        networks' statistics: ``lambda p, model_state: (p["w"], {"v": model_state["w"]})``. It may
        return ``(params[name], model_state)``; otherwise statistics go on from where the last solve
        left them. Optimizer state and schedules begin anew; ``params[name]`` then only says the
        structure.
        `hypergradient.unrolled` differentiates it.
        None: where the last solve ended.
      every: solve it in every n-th step only; it stands still in between.
      look_ahead: take all `steps` for the gradient, and keep the first of them only (roll-back):
        the level sees where it is heading without going there.
      freeze: the level stands still, and is a constant to all who read it: neither solved nor
        differentiated.

    Clipping, accumulation and warm-up are the optimizer's:
    ``optax.chain(optax.clip_by_global_norm(1.0), opt)``, ``optax.MultiSteps(opt,
    n).gradient_transformation()``, a schedule that is zero for the first steps.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> fit = lambda p, batch: jnp.sum((p["w"] - p["lam"]) ** 2)
      >>> bx.Level(
      ...     "w",
      ...     fit,
      ...     solver=bx.inner.optax(optax.sgd(0.5), 10),
      ...     hypergradient=bx.hypergradient.implicit(),
      ... )
      Level('w', <lambda>, solver=optax(...), hypergradient=implicit(...))
    """

    name: str
    objective: Callable[..., Any]
    _: dataclasses.KW_ONLY
    solver: Any
    hypergradient: Hypergradient | None = None
    reads: Sequence[str] | None = None
    start: Callable[..., Any] | None = None
    every: int = 1
    look_ahead: bool = False
    freeze: bool = False

    def __post_init__(self) -> None:
        numbers.word(self.name, "name", "head")
        where = f"Level {self.name!r}"
        if not callable(self.objective):
            raise TypeError(
                f"{where}, objective: got {check.describe(self.objective)}; expected a function "
                "(params, batch) -> scalar."
            )
        if not isinstance(self.objective, Objective):
            numbers.takes(self.objective, f"{where}, objective", "(params, batch) -> scalar")
        if objective(self.objective).trajectory:
            raise TypeError(
                f"{where}, objective: got objective(..., trajectory=True); expected one of single "
                "points: what reads the steps of the level below is an outer objective of "
                "solve_bilevel."
            )
        if not isinstance(self.solver, InnerSolver):
            check.transformation(self.solver, f"{where}, solver")
        if self.hypergradient is not None and not isinstance(self.hypergradient, Hypergradient):
            raise TypeError(
                f"{where}, hypergradient: got {check.describe(self.hypergradient)}; expected a "
                f"Hypergradient.{check.method_hint(self.hypergradient)}"
            )
        if self.hypergradient is not None and self.hypergradient.constant:
            raise ValueError(
                f"{where}, hypergradient: got {self.hypergradient!r}, for which this level's "
                "solution is a constant; expected one that follows it. Where a level above is not "
                f"to follow it: let it read jax.lax.stop_gradient(params[{self.name!r}])."
            )
        if self.reads is not None:
            if not isinstance(self.reads, (list, tuple, set, frozenset)) or not all(
                isinstance(name, str) for name in self.reads
            ):
                example = self.reads if isinstance(self.reads, str) else "head"
                raise TypeError(
                    f"{where}, reads: got {numbers.shown(self.reads)}; expected a sequence of "
                    f"level names. Try reads=({example!r},)."
                )
            object.__setattr__(self, "reads", tuple(self.reads))
        numbers.count(self.every, f"{where}, every")
        for argument in ("look_ahead", "freeze"):
            numbers.flag(getattr(self, argument), f"{where}, {argument}")
        if self.start is not None and not callable(self.start):
            raise TypeError(
                f"{where}, start: got {check.describe(self.start)}; expected a function params -> "
                f"params[{self.name!r}], or None."
            )
        if self.start is not None:
            given = {"key": takes_key(self.start), "model_state": takes_states(self.start)}
            asked = {name: None for name, asks in given.items() if asks}
            numbers.takes(
                functools.partial(self.start, **asked) if asked else self.start,
                f"{where}, start",
                f"(params) -> params[{self.name!r}], with key= and model_state= where it asks",
            )
        if self.start is not None and (self.every > 1 or self.look_ahead or self.freeze):
            got = f"every={self.every}, look_ahead={self.look_ahead}, freeze={self.freeze}"
            raise ValueError(
                f"{where}, start: got one with {got}; expected none of them, since every solve "
                "begins anew and nothing of it is kept."
            )

    def __repr__(self) -> str:
        parts = [repr(self.name), objective(self.objective).name, f"solver={_short(self.solver)}"]
        parts += (
            [f"hypergradient={_short(self.hypergradient)}"]
            if self.hypergradient is not None
            else []
        )
        parts += [f"reads={self.reads}"] if self.reads is not None else []
        parts += [f"start={name_of(self.start)}"] if self.start is not None else []
        parts += [f"every={self.every}"] if self.every > 1 else []
        parts += [f"{flag}=True" for flag in ("look_ahead", "freeze") if getattr(self, flag)]
        return f"Level({', '.join(parts)})"


def _short(value: Any) -> str:
    piece = (
        value.step
        if isinstance(value, InnerSolver)
        else value.vjp
        if isinstance(value, Hypergradient)
        else value
    )
    return f"{name_of(piece)}(...)" if callable(piece) else type(value).__name__


def checked(levels: Sequence[Level]) -> tuple[Level, ...]:
    """The levels, refused by name where they cannot work together."""
    if (
        isinstance(levels, Level)
        or not isinstance(levels, Sequence)
        or not all(isinstance(level, Level) for level in levels)
    ):
        raise TypeError(
            f"levels: got {check.describe(levels)}; expected a sequence of Level, lowest first."
        )
    if len(levels) < 2:
        raise ValueError(
            f"levels: got {len(levels)}; expected two or more. One level alone is an ordinary "
            "optimization."
        )
    names = [level.name for level in levels]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"levels: got the name {name!r} {names.count(name)} times; expected a name of its "
                "own for each level."
            )
    *lower, top = levels
    for level in lower:
        if level.hypergradient is None and not level.freeze:
            raise ValueError(
                f"Level {level.name!r}, hypergradient: got None; expected a method, since it is "
                "not the top level. Try hypergradient.implicit()."
            )
    if top.hypergradient is not None:
        raise ValueError(
            f"Level {top.name!r}, hypergradient: got {top.hypergradient!r}; expected None, since "
            "nothing stands above the top level."
        )
    if isinstance(top.solver, InnerSolver):
        raise TypeError(
            f"Level {top.name!r}, solver: got {top.solver!r}; expected an optax transformation for "
            "the top level. Try optax.adam(1e-2)."
        )
    if top.every > 1 or top.look_ahead or top.freeze or top.start is not None:
        got = (
            f"every={top.every}, look_ahead={top.look_ahead}, freeze={top.freeze}, "
            f"start={top.start}"
        )
        raise ValueError(
            f"Level {top.name!r}: got {got} for the top level; expected none of them. Give more "
            "steps below, or leave the level out."
        )
    for level in levels:
        for name in level.reads or ():
            if name == level.name:
                raise ValueError(
                    f"Level {name!r}, reads: got a cycle, {name!r} reading itself; expected names "
                    "of other levels."
                )
            if name not in names:
                raise ValueError(
                    f"Level {level.name!r}, reads: got {name!r}, which is no level; expected names "
                    f"among {names}."
                )
    return tuple(levels)


def split_params(
    levels: Sequence[Level], params: Any
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Floating-point leaves and the others, each a dict by level name."""
    names = [level.name for level in levels]
    if not isinstance(params, dict) or set(params) != set(names):
        got = sorted(map(str, params)) if isinstance(params, dict) else check.describe(params)
        raise ValueError(
            f"params: got {got}; expected a dict with the level names as keys: {names}."
        )
    arrays = {name: check.arrays(params[name], f"params[{name!r}]") for name in names}
    for name, value in arrays.items():
        check.params(value, f"params[{name!r}]")
    parts = {name: tree.partition(value) for name, value in arrays.items()}
    return {name: part[0] for name, part in parts.items()}, {
        name: part[1] for name, part in parts.items()
    }


def check_names(given: Any, names: Sequence[str], argument: str) -> dict[Any, Any]:
    """A dict by level name; None is an empty one."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise TypeError(
            f"{argument}: got {check.describe(given)}; expected a dict by level name, of "
            f"{list(names)}."
        )
    for name in given:
        if name not in names:
            raise ValueError(
                f"{argument}: got the key {name!r}; expected level names: {list(names)}."
            )
    return given


def check_batches(given: Any, names: Sequence[str]) -> dict[Any, Any]:
    """One batch of each level that has data, by name."""
    for name, value in check_names(given, names, "batches").items():
        if isinstance(value, (Source, Episodes)):
            raise TypeError(
                f"batches[{name!r}]: got a data source, from which a run draws; expected one "
                "batch of it. Try its first rows, jax.tree.map(lambda a: a[:32], arrays)."
            )
    return given or {}


def check_key(levels: Sequence[Level], key: Any, sampled: list[str]) -> None:
    """A PRNG key where a level draws."""
    keyed = [
        f"the objective of level {level.name!r} takes a key"
        for level in levels
        if getattr(level.objective, "keyed", False)
    ]
    keyed += [
        f"the start of level {level.name!r} takes a key"
        for level in levels
        if takes_key(level.start)
    ]
    if key is None and (keyed or sampled):
        cause = keyed[0] if keyed else f"the data of level {sampled[0]!r} is sampled"
        raise ValueError(
            f"key: got None although {cause}; expected a PRNG key. Try jax.random.key(0)."
        )
    if key is not None:
        numbers.key(key)
