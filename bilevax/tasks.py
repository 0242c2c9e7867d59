"""Batches of tasks: one lower level a task, side by side along a leading axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevax._core import numbers
from bilevax.base import Bound, Objective, PyTree, objective


def tasks(fn: Callable[..., Any], reduce: str = "mean") -> Objective:
    r"""An objective over a batch of tasks, from the objective of one task.

    .. math::
        F(Y, x) = \frac{1}{T} \sum_{t=1}^{T} f(y_t, x, \mathrm{batch}_t), \qquad
        Y = (y_1, \dots, y_T)

    Take the sum for the inner objective, so that each task's gradient is its own, and the mean for
    the outer one. Any solver, method and algorithm then works on all tasks at once; only what looks
    at all inner parameters together (clipping by the global norm, a line search) sees the tasks as
    one.

    Args:
      fn: ``(inner_params, outer_params, batch) -> scalar`` for one task, or `objective` of one
        (`has_aux`; `keyed`: a key of its own each; `stateful`: a model state of its own each, with
        the task axis in front, as ``task_copies(n)(state)`` makes it; `trajectory`: its own steps
        each).
      reduce: "mean" or "sum".

    Returns:
      An `Objective` whose inner parameters and batch have a leading task axis, and whose outer
      parameters have none; its aux is stacked.

    Raises:
      TypeError: for a function that is none.
      ValueError: for another `reduce`.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> loss = lambda w, x, batch: jnp.sum((w - batch) ** 2) / 2
      >>> fn = bx.value_and_hypergrad(
      ...     bx.tasks(loss, "sum"),
      ...     bx.tasks(loss),
      ...     solver=bx.inner.optax(optax.sgd(0.5), steps=1),
      ...     hypergradient=bx.hypergradient.unrolled(),
      ...     inner_init=bx.task_copies(3),
      ... )  # MAML: three tasks, one inner step each, from a shared initialisation
      >>> batch = jnp.array([[1.0], [2.0], [3.0]])
      >>> fn(jnp.zeros((3, 1)), jnp.zeros(1), batch, batch).grad.tolist()
      [-0.5]

    Source: Finn, Abbeel and Levine, "Model-agnostic meta-learning for fast adaptation of deep
    networks" (ICML 2017), algorithm 1.
    """
    one = objective(fn)
    numbers.choice(reduce, "reduce", ("mean", "sum"))
    settings = dict(
        fn=one.fn,
        has_aux=one.has_aux,
        stateful=one.stateful,
        keyed=one.keyed,
        reduce=reduce,
        axis=1 if one.trajectory else 0,  # of the tasks, behind that of the steps
    )
    return Objective(
        Bound(f"tasks({one.name})", _over_tasks, **settings),
        one.has_aux,
        one.stateful,
        one.keyed,
        one.indexed,
        one.trajectory,
        tasks=reduce,
    )


def _over_tasks(
    inner: PyTree,
    outer: PyTree,
    batch: PyTree,
    *model: Any,
    fn: Callable[..., Any],
    has_aux: bool,
    stateful: bool,
    keyed: bool,
    reduce: Any,
    axis: int,
    key: Any = None,
    **number: Any,
) -> Any:
    lengths = {jnp.shape(leaf)[axis : axis + 1] for leaf in jax.tree.leaves(inner)}
    lengths |= {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((batch, model))}
    if len(lengths) != 1 or () in lengths:
        shapes = [list(jnp.shape(leaf)) for leaf in jax.tree.leaves((inner, batch))]
        states = (
            f" and a model state of {[list(jnp.shape(leaf)) for leaf in jax.tree.leaves(model)]}"
            if jax.tree.leaves(model)
            else ""
        )
        raise ValueError(
            f"inner_params and batch: got shapes {shapes}{states}; expected one common task axis "
            "in front. Try "
            "bx.task_copies(num_tasks), of the model state, too."
        )
    keys = _keys_of(key, lengths.pop()[0]) if keyed else None

    def one(inner, batch, model, key):
        out = fn(inner, outer, batch, *model, **({"key": key} if keyed else {}), **number)
        return out if has_aux or stateful else (out, None)

    values, rest = jax.vmap(one, in_axes=(axis, 0, 0, 0))(inner, batch, model, keys)
    value = jnp.mean(values) if reduce == "mean" else jnp.sum(values)
    return (value, rest) if has_aux or stateful else value


def _keys_of(key: Any, count: int) -> Any:
    """A key for each task; those of some tasks among more come made."""
    one = 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1
    return key if jnp.ndim(key) > one else jax.random.split(key, count)


def task_copies(num_tasks: int, model_state: PyTree = None) -> Callable[[PyTree], PyTree]:
    """The `inner_init` of MAML: every task starts from the outer parameters.

    Args:
      num_tasks: length of the task axis, at least 1.
      model_state: of a network with statistics: every task starts from a copy of it as well.

    Returns:
      ``outer_params -> inner_params`` with a leading task axis; with `model_state`, ``outer_params
      -> (inner_params, model_state)``.

    Raises:
      ValueError: for fewer than 1.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> bx.task_copies(2)(jnp.ones(3)).shape
      (2, 3)
    """
    if model_state is not None:
        numbers.arrays(model_state, "model_state")
        leaves = jax.tree.leaves(model_state)
        if all(not hasattr(leaf, "dtype") or leaf.size == 0 for leaf in leaves):
            raise TypeError(
                f"model_state: got {model_state!r}; expected the state of a network: a pytree of "
                "arrays, or None."
            )
    return Bound(
        "task_copies",
        _copies,
        num_tasks=numbers.count(num_tasks, "num_tasks"),
        model_state=model_state,
    )


def _copies(outer: PyTree, *, num_tasks: Any, model_state: Any) -> Any:
    both = outer if model_state is None else (outer, model_state)
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (num_tasks, *jnp.shape(a))), both)
