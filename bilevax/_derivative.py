"""The derivative of an estimate: of its value the estimate's own gradient, of that the exact one or
a refusal.

The value of an estimate is a function of everything that its objectives read: outer parameters,
batches, captured arrays. The tangent of the value is the inner product of the tangents with the
gradient by the estimate's own method, pulled back to whatever of these moves and to nothing else.
The gradient's tangent is exact for a method of order 2 (`argmin.attach` at the solved point, with
the method's own linear solver). For a method of order 1 it is NaN going forwards, where its use
cannot be seen, and raises where a cotangent comes back to it. The solution and the aux carry the
best response's derivative: backwards by the method's pullback, forwards for order 2 only. Infos and
states are constants.

A method of order 2 without a linear solver carries all its derivatives in its own operations, those
in the starting point among them, and nothing is done here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bilevax import starts, tree
from bilevax._core.pullback import known_backwards
from bilevax._estimate import estimate
from bilevax.argmin import attach
from bilevax.base import (
    Bound,
    Ctx,
    Estimate,
    Feed,
    Feeds,
    Hypergradient,
    InnerState,
    Lower,
    Objective,
    Problem,
    PyTree,
    as_cotangent,
    join,
    split,
)
from bilevax.hypergradient.parts import over
from bilevax.results import failed

MAX_RESIDUAL = 1e-2  # of a linear solve inside a derivative of a gradient: above it that is NaN


class Theta(NamedTuple):
    """All that a value depends on and that may move: outer parameters, what the problem's functions
    are bound to, the data of the three streams.
    """

    outer: PyTree
    problem: tuple[Any, ...]
    data: tuple[Any, ...]


class Given(NamedTuple):
    """What an estimate starts from, and its pieces' numbers: constants to every derivative."""

    pieces: tuple[Any, ...]
    inner: InnerState
    method: PyTree
    feeds: Feeds


class _Out(NamedTuple):
    value: Any
    grads: list[Any]  # with respect to the leaves of `Theta` that were asked for
    params: PyTree
    aux: PyTree
    rest: tuple[Any, ...]  # optimizer's, model's and method's state; info


def differentiable(
    problem: Problem,
    solver: Any,
    method: Hypergradient,
    inner: InnerState,
    outer: PyTree,
    feeds: Feeds,
    state: PyTree,
) -> tuple[InnerState, Estimate]:
    """`estimate`, as one compiled program and with the derivatives above."""
    bound, captured = split(problem)
    pieces, numbers = split((solver, method))
    shared = feeds.hyper.data is feeds.inner.data  # as one operand, so that it moves as one
    data = (feeds.inner.data, None if shared else feeds.hyper.data, feeds.outer.data)
    bare = feeds._replace(
        **{name: getattr(feeds, name)._replace(data=None) for name in ("inner", "hyper", "outer")}
    )
    return _run(
        (bound, pieces, shared), Given(numbers, inner, state, bare), Theta(outer, captured, data)
    )


@partial(jax.jit, static_argnums=0)
def _run(static: tuple[Any, ...], given: Given, theta: Theta) -> tuple[InnerState, Estimate]:
    problem, solver, method, feeds = _parts(static, given, theta)
    starts.structure(problem, solver, method, given.inner, theta.outer, feeds)
    if method.order > 1 and method.linear is None:
        return estimate(problem, solver, method, given.inner, theta.outer, feeds, given.method)
    count = len(jax.tree.leaves(theta.outer))
    which = tuple(i < count for i in range(len(jax.tree.leaves(theta))))
    out = _pulled(static, which, given, theta)
    opt, model, state, info = out.rest
    grad = jax.tree.unflatten(jax.tree.structure(theta.outer), out.grads)
    return InnerState(out.params, opt, model), Estimate(
        out.value, grad, out.params, state, info, out.aux
    )


def _parts(static: tuple[Any, ...], given: Given, theta: Theta) -> tuple[Any, ...]:
    bound, pieces, shared = static
    problem = join(bound, theta.problem)
    solver, method = join(pieces, given.pieces)
    method = over(method, solver)
    inner, hyper, outer = theta.data
    data = {"inner": inner, "hyper": inner if shared else hyper, "outer": outer}
    feeds = given.feeds._replace(
        **{name: getattr(given.feeds, name)._replace(data=d) for name, d in data.items()}
    )
    return problem, solver, method, feeds


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _pulled(static: tuple[Any, ...], which: tuple[Any, ...], given: Given, theta: Theta) -> _Out:
    """An estimate, with its gradients in the leaves `which` of `theta`; all of the outer parameters
    are among these.
    """
    problem, solver, method, feeds = _parts(static, given, theta)
    count = len(jax.tree.leaves(theta.outer))
    if not any(which[count:]):
        solution, est = estimate(
            problem, solver, method, given.inner, theta.outer, feeds, given.method
        )
        return _out(solution, est, jax.tree.leaves(est.grad), est.info)
    problem, outer = _extended(static, which, problem, theta)
    solution, est = estimate(problem, solver, method, given.inner, outer, feeds, given.method)
    grads, extra = est.grad
    bad = failed(est.info["code"])
    info = {**est.info, "grad_norm": tree.norm(grads)}
    return _out(solution, est, tree.nan_where(bad, [*jax.tree.leaves(grads), *extra]), info)


def _out(solution: InnerState, est: Estimate, grads: list[Any], info: dict[Any, Any]) -> _Out:
    return _Out(
        est.value, grads, solution.params, est.aux, (solution.opt, solution.model, est.state, info)
    )


# ---- a problem whose outer parameters are joined by batches and captured arrays


def _extended(
    static: tuple[Any, ...], which: tuple[Any, ...], problem: Problem, theta: Theta
) -> tuple[Problem, PyTree]:
    """The same problem with outer parameters ``(outer, [further leaves of theta])``."""
    leaves, count = jax.tree.leaves(theta), len(jax.tree.leaves(theta.outer))
    extra = [leaf for leaf, flag in zip(leaves[count:], which[count:], strict=True) if flag]
    how = _How(static[0], static[2], which[count:], jax.tree.structure(theta))
    rest = leaves[count:]
    names = ("inner", "hyper", "outer")
    draws = {
        f"{name}_draw": Bound("placed", _placed, draw=getattr(problem, f"{name}_draw"), stream=name)
        for name in names
    }
    adapt = Bound("extended", _adapted, how=how, rest=rest)
    inner, outer = (
        Objective(
            Bound(getattr(problem, name).name, _moved, how=how, rest=rest, level=name),
            True,
            True,
            True,
            adapt=adapt,
        )
        for name in ("inner", "outer")
    )
    outer = dataclasses.replace(outer, trajectory=problem.outer.trajectory)
    if problem.inner_init is not None:
        begun = Bound("inner_init", _begun, fn=problem.inner_init)
        problem = problem._replace(
            inner_init=starts.Start(begun, starts.takes_key(problem.inner_init))
        )
    return problem._replace(inner=inner, outer=outer, **draws), (theta.outer, extra)


def _begun(outer: PyTree, key: Any = None, *, fn: Callable[..., Any]) -> Any:
    return fn(outer[0], key)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _How:
    """How a problem and its data are put together again from leaves; static."""

    problem: Any
    shared: bool
    moving: tuple[Any, ...]
    structure: Any

    def theta(self, outer: tuple[Any, ...], rest: list[Any]) -> Theta:
        own, extra = outer
        moved = iter(extra)
        leaves = [
            next(moved) if flag else leaf for leaf, flag in zip(rest, self.moving, strict=True)
        ]
        return jax.tree.unflatten(self.structure, [*jax.tree.leaves(own), *leaves])

    def context(self, theta: Theta, batch: tuple[Any, ...], model: PyTree) -> Ctx:
        """The context of a draw, from the data that `theta` holds now."""
        _, (feed, i, stream) = batch
        problem = join(self.problem, theta.problem)
        place = {"inner": 0, "hyper": 0 if self.shared else 1, "outer": 2}[stream.name]
        return getattr(problem, f"{stream.name}_draw")(
            feed._replace(data=theta.data[place]), i
        )._replace(model=model)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Stream:
    name: str


def _placed(feed: Feed, i: Any, *, draw: Any, stream: Any) -> Any:
    """A draw that says where it was made, so that it can be made again from data that moves."""
    ctx = draw(feed, i)
    return ctx._replace(batch=(ctx.batch, (feed._replace(data=None), i, _Stream(stream))))


def _moved(
    inner: PyTree,
    outer: PyTree,
    batch: PyTree,
    model: PyTree,
    *,
    key: Any,
    how: Any,
    rest: Any,
    level: Any,
) -> Any:
    theta = how.theta(outer, rest)
    objective = getattr(join(how.problem, theta.problem), level)
    value, (model, aux) = objective(inner, theta.outer, how.context(theta, batch, model))
    return value, (model, aux)


def _adapted(mapping: Any, *, how: Any, rest: Any) -> Any:
    return Objective(
        Bound(mapping.name, _mapped, mapping=mapping, how=how, rest=rest), True, True, True
    )


def _mapped(
    inner: PyTree,
    outer: PyTree,
    batch: PyTree,
    model: PyTree,
    *,
    key: Any,
    mapping: Any,
    how: Any,
    rest: Any,
) -> Any:
    theta = how.theta(outer, rest)
    like = join(how.problem, theta.problem).inner
    mapping = mapping if like.adapt is None else like.adapt(mapping)
    value, (model, aux) = mapping(inner, theta.outer, how.context(theta, batch, model))
    return value, (model, aux)


# ---- the rule


def _pulled_jvp(
    static: tuple[Any, ...],
    which: tuple[Any, ...],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> Any:
    given, theta = primals
    moves = jax.tree.leaves(tangents[1], is_leaf=_is_zero)
    moving = tuple(not _is_zero(t) for t in moves)
    both = tuple(a or b for a, b in zip(which, moving, strict=True))
    full = _pulled(static, both, given, theta)
    asked = [flag for flag, kept in zip(which, both, strict=True) if kept]
    out = full._replace(grads=[g for g, flag in zip(full.grads, asked, strict=True) if flag])
    still = jax.tree.map(_still, out)
    if not any(moving):
        return out, still
    _, _, method, _ = _parts(static, given, theta)
    if any(moving[len(jax.tree.leaves(theta.outer)) :]) and not method.extends:
        raise ValueError(
            f"hypergradient: got {_shown(static, given)}, which gives derivatives in the outer "
            "parameters only, and one in a batch or in an array "
            "that an objective captures was asked for; expected a method such as "
            "hypergradient.implicit(), or that array among outer_params."
        )
    directions = [t for t in moves if not _is_zero(t)]
    pulled = [
        g
        for g, flag in zip(
            full.grads, [m for m, kept in zip(moving, both, strict=True) if kept], strict=True
        )
        if flag
    ]
    value = _along(pulled, directions).astype(out.value.dtype)
    at = _At(static, moving, which)
    if method.order > 1:
        params, grads = _exact(at, given, theta, out, directions)
    else:
        params = known_backwards(
            partial(_pull_solution, at), out.params, (given, theta), directions
        )
        grads = known_backwards(partial(_refuse, _shown(static, given)), out.grads, (), directions)
    aux = _aux(at, given, theta, out, params, directions)
    return out, still._replace(value=value, params=params, grads=grads, aux=aux)


_pulled.defjvp(_pulled_jvp, symbolic_zeros=True)


class _At(NamedTuple):
    static: tuple[Any, ...]
    moving: tuple[Any, ...]
    which: tuple[Any, ...]


def _is_zero(tangent: PyTree) -> bool:
    return (
        isinstance(tangent, jax.custom_derivatives.SymbolicZero)
        or getattr(tangent, "dtype", None) == jax.dtypes.float0
    )


def _still(leaf: Any) -> Any:
    """A tangent of zero."""
    leaf = jnp.asarray(leaf)
    return (
        jnp.zeros_like(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
        else np.zeros(leaf.shape, jax.dtypes.float0)
    )


def _along(grads: list[Any], directions: list[Any]) -> Any:
    """What a real value changes by; gradients in complex arrays are as ``jax.grad`` has them."""
    pairs = list(zip(grads, directions, strict=True))
    real = [pair for pair in pairs if not jnp.iscomplexobj(pair[0])]
    both = [jnp.sum(jnp.real(g * d)) for g, d in pairs if jnp.iscomplexobj(g)]
    return sum(both, tree.dot([g for g, _ in real], [d for _, d in real]))


class _Number:
    def __repr__(self) -> str:
        return "..."


def _shown(static: tuple[Any, ...], given: Given) -> str:
    """The method, without its numbers, which may be traced."""
    return repr(join(static[1], (_Number(),) * len(given.pieces))[1])


def _with(theta: Theta, flags: tuple[Any, ...], moved: list[Any]) -> Theta:
    values = iter(moved)
    leaves, structure = jax.tree.flatten(theta)
    return structure.unflatten(
        [next(values) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
    )


def _exact(
    at: _At, given: Given, theta: Theta, out: _Out, directions: list[Any]
) -> tuple[PyTree, list[Any]]:
    """Tangents of the solution and of the gradients, by the implicit function theorem at the solved
    point.
    """
    model = out.rest[1]
    _, _, method, _ = _parts(at.static, given, theta)

    def inner_value(y, theta, given):
        problem, _, _, feeds = _parts(at.static, given, theta)
        return problem.inner(
            y, theta.outer, problem.hyper_draw(feeds.hyper, 0)._replace(model=model)
        )[0]

    response = attach(inner_value, method.linear, max_residual=MAX_RESIDUAL)

    def total(theta):
        problem, _, _, feeds = _parts(at.static, given, theta)
        ctx = problem.outer_draw(feeds.outer, 0)._replace(model=model)
        return problem.outer(response(out.params, theta, given), theta.outer, ctx)[0]

    def gradients(moved):
        here = _with(theta, at.moving, moved)
        asked = [leaf for leaf, flag in zip(jax.tree.leaves(here), at.which, strict=True) if flag]
        return jax.grad(lambda asked: total(_with(here, at.which, asked)))(asked)

    leaves = [leaf for leaf, flag in zip(jax.tree.leaves(theta), at.moving, strict=True) if flag]
    _, params = jax.jvp(
        lambda moved: response(out.params, _with(theta, at.moving, moved), given),
        (leaves,),
        (directions,),
    )
    _, grads = jax.jvp(gradients, (leaves,), (directions,))
    return params, grads


def _refuse(method: str, residuals: Any, cotangent: PyTree) -> None:
    raise ValueError(
        f"hypergradient: got {method}, whose derivative is right once only, and a derivative of "
        "Estimate.grad was asked for; expected a method "
        "of order 2, such as hypergradient.implicit(linear.cg()) or unrolled(). Estimate.value may "
        "be differentiated as it is."
    )


def _pull_solution(at: _At, residuals: Any, cotangent: PyTree) -> list[Any]:
    """The method's own pullback of a cotangent on the solution, after a solve of its own."""
    given, theta = residuals
    problem, solver, method, feeds = _parts(at.static, given, theta)
    count = len(jax.tree.leaves(theta.outer))
    flags = tuple(i < count or flag for i, flag in enumerate(at.moving))
    problem, outer = _extended(at.static, flags, problem, theta)
    lower = Lower(problem.inner, solver, problem.inner_draw)
    _, pullback = method.vjp(
        lower, given.inner, outer, feeds.inner, problem.hyper_draw(feeds.hyper, 0), given.method
    )
    still = tree.zeros_like(tree.partition(given.inner.model)[0])  # states are constants
    found, _, _, info = pullback(as_cotangent(method, cotangent, still))
    found = tree.nan_where(failed(info["code"]), jax.tree.leaves(found))
    return [
        g
        for g, flag in zip(
            found, [m for m, f in zip(at.moving, flags, strict=True) if f], strict=True
        )
        if flag
    ]


def _aux(
    at: _At, given: Given, theta: Theta, out: _Out, params: PyTree, directions: list[Any]
) -> PyTree:
    if not any(
        jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in jax.tree.leaves(out.aux)
    ):
        return jax.tree.map(_still, out.aux)
    model = out.rest[1]

    def aux(y, moved):
        here = _with(theta, at.moving, moved)
        problem, _, _, feeds = _parts(at.static, given, here)
        ctx = problem.outer_draw(feeds.outer, 0)._replace(model=model)
        return problem.outer(y, here.outer, ctx)[1][1]

    leaves = [leaf for leaf, flag in zip(jax.tree.leaves(theta), at.moving, strict=True) if flag]
    _, tangent = jax.jvp(aux, (lax.stop_gradient(out.params), leaves), (params, directions))
    return tangent
