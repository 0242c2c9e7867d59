"""Where each solve starts, and what of the outer parameters anything depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bilevax import tree
from bilevax._core.jaxpr import dependences, reads
from bilevax._core.settings import parameters
from bilevax.base import Bound, Feeds, Hypergradient, InnerSolver, InnerState, Problem, PyTree

_STREAM = 0x5354  # apart from the other uses of a step's own key


# ---- starts


class Start(NamedTuple):
    """A user's start on floating-point leaves: ``(outer, key) -> (inner params, model state or
    None)``; `keyed`: it draws.
    """

    run: Callable[[PyTree, Any], tuple[PyTree, PyTree]]
    keyed: bool

    def __call__(self, outer: PyTree, key: Any = None) -> tuple[PyTree, PyTree]:
        return self.run(outer, key)


def as_start(fn: Callable[..., Any], outer_fixed: PyTree, inner_fixed: PyTree) -> Start:
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
    )


def takes_key(fn: Callable[..., Any] | None) -> bool:
    """Whether a start draws: a user's function has a parameter named ``key``."""
    if fn is None or isinstance(fn, Start):
        return fn is not None and fn.keyed
    try:
        return "key" in parameters(fn)
    except (TypeError, ValueError):  # no signature to read
        return False


def _structure(value: PyTree) -> Any:
    return jax.tree.structure(value, is_leaf=lambda a: a is None)


def _start(
    outer: PyTree,
    key: Any = None,
    *,
    fn: Callable[..., Any],
    keyed: bool,
    outer_fixed: PyTree,
    like: Any,
) -> Any:
    given = tree.combine(outer, outer_fixed)
    out = fn(given, key=key) if keyed else fn(given)
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
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(outer)]
    params = shown = inner.params
    if problem.outer.trajectory:
        shown = jax.tree.map(lambda a: jax.numpy.broadcast_to(a, (solver.steps, *a.shape)), params)

    def outer_value(given):
        return problem.outer(given[1], given[0], outer_ctx._replace(model=given[2]))[0]

    above, differentiable = dependences(outer_value, (outer, shown, inner.model))
    direct, solved = differentiable[: len(paths)], any(differentiable[len(paths) :])
    if not any(above):
        raise ValueError(
            "outer_objective: it depends neither on inner_params nor on outer_params; expected a "
            "function to be minimized. "
            "A value that it captured is a constant: use the arguments."
        )
    held = [mapping for mapping in (method.mapping, solver.constraints) if mapping is not None]
    functions = [
        problem.inner,
        *(
            mapping if problem.inner.adapt is None else problem.inner.adapt(mapping)
            for mapping in held
        ),
    ]
    lower, through = dependences(lambda x: [fn(params, x, ctx)[0] for fn in functions], outer)
    objectives = list(map(max, zip(lower, above[: len(paths)], strict=True)))
    start = [False] * len(paths)
    if problem.inner_init is not None:
        init, key = problem.inner_init, (ctx.key if takes_key(problem.inner_init) else None)
        start = reads(lambda x: init(x, key), outer)
    steps = [False] * len(paths)
    if solver.sees_outer or not all(map(max, zip(objectives, start, strict=True))):

        def one_step(x):
            state = inner._replace(opt=solver.first(params, x))
            return solver.step(problem.inner, state, x, ctx)[0].params

        steps = reads(one_step, outer)
    settings = [False] * len(paths)
    if solver.sees_outer and solver.update is not None:
        zero, update = tree.zeros_like(params), solver.update
        # what sees outer parameters takes them: `sees_outer`, which a type cannot say
        settings = reads(lambda x: update(zero, solver.first(params, x), params, outer=x)[0], outer)  # type: ignore[call-arg]

    if method.batches or method.sees_model:  # it differentiates the inner objective
        lower = through
    alone = [
        stepped and not known for stepped, known in zip(steps, objectives, strict=True)
    ]  # what only the solver reads
    reacts = [max(flags) for flags in zip(lower, start, alone, settings, strict=True)]

    for path, known, begun, stepped, setting in zip(
        paths, objectives, start, steps, settings, strict=True
    ):
        place = f"outer_params{path}"
        if not (known or begun or stepped):
            raise ValueError(
                f"{place}: neither objective reads it, nor the start of the solve, nor the inner "
                "solver; expected "
                "every leaf to be read. A value that a function captured, or that an optimizer was "
                "built with, is a "
                "constant: use outer_params in the objective, or inner.optax(lambda outer: "
                "optimizer, steps); if every solve begins at it, give inner_init=."
            )
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
    for path, own, reacting in zip(paths, direct, reacts, strict=True):
        if not (own or (solved and reacting)):
            why = (
                "inner_objective: it reads"
                if solved
                else "outer_objective: it reads inner_params, and with them"
            )
            raise ValueError(
                f"{why} outer_params{path}, through stop_gradient or not at all; expected a "
                "dependence that can be differentiated: the "
                "hypergradient would be zero. Leave out stop_gradient, and use the arguments in "
                "place of captured values."
            )
