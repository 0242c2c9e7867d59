"""The compiled pieces of a replay: the start, a training step, its pullback, and the end.

Nothing here takes the gradient of the inner objective twice. A step's pullback is given the
gradient that the step took, differentiates the optimizer's update alone, and pulls the cotangent
of the gradient by one forward sweep over a reverse one (a Hessian is symmetric).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import partial_eval

from bilevax import tree
from bilevax._core import optimizer
from bilevax.base import Ctx, Draw, Feed, InnerState, Objective, PyTree
from bilevax.replay._placing import Placing


class Gradients(NamedTuple):
    """A user's own gradient in place of an objective; made by `gradients`."""

    fn: Callable[..., Any]
    stateful: bool = False
    keyed: bool = False

    def __call__(self, inner: PyTree, outer: PyTree, ctx: Ctx) -> tuple[PyTree, PyTree]:
        args = (inner, outer, ctx.batch) + ((ctx.model,) if self.stateful else ())
        out = self.fn(*args, **({"key": ctx.key} if self.keyed else {}))
        return out if self.stateful else (out, ctx.model)

    @property
    def name(self) -> str:
        """The user's function's name, for messages."""
        return getattr(self.fn, "__name__", None) or repr(self.fn)


class Given(NamedTuple):
    """What stays from step to step; `*_fixed` are the leaves that are no floating-point numbers."""

    outer: PyTree
    outer_fixed: PyTree = None
    inner_fixed: PyTree = None
    data: PyTree = None
    key: Any = None


class Saved(NamedTuple):
    """What a training step leaves for its pullback."""

    value: Any
    grads: PyTree = None


class Training(NamedTuple):
    """How a training moves.

    `optimizer` maps outer parameters to an optax transformation; `start` maps them to initial
    parameters, or is None; `save` says whether a step's gradient is kept for its pullback.
    """

    objective: Objective | Gradients
    optimizer: Callable[[PyTree], Any]
    draw: Draw
    start: Callable[[PyTree], PyTree] | None = None
    microbatches: int = 1
    save: bool = True
    placing: Placing = Placing()


# ---- one evaluation


def _context(training: Training, given: Given, step: Any, model: PyTree) -> Ctx:
    ctx = training.draw(Feed(given.data, given.key, step), 0)
    return ctx._replace(model=model, inner_step=step)


def _in_parts(training: Training, fn: Callable[[Ctx], PyTree], ctx: Ctx) -> PyTree:
    """The mean of ``fn`` over the microbatches of a batch, one in memory at a time."""
    count = training.microbatches
    if count == 1:
        return fn(ctx)
    # Every n-th row, so that each device of a sharded batch has its part in each microbatch.
    parts = jax.tree.map(
        lambda a: jnp.moveaxis(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 1, 0), ctx.batch
    )

    def one(i):
        key = None if ctx.key is None else jax.random.fold_in(ctx.key, i)
        return fn(ctx._replace(batch=jax.tree.map(lambda a: a[i], parts), key=key))

    def body(total, i):
        return tree.add(total, one(i)), None

    shapes = jax.eval_shape(one, jnp.int32(0))
    total, _ = lax.scan(
        body,
        jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes),
        jnp.arange(count, dtype=jnp.int32),
    )
    return tree.scale(1 / count, total)


def _objective(training: Training, given: Given, ctx: Ctx) -> Any:
    """The inner objective of parameters, outer parameters and the model state's floats."""
    moving, resting = tree.partition(ctx.model)

    def fn(params, outer, model):
        full = tree.combine(params, given.inner_fixed), tree.combine(outer, given.outer_fixed)
        value, (new, _) = training.objective(
            *full, ctx._replace(model=tree.combine(model, resting))
        )
        return value, new

    return fn, moving


def _take_gradient(
    training: Training, given: Given, params: PyTree, outer: PyTree, ctx: Ctx
) -> Any:
    """``(Saved, new model state)``."""
    if isinstance(training.objective, Gradients):
        full = tree.combine(params, given.inner_fixed), tree.combine(outer, given.outer_fixed)
        grads, model = training.objective(*full, ctx)
        return Saved(jnp.zeros(()), tree.partition(grads)[0]), model
    if training.microbatches > 1:

        def part(ctx):
            fn, moving = _objective(training, given, ctx)
            value, grads = jax.value_and_grad(lambda p: fn(p, outer, moving)[0])(params)
            return Saved(value, grads)

        return _in_parts(training, part, ctx), ctx.model
    fn, moving = _objective(training, given, ctx)
    (value, model), grads = jax.value_and_grad(lambda p: fn(p, outer, moving), has_aux=True)(params)
    return Saved(value, grads), model


def _update(
    training: Training, given: Given, params: PyTree, opt: Any, outer: PyTree, saved: Saved
) -> Any:
    """The optimizer's step alone, as a function of all that it reads."""
    transformation = training.optimizer(tree.combine(outer, given.outer_fixed))
    updates, opt = optimizer.update(
        transformation, saved.grads, opt, params, value=saved.value, grad=saved.grads
    )
    return optimizer.apply(params, updates), opt


# ---- the pieces


def begin(training: Training, params: PyTree, given: Given, model: PyTree) -> InnerState:
    """The first state."""
    if training.start is not None:
        params = tree.partition(
            tree.strong(training.start(tree.combine(given.outer, given.outer_fixed)))
        )[0]
    transformation = training.optimizer(tree.combine(given.outer, given.outer_fixed))
    return training.placing.hold_state(
        InnerState(params, optimizer.init(transformation, params), model)
    )


def advance(
    training: Training, state: InnerState, given: Given, step: Any
) -> tuple[InnerState, Saved]:
    """One training step, and what its pullback will ask for."""
    ctx = _context(training, given, step, state.model)
    saved, model = _take_gradient(training, given, state.params, given.outer, ctx)
    saved = saved._replace(grads=training.placing.hold_grads(saved.grads))
    saved = lax.optimization_barrier(saved)  # the same numbers, whether or not they are an output
    params, opt = _update(training, given, state.params, state.opt, given.outer, saved)
    return training.placing.hold_state(
        InnerState(params, opt, model)
    ), saved if training.save else Saved(saved.value)


def retreat(
    training: Training,
    state: InnerState,
    saved: Saved,
    given: Given,
    step: Any,
    cotangent: InnerState,
    outer_cotangent: PyTree,
) -> Any:
    """The pullback of one training step; what it finds for the outer parameters is added up."""
    ctx = _context(training, given, step, state.model)
    if saved.grads is None:
        saved, _ = _take_gradient(training, given, state.params, given.outer, ctx)
    moving, resting = tree.partition(state.opt)

    def update(params, opt, outer, saved):
        params, opt = _update(training, given, params, tree.combine(opt, resting), outer, saved)
        return params, tree.partition(opt)[0]

    reads_value = _reads_value(update, state.params, moving, given.outer, saved)
    _, pull = jax.vjp(update, state.params, moving, given.outer, saved)
    pull_gradient = functools.partial(
        _pull_gradient, training, given, state.params, ctx, reads_value
    )

    def one(cotangent: InnerState, outer_cotangent):
        params, opt, outer, direction = pull((cotangent.params, cotangent.opt))
        more = pull_gradient(direction, cotangent.model)
        outer = jax.tree.map(lambda a, b, c: a + b + c, outer_cotangent, outer, more[1])
        new, outer = training.placing.hold_cotangents(
            InnerState(tree.add(params, more[0]), opt, more[2]), outer
        )
        return new, outer, tree.norm(new)

    if jnp.ndim(jax.tree.leaves(cotangent.params)[0]) == jnp.ndim(jax.tree.leaves(state.params)[0]):
        return one(cotangent, outer_cotangent)
    return jax.vmap(one)(cotangent, outer_cotangent)  # a query each


def _pull_gradient(
    training: Any,
    given: Any,
    params: PyTree,
    ctx: Ctx,
    reads_value: Any,
    direction: Saved,
    model_cotangent: Any,
) -> Any:
    """Pulls the step's gradient and new model state back to parameters, outer and model state."""
    if isinstance(training.objective, Gradients):
        return _pull_own_gradient(training, given, params, ctx, direction.grads, model_cotangent)

    def part(ctx):
        fn, moving = _objective(training, given, ctx)

        def derivative(params, amount):
            # The new model state is weighed into the value by an amount that grows from zero, so
            # that one forward sweep gives the Hessian's product and the statistics' pullback at
            # once.
            def weighed(params, outer, model):
                value, new = fn(params, outer, model)
                extra = (
                    tree.dot(tree.partition(new)[0], model_cotangent)
                    if jax.tree.leaves(model_cotangent)
                    else None
                )
                return value if extra is None else value + amount * extra.astype(value.dtype)

            return jax.grad(weighed, (0, 1, 2))(params, given.outer, moving)

        amount = jnp.zeros((), direction.value.dtype)
        first, total = jax.jvp(
            derivative, (params, amount), (direction.grads, jnp.ones_like(amount))
        )
        return tree.axpy(direction.value, first, total) if reads_value else total

    return _in_parts(training, part, ctx)


def _pull_own_gradient(
    training: Any, given: Any, params: PyTree, ctx: Ctx, direction: Any, model_cotangent: Any
) -> Any:
    moving, resting = tree.partition(ctx.model)

    def fn(params, outer, model):
        full = tree.combine(params, given.inner_fixed), tree.combine(outer, given.outer_fixed)
        grads, new = training.objective(*full, ctx._replace(model=tree.combine(model, resting)))
        return tree.partition(grads)[0], tree.partition(new)[0]

    return jax.vjp(fn, params, given.outer, moving)[1]((direction, model_cotangent))


def _reads_value(update: Callable[..., Any], *args: Any) -> bool:
    """Whether the optimizer looks at the objective's value, as step rules do that ask for it."""
    jaxpr = jax.make_jaxpr(update)(*args).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return used[len(jax.tree.leaves(args[:-1]))]  # `Saved.value` is its first leaf


def end(
    training: Training,
    objective: Objective,
    state: InnerState,
    given: Given,
    batch: PyTree,
    key: Any,
    weight: Any,
) -> Any:
    """The outer objective at a state, times `weight`.

    ``(value, aux, cotangent of the state, cotangent of the outer parameters)``. A vector of values
    (queries) gives cotangents with one more axis in front.
    """
    moving, resting = tree.partition(state.model)
    zeros = tree.zeros_like(tree.partition(state.opt)[0])

    def fn(params, outer, model):
        full = tree.combine(params, given.inner_fixed), tree.combine(outer, given.outer_fixed)
        value, (_, aux) = objective(*full, Ctx(batch, key, tree.combine(model, resting)))
        return value, aux

    value, pull, aux = jax.vjp(fn, state.params, given.outer, moving, has_aux=True)

    def one(cotangent):
        params, outer, model = pull(cotangent)
        return training.placing.hold_cotangents(InnerState(params, zeros, model), outer)

    weight = jnp.asarray(weight, value.dtype)
    if value.ndim == 0:
        return (weight * value, aux, *one(weight))
    return (
        weight * value,
        aux,
        *jax.vmap(one, out_axes=0)(weight * jnp.eye(value.shape[0], dtype=value.dtype)),
    )


def finish(
    training: Training,
    params: PyTree,
    given: Given,
    model: PyTree,
    cotangent: InnerState,
    outer_cotangent: PyTree,
) -> Any:
    """The pullback of `begin`: cotangents of the outer and of the initial parameters."""

    def fn(outer, params):
        return tree.partition(begin(training, params, given._replace(outer=outer), model))[
            0
        ]._replace(model=None)

    _, pull = jax.vjp(fn, given.outer, params)

    def one(cotangent, outer_cotangent):
        outer, init = pull(cotangent._replace(model=None))
        return tree.add(outer_cotangent, outer), init

    if jnp.ndim(jax.tree.leaves(cotangent.params)[0]) == jnp.ndim(jax.tree.leaves(params)[0]):
        return one(cotangent, outer_cotangent)
    return jax.vmap(one)(cotangent, outer_cotangent)
