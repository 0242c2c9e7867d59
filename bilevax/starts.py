"""Where each solve starts, and what of the outer parameters anything depends on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from bilevax import tree
from bilevax._core.jaxpr import dependences, reads
from bilevax._core.settings import Static, asks, join, split
from bilevax.base import Bound, Ctx, Feeds, Hypergradient, InnerSolver, InnerState, Problem, PyTree
from bilevax.results import RESULTS, mask_of

_STREAM = 0x5354  # apart from the other uses of a step's own key


# ---- starts


class Start(NamedTuple):
    """A user's start on floating-point leaves: ``(outer, key, states) -> (inner params, model state
    or None)``; `keyed`: it draws; `owners`: of a level's, whose model states it is given.
    """

    run: Callable[..., tuple[PyTree, PyTree]]
    keyed: bool
    owners: tuple[str, ...] = ()

    def __call__(self, outer: PyTree, key: Any = None, states: Any = None) -> tuple[PyTree, PyTree]:
        return self.run(outer, key, states) if self.owners else self.run(outer, key)


def as_start(
    fn: Callable[..., Any],
    outer_fixed: PyTree,
    inner_fixed: PyTree,
    owners: tuple[str, ...] = (),
) -> Start:
    """The start that a user's function makes."""
    keyed = takes_key(fn)
    return Start(
        Bound(
            "inner_init",
            _start,
            fn=fn,
            keyed=keyed,
            outer_fixed=outer_fixed,
            like=_structure(inner_fixed),
        ),
        keyed,
        owners,
    )


def takes_key(fn: Callable[..., Any] | None) -> bool:
    """Whether a start draws: a user's function has a parameter named ``key``."""
    return fn.keyed if isinstance(fn, Start) else _takes(fn, "key")


def takes_states(fn: Callable[..., Any] | None) -> bool:
    """Whether a level's start asks for model states: a parameter named ``model_state``."""
    return _takes(fn, "model_state")


def _takes(fn: Callable[..., Any] | None, name: str) -> bool:
    try:
        return fn is not None and asks(fn, name)
    except (TypeError, ValueError):  # no signature to read
        return False


def _structure(value: PyTree) -> Any:
    return jax.tree.structure(value, is_leaf=lambda a: a is None)


def _start(
    outer: PyTree,
    key: Any = None,
    states: Any = None,
    *,
    fn: Callable[..., Any],
    keyed: bool,
    outer_fixed: PyTree,
    like: Any,
) -> Any:
    given = tree.combine(outer, outer_fixed)
    asked = ({"key": key} if keyed else {}) | ({} if states is None else {"model_state": states})
    out = fn(given, **asked)
    model = None
    if (
        _structure(out) != like
        and isinstance(out, tuple)
        and len(out) == 2
        and _structure(out[0]) == like
    ):
        out, model = out
    return tree.partition(out)[0], model


def started(
    problem: Problem,
    solver: InnerSolver,
    method: Hypergradient,
    inner: InnerState,
    outer: PyTree,
    feeds: Feeds,
) -> Any:
    """The state that a solve begins with, and the pullback of its cotangent to the outer parameters
    (or None).
    """
    init = problem.inner_init
    if init is None:
        return inner, None
    key = None if feeds.key is None else jax.random.fold_in(feeds.key, _STREAM)

    def begin(outer):
        params, model = init(outer, key)
        floats, rest = tree.partition(inner.model if model is None else model)
        return (params, floats), rest

    if not method.sees_init:
        (params, floats), rest = jax.lax.stop_gradient(begin(outer))
        pull = None
    else:
        (params, floats), reverse, rest = jax.vjp(begin, outer, has_aux=True)

        def pull(cotangent):
            seen = cotangent.model if method.sees_model else tree.zeros_like(floats)
            return reverse((cotangent.params if method.sees_model else cotangent, seen))[0]

    state = inner._replace(params=params, model=tree.combine(floats, rest))
    return state._replace(opt=solver.first(params, outer)), pull


# ---- what is read of the outer parameters


class Dependence(NamedTuple):
    """What the objectives take of each leaf of the outer parameters.

    Attributes:
      above: whether the outer objective reads it, and
      direct: has a derivative in it.
      solved: whether the outer objective has a derivative in the lower level's solution or model.
      lower: whether what the lower level solves reads it, and
      through: whether the solution can have a derivative in it.
    """

    above: list[bool]
    direct: list[bool]
    solved: bool
    lower: list[bool]
    through: list[bool]

    @property
    def read(self) -> list[bool]:
        """Whether anything that is solved or minimized reads it."""
        return _either(self.lower, self.above)


def _either(*flags: list[bool]) -> list[bool]:
    return list(map(any, zip(*flags, strict=True)))


def _paths(outer: PyTree) -> list[str]:
    return [
        f"outer_params{jax.tree_util.keystr(path)}"
        for path, _ in jax.tree_util.tree_leaves_with_path(outer)
    ]


def _dependence(
    problem: Problem,
    inner: InnerState,
    outer: PyTree,
    contexts: tuple[Ctx, Ctx],
    mappings: Sequence[Any] = (),
    steps: int = 1,
    stationary: bool = True,
) -> Dependence:
    """Look at the objectives.

    Args:
      problem: both objectives.
      inner: where the lower level stands.
      outer: where the upper level stands.
      contexts: of both objectives.
      mappings: what else says which points are solutions, a constraint, say.
      steps: of a solve, for an outer objective that reads them all.
      stationary: whether solutions are where the inner gradient is zero, so that terms without
        inner parameters play no part in them.

    Raises:
      ValueError: for an outer objective of nothing.
    """
    inner_ctx, outer_ctx = (ctx._replace(model=None) for ctx in contexts)
    params = shown = inner.params
    if problem.outer.trajectory:
        shown = jax.tree.map(lambda a: jax.ShapeDtypeStruct((steps, *a.shape), a.dtype), params)

    def outer_value(read, ctx):
        return (problem.outer(read[1], read[0], ctx._replace(model=read[2]))[0],)

    ((above, differentiable),) = dependences(outer_value, (outer, shown, inner.model), outer_ctx)
    if not any(above):
        raise ValueError(
            "outer_objective: it depends neither on inner_params nor on outer_params; expected a "
            "function to be minimized. "
            "A value that it captured is a constant: use the arguments."
        )
    count = len(jax.tree.leaves(outer))
    direct = differentiable[:count]
    stationary = stationary and not mappings and not all(direct)

    def solved(outer, params, model, ctx):
        ctx = ctx._replace(model=model)
        if stationary:
            return jax.value_and_grad(lambda params: problem.inner(params, outer, ctx)[0])(params)
        adapt = problem.inner.adapt
        held = (m if adapt is None else adapt(m) for m in mappings)
        return ([fn(params, outer, ctx)[0] for fn in (problem.inner, *held)],)

    found = dependences(solved, outer, params, inner.model, inner_ctx)
    lower, through = found[0].read, found[-1].moved
    return Dependence(above[:count], direct, any(differentiable[count:]), lower, through)


def _learned(outer: PyTree, found: Dependence, reacts: list[bool]) -> None:
    """Refuse a leaf whose hypergradient is zero by construction; `reacts` says of each whether the
    lower level's solution can move with it.
    """
    for path, own, reacting in zip(_paths(outer), found.direct, reacts, strict=True):
        if own or (found.solved and reacting):
            continue
        why = (
            "inner_objective: it reads"
            if found.solved
            else "outer_objective: it reads inner_params, and with them"
        )
        raise ValueError(
            f"{why} {path}, through stop_gradient or not at all where derivatives are concerned (a "
            "term without inner_params moves no solution); expected a dependence that can be "
            "differentiated: the hypergradient would be zero. Leave out stop_gradient, use the "
            "arguments in place of captured values, and let inner_params be in the term."
        )


def _read_above(method: Hypergradient, paths: list[str], found: Dependence) -> None:
    """Refuse a leaf of which the outer objective itself has no derivative, where nothing else
    counts.
    """
    for place, own in zip(paths, found.direct, strict=True):
        if not own:
            raise ValueError(
                f"hypergradient: got {method!r}, for which the lower level's solution is a "
                f"constant, and the outer objective itself has no derivative in {place}; expected "
                "one that reads it: its hypergradient would be zero. Try "
                "hypergradient.implicit() or unrolled(), which follow the solution."
            )


def _unread(place: str) -> ValueError:
    return ValueError(
        f"{place}: neither objective reads it, nor the start of the solve, nor the inner solver; "
        "expected every leaf to be read. A value that a function captured, or that an optimizer "
        "was built with, is a constant: use outer_params in the objective, or inner.optax(lambda "
        "outer: optimizer, steps); if every solve begins at it, give inner_init=."
    )


def constant_statistics(problem: Problem, inner: InnerState, outer: PyTree, ctx: Ctx) -> int:
    """Whether the outer objective depends on statistics that the lower level moves, for what takes
    them as constants: the mask of the warning, or zero. `ctx` is of the outer objective.
    """
    if not problem.inner.stateful:
        return 0
    floats, rest = tree.partition(inner.model)

    def value(given):
        floats, rest, params, outer, ctx = given
        return problem.outer(params, outer, ctx._replace(model=tree.combine(floats, rest)))[0]

    given = (floats, rest, inner.params, outer, ctx._replace(model=None))
    return mask_of(RESULTS.statistics_constant) * any(
        reads(value, given)[: len(jax.tree.leaves(floats))]
    )


def linked(problem: Problem, inner: InnerState, outer: PyTree, contexts: tuple[Ctx, Ctx]) -> None:
    """Name the leaves of the outer parameters that an algorithm cannot learn which moves along
    derivatives of both objectives: nothing depends on them, or nothing that has a derivative.

    Raises:
      ValueError: naming the leaf.
    """
    static, dynamic = split(problem)
    _linked.eval_shape(static, dynamic, inner, outer, contexts)


@functools.partial(
    jax.jit, static_argnums=0
)  # for its cache: a second run on the same shapes traces nothing
def _linked(
    static: Static, dynamic: Any, inner: InnerState, outer: PyTree, contexts: tuple[Ctx, Ctx]
) -> None:
    found = _dependence(join(static, dynamic), inner, outer, contexts)
    for place, read in zip(_paths(outer), found.read, strict=True):
        if not read:
            raise _unread(place)
    _learned(outer, found, found.through)


def structure(
    problem: Problem,
    solver: InnerSolver,
    method: Hypergradient,
    inner: InnerState,
    outer: PyTree,
    feeds: Feeds,
) -> None:
    """Name the leaves of the outer parameters that cannot be learned: nothing depends on them, or
    nothing that `method` sees.

    Raises:
      ValueError: naming the leaf.
    """
    ctx = problem.inner_draw(feeds.inner, 0)._replace(model=inner.model)
    outer_ctx = problem.outer_draw(feeds.outer, 0)._replace(model=inner.model)
    paths, params = _paths(outer), inner.params
    found = _dependence(
        problem,
        inner,
        outer,
        (ctx, outer_ctx),
        [mapping for mapping in (method.mapping, solver.constraints) if mapping is not None],
        solver.steps,
        # what only compares values feels every term; a projected step may read what it likes
        stationary=(method.batches > 0 or method.sees_model) and solver.optimality is None,
    )
    if method.constant:
        _read_above(method, paths, found)
        return
    objectives = found.read
    start = [False] * len(paths)
    if problem.inner_init is not None:
        init, key = problem.inner_init, (ctx.key if takes_key(problem.inner_init) else None)
        start = reads(lambda x: init(x, key), outer)

    def one_step(x):
        state = inner._replace(opt=solver.first(params, x))
        return solver.step(problem.inner, state, x, ctx)[0].params

    steps = [False] * len(paths)
    if solver.sees_outer or not all(_either(objectives, start)):
        steps = reads(one_step, outer)
    settings = [False] * len(paths)
    if solver.sees_outer and solver.update is not None:
        zero, update = tree.zeros_like(params), solver.update
        # what sees outer parameters takes them: `sees_outer`, which a type cannot say
        settings = reads(lambda x: update(zero, solver.first(params, x), params, outer=x)[0], outer)  # type: ignore[call-arg]

    for place, known, begun, stepped, setting in zip(
        paths, objectives, start, steps, settings, strict=True
    ):
        if not (known or begun or stepped):
            raise _unread(place)
        if begun and not known and not method.sees_init:
            raise ValueError(
                f"inner_init: the start depends on {place}, which no objective reads, with "
                f"{method!r}, which gives "
                "the initial inner point no derivative (an exact solution does not depend on where "
                "it was started): "
                "its hypergradient would be zero. Try hypergradient.unrolled(), or put a proximal "
                "term ‖y − x‖² into "
                "the inner objective."
            )
        if (setting or (stepped and not known)) and not method.sees_settings:
            raise ValueError(
                f"solver: its settings depend on {place}, with {method!r}, which does not "
                "differentiate the solver's "
                "steps: that part of the hypergradient would be zero. Try "
                "hypergradient.unrolled(), or "
                "hypergradient.forward() for few outer parameters."
            )

    # it differentiates the inner objective
    reacts = found.through if method.batches or method.sees_model else found.lower
    # what only the solver reads
    alone = [stepped and not known for stepped, known in zip(steps, objectives, strict=True)]
    reacts = _either(reacts, start, alone, settings)
    if method.sees_settings and not all(_either(reacts, found.direct)):
        # a line search, say, whose steps feel a term that has no inner parameters
        reacts = _either(reacts, dependences(lambda x: (one_step(x),), outer)[0].moved)
    _learned(outer, found, reacts)
