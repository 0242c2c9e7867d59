"""The gradient of the top level through all levels below it, and the driver that follows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import check, tree
from bilevax._core import optimizer
from bilevax.base import Algorithm, Bound, Ctx, Estimate, Feed, InnerState, PyTree, StepInfo
from bilevax.checkpoint import Checkpointing
from bilevax.data import Source, Stream, as_source, same
from bilevax.hypergradient._solve import forward
from bilevax.multilevel import joint, nested
from bilevax.multilevel.level import Level, System, as_solver, as_system, checked, method_of, split_params
from bilevax.results import RESULTS, first, unless
from bilevax.run.metrics import Metrics, check_metrics
from bilevax.run.solution import Solution
from bilevax.sharding import Sharding
from bilevax.solve import RunState, check_options, first_context, launch, source_draw

# ---- the reverse sweep


class Sweep(NamedTuple):
    """One gradient of the top level and what it leaves behind.

    Attributes:
      value: the top objective at the solved levels.
      grad: its total derivative.
      solved: the states that `value` belongs to, by level name.
      states: the states to go on from: `solved`, but for levels that only looked ahead.
      methods: the methods' states, by level name.
      info: scalars, those of a level as ``"name/entry"``, and ``code`` and ``grad_norm``.
      aux: the top objective's aux.
    """

    value: Any
    grad: PyTree
    solved: dict[str, InnerState]
    states: dict[str, InnerState]
    methods: dict[str, PyTree]
    info: dict[str, Any]
    aux: PyTree


def sweep(system: System, states: dict[str, InnerState], methods: dict[str, PyTree], outer: PyTree, feeds: dict[str, Feed]) -> Sweep:
    """Solve the levels, each after those that it reads, and pull the top objective's cotangents back, each before those.

    ``w_j = ∂F_top/∂y_j + Σ_k (∂y_k/∂y_j)' w_k`` over the levels k that read j; one pullback a level, none where nothing arrives or nothing moves.
    """
    graph, top = system.graph, system.graph.top
    states, methods = dict(states), dict(methods)
    data = {name: feed.data for name, feed in feeds.items()}
    env = {name: state.params for name, state in states.items()} | {top.name: outer}
    ahead: dict[str, InnerState] = {}
    pullbacks: dict[str, Callable] = {}
    infos: dict[str, dict] = {}
    for name in top.nested:
        node, side = graph[name], nested.lower(system, name)
        given = {n: env[n] for n in node.live}
        rest = lax.stop_gradient({n: v for n, v in env.items() if n != name and n not in given})
        feed = Feed((data, rest), feeds[name].key, feeds[name].step)
        start = nested.start_state(system, name, states)
        if node.live:
            method = joint.adapted(system, name)
            solution, pullbacks[name] = method.vjp(side, start, given, feed, nested.hyper_context(side, feed), methods[name])
        else:
            solution, infos[name] = forward(side, start, given, feed)
        if system.look_ahead[name]:
            one, _ = side.run(*lax.stop_gradient((start, given, feed)), 0, 1)
            ahead |= nested.end_states(name, lax.stop_gradient(one))
        env[name] = solution.params
        states |= nested.end_states(name, solution)

    moved = {n: env[n] for n in (*(n for n in top.uses if n in pullbacks), top.name)}
    ctx = system.draws[top.name](feeds[top.name], 0)._replace(model=None)

    def value_of(moved):
        return system.objectives[top.name]({**env, **moved}, None, ctx)

    (value, (_, aux)), cotangents = jax.value_and_grad(value_of, has_aux=True)(moved)
    for name in reversed(top.nested):
        if name not in pullbacks or name not in cotangents:
            continue
        found, _, methods[name], infos[name] = pullbacks[name](cotangents[name])
        for n, cotangent in found.items():
            cotangents[n] = tree.add(cotangents[n], cotangent) if n in cotangents else cotangent
    grad = cotangents[top.name]
    return Sweep(value, grad, states, {**states, **ahead}, methods, _report(system, infos, value, grad), aux)


def _report(system: System, infos: dict[str, dict], value, grad) -> dict[str, Any]:
    order = [name for name in system.graph.top.nested if name in infos]
    out = {f"{name}/{entry}": a for name in order for entry, a in infos[name].items() if entry != "code"}
    grad_norm = tree.norm(grad)
    codes = [infos[name]["code"] for name in order]
    code = first(
        *(jnp.where(c == RESULTS.inner_nonfinite, c, jnp.int32(0)) for c in codes),
        unless(jnp.isfinite(value), RESULTS.outer_nonfinite),
        *codes,
        *(unless(jnp.isfinite(a), RESULTS.adjoint_nonfinite) for entry, a in out.items() if entry.endswith("/inner_grad_norm")),
        unless(jnp.isfinite(grad_norm), RESULTS.hypergradient_nonfinite),
    )
    return {**out, "grad_norm": grad_norm, "code": code}


# ---- value_and_multilevel_grad


class MultilevelEstimateState(NamedTuple):
    """What the next estimate starts from, by level name: optimizers' states, models' states, methods' states; and draws done."""

    opt: dict[str, PyTree]
    model: dict[str, PyTree]
    method: dict[str, PyTree]
    step: Any


class MultilevelGradFn:
    """What `value_and_multilevel_grad` returns: call it, or make a first state with `init`."""

    def __init__(self, levels: Sequence[Level]):
        self.levels = checked(levels)

    def __repr__(self) -> str:
        return f"value_and_multilevel_grad({list(self.levels)!r})"

    def init(self, params: dict[str, PyTree], *, model_state: dict[str, PyTree] | None = None) -> MultilevelEstimateState:
        """A first `state` for these parameters. Passing it from the start keeps one trace, where ``state=None`` and then a state make two.

        Args:
          params: dict by level name.
          model_state: initial model states of stateful objectives, by level name.

        Returns:
          A `MultilevelEstimateState`.
        """
        floats, fixed = split_params(self.levels, params)
        states, methods = first_states(self.levels, floats, check_names(model_state, [level.name for level in self.levels], "model_state"))
        opt = {name: state.opt for name, state in states.items()}
        return MultilevelEstimateState(opt, {name: state.model for name, state in states.items()}, methods, jnp.zeros((), jnp.int32))

    def __call__(
        self,
        params: dict[str, PyTree],
        batches: dict[str, PyTree] | None = None,
        *,
        state: MultilevelEstimateState | None = None,
        key: jax.Array | None = None,
    ) -> Estimate:
        """Value and gradient of the top level at `params`; see `value_and_multilevel_grad`."""
        floats, fixed = split_params(self.levels, params)
        names = [level.name for level in self.levels]
        batches = {n: jax.tree.map(jnp.asarray, b) for n, b in check_names(batches, names, "batches").items()}
        models = {} if state is None else state.model
        system = self.system(floats, fixed, batches, key, models)
        if state is None:
            states, methods = first_states(self.levels, floats, {})
            step = jnp.zeros((), jnp.int32)
        else:
            states = {n: InnerState(floats[n], state.opt[n], state.model[n]) for n in names[:-1]}
            methods, step = state.method, state.step
        zero = jnp.zeros((), jnp.int32)
        feeds = {n: Feed(batches.get(n), None if key is None else jax.random.fold_in(key, i), zero) for i, n in enumerate(names)}
        out = sweep(system, states, methods, floats[names[-1]], feeds)
        new_state = MultilevelEstimateState(
            {n: s.opt for n, s in out.states.items()}, {n: s.model for n, s in out.states.items()}, out.methods, step + 1
        )
        solved = {n: tree.combine(s.params, fixed[n]) for n, s in out.states.items()}
        grad = tree.combine(out.grad, jax.tree.map(lambda a: None, fixed[names[-1]]))
        return Estimate(out.value, grad, solved, new_state, out.info, out.aux)

    def system(self, floats: dict, fixed: dict, batches: dict, key: Any, models: dict) -> System:
        """The levels bound to these shapes, with the graph found from them."""
        _check_key(self.levels, key, [])
        contexts = {level.name: Ctx(batches.get(level.name), key) for level in self.levels}
        return as_system(self.levels, floats, fixed, {level.name: same for level in self.levels}, contexts, models, joint.attached)


def check_names(given: Any, names: Sequence[str], argument: str) -> dict:
    """A dict by level name; None is an empty one."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise TypeError(f"{argument}: got {check.describe(given)}; expected a dict by level name, of {list(names)}.")
    for name in given:
        if name not in names:
            raise ValueError(f"{argument}: got the key {name!r}; expected level names: {list(names)}.")
    return given


def first_states(levels: Sequence[Level], params: dict[str, PyTree], models: dict) -> tuple[dict[str, InnerState], dict[str, PyTree]]:
    """Fresh optimizer and method states of all levels but the top one."""
    states, methods = {}, {}
    for level in levels[:-1]:
        name = level.name
        opt, methods[name] = tree.strong((as_solver(level).init(params[name]), method_of(level).init(params[name])))
        states[name] = InnerState(params[name], opt, None if models.get(name) is None else tree.strong(models[name]))
    return states, methods


def value_and_multilevel_grad(levels: Sequence[Level]) -> MultilevelGradFn:
    r"""The top objective at the solved levels below it, and its total derivative: `value_and_hypergrad` for any number of levels.

    .. math::
        w_j = \nabla_{y_j} f + \sum_{k \text{ reads } j} (\partial y_k / \partial y_j)^\top w_k, \qquad
        \nabla F = \nabla_x f + \sum_{j \text{ reads } x} (\partial y_j / \partial x)^\top w_j

    Who reads whom is found from the objectives (`explain` prints it); so is whether a lower level is a constant of another's problem (a chain) or
    reacts to it and is solved inside it (nested). Every level is pulled back once, after all levels that read it.

    Args:
      levels: two or more `Level`, lowest first. Each but the top one has a solver and a method.

    Returns:
      ``fn(params, batches=None, *, state=None, key=None) -> Estimate``, free to be jitted, vmapped and scanned, with ``fn.init(params,
      model_state=)`` for a first state. `params` and `batches` are dicts by level name; `params` says where each level starts. ``Estimate.grad`` is
      that of the top level, ``Estimate.inner_params`` a dict of the levels below as solved, ``Estimate.info`` has the entries of each level's
      method as ``"name/entry"``. A level that only others' objectives hold is returned as those left it.

    Raises:
      TypeError, ValueError: for arguments that cannot work, naming the level; for a level that nobody reads; for a method that needs a second
        derivative through a level whose method gives only one.

    Example:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> descent, method = bx.inner.optax(optax.sgd(0.2), 30), bx.hypergradient.implicit()
      >>> levels = [
      ...     bx.Level("z", lambda p, batch: (p["z"] - p["y"]) ** 2, solver=descent, hypergradient=method),
      ...     bx.Level("y", lambda p, batch: (p["y"] - p["x"]) ** 2 + p["z"] ** 2, solver=descent, hypergradient=method),
      ...     bx.Level("x", lambda p, batch: (p["y"] - 1.0) ** 2, solver=optax.sgd(0.1)),
      ... ]
      >>> fn = bx.value_and_multilevel_grad(levels)
      >>> round(float(fn({"z": 0.0, "y": 0.0, "x": 4.0}).grad), 3)  # y = x / 2, since z follows y
      1.0

    Source: the levels' best responses compose by the implicit function theorem; Choe et al., "Betty: an automatic differentiation library for
    multilevel optimization" (ICLR 2023), on graphs of levels.
    """
    return MultilevelGradFn(levels)


# ---- solve_multilevel


class MultilevelState(NamedTuple):
    """Where a multilevel run stands: the lower levels' states (an `InnerState` of dicts by level name), the top level, its optimizer, the methods."""

    inner: InnerState
    outer: PyTree
    outer_opt: PyTree
    method: dict[str, PyTree]


def _packed(states: dict[str, InnerState]) -> InnerState:
    return InnerState(*({name: state[i] for name, state in states.items()} for i in range(3)))


def _init(problem: System, inner: InnerState, outer: PyTree) -> MultilevelState:
    opt = {name: solver.init(inner.params[name]) for name, solver in problem.solvers.items()}
    methods = {name: joint.adapted(problem, name).init(inner.params[name]) for name in problem.solvers}
    return MultilevelState(inner._replace(opt=opt), outer, optimizer.init(problem.optimizer, outer), methods)


def _step(problem: System, state: MultilevelState, feeds: tuple[Feed, ...], *, project) -> tuple[MultilevelState, StepInfo]:
    states = {name: InnerState(*(part[name] for part in state.inner)) for name in problem.solvers}
    out = sweep(problem, states, state.method, state.outer, dict(zip(problem.graph.names, feeds, strict=True)))
    updates, opt = optimizer.update(problem.optimizer, out.grad, state.outer_opt, state.outer, value=out.value, grad=out.grad)
    outer = optimizer.apply(state.outer, updates)
    if project is not None:
        outer = project(outer)
    diagnostics = {k: v for k, v in out.info.items() if k not in ("code", "grad_norm")}
    info = StepInfo(out.value, out.info["grad_norm"], (_packed(out.solved), state.outer), out.info["code"], diagnostics, out.aux)
    return MultilevelState(_packed(out.states), outer, opt, out.methods), info


def solve_multilevel(
    levels: Sequence[Level],
    params: dict[str, PyTree],
    *,
    data: dict[str, Any] | None = None,
    num_steps: int = 100,
    key: jax.Array | None = None,
    project: Callable[[PyTree], PyTree] | None = None,
    model_state: dict[str, PyTree] | None = None,
    metrics: Metrics | Callable | None = None,
    tol: float | None = None,
    keep: str = "best",
    state: RunState | None = None,
    callbacks: Sequence[Callable] = (),
    progress: bool = False,
    checkpoint: Checkpointing | None = None,
    sharding: Sharding | None = None,
    on_failure: str = "stop",
    throw: bool = True,
) -> Solution:
    """Minimise the top level's objective over the solutions of the levels below it.

    In each step every level takes its solver's steps from where it stood, after the levels that it reads; then the gradient of
    `value_and_multilevel_grad` moves the top level. The driver is that of `solve_bilevel`, and so is what is not explained here.

    Args:
      levels: two or more `Level`, lowest first; the top level's solver is the optax transformation that moves it.
      params: dict by level name: where each starts.
      data: dict by level name, each entry as in `solve_bilevel`; levels without one get ``batch=None``. Inner steps and second-order products draw
        apart. A level inside another's objective cannot take an iterable, since how often it is solved is not known on the host.
      num_steps: steps of the top level.
      key: PRNG key; needed where data is sampled or an objective is keyed.
      project: of the top level's parameters, after each of its steps.
      model_state: initial model states of stateful objectives, a dict by level name.
      metrics: as in `solve_bilevel`; called with the dict of lower levels, the top level, and the data.
      tol: as in `solve_bilevel`.
      keep: as in `solve_bilevel`.
      state: as in `solve_bilevel`.
      callbacks: as in `solve_bilevel`.
      progress: as in `solve_bilevel`.
      checkpoint: as in `solve_bilevel`.
      sharding: as in `solve_bilevel`: `sharding.data_parallel()`, `sharding.fsdp()` or `sharding.by_path(...)`.
      on_failure: as in `solve_bilevel`.
      throw: as in `solve_bilevel`.

    Returns:
      A `Solution`: ``inner_params`` is a dict of the lower levels, ``outer_params`` the top level. The history has each level's diagnostics as
      ``"name/entry"``.

    Raises:
      TypeError, ValueError: for arguments that cannot work, before anything is compiled.
      SolveError: if the run fails and `throw`.

    Example:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> descent, method = bx.inner.optax(optax.sgd(0.2), 3), bx.hypergradient.implicit()
      >>> levels = [
      ...     bx.Level("z", lambda p, batch: (p["z"] - p["y"]) ** 2, solver=descent, hypergradient=method),
      ...     bx.Level("y", lambda p, batch: (p["y"] - p["x"]) ** 2 + p["z"] ** 2, solver=descent, hypergradient=method),
      ...     bx.Level("x", lambda p, batch: (p["y"] - 1.0) ** 2, solver=optax.sgd(0.5)),
      ... ]
      >>> solution = bx.solve_multilevel(levels, {"z": 0.0, "y": 0.0, "x": 4.0}, num_steps=60)
      >>> round(float(solution.outer_params), 2)
      2.0
    """
    levels = checked(levels)
    options = check_options(
        num_steps, metrics, tol, keep, callbacks, progress, throw, on_failure=on_failure, checkpoint=checkpoint, sharding=sharding
    )
    if state is not None and not isinstance(state, RunState):
        raise TypeError(f"state: got {check.describe(state)}; expected solution.state of an earlier run, or None.")
    if project is not None and not callable(project):
        raise TypeError(f"project: got {check.describe(project)}; expected a function of the top level's parameters, or None.")
    names = [level.name for level in levels]
    upper = names[-1]
    given = check_names(data, names, "data")
    sources = {name: as_source(given.get(name), f"data[{name!r}]") for name in names}
    models = {n: check.arrays(m, f"model_state[{n!r}]") for n, m in check_names(model_state, names, "model_state").items()}
    run_key = key if state is None else state.key
    _check_key(levels, run_key, [n for n, s in sources.items() if isinstance(s, Source) and s.keyed])
    floats, fixed = split_params(levels, params)
    for name in names:
        check.finite(floats[name], f"params[{name!r}]")
    contexts = {name: first_context(source, run_key) for name, source in sources.items()}
    now = models if state is None else state.algorithm.inner.model
    system = as_system(levels, floats, fixed, {n: source_draw(s) for n, s in sources.items()}, contexts, now, joint.attached)
    inside = {n for name in names[:-1] for n in system.graph[name].held}
    for name, source in sources.items():
        if isinstance(source, Stream) and name in inside:
            raise ValueError(
                f"data[{name!r}]: got an iterable for a level that is solved inside another one's objective; expected arrays, data.minibatches of "
                "them, or a function (key, step) -> batch."
            )
    model = {n: models.get(n) for n in names[:-1]}
    start = InnerState({n: floats[n] for n in names[:-1]}, {}, model)
    if options.metrics is not None:
        check_metrics(options.metrics, start.params, floats[upper], model, {"value", "grad_norm", "code", "aux"})
    value = jax.eval_shape(lambda p, ctx: system.objectives[upper](p, None, ctx)[0], floats, contexts[upper])
    draws = (*(solver.steps + 1 for solver in system.solvers.values()), 1)
    bound = None if project is None else Bound("project", _projected, fn=project, fixed=fixed[upper])
    # The driver hands an algorithm whatever problem it was given, and as many streams as `draws` has entries.
    algorithm = Algorithm(_init, Bound("multilevel", _step, project=bound), draws)  # type: ignore[arg-type]
    leaves = ({n: fixed[n] for n in names[:-1]}, fixed[upper])
    return launch(system, algorithm, tuple(sources.values()), start, floats[upper], leaves, key, state, value.dtype, options)


def _projected(outer, *, fn, fixed):
    return tree.partition(fn(tree.combine(outer, fixed)))[0]


def _check_key(levels: Sequence[Level], key, sampled: list[str]) -> None:
    keyed = [level.name for level in levels if getattr(level.objective, "keyed", False)]
    if key is None and (keyed or sampled):
        cause = f"the objective of level {keyed[0]!r} takes a key" if keyed else f"the data of level {sampled[0]!r} is sampled"
        raise ValueError(f"key: got None although {cause}; expected a PRNG key. Try jax.random.key(0).")
    if key is not None:
        check.is_key(key)
