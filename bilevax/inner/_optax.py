"""Any optax transformation as an inner solver."""

from __future__ import annotations

import jax
import optax as _optax

from bilevax import base, tree
from bilevax._core import numbers, optimizer
from bilevax.base import PyTree


def optax(opt: _optax.GradientTransformation, steps: int) -> base.InnerSolver:
    """Move the inner parameters by `steps` updates of an optax transformation for each outer step.

    ``y_{t+1} = y_t + u_t``, with ``(u_t, s_{t+1}) = opt.update(∇_y g(y_t, x, batch_t), s_t, y_t)``.

    The value, the gradient and the objective itself are handed to `opt` as ``value``, ``grad`` and ``value_fn``, so transformations that
    ask for them (``optax.polyak_sgd``, ``optax.lbfgs``) work as they are. A line search that loops until it is content (``optax.lbfgs``)
    has no reverse mode, so unroll only transformations that do not search.

    Args:
      opt: a ``GradientTransformation``. One built by `bilevax.tunable` has its numbers as leaves, so that another learning rate does not
        compile again; any other is compared by identity, so build it once.
      steps: updates for each outer step, at least 1.

    Returns:
      An `InnerSolver`. Its info has ``value`` and ``grad_norm``, both before the step.

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

    References:
      DeepMind et al., The DeepMind JAX Ecosystem, 2020 (optax).
    """
    if not (isinstance(opt, tuple) and callable(getattr(opt, "init", None)) and callable(getattr(opt, "update", None))):
        raise TypeError(f"opt: got {numbers.describe(opt)}; expected an optax.GradientTransformation. Try optax.adam(1e-2).")
    steps = numbers.count(steps, "steps")
    return base.InnerSolver(
        init=base.Bound("init", _init, opt=opt),
        step=base.Bound("optax", _step, opt=opt),
        steps=steps,
        update=base.Bound("update", _update, opt=opt),
        gradients=1,
    )


def _init(params: PyTree, *, opt) -> PyTree:
    return optimizer.init(opt, params)


def _update(grads: PyTree, state: PyTree, params: PyTree, *, opt, **extra) -> tuple[PyTree, PyTree]:
    return optimizer.update(opt, grads, state, params, **extra)


def _step(objective, state: base.InnerState, outer: PyTree, ctx: base.Ctx, *, opt):
    def evaluate(params):
        return objective(params, outer, ctx)

    (value, (model, _)), grads = jax.value_and_grad(evaluate, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(opt, grads, state.opt, state.params, value=value, grad=grads, value_fn=lambda params: evaluate(params)[0])
    params = optimizer.apply(state.params, updates)
    return base.InnerState(params, opt_state, model), {"value": value, "grad_norm": tree.norm(grads)}
