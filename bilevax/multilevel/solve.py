"""solve_multilevel: the driver's run along the gradient of the top level."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax

from bilevax import check, tree
from bilevax._core import numbers, optimizer
from bilevax._core.transfers import by_intent
from bilevax._core.types import Key
from bilevax._estimate import told
from bilevax.base import Algorithm, Bound, Feed, InnerState, PyTree, StepInfo, objective
from bilevax.checkpoint import Checkpointing
from bilevax.data.draws import level_windowed, with_number
from bilevax.data.loaders import Stream
from bilevax.multilevel import joint
from bilevax.multilevel.givens import givens
from bilevax.multilevel.level import Level, check_names, checked
from bilevax.multilevel.statistics import divided
from bilevax.multilevel.sweep import sweep
from bilevax.multilevel.system import System, as_solver, as_system
from bilevax.results import RESULTS
from bilevax.run.chunk import drive
from bilevax.run.driver import ready
from bilevax.run.metrics import Metrics, check_metrics
from bilevax.run.options import check_options
from bilevax.run.solution import Solution
from bilevax.run.state import RunState
from bilevax.run.watch import Callback
from bilevax.run.window import first_context, source_draw
from bilevax.sharding import Sharding


class MultilevelState(NamedTuple):
    """Where a multilevel run stands: the lower levels' states (an `InnerState` of dicts by level
    name), the top level, its optimizer, the methods.
    """

    inner: InnerState
    outer: PyTree
    outer_opt: PyTree
    method: dict[str, PyTree]


def _packed(states: dict[str, InnerState]) -> InnerState:
    return InnerState(*({name: state[i] for name, state in states.items()} for i in range(3)))


def _init(problem: System, inner: InnerState, outer: PyTree) -> MultilevelState:
    opt = {name: solver.first(inner.params[name], None) for name, solver in problem.solvers.items()}
    methods = {
        name: joint.adapted(problem, name).init(inner.params[name]) for name in problem.solvers
    }
    return MultilevelState(
        inner._replace(opt=opt), outer, optimizer.init(problem.optimizer, outer), methods
    )


def _step(
    problem: System, state: MultilevelState, feeds: tuple[Feed, ...], *, project: Any
) -> tuple[MultilevelState, StepInfo]:
    states = {name: InnerState(*(part[name] for part in state.inner)) for name in problem.solvers}
    out = sweep(
        problem,
        states,
        state.method,
        state.outer,
        dict(zip(problem.graph.names, feeds, strict=True)),
    )
    outer, opt = optimizer.moved(
        problem.optimizer,
        out.grad,
        state.outer_opt,
        state.outer,
        project,
        value=out.value,
        grad=out.grad,
    )
    return MultilevelState(_packed(out.states), outer, opt, out.methods), told(
        out.value, out.info, (_packed(out.solved), state.outer), out.aux
    )


@by_intent
def solve_multilevel(
    levels: Sequence[Level],
    params: dict[str, PyTree],
    *,
    data: dict[str, Any] | None = None,
    num_steps: int = 100,
    key: Key | None = None,
    project: Callable[[PyTree], PyTree] | None = None,
    model_state: dict[str, PyTree] | None = None,
    metrics: Metrics | Callable[..., Any] | None = None,
    tol: float | None = None,
    keep: str = "best",
    state: RunState | None = None,
    callbacks: Sequence[Callable[..., Any] | Callback] = (),
    progress: bool = False,
    checkpoint: Checkpointing | None = None,
    sharding: Sharding | None = None,
    on_failure: str = "stop",
    read_ahead: int | None = None,
    strict: bool | Collection[RESULTS] = False,
    throw: bool = True,
) -> Solution:
    """Minimise the top level's objective over the solutions of the levels below it.

    In each step every level takes its solver's steps from where it stood, after the levels that it
    reads; then the gradient of `value_and_multilevel_grad` moves the top level. The driver is that
    of `solve_bilevel`, and so is what is not explained here.

    Args:
      levels: two or more `Level`, lowest first; the top level's solver is the optax transformation
        that moves it.
      params: dict by level name: where each starts.
      data: dict by level name, each entry as in `solve_bilevel`; levels without one get
        ``batch=None``. Inner steps and second-order products draw apart; of an iterable each batch
        is trained on once, and products are taken on the last one that the level was trained on. A
        level inside another's objective cannot take an iterable, since how often it is solved is
        not known on the host (episodes of one it can).
      num_steps: steps of the top level.
      key: PRNG key; needed where data is sampled or an objective is keyed.
      project: of the top level's parameters, after each of its steps.
      model_state: initial model states of stateful objectives, a dict by level name. A network's
        belongs to the level that trains it: ``{"w": {"w": net.state}}``; the others read it as it
        is then.
      metrics: as in `solve_bilevel`; called with the dict of lower levels, the top level, and the
        data.
      tol: as in `solve_bilevel`.
      keep: as in `solve_bilevel`.
      state: as in `solve_bilevel`.
      callbacks: as in `solve_bilevel`.
      progress: as in `solve_bilevel`.
      checkpoint: as in `solve_bilevel`.
      sharding: as in `solve_bilevel`: `sharding.data_parallel()`, `fsdp()`, `tasks()` or
        `by_path(...)`.
      on_failure: as in `solve_bilevel`.
      read_ahead: as in `solve_bilevel`.
      strict: as in `solve_bilevel`.
      throw: as in `solve_bilevel`.

    Returns:
      A `Solution`, whose ``inner_params`` is a dict of the lower levels, its ``outer_params`` the
      top level. The history has each level's diagnostics as ``"name/entry"``.

    Raises:
      TypeError, ValueError: for arguments that cannot work, before anything is compiled.
      SolveError: if the run fails and `throw`.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> descent, method = bx.inner.optax(optax.sgd(0.2), 3), bx.hypergradient.implicit()
      >>> levels = [
      ...     bx.Level(
      ...         "z", lambda p, batch: (p["z"] - p["y"]) ** 2, solver=descent, hypergradient=method
      ...     ),
      ...     bx.Level(
      ...         "y",
      ...         lambda p, batch: (p["y"] - p["x"]) ** 2 + p["z"] ** 2,
      ...         solver=descent,
      ...         hypergradient=method,
      ...     ),
      ...     bx.Level("x", lambda p, batch: (p["y"] - 1.0) ** 2, solver=optax.sgd(0.5)),
      ... ]
      >>> solution = bx.solve_multilevel(levels, {"z": 0.0, "y": 0.0, "x": 4.0}, num_steps=60)
      >>> round(float(solution.outer_params), 2)
      2.0
    """
    levels = checked(levels)
    options = check_options(
        num_steps, metrics, tol, keep, callbacks, progress, throw,
        on_failure=on_failure, checkpoint=checkpoint, sharding=sharding, read_ahead=read_ahead,
        strict=strict, name="solve_multilevel",
    )  # fmt: skip
    if sharding is not None and sharding.mean:
        raise ValueError(
            "sharding: got mean=True for more than two levels; expected data_parallel() without "
            "it, fsdp(), tasks() or by_path(...)."
        )
    if project is not None and not callable(project):
        raise TypeError(
            f"project: got {check.describe(project)}; expected a function of the top level's "
            "parameters, or None."
        )
    if project is not None:
        numbers.takes(project, "project", "(params) -> params")
    names = [level.name for level in levels]
    upper = names[-1]
    sources, floats, fixed, run_key = givens(levels, params, data, key, state)
    models = {
        n: check.arrays(m, f"model_state[{n!r}]")
        for n, m in check_names(model_state, names, "model_state").items()
    }
    for name, model in models.items():
        check.finite(model, f"model_state[{name!r}]")
    contexts = {
        level.name: with_number(
            objective(level.objective), first_context(sources[level.name], run_key)
        )
        for level in levels
    }
    objectives = {level.name: objective(level.objective) for level in levels}
    division = divided(names, objectives, models)
    # What a state brings are the levels' own; the readers' are theirs.
    now = {**models, **division.own, **({} if state is None else state.algorithm.inner.model)}
    draws = {level.name: _draw_of(level, sources[level.name]) for level in levels}
    system = as_system(levels, floats, fixed, draws, contexts, now)
    inside = {n for name in names[:-1] for n in system.graph[name].held}
    for name, source in sources.items():
        if isinstance(source, Stream) and name in inside:
            raise ValueError(
                f"data[{name!r}]: got an iterable for a level that is solved inside another one's "
                "objective; expected arrays, data.minibatches of "
                "them, or a function (key, step) -> batch."
            )
    model = {n: division.own[n] for n in names[:-1]}
    start = InnerState({n: floats[n] for n in names[:-1]}, {}, model)
    if options.metrics is not None:
        measured = check_metrics(
            options.metrics,
            start.params,
            floats[upper],
            model,
            {"value", "grad_norm", "code", "warnings", "aux"},
        )
        options = options._replace(metrics=measured)
    seen = contexts[upper]._replace(model=division.whole(upper))
    value = jax.eval_shape(lambda p, ctx: system.objectives[upper](p, None, ctx)[0], floats, seen)
    counts = (*(solver.steps + 1 for solver in system.solvers.values()), 1)
    bound = (
        None if project is None else Bound("project", _projected, fn=project, fixed=fixed[upper])
    )
    # The driver hands an algorithm whatever problem it was given, and as many streams as `draws`
    # has entries.
    # as many entries as there are streams, where Draws names the three of two levels
    algorithm = Algorithm(_init, Bound("multilevel", _step, project=bound), counts)  # type: ignore[arg-type]
    leaves = ({n: fixed[n] for n in names[:-1]}, fixed[upper])
    functions = {
        f"objective of level {name!r}": (
            system.objectives[name],
            (floats, None, contexts[name]._replace(model=now.get(name))),
        )
        for name in names
    }
    named = {f"data[{name!r}]": source for name, source in sources.items()}
    return drive(
        ready(
            system,
            algorithm,
            named,
            start,
            floats[upper],
            leaves,
            key,
            state,
            value.dtype,
            options,
            functions,
        )
    )


def _draw_of(level: Level, source: Any) -> Any:
    """The draw of a level's source; an iterable is told what the level takes of it."""
    if not isinstance(source, Stream):
        return source_draw(source)
    steps = 0 if level.freeze else as_solver(level).steps if level.hypergradient is not None else 1
    source.take, source.every = steps, level.every
    if level.hypergradient is None:
        return source_draw(source)
    return Bound("window", level_windowed, take=steps, every=level.every)


def _projected(outer: PyTree, *, fn: Callable[..., Any], fixed: Any) -> Any:
    return tree.partition(fn(tree.combine(outer, fixed)))[0]
