"""solve_game: the driver's run along the players' own gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import check, tree
from bilevax._captured import hoisted
from bilevax._core import optimizer
from bilevax._core.transfers import by_intent
from bilevax.base import (
    Algorithm,
    Bound,
    Draw,
    Feed,
    InnerSolver,
    InnerState,
    Objective,
    PyTree,
    StepInfo,
    objective,
)
from bilevax.checkpoint import Checkpointing
from bilevax.functions import evaluate
from bilevax.games.plays import Play, extragradient
from bilevax.multilevel import Level
from bilevax.multilevel.givens import givens
from bilevax.multilevel.level import check_names
from bilevax.results import RESULTS, first, unless
from bilevax.run.chunk import drive
from bilevax.run.driver import ready
from bilevax.run.metrics import Metrics, check_metrics
from bilevax.run.options import check_options
from bilevax.run.solution import Solution
from bilevax.run.state import RunState
from bilevax.run.watch import Callback
from bilevax.run.window import first_context, source_draw
from bilevax.sharding import Sharding


class Game(NamedTuple):
    """The players as compiled code is given them, by name."""

    objectives: dict[str, Objective]  # (params, None, ctx), on floating-point leaves
    optimizers: dict[str, Any]
    draws: dict[str, Draw]
    projections: dict[str, Any]

    @property
    def separable(self) -> bool:
        """Whether devices may run it on tasks of their own, without the others."""
        return False

    @property
    def stream_draws(self) -> tuple[Draw | None, ...]:
        """The draw of each player's stream, where it may find out its order beforehand: none needs
        to, for one batch a step.
        """
        return (None,) * len(self.draws)

    def with_objectives(self, change: Callable[[Objective], Objective]) -> Game:
        """The same players with changed objectives."""
        return self._replace(objectives={name: change(fn) for name, fn in self.objectives.items()})

    def feeds(self, streams: tuple[Feed, ...], key: Any, step: Any, done: Any) -> tuple[Feed, ...]:
        """A step's streams: one a player."""
        return streams


class GameState(NamedTuple):
    """Where a game stands: all players' parameters (``outer``), their optimizers' states, what the
    play remembers.
    """

    inner: InnerState
    outer: dict[str, PyTree]
    opts: dict[str, PyTree]
    memory: PyTree


def _init(problem: Game, inner: InnerState, outer: dict[Any, Any], *, play: Play) -> GameState:
    opts = {name: optimizer.init(opt, outer[name]) for name, opt in problem.optimizers.items()}
    return GameState(inner, outer, opts, play.init(outer))


def _step(
    problem: Game,
    state: GameState,
    feeds: tuple[Feed, ...],
    *,
    play: Play,
    names: tuple[str, ...],
) -> tuple[GameState, StepInfo]:
    # Compiled code is given dicts in the order of their keys, streams in that of the players.
    contexts = {name: problem.draws[name](feed, 0) for name, feed in zip(names, feeds, strict=True)}

    def field(params):
        directions, report = {}, {}
        for name, fn in problem.objectives.items():

            def own(mine, name=name, fn=fn):
                return fn({**params, name: mine}, None, contexts[name])

            (value, (_, aux)), directions[name] = jax.value_and_grad(own, has_aux=True)(
                params[name]
            )
            report[name] = (value, aux)
        return directions, report

    def move(params, directions, opts):
        moved, kept = {}, {}
        for name, opt in problem.optimizers.items():
            updates, kept[name] = optimizer.update(opt, directions[name], opts[name], params[name])
            moved[name] = optimizer.apply(params[name], updates)
            if name in problem.projections:
                moved[name] = problem.projections[name](moved[name])
        return moved, kept

    params, opts, memory, (directions, report) = play.step(
        field, move, state.outer, state.opts, state.memory
    )
    norms = {name: tree.norm(direction) for name, direction in directions.items()}
    norm = tree.norm(directions)
    value, aux = report[names[-1]]
    finite = jnp.all(jnp.stack([jnp.isfinite(value) for value, _ in report.values()]))
    code = first(
        unless(finite, RESULTS.outer_nonfinite),
        unless(jnp.isfinite(norm), RESULTS.hypergradient_nonfinite),
    )
    diagnostics = {f"{name}/value": value for name, (value, _) in report.items()} | {
        f"{name}/grad_norm": size for name, size in norms.items()
    }
    info = StepInfo(value, norm, (state.inner, state.outer), code, diagnostics, aux)
    return GameState(state.inner, params, opts, memory), info


@by_intent
def solve_game(
    levels: Sequence[Level],
    params: dict[str, PyTree],
    *,
    play: Play | None = None,
    data: dict[str, Any] | None = None,
    num_steps: int = 100,
    key: jax.Array | None = None,
    project: dict[str, Callable[[PyTree], PyTree]] | None = None,
    metrics: Metrics | Callable[..., Any] | None = None,
    tol: float | None = None,
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
    r"""Let players move at once until no one gains by moving alone: a Nash equilibrium of their
    objectives.

    .. math::
        z_i^* \in \operatorname{argmin}_{z_i} f_i(z_i, z_{-i}^*) \quad
        \text{for every player } i, \qquad v(z) = (\nabla_{z_i} f_i)_i

    Each player minimizes; who maximizes has the objective with the other sign. The players are
    levels, as `solve_multilevel` takes them: there the upper one counts on the lower one's answer
    (a Stackelberg game), here nobody counts on anything (hypergradients are left out). What is
    reached is a stationary point of the play, which the history judges: ``grad_norm`` is the norm
    of the field. The driver is that of `solve_bilevel`, and so is what is not explained here.

    Args:
      levels: two or more `Level`, in any order. A player's `solver` is the optax transformation
        that moves it (or `inner.optax` of one); `games.mirror` for weights on a simplex.
      params: dict by player's name: where each starts.
      play: how they move; default `games.extragradient()`.
      data: dict by player's name, each entry as in `solve_bilevel`.
      num_steps: steps of all players.
      key: PRNG key; needed where data is sampled or an objective is keyed.
      project: dict by player's name: functions that bring a player's parameters into their feasible
        set after each move.
      metrics: as in `solve_bilevel`; called with None, the dict of players, and the data.
      tol: stop where the norm of the field is at most `tol` times its first.
      state: as in `solve_bilevel`.
      callbacks: as in `solve_bilevel`.
      progress: as in `solve_bilevel`.
      checkpoint: as in `solve_bilevel`.
      sharding: as in `solve_bilevel`.
      on_failure: as in `solve_bilevel`.
      read_ahead: as in `solve_bilevel`.
      strict: as in `solve_bilevel`.
      throw: as in `solve_bilevel`.

    Returns:
      A `Solution` whose ``outer_params`` is the dict of all players, after the last step. ``value``
      in the history is the last player's objective; every player has ``"name/value"`` and
      ``"name/grad_norm"``.

    Raises:
      TypeError, ValueError: for arguments that cannot work, before anything is compiled.
      SolveError: if the run fails and `throw`.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> players = [
      ...     bx.Level("x", lambda p, batch: p["x"] * p["y"] + p["x"], solver=optax.sgd(0.3)),
      ...     bx.Level("y", lambda p, batch: -p["x"] * p["y"], solver=optax.sgd(0.3)),
      ... ]
      >>> out = bx.games.solve_game(players, {"x": 1.0, "y": 1.0}, num_steps=400)
      >>> [round(float(out.outer_params[name]), 3) + 0.0 for name in ("x", "y")]
      [0.0, -1.0]

    Source: of the plays, there. On the two kinds of equilibrium: Fiez, Chasnov and Ratliff,
    "Implicit learning dynamics in Stackelberg games" (ICML 2020).
    """
    names = _checked(levels)
    play = extragradient() if play is None else play
    if not isinstance(play, Play):
        raise TypeError(
            f"play: got {check.describe(play)}; expected one of bx.games. Try "
            "bx.games.extragradient()."
        )
    options = check_options(
        num_steps, metrics, tol, "last", callbacks, progress, throw,
        on_failure=on_failure, checkpoint=checkpoint, sharding=sharding, read_ahead=read_ahead,
        strict=strict, name="solve_game",
    )  # fmt: skip
    if sharding is not None and (sharding.apart or sharding.mean):
        got = "tasks()" if sharding.apart else "mean=True"
        raise ValueError(
            f"sharding: got {got} for a game; expected data_parallel(), fsdp() or by_path(...) "
            "there."
        )
    projections = check_names(project, names, "project")
    for name, fn in projections.items():
        if not callable(fn):
            raise TypeError(
                f"project[{name!r}]: got {check.describe(fn)}; expected a function of the player's "
                "parameters."
            )
    sources, floats, fixed, run_key = givens(levels, params, data, key, state)
    contexts = {name: first_context(sources[name], run_key) for name in names}
    objectives = {}
    for level in levels:
        fn = objective(level.objective)
        bound = dataclasses.replace(fn, fn=Bound(fn.name, _bound, fn=fn.fn, fixed=fixed))
        evaluate(bound, f"Level {level.name!r}, objective", floats, None, contexts[level.name])
        objectives[level.name] = hoisted(bound, floats, None, contexts[level.name])
    held = {
        name: Bound("project", _projected, fn=fn, fixed=fixed[name])
        for name, fn in projections.items()
    }
    game = Game(
        objectives,
        {level.name: _optimizer(level) for level in levels},
        {n: source_draw(s) for n, s in sources.items()},
        held,
    )
    if options.metrics is not None:
        measured = check_metrics(
            options.metrics, None, floats, None, {"value", "grad_norm", "code", "warnings", "aux"}
        )
        options = options._replace(metrics=measured)
    value = jax.eval_shape(
        lambda p, ctx: objectives[names[-1]](p, None, ctx)[0], floats, contexts[names[-1]]
    )
    algorithm = Algorithm(
        Bound("game", _init, play=play),
        Bound("game", _step, play=play, names=tuple(names)),
        # a stream a player, where Draws names the three of two levels
        (1,) * len(names),  # type: ignore[arg-type]
    )
    functions = {
        f"objective of player {name!r}": (objectives[name], (floats, None, contexts[name]))
        for name in names
    }
    named = {f"data[{name!r}]": source for name, source in sources.items()}
    return drive(
        ready(
            game,
            algorithm,
            named,
            InnerState(None),
            floats,
            (None, fixed),
            key,
            state,
            value.dtype,
            options,
            functions,
        )
    )


def _checked(levels: Any) -> list[str]:
    """The players' names."""
    if (
        isinstance(levels, Level)
        or not isinstance(levels, Sequence)
        or not all(isinstance(level, Level) for level in levels)
    ):
        raise TypeError(
            f"levels: got {check.describe(levels)}; expected a sequence of Level, a player each."
        )
    if len(levels) < 2:
        raise ValueError(
            f"levels: got {len(levels)}; expected two or more. One player alone is an ordinary "
            "optimization."
        )
    names = [level.name for level in levels]
    for level in levels:
        if names.count(level.name) > 1:
            raise ValueError(
                f"levels: got the name {level.name!r} {names.count(level.name)} times; expected a "
                "name of its own for each player."
            )
        if level.every > 1 or level.look_ahead or level.freeze:
            raise ValueError(
                f"Level {level.name!r}: got every={level.every}, look_ahead={level.look_ahead}, "
                f"freeze={level.freeze}; expected none of them for a "
                "player, who moves with all others. A player that stands still is a constant: "
                "leave it out."
            )
        if getattr(level.objective, "stateful", False):
            raise ValueError(
                f"Level {level.name!r}, objective: got a stateful one; expected none in a game. "
                "Try frozen statistics."
            )
    return names


def _optimizer(level: Level) -> Any:
    """The gradient transformation that moves a player."""
    if not isinstance(level.solver, InnerSolver):
        return level.solver
    if level.solver.update is None or level.solver.sees_outer:
        raise TypeError(
            f"Level {level.name!r}, solver: got {level.solver!r}; expected an optax "
            "transformation. Try optax.sgd(0.1)."
        )
    return _Transformation(level.solver.init, level.solver.update)


class _Transformation(NamedTuple):
    init: Any
    update: Any


def _bound(params: PyTree, _: Any, batch: Any, *, fn: Any, fixed: Any, **keyed: Any) -> Any:
    return fn({name: tree.combine(params[name], fixed[name]) for name in fixed}, batch, **keyed)


def _projected(mine: Any, *, fn: Any, fixed: Any) -> Any:
    return tree.partition(fn(tree.combine(mine, fixed)))[0]
