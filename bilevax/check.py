"""Refusals: what cannot work is said before anything is compiled, with the argument, what came,
what was expected, and what to try.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import functions, tree
from bilevax._captured import hoisted
from bilevax._core import numbers
from bilevax._core.numbers import describe as describe
from bilevax.base import (
    Algorithm,
    Bound,
    Ctx,
    Draw,
    Hypergradient,
    InnerSolver,
    Objective,
    Problem,
    PyTree,
    objective,
)
from bilevax.starts import as_start, takes_key

# ---- parameters


def params(value: PyTree, argument: str) -> None:
    """A pytree of arrays with at least one real floating-point leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(value)
    if not leaves:
        raise ValueError(
            f"{argument}: got {value!r}, which has no leaf; expected a pytree of arrays."
        )
    if not any(leaf.size for _, leaf in leaves):
        raise ValueError(
            f"{argument}: got {functions.shapes(value)}, without an entry; expected at least one "
            "number."
        )
    for path, leaf in leaves:
        place = argument + jax.tree_util.keystr(path)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"{place}: got {describe(leaf)}; expected real numbers. Try its real and imaginary "
                "parts as two leaves."
            )
    if not any(tree.is_float(leaf) for _, leaf in leaves):
        kinds = sorted({str(leaf.dtype) for _, leaf in leaves})
        raise TypeError(
            f"{argument}: got leaves of {', '.join(kinds)} only; expected at least one "
            "floating-point leaf, since nothing else can be learned by "
            "gradient. Try jnp.asarray(value, jnp.float32)."
        )


def arrays(value: PyTree, argument: str) -> PyTree:
    """`value` with strong arrays as leaves, or an error that names the leaf that cannot be one."""
    try:
        leaves = jax.tree_util.tree_leaves_with_path(value)
    except (
        SystemError,
        RecursionError,
        ValueError,
    ) as error:  # one that holds itself, or whose keys have no order
        raise TypeError(
            f"{argument}: got {describe(value)}, which is no pytree ({error}); expected nested "
            "dicts, lists or tuples of arrays."
        ) from error
    for path, leaf in leaves:
        if not isinstance(
            leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)
        ) or getattr(leaf, "dtype", None) == np.dtype(object):
            raise TypeError(
                f"{argument}{jax.tree_util.keystr(path)}: got {describe(leaf)}; expected an array "
                "or a number. Keep functions, strings and "
                "settings out of parameters."
            )
    numbers.arrays(value, argument)
    return tree.strong(value)


def module(value: PyTree, argument: str) -> None:
    """No Flax module (or its state) with more than parameters in it: as a pytree its statistics and
    random streams would stand still, and nobody would switch its modes.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    moving = (nnx.BatchStat, nnx.RngState, nnx.Cache, nnx.Intermediate)
    leaves = jax.tree.leaves(value, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    found = sorted({type(leaf).__name__ for leaf in leaves if isinstance(leaf, moving)})
    if found:
        raise TypeError(
            f"{argument}: got {describe(value)} with {', '.join(found)} in it, which would stand "
            "still; expected parameters alone. Try bx.nn.bilevel(inner, outer, model, ...), which "
            "keeps statistics and random streams and switches the modes."
        )


def batch(value: PyTree, argument: str) -> PyTree:
    """`value` with arrays as leaves, or an error that names the leaf that cannot be one."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        if isinstance(leaf, (str, bytes)) or callable(leaf):
            raise TypeError(
                f"{argument}{jax.tree_util.keystr(path)}: got {describe(leaf)}; expected an array "
                "or a number. Let the objective capture texts, "
                "functions and settings."
            )
    numbers.arrays(value, argument)
    return jax.tree.map(jnp.asarray, value)


def finite(value: PyTree, argument: str) -> None:
    """No NaN or infinity in concrete leaves."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        if (
            isinstance(leaf, jax.core.Tracer)
            or not tree.is_float(leaf)
            or not leaf.is_fully_addressable
        ):
            continue
        with (
            jax.ensure_compile_time_eval()
        ):  # a constant under a transformation is still looked at now
            bad = int(jnp.sum(~jnp.isfinite(leaf)))
        if bad:
            raise ValueError(
                f"{argument}{jax.tree_util.keystr(path)}: got {bad} non-finite of {leaf.size} "
                "values at the start; expected finite numbers."
            )


def bind_fixed(problem: Problem, inner_fixed: PyTree, outer_fixed: PyTree) -> Problem:
    """`problem` on floating-point leaves only: the other leaves ride along as bound values of its
    functions.
    """
    if problem.inner_init is not None:
        problem = problem._replace(
            inner_init=as_start(problem.inner_init, outer_fixed, inner_fixed)
        )
    if not jax.tree.leaves((inner_fixed, outer_fixed)):
        return problem

    def bind(obj: Objective) -> Objective:
        fixed = dict(inner_fixed=inner_fixed, outer_fixed=outer_fixed)
        return dataclasses.replace(
            obj,
            fn=Bound(obj.name, _with_fixed, fn=obj.fn, **fixed),
            adapt=Bound("with_fixed", _adapted, **fixed),
        )

    problem = problem._replace(inner=bind(problem.inner), outer=bind(problem.outer))
    if problem.project is not None:
        problem = problem._replace(
            project=Bound("project", _init_with_fixed, fn=problem.project, outer_fixed=outer_fixed)
        )
    return problem


def _with_fixed(
    inner: PyTree,
    outer: PyTree,
    *args: Any,
    fn: Callable[..., Any],
    inner_fixed: PyTree,
    outer_fixed: PyTree,
    **kwargs: Any,
) -> Any:
    return fn(tree.combine(inner, inner_fixed), tree.combine(outer, outer_fixed), *args, **kwargs)


def _adapted(mapping: Objective, **fixed: Any) -> Objective:
    return dataclasses.replace(mapping, fn=Bound(mapping.name, _with_fixed, fn=mapping.fn, **fixed))


def _init_with_fixed(outer: PyTree, *, fn: Callable[..., Any], outer_fixed: PyTree) -> Any:
    return tree.partition(fn(tree.combine(outer, outer_fixed)))[0]


def captured(
    problem: Problem,
    inner: PyTree,
    outer: PyTree,
    model: PyTree,
    inner_ctx: Ctx,
    outer_ctx: Ctx,
    steps: int = 1,
) -> Problem:
    """`problem` with the traced arrays that its objectives capture bound to them, as values."""
    return problem._replace(
        inner=hoisted(problem.inner, inner, outer, inner_ctx._replace(model=model)),
        outer=hoisted(
            problem.outer,
            seen_by_outer(problem, inner, steps),
            outer,
            outer_ctx._replace(model=model),
        ),
    )


def seen_by_outer(problem: Problem, inner: PyTree, steps: int) -> PyTree:
    """Shapes of what the outer objective is given of the inner level: a point, or those after each
    of `steps`.
    """
    if not problem.outer.trajectory:
        return inner
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((steps, *jnp.shape(a)), a.dtype), inner)


# ---- pieces


def callable_objective(fn: Any, argument: str) -> None:
    """A function, or `objective` of one."""
    if not callable(fn):
        raise TypeError(
            f"{argument}: got {describe(fn)}; expected a function (inner_params, outer_params, "
            "batch) -> scalar, or objective(...) of one."
        )


def problem(
    inner_objective: Callable[..., Any],
    outer_objective: Callable[..., Any],
    inner_draw: Draw,
    hyper_draw: Draw,
    outer_draw: Draw,
    inner_init: Callable[..., Any] | None = None,
    project: Callable[..., Any] | None = None,
) -> Problem:
    """A `Problem` of these functions, each refused by name if it is none."""
    for name, fn in (("inner_objective", inner_objective), ("outer_objective", outer_objective)):
        callable_objective(fn, name)
    for name, optional in (("inner_init", inner_init), ("project", project)):
        if optional is not None and not callable(optional):
            raise TypeError(
                f"{name}: got {describe(optional)}; expected a function of outer_params, or None."
            )
    if inner_init is not None:
        numbers.takes(
            functools.partial(inner_init, key=None) if takes_key(inner_init) else inner_init,
            "inner_init",
            "(outer_params) -> inner_params, or (outer_params, key) -> inner_params",
        )
    if project is not None:
        numbers.takes(project, "project", "(outer_params) -> outer_params")
    if objective(inner_objective).trajectory:
        raise TypeError(
            "inner_objective: got objective(..., trajectory=True); expected it at the outer level "
            "only, which reads the inner level's steps."
        )
    if objective(outer_objective).indexed:
        raise TypeError(
            "outer_objective: got objective(..., indexed=True); expected it at the inner level "
            "only, whose steps have numbers."
        )
    for draw in (inner_draw, hyper_draw, outer_draw):
        if not callable(draw):
            raise TypeError(
                f"inner_draw: got {describe(draw)}; expected a draw (feed, i) -> Ctx such as "
                "data.same or data.stacked."
            )
    return Problem(
        objective(inner_objective),
        objective(outer_objective),
        inner_draw,
        hyper_draw,
        outer_draw,
        inner_init,
        project,
    )


def pieces(
    solver: Any, method: Any, argument: str = "solver", second: str = "hypergradient"
) -> None:
    """An inner solver and a hypergradient method, by the names of both arguments."""
    if not isinstance(solver, InnerSolver):
        hint = (
            " Try inner.optax(optimizer, steps)."
            if hasattr(solver, "update")
            else " Try inner.lbfgs() or inner.optax(optimizer, steps)."
        )
        raise TypeError(f"{argument}: got {describe(solver)}; expected an InnerSolver.{hint}")
    numbers.count(solver.steps, f"{argument}.steps")
    if not isinstance(method, Hypergradient):
        raise TypeError(
            f"{second}: got {describe(method)}; expected a Hypergradient.{method_hint(method)}"
        )


def method_hint(value: Any) -> str:
    """What to give in place of what is no hypergradient method."""
    if not callable(value):
        return " Try hypergradient.implicit()."
    made = str(getattr(value, "__module__", "")).startswith("bilevax.hypergradient")
    return f" Call the factory: hypergradient.{value.__name__ if made else 'implicit'}()."


def transformation(optimizer: Any, argument: str) -> None:
    """An optax transformation."""
    if not (
        callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))
    ):
        hint = (
            " Try its .tx."
            if hasattr(optimizer, "tx")
            else " Call it first, as in optax.adam(1e-2)."
            if callable(optimizer)
            else " Try optax.adam(1e-2)."
        )
        raise TypeError(
            f"{argument}: got {describe(optimizer)}; expected an optax gradient "
            f"transformation.{hint}"
        )


def algorithm(value: Any) -> None:
    """An algorithm."""
    if isinstance(value, Algorithm):
        return
    hint = (
        " Call the factory, as in algorithms.double_loop(solver, hypergradient, outer_optimizer)."
        if callable(value)
        else ""
    )
    if isinstance(value, Hypergradient) or hasattr(value, "update"):
        hint = " Try algorithms.double_loop(inner_solver, hypergradient, outer_optimizer)."
    raise TypeError(
        f"algorithm: got {describe(value)}; expected an Algorithm, or None for the documented "
        f"default.{hint}"
    )


def trajectory(problem: Problem, method: Hypergradient) -> None:
    """A method that follows all of the solve's steps, where the outer objective reads them."""
    if problem.outer.trajectory and not method.sees_steps:
        raise ValueError(
            f"outer_objective: got {problem.outer!r}, which reads every inner step, with "
            f"{method!r}, which differentiates the last "
            "point only; expected a method that sees the steps. Try hypergradient.unrolled() or "
            "forward()."
        )


def key(value: Any, problem: Problem, sampled: bool) -> None:
    """A PRNG key where something draws."""
    keyed = [
        name
        for name, obj in (("inner_objective", problem.inner), ("outer_objective", problem.outer))
        if obj.keyed
    ]
    keyed += ["inner_init"] if takes_key(problem.inner_init) else []
    if value is None:
        if keyed or sampled:
            takes = "takes" if len(keyed) == 1 else "take"
            cause = f"{' and '.join(keyed)} {takes} a key" if keyed else "the data is sampled"
            raise ValueError(
                f"key: got None although {cause}; expected a PRNG key. Try jax.random.key(0)."
            )
        return
    numbers.key(value)


# ---- objectives, by abstract evaluation


def objectives(
    problem: Problem,
    inner: PyTree,
    outer: PyTree,
    model: PyTree,
    inner_ctx: Ctx,
    outer_ctx: Ctx,
    steps: int = 1,
) -> jnp.dtype:
    """Both objectives return what they say they do on these shapes; the outer value's dtype. The
    user's own errors pass with their own frames.
    """
    if problem.inner_init is not None:
        begun, moved = jax.eval_shape(
            lambda outer, key: problem.inner_init(outer, key), outer, inner_ctx.key
        )
        same_structure(begun, inner, "inner_init", "inner_params")
        if moved is not None:
            same_structure(moved, model, "inner_init's model state", "model_state")
    if problem.project is not None:
        same_structure(jax.eval_shape(problem.project, outer), outer, "project", "outer_params")
    if model is not None and not (problem.inner.stateful or problem.outer.stateful):
        raise ValueError(
            f"model_state: got {jax.tree.structure(model)} although neither objective takes it; "
            "expected None, or an inner objective wrapped by "
            "objective(fn, stateful=True)."
        )
    _, new_model = functions.evaluate(
        problem.inner, "inner_objective", inner, outer, inner_ctx._replace(model=model)
    )
    if problem.inner.stateful:
        same_structure(new_model, model, "inner_objective's new model_state", "model_state")
    inner = seen_by_outer(problem, inner, steps)
    return functions.evaluate(
        problem.outer, "outer_objective", inner, outer, outer_ctx._replace(model=model)
    )[0]


def same_structure(got: PyTree, want: PyTree, name: str, like: str) -> None:
    """`got` has the structure, shapes and dtypes of `want`."""
    got_leaves, got_def = jax.tree_util.tree_flatten_with_path(got)
    want_leaves, want_def = jax.tree_util.tree_flatten_with_path(want)
    if got_def != want_def:
        paths_got, paths_want = (
            {jax.tree_util.keystr(p) or "the whole" for p, _ in leaves}
            for leaves in (got_leaves, want_leaves)
        )
        differing = sorted(paths_got ^ paths_want)
        raise ValueError(
            f"{name}: got structure {got_def}; expected that of {like}, {want_def}. Differing "
            f"paths: {differing or 'container types'}."
        )
    for (path, a), (_, b) in zip(got_leaves, want_leaves, strict=True):
        if jnp.shape(a) != jnp.shape(b) or a.dtype != b.dtype:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)}: got {a.dtype}{list(jnp.shape(a))}; expected "
                f"{b.dtype}{list(jnp.shape(b))}, as in {like}."
            )
