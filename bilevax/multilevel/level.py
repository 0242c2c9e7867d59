"""One node of a multilevel problem, and all of them with what is known of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import check, tree
from bilevax import inner as inner_solvers
from bilevax.base import Bound, Draw, Hypergradient, InnerSolver, Objective, PyTree, objective
from bilevax.hypergradient.finite_difference import finite_difference
from bilevax.hypergradient.one_step import one_step
from bilevax.multilevel.graph import Graph, find


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """One level: the objective that its variable minimizes, how it is solved, and how its solution is differentiated.

    Args:
      name: the key of its variable in `params`.
      objective: ``fn(params, batch) -> scalar`` with `params` a dict by level name, or `objective` of one (with its flags). It is minimized over
        ``params[name]``; it may read any of the others.
      solver: an `InnerSolver`, run for its `steps` in each step of the level that waits for it, from where it stood. An optax transformation is
        one step of it. For the top level: an optax transformation, the only thing that moves it.
      hypergradient: the `Hypergradient` method that differentiates its solution. None for the top level.
      reads: names of the levels that its objective depends on. Default: found from the objective's jaxpr. Given, every other one is a constant
        to this level, and nothing of it is differentiated.
      every: solve it in every n-th step only; it stands still in between.
      look_ahead: take all `steps` for the gradient, and keep the first of them only (roll-back): the level sees where it is heading without
        going there.
      freeze: the level stands still, and is a constant to all who read it: neither solved nor differentiated.

    Clipping, accumulation and warm-up are the optimizer's: ``optax.chain(optax.clip_by_global_norm(1.0), opt)``, ``optax.MultiSteps(opt,
    n).gradient_transformation()``, a schedule that is zero for the first steps.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Example:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> fit = lambda p, batch: jnp.sum((p["w"] - p["lam"]) ** 2)
      >>> bx.Level("w", fit, solver=bx.inner.optax(optax.sgd(0.5), 10), hypergradient=bx.hypergradient.implicit())
      Level('w', <lambda>, solver=optax(...), hypergradient=implicit(...))
    """

    name: str
    objective: Callable
    _: dataclasses.KW_ONLY
    solver: Any
    hypergradient: Hypergradient | None = None
    reads: Sequence[str] | None = None
    every: int = 1
    look_ahead: bool = False
    freeze: bool = False

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name: got {self.name!r}; expected a non-empty string.")
        where = f"Level {self.name!r}"
        if not callable(self.objective):
            raise TypeError(f"{where}, objective: got {check.describe(self.objective)}; expected a function (params, batch) -> scalar.")
        if not isinstance(self.solver, InnerSolver):
            check.transformation(self.solver, f"{where}, solver")
        if self.hypergradient is not None and not isinstance(self.hypergradient, Hypergradient):
            hint = " Call the factory: hypergradient.implicit()." if callable(self.hypergradient) else " Try hypergradient.implicit()."
            raise TypeError(f"{where}, hypergradient: got {check.describe(self.hypergradient)}; expected a Hypergradient.{hint}")
        if self.reads is not None:
            if isinstance(self.reads, str) or not all(isinstance(name, str) for name in self.reads):
                raise TypeError(f"{where}, reads: got {self.reads!r}; expected a sequence of level names. Try reads=({self.reads!r},).")
            object.__setattr__(self, "reads", tuple(self.reads))
        check.count(self.every, f"{where}, every")
        for argument in ("look_ahead", "freeze"):
            if not isinstance(getattr(self, argument), bool):
                raise TypeError(f"{where}, {argument}: got {getattr(self, argument)!r}; expected True or False.")

    def __repr__(self) -> str:
        parts = [repr(self.name), objective(self.objective).name, f"solver={_short(self.solver)}"]
        parts += [f"hypergradient={_short(self.hypergradient)}"] if self.hypergradient is not None else []
        parts += [f"reads={self.reads}"] if self.reads is not None else []
        parts += [f"every={self.every}"] if self.every > 1 else []
        parts += [f"{flag}=True" for flag in ("look_ahead", "freeze") if getattr(self, flag)]
        return f"Level({', '.join(parts)})"


def _short(value) -> str:
    piece = value.step if isinstance(value, InnerSolver) else value.vjp if isinstance(value, Hypergradient) else value
    return f"{piece.name}(...)" if isinstance(piece, Bound) else type(value).__name__


class System(NamedTuple):
    """The levels as compiled code is given them: a pytree whose functions and integers are static and whose numbers are leaves."""

    graph: Graph
    objectives: dict[str, Objective]  # (params, None, ctx), on floating-point leaves
    solvers: dict[str, InnerSolver]  # of all levels but the top one
    methods: dict[str, Hypergradient]
    draws: dict[str, Draw]
    optimizer: Any  # of the top level
    look_ahead: dict[str, bool]
    joint: Callable  # (system, name, solution, given, ctx): the exact derivative of a solved level with others inside it


def checked(levels: Sequence[Level]) -> tuple[Level, ...]:
    """The levels, refused by name where they cannot work together."""
    if isinstance(levels, Level) or not isinstance(levels, Sequence) or not all(isinstance(level, Level) for level in levels):
        raise TypeError(f"levels: got {check.describe(levels)}; expected a sequence of Level, lowest first.")
    if len(levels) < 2:
        raise ValueError(f"levels: got {len(levels)}; expected two or more. One level alone is an ordinary optimization.")
    names = [level.name for level in levels]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"levels: got the name {name!r} {names.count(name)} times; expected a name of its own for each level.")
    *lower, top = levels
    for level in lower:
        if level.hypergradient is None and not level.freeze:
            raise ValueError(
                f"Level {level.name!r}, hypergradient: got None; expected a method, since it is not the top level. Try hypergradient.implicit()."
            )
    if top.hypergradient is not None:
        raise ValueError(f"Level {top.name!r}, hypergradient: got {top.hypergradient!r}; expected None, since nothing stands above the top level.")
    if isinstance(top.solver, InnerSolver):
        raise TypeError(f"Level {top.name!r}, solver: got {top.solver!r}; expected an optax transformation for the top level. Try optax.adam(1e-2).")
    if top.every > 1 or top.look_ahead or top.freeze:
        got = f"every={top.every}, look_ahead={top.look_ahead}, freeze={top.freeze}"
        raise ValueError(f"Level {top.name!r}: got {got} for the top level; expected none of them. Give more steps below, or leave the level out.")
    for level in levels:
        for name in level.reads or ():
            if name == level.name:
                raise ValueError(f"Level {name!r}, reads: got a cycle, {name!r} reading itself; expected names of other levels.")
            if name not in names:
                raise ValueError(f"Level {level.name!r}, reads: got {name!r}, which is no level; expected names among {names}.")
    return tuple(levels)


def split_params(levels: Sequence[Level], params: Any) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Floating-point leaves and the others, each a dict by level name."""
    names = [level.name for level in levels]
    if not isinstance(params, dict) or set(params) != set(names):
        got = sorted(map(str, params)) if isinstance(params, dict) else check.describe(params)
        raise ValueError(f"params: got {got}; expected a dict with the level names as keys: {names}.")
    arrays = {name: check.arrays(params[name], f"params[{name!r}]") for name in names}
    for name, value in arrays.items():
        check.params(value, f"params[{name!r}]")
    parts = {name: tree.partition(value) for name, value in arrays.items()}
    return {name: part[0] for name, part in parts.items()}, {name: part[1] for name, part in parts.items()}


def as_system(levels: Sequence[Level], params: dict, fixed: dict, draws: dict[str, Draw], contexts: dict, models: dict, joint: Callable) -> System:
    """The levels bound to their non-float leaves, with the graph of who reads whom found from these shapes."""
    objectives = {}
    for level in levels:
        wrapped = objective(level.objective)
        objectives[level.name] = dataclasses.replace(wrapped, fn=Bound(wrapped.name, _two_arguments, fn=wrapped.fn, fixed=fixed))
        model = models.get(level.name)
        if wrapped.stateful and model is None:
            raise ValueError(f"model_states: got none for level {level.name!r}, whose objective is stateful; expected its initial model state.")
        check._evaluate(objectives[level.name], f"Level {level.name!r}, objective", params, None, contexts[level.name]._replace(model=model))
    given = {name: contexts[name]._replace(model=models.get(name)) for name in objectives}
    graph = find(objectives, params, given, {level.name: level.reads for level in levels}, [level.name for level in levels if level.freeze])
    *lower, top = levels
    methods = {level.name: method_of(level) for level in lower}
    return System(
        graph,
        objectives,
        {level.name: as_solver(level) for level in lower},
        {name: _once_only(method) if any(methods[n].order < 2 for n in graph[name].held) else method for name, method in methods.items()},
        draws,
        top.solver,
        {level.name: level.look_ahead for level in lower},
        joint,
    )


def method_of(level: Level) -> Hypergradient:
    """The method of a level below the top; only a frozen one may do without."""
    return _NONE if level.hypergradient is None else level.hypergradient


_NONE = one_step()  # never called: nothing waits for a frozen level


def _once_only(method: Hypergradient) -> Hypergradient:
    """A method over a level that can be differentiated once only: SAMA and one-step take their mixed products from differences there."""
    if not isinstance(method.vjp, Bound):
        return method
    settings = method.vjp.settings
    if method.vjp.name == "one_step":
        return finite_difference(settings["scale"])
    if settings.get("product") == "exact":
        return method._replace(vjp=Bound(method.vjp.name, method.vjp.fn, **{**settings, "product": "difference"}))
    return method


def _two_arguments(params, _, batch, *model, fn, fixed, **keyed):
    return fn({name: tree.combine(value, fixed[name]) for name, value in params.items()}, batch, *model, **keyed)


def as_solver(level: Level) -> InnerSolver:
    """What solves a level below the top."""
    solver = level.solver if isinstance(level.solver, InnerSolver) else inner_solvers.optax(level.solver, 1)
    if level.every == 1:
        return solver
    step = Bound("every", _every_nth, step=solver.step, solves=solver.steps + 1, every=level.every)
    return solver._replace(step=step)


def _every_nth(objective, state, outer, ctx, *, step, solves, every):
    """The solver's step in every n-th solve; in the others the level stands still."""

    def move():
        return step(objective, state, outer, ctx)

    shapes = jax.eval_shape(move)[1]

    def stand():
        return state, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return lax.cond((ctx.batch.number // solves) % every == 0, move, stand)
