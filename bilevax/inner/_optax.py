"""Any optax transformation as an inner solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax as _optax

from bilevax import base, tree
from bilevax._core import numbers, optimizer
from bilevax.base import Objective, PyTree, Scalar


def optax(
    opt: _optax.GradientTransformation | Callable[[PyTree], _optax.GradientTransformation],
    steps: int,
) -> base.InnerSolver:
    """Move the inner parameters by `steps` updates of an optax transformation for each outer step.

    ``y_{t+1} = y_t + u_t``, with ``(u_t, s_{t+1}) = opt.update(∇_y g(y_t, x, batch_t), s_t, y_t)``.

    The value, the gradient, the objective and its gradient are handed to `opt` as ``value``,
    ``grad``, ``value_fn`` and ``grad_fn`` where it has such parameters, so transformations that ask
    for them (``optax.polyak_sgd``, ``optax.lbfgs``, ``optax.contrib.sam``) work as they are. A line
    search that loops until it is content (``optax.lbfgs``) has no reverse mode, so unroll only
    transformations that do not search.

    Args:
      opt: a ``GradientTransformation`` or an ``optax.MultiSteps``. One built by `bilevax.tunable`
        has its numbers as leaves, so that another learning rate does not compile again; any other
        is compared by identity, so build it once. Or a function of the outer parameters that
        returns one, whose settings are then learned:
        ``lambda outer: optax.sgd(outer["rate"])``. It is called at every step with the current
        values; methods that do not differentiate the steps refuse it.
      steps: updates for each outer step, at least 1.

    Returns:
      An `InnerSolver`. Its info has ``value`` and ``grad_norm``, both before the step, and the
      objective's ``aux``, where it has one; that of the last step is the estimate's and the
      history's ``inner_aux``.

    Raises:
      TypeError: if `opt` is not a gradient transformation, or `steps` is not an int.
      ValueError: if ``steps < 1``.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> from bilevax import base
      >>> solver = bx.inner.optax(optax.sgd(0.5), steps=20)
      >>> g = bx.objective(lambda y, x, batch: jnp.sum((y - x) ** 2) / 2)
      >>> y = jnp.zeros(3)
      >>> lower = base.Lower(g, solver, lambda feed, i: base.Ctx())
      >>> state, info = lower.run(base.InnerState(y, solver.init(y)), jnp.ones(3), base.Feed())
      >>> bool(jnp.allclose(state.params, 1.0, atol=1e-5))
      True

    Source: DeepMind et al., The DeepMind JAX Ecosystem, 2020 (optax).
    """
    if not _is_transformation(opt) and not callable(opt):
        under_way = hasattr(opt, "tx") and hasattr(opt, "opt_state")
        raise TypeError(
            f"opt: got {numbers.describe(opt)}; expected an optax.GradientTransformation. Try "
            + (
                "bx.nn.going_on(...) of it, which starts from its moments, or its .tx."
                if under_way
                else "optax.adam(1e-2)."
            )
        )
    if not _is_transformation(opt) and getattr(opt, "__module__", "").startswith("optax."):
        raise TypeError(
            f"opt: got the function {opt.__name__}; expected what it returns. Try "
            f"optax.{opt.__name__}(1e-2)."
        )
    steps = numbers.count(steps, "steps")
    learned = not _is_transformation(opt)
    return base.InnerSolver(
        init=base.Bound("init", _init_learned if learned else _init, opt=opt),
        step=base.Bound("optax", _step, opt=opt, learned=learned),
        steps=steps,
        update=base.Bound("update", _update_learned if learned else _led_to, opt=opt),
        sees_outer=learned,
        gradients=1,
    )


def _is_transformation(opt: Any) -> bool:
    return callable(getattr(opt, "init", None)) and callable(getattr(opt, "update", None))


def _built(opt: Any, outer: PyTree) -> Any:
    made = opt(outer)
    if not _is_transformation(made):
        raise TypeError(
            f"opt: the function of the outer parameters returned {type(made).__name__}; expected "
            "an optax.GradientTransformation."
        )
    return made


def _init(params: PyTree, *, opt: Any) -> PyTree:
    return optimizer.init(opt, params)


def _init_learned(params: PyTree, outer: PyTree, *, opt: Any) -> PyTree:
    return optimizer.init(_built(opt, outer), params)


def _update(
    grads: PyTree, state: PyTree, params: PyTree, *, opt: Any, **extra: Any
) -> tuple[PyTree, PyTree]:
    return optimizer.update(opt, grads, state, params, **extra)


def _led_to(
    grads: PyTree, state: PyTree, params: PyTree, *, opt: Any, **extra: Any
) -> tuple[PyTree, PyTree]:
    return optimizer.update(optimizer.leading(opt), grads, state, params, **extra)


def _update_learned(
    grads: PyTree, state: PyTree, params: PyTree, *, opt: Any, outer: PyTree, **extra: Any
) -> tuple[PyTree, PyTree]:
    made = _built(opt, outer)
    return optimizer.update(made, grads, _current(made, state, params), params, **extra)


def _current(opt: Any, state: PyTree, params: PyTree) -> PyTree:
    """`state` with the settings that an optimizer keeps in it (``optax.inject_hyperparams``) as
    they are now.
    """
    keeps = lambda a: hasattr(a, "hyperparams") and hasattr(a, "_replace")
    if not any(map(keeps, jax.tree.leaves(state, is_leaf=keeps))):
        return state
    fresh = optimizer.init(opt, params)
    return jax.tree.map(
        lambda old, new: old._replace(hyperparams=new.hyperparams) if keeps(old) else old,
        state,
        fresh,
        is_leaf=keeps,
    )


def _step(
    objective: Objective,
    state: base.InnerState,
    outer: PyTree,
    ctx: base.Ctx,
    *,
    opt: Any,
    learned: Any,
) -> tuple[base.InnerState, dict[str, Scalar]]:
    def evaluate(params):
        return objective(params, outer, ctx)

    (value, (model, aux)), grads = jax.value_and_grad(evaluate, has_aux=True)(state.params)
    update = (
        base.Bound("update", _update_learned, opt=opt, outer=outer)
        if learned
        else base.Bound("update", _update, opt=opt)
    )
    given = dict(
        value=value,
        grad=grads,
        value_fn=lambda params: evaluate(params)[0],
        grad_fn=lambda params, i: jax.grad(evaluate, has_aux=True)(params)[0],
    )
    updates, opt_state = update(grads, state.opt, state.params, **given)
    params = optimizer.apply(state.params, updates)
    info = {"value": value, "grad_norm": tree.norm(grads)}
    return base.InnerState(params, opt_state, model), (
        info if aux is None else {**info, "aux": aux}
    )
