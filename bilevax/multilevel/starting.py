"""Where a level's solve begins: at a function of the other levels' variables, in each solve
anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from bilevax import check, tree
from bilevax._core.jaxpr import reads
from bilevax.base import Hypergradient, InnerSolver, InnerState, Objective, PyTree
from bilevax.multilevel.graph import dependencies
from bilevax.multilevel.level import Level
from bilevax.multilevel.statistics import Division, floats_of, others_of
from bilevax.starts import Start, as_start, takes_states

_STREAM = 0x5354  # apart from the other uses of a level's key


def starts_of(
    levels: Sequence[Level],
    params: dict[str, PyTree],
    fixed: dict[str, PyTree],
    division: Division,
    keys: dict[Any, Any],
) -> dict[str, Start]:
    """The starts of the levels that have one, tried on these shapes."""
    own = division.own
    out = {}
    for level in levels:
        if level.start is None:
            continue
        name = level.name
        owners = tuple(n for n in division.owners if n != name) if takes_states(level.start) else ()
        start = as_start(level.start, _others(fixed, name), fixed[name], owners)
        begun, moved = jax.eval_shape(
            lambda others, key, states, start=start: start(others, key, states),
            _others(params, name),
            keys[name],
            division.states_of(owners),
        )
        check.same_structure(begun, params[name], f"Level {name!r}, start", f"params[{name!r}]")
        if moved is not None:
            check.same_structure(
                moved, own[name], f"Level {name!r}, start's model state", f"model_state[{name!r}]"
            )
        out[name] = start
    return out


def _others(variables: dict[str, PyTree], name: str) -> dict[str, PyTree]:
    return {n: value for n, value in variables.items() if n != name}


def read_by(
    start: Start, name: str, params: dict[Any, Any], key: Any, division: Division
) -> tuple[set[str], set[str]]:
    """The levels whose variables the start of level `name` depends on, and those whose statistics
    it does.
    """

    def run(given, key):
        variables = {n: value for n, value in given.items() if n in params}
        states = {n: given[floats_of(n)] for n in start.owners}
        return start(variables, key, states)

    states = {floats_of(n): state for n, state in division.states_of(start.owners).items()}
    found = set(dependencies(run, {**_others(params, name), **states}, key))
    return found & set(params), {n for n in start.owners if floats_of(n) in found}


def refuse_unread(
    starts: dict[str, Start],
    methods: dict[str, Hypergradient],
    objectives: dict[str, Objective],
    params: dict[Any, Any],
    contexts: dict[Any, Any],
    frozen: Sequence[str],
    division: Division,
) -> None:
    """A leaf of the top level that nothing reads; one that a start alone reads, with a method that
    gives starts no derivative.

    Raises:
      ValueError: naming the leaf.
    """
    count = len(jax.tree.leaves(params))  # the contexts may be shapes: they are arguments, too
    known = reads(
        lambda given: [fn(given[0], None, given[1][name])[0] for name, fn in objectives.items()],
        (params, contexts),
    )[:count]

    def paths_read(name):
        others, states = _others(params, name), division.states_of(starts[name].owners)
        paths = [
            jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(others)
        ]
        return {
            p
            for p, flag in zip(
                paths,
                reads(lambda given: starts[name](*given), (others, contexts[name].key, states)),
                strict=False,
            )
            if flag
        }

    read = {name: paths_read(name) for name in starts}
    seen = set().union(*(found for name, found in read.items() if methods[name].sees_init))
    top = list(objectives)[-1]
    for (path, _), flag in zip(jax.tree_util.tree_leaves_with_path(params), known, strict=True):
        place = jax.tree_util.keystr(path)
        blind = [name for name, found in read.items() if place in found]
        if flag or place in seen or path[0].key in frozen:
            continue
        if blind:
            raise ValueError(
                f"Level {blind[0]!r}, start: it depends on params{place}, which no objective "
                f"reads, with {methods[blind[0]]!r}, "
                "which gives the initial point no derivative (an exact solution does not depend on "
                "where it was started): its "
                "gradient would be zero. Try hypergradient.unrolled(), or put a proximal term ‖y − "
                "x‖² into the objective."
            )
        if path[0].key == top:
            raise ValueError(
                f"params{place}: no level's objective reads it, and no start; expected every leaf "
                "of the top level to be read. A value "
                "that a function captured is a constant: use params in the objective."
            )


def begun(
    start: Start | None,
    name: str,
    names: Sequence[str],
    solver: InnerSolver,
    state: InnerState,
    env: dict[Any, Any],
    key: Any,
    sees: bool,
) -> tuple[InnerState, Callable[..., Any] | None]:
    """The state that a solve of level `name` begins with, and the pullback of its cotangent to the
    variables in ``moving``.

    Args:
      start: the level's own; None for one that goes on from `state`.
      name: the level.
      names: all levels.
      solver: the level's.
      state: where it stands.
      env: the variables as they are now.
      key: of this solve.
      sees: whether the start is differentiated.
    """
    if start is None:
        return state, None
    key = None if key is None else jax.random.fold_in(key, _STREAM)
    variables = {n: env[n] for n in names if n != name}
    for n in start.owners:
        variables |= {of(n): env[of(n)] for of in (floats_of, others_of)}

    def begin(moving):
        now = {**variables, **moving}
        states = {n: tree.combine(now[floats_of(n)], now[others_of(n)]) for n in start.owners}
        others = {n: value for n, value in now.items() if n in names}
        params, model = start(others, key, states)
        floats, rest = tree.partition(state.model if model is None else model)
        return (params, floats), rest

    (params, floats), rest = begin({}) if sees else lax.stop_gradient(begin({}))

    def pulled(moving: Sequence[str], cotangent):
        _, reverse, _ = jax.vjp(begin, {n: variables[n] for n in moving}, has_aux=True)
        return reverse(cotangent)[0]

    return state._replace(
        params=params, opt=solver.first(params, None), model=tree.combine(floats, rest)
    ), pulled
