"""Hand-over: from and to training that is already under way, in a linen ``TrainState`` or an nnx
``Optimizer``.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx

from bilevax import check
from bilevax._core import numbers
from bilevax.base import Bound, PyTree


def going_on(training: Any) -> optax.GradientTransformation:
    """The optimizer of a training under way, as an inner optimizer that starts from its moments and
    counts.

    Args:
      training: a ``flax.training.train_state.TrainState``, an ``nnx.Optimizer``, or anything else
        with ``tx`` and ``opt_state``.

    Returns:
      A ``GradientTransformation``, what `inner.optax` takes. Its first state is the training's; the
      numbers in it are leaves.

    Raises:
      TypeError: for anything without ``tx`` and ``opt_state``.
      ValueError: when it starts, if the state is of other parameters than those learned.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
      >>> solver = bx.inner.optax(bx.nn.going_on(optimizer), steps=5)
    """
    if not (hasattr(training, "tx") and hasattr(training, "opt_state")):
        raise TypeError(
            f"training: got {check.describe(training)}; expected a TrainState or an nnx.Optimizer, "
            "with tx and opt_state."
        )
    leaves = tuple(jax.tree.leaves(training.opt_state))
    return optax.GradientTransformationExtraArgs(
        Bound("going_on", _init, tx=training.tx, leaves=leaves),
        Bound("going_on", _update, tx=training.tx),
    )


def _init(params: PyTree, *, tx: Any, leaves: tuple[Any, ...]) -> Any:
    # nnx wraps each array of the state in a variable of its own; the arrays are the same ones in
    # the same order.
    return _filled(jax.eval_shape(tx.init, params), leaves)


def _update(updates: PyTree, state: PyTree, params: PyTree = None, *, tx: Any, **extra: Any) -> Any:
    return optax.with_extra_args_support(tx).update(updates, state, params, **extra)


def _filled(like: PyTree, leaves: Any) -> PyTree:
    want, treedef = jax.tree.flatten(like)
    if [jax.numpy.shape(a) for a in leaves] != [jax.numpy.shape(a) for a in want]:
        raise ValueError(
            f"opt_state: got {len(leaves)} arrays, where the learned parameters make {len(want)}, "
            "or their shapes differ; expected the state of the "
            "same parameters. Try the same filter: nn.from_nnx(model, wrt=optimizer.wrt)."
        )
    return jax.tree.unflatten(treedef, leaves)


def hand_back(training: Any, solution: Any, *, inner_steps: int, model: Any = None) -> Any:
    """A training that goes on where the inner level of a run stands: its last parameters, model
    state, moments and counts.

    Args:
      training: the ``TrainState`` or ``nnx.Optimizer`` that the run took over by `going_on`.
      solution: a `Solution` of `solve_bilevel`. Its last iterate is taken (the moments belong to
        it), also with ``keep="best"``.
      inner_steps: inner steps in each outer step: K of ``inner.optax(opt, K)``.
      model: with an ``nnx.Optimizer``, the module that it trains; parameters and statistics are
        written into it.

    Returns:
      A new ``TrainState``; its ``batch_stats``, if it has that field, are the run's. Or the
      ``nnx.Optimizer`` itself, updated in place.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
      >>> loss = lambda model, x, batch: jnp.mean((model(jnp.eye(2)) - x) ** 2)
      >>> problem = bx.nn.bilevel(
      ...     loss, lambda model, x, batch: jnp.mean(model(jnp.eye(2)) ** 2), model, jnp.ones(())
      ... )
      >>> algorithm = bx.algorithms.double_loop(
      ...     bx.inner.optax(bx.nn.going_on(optimizer), 5),
      ...     bx.hypergradient.implicit(),
      ...     optax.sgd(0.1),
      ... )
      >>> solution = bx.solve_bilevel(**problem.arguments, algorithm=algorithm, num_steps=4)
      >>> optimizer = bx.nn.hand_back(optimizer, solution, inner_steps=5, model=model)
      >>> int(optimizer.step[...])
      20
    """
    numbers.count(inner_steps, "inner_steps")
    inner = solution.state.algorithm.inner
    steps = inner_steps * int(solution.stats["total_steps"])
    state: Any = next(iter((inner.model or {}).values()), {})
    if isinstance(training, nnx.Optimizer):
        if model is None:
            raise TypeError(
                "model: got None with an nnx.Optimizer; expected the module that it trains."
            )
        nnx.update(model, inner.params, *([state] if jax.tree.leaves(state) else []))
        new = _filled(
            nnx.state(training.opt_state)
            if isinstance(training.opt_state, nnx.Module)
            else training.opt_state,
            jax.tree.leaves(inner.opt),
        )
        nnx.update(training.opt_state, nnx.state(new))
        training.step[...] += steps
        return training
    if not hasattr(training, "replace"):
        raise TypeError(
            f"training: got {check.describe(training)}; expected a TrainState or an nnx.Optimizer."
        )
    moved = (
        {"batch_stats": state["batch_stats"]}
        if hasattr(training, "batch_stats") and "batch_stats" in state
        else {}
    )
    opt_state = _filled(training.opt_state, jax.tree.leaves(inner.opt))
    return training.replace(
        params=inner.params, opt_state=opt_state, step=training.step + steps, **moved
    )


__all__ = ["going_on", "hand_back"]
