"""The gradient of a trained model's quality in everything that went into its training."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import check, tree
from bilevax._core import numbers
from bilevax._core.types import Key
from bilevax.base import Bound, Draw, Objective, PyTree, objective
from bilevax.checkpoint import Checkpointing
from bilevax.data.sources import Source
from bilevax.replay import _steps, schedules
from bilevax.replay._batches import Batches, resolve
from bilevax.replay._placing import Placing
from bilevax.replay._run import Metagradient, Pieces, Run
from bilevax.replay._steps import Given, Gradients, Training
from bilevax.run import layout
from bilevax.sharding.placement import Sharding


class MetagradFn:
    """A training and its way back; made by `value_and_metagrad`."""

    def __init__(self, training: Training, outer: Objective, num_steps: int, **settings: Any):
        self.training, self.outer, self.num_steps = training, outer, num_steps
        self.schedule: schedules.Schedule = settings["schedule"]
        self.at: tuple[int, ...] = settings["at"]
        self.sharding: Sharding | None = settings["sharding"]
        self.checkpoint: Checkpointing | None = settings["checkpoint"]
        self.states: str | None = settings["states"]
        self.verify, self.throw = bool(settings["verify"]), bool(settings["throw"])

    def __repr__(self) -> str:
        return (
            f"value_and_metagrad({self.training.objective.name}, {self.outer.name}, "
            f"num_steps={self.num_steps}, schedule={self.schedule!r})"
        )

    def __call__(
        self,
        inner_params: PyTree,
        outer_params: PyTree,
        inner_data: Any = None,
        outer_batch: PyTree = None,
        *,
        model_state: PyTree = None,
        key: Key | None = None,
    ) -> Metagradient:
        """Train, and go back; see `value_and_metagrad`."""
        _check_concrete(
            inner_params=inner_params, outer_params=outer_params, outer_batch=outer_batch, key=key
        )
        source = resolve(inner_data)
        inner_params, outer_params = (
            check.arrays(inner_params, "inner_params"),
            check.arrays(outer_params, "outer_params"),
        )
        check.params(inner_params, "inner_params")
        check.params(outer_params, "outer_params")
        (params, inner_fixed), (outer, outer_fixed) = (
            tree.partition(inner_params),
            tree.partition(outer_params),
        )
        model = None if model_state is None else check.arrays(model_state, "model_state")
        given = Given(outer, outer_fixed, inner_fixed, None, key)
        placing = self._placing(params, given, model)
        if isinstance(source, Source):
            source = source._replace(data=placing.put_rows(source.data))
        given = given._replace(outer=placing.put_outer(outer), key=placing.put_whole(key))
        params, model = placing.put_params(params), placing.put_whole(model)
        outer_batch = placing.put_rows(jax.tree.map(jnp.asarray, outer_batch))
        batches = Batches(source, self.num_steps, placing.put_rows)
        pieces = self._pieces(batches.draw, placing)
        try:
            return Run(self, pieces, batches, given, params, model, outer_batch).there_and_back()
        finally:
            batches.close()

    def _placing(self, params: PyTree, given: Given, model: PyTree) -> Placing:
        if self.sharding is None:
            return Placing()
        state = jax.eval_shape(functools.partial(_steps.begin, self.training), params, given, model)
        return Placing(self.sharding, state, given.outer)

    def _pieces(self, draw: Draw, placing: Placing) -> Pieces:
        """The compiled pieces for data that is read by `draw`."""
        training, outer = self.training, self.outer
        if self.sharding is not None:
            # an Objective: `_check_sharding` refuses a user's own Gradients
            training = training._replace(objective=layout.wrap(self.sharding, training.objective))  # type: ignore[arg-type]
            outer = layout.wrap(self.sharding, outer)
        return Pieces(training._replace(draw=draw, placing=placing), outer)


# ---- the public face


def gradients(fn: Callable[..., Any], *, stateful: bool = False, keyed: bool = False) -> Gradients:
    """A gradient of your own in place of an inner objective.

    For gradients that are no objective's: clipped a row each, a policy gradient. Its pullback is
    plain reverse mode (a gradient of your own need not have a symmetric derivative).

    Args:
      fn: ``(inner_params, outer_params, batch) -> grads``, with the structure of `inner_params`.
      stateful: `fn` takes ``model_state`` as fourth argument and returns ``(grads, model_state)``.
      keyed: `fn` takes a PRNG key as ``key=``.

    Returns:
      What `value_and_metagrad` takes as `inner_objective`.

    Raises:
      TypeError: if `fn` is not callable.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, bilevax as bx
      >>> loss = lambda w, x, row: (w - x * row) ** 2
      >>> clipped = lambda g: g / jnp.maximum(1.0, jnp.abs(g))
      >>> mean = lambda w, x, batch: jnp.mean(
      ...     jax.vmap(lambda row: clipped(jax.grad(loss)(w, x, row)))(batch)
      ... )
      >>> own = bx.replay.gradients(mean)
      >>> fn = bx.replay.value_and_metagrad(
      ...     own, lambda w, x, batch: w**2, optax.sgd(0.1), num_steps=5
      ... )
      >>> found = fn(jnp.float32(0.5), jnp.float32(1.0), jnp.arange(4.0))
      >>> bool(jnp.isfinite(found.grad))
      True
    """
    if not callable(fn):
        raise TypeError(
            f"fn: got {check.describe(fn)}; expected a function (inner_params, outer_params, "
            "batch) -> grads."
        )
    numbers.no_type(fn, "fn", "(inner_params, outer_params, batch) -> grads")
    return Gradients(fn, numbers.flag(stateful, "stateful"), numbers.flag(keyed, "keyed"))


def _check_concrete(**arguments: PyTree) -> None:
    for name, value in arguments.items():
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
            raise TypeError(
                f"{name}: got a traced value, under jit, grad, vmap or scan; expected arrays, "
                "since a replay is a loop of the host. Call it outside, "
                "or take hypergradient.unrolled(checkpoint='sqrt') inside."
            )


def _constant(outer: PyTree, *, transformation: Any) -> Any:
    return transformation


def _check_sharding(sharding: Any, inner: Any) -> None:
    if sharding is None:
        return
    if not isinstance(sharding, Sharding) or sharding.apart or sharding.dry:
        raise TypeError(
            f"sharding: got {check.describe(sharding)}; expected sharding.data_parallel(), fsdp() "
            "or by_path(...), or None."
        )
    if isinstance(inner, Gradients):
        raise TypeError(
            f"sharding: got {sharding.kind!r} with {inner.name}, a gradient of your own; expected "
            "None. Place the arrays of the call, which stay "
            "where they lie, and split the rows inside."
        )


def value_and_metagrad(
    inner_objective: Callable[..., Any] | Gradients,
    outer_objective: Callable[..., Any],
    optimizer: Any,
    num_steps: int,
    *,
    schedule: schedules.Schedule | None = None,
    inner_init: Callable[[PyTree], PyTree] | None = None,
    at: tuple[int, ...] | None = None,
    save_gradients: bool = True,
    microbatches: int = 1,
    sharding: Sharding | None = None,
    states: str | os.PathLike[str] | None = None,
    checkpoint: Checkpointing | None = None,
    verify: bool = True,
    throw: bool = True,
) -> MetagradFn:
    r"""The outer objective after a whole training, and its derivative in all that went into it.

    .. math::
        s_{t+1} = U(s_t, \nabla_y g(y_t, x, b_t), x), \qquad \text{value} = f(y_T, x), \qquad
        \text{grad} = \frac{\mathrm{d}}{\mathrm{d} x} f(y_T(x), x)

    The training is a loop of the host over one compiled step, so that its length costs neither
    device memory nor compile time. States of it are kept on the host as `schedule` says; on the
    way back each step is pulled back at its own state. The devices hold one step and what is in
    flight. Everything counts that `outer_params` decide: weights of examples
    (``x["weight"][batch["index"]]``), a term of each step or batch (``bx.objective(fn,
    indexed=True)`` takes the step's number as ``inner_step=``), the optimizer's numbers, the
    initial parameters.

    A step back costs about 2.7 training steps (a gradient is never taken twice), so that the whole
    costs 3.7 trainings with `everything` kept and 4.7 with `segments`.

    For a language model of hundreds of millions of parameters: ``schedule=segments()``, which for
    256 steps keeps 30 states on the host (of Adam, four times the parameters' bytes each, gradient
    included); `microbatches` for activations; ``inner_data=replay.reader(...)`` or arrays on the
    device; ``jax.checkpoint`` inside the objective as ever. Nothing of it is bound to one kind of
    device.

    Args:
      inner_objective: ``(inner_params, outer_params, batch) -> scalar``, or `objective` of one, or
        `gradients`.
      outer_objective: the same for the quality of the trained model. It may return a vector, a
        value a query: `grad` then has that axis in front, and all queries share one way back.
      optimizer: an optax transformation, or a function ``outer_params -> transformation`` whose
        numbers are then learned along. The structure of its state must not depend on them.
      num_steps: training steps, T.
      schedule: `everything`, `segments` (default) or `tree`: what is kept of the training.
      inner_init: ``outer_params -> inner_params``, where the initial parameters are a function of
        the outer ones. The `inner_params` of a call then give their structure only.
      at: steps after which the outer objective is evaluated, from 1 to T; its value is their mean.
        None for T alone.
      save_gradients: keep each step's gradient beside its state. False saves one vector of the
        parameters' size a kept state, and each step back then costs about .7 of a training step
        more.
      microbatches: parts of a batch, one in memory at a time, for objectives that are means over
        rows.
      sharding: ``sharding.data_parallel()``, ``fsdp()`` or ``by_path(...)``; None for arrays as
        they lie.
      states: a folder for the kept states, where they outgrow the host's memory; None for that.
      checkpoint: ``checkpoint.every(n, directory)``: each n-th state on the way there and each
        n-th cotangent on the way back are written to files of the directory. A replay that was
        killed, if called again with the same arguments, goes on from there and ends with the same
        bits; what its schedule had kept is made again as it is needed. When all is done the files
        are removed.
      verify: compare the bits of the first step that is done again (two words of digest a leaf)
        and refuse where they differ.
      throw: raise where no number can come; otherwise say so in ``info["code"]``.

    Returns:
      ``fn(inner_params, outer_params, inner_data=None, outer_batch=None, *, model_state=None,
      key=None) -> Metagradient``. `inner_data` is anything that can be read again at any step:
      arrays, ``data.minibatches``, a pure function ``(key, step) -> batch``, `reader`.

    Raises:
      TypeError, ValueError: for arguments that cannot work, before anything is compiled.
      RuntimeError: in the call, where a step done again gives other bits.
      SolveError: in the call, where something is not finite.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> loss = lambda w, x, batch: jnp.mean(x["weight"] * (w - batch) ** 2)
      >>> quality = lambda w, x, batch: (w - 1.0) ** 2
      >>> sgd = lambda x: optax.sgd(x["rate"])
      >>> fn = bx.replay.value_and_metagrad(
      ...     loss, quality, sgd, num_steps=20, schedule=bx.replay.tree(3)
      ... )
      >>> found = fn(
      ...     jnp.float32(0.0),
      ...     {"weight": jnp.ones(3), "rate": jnp.float32(0.1)},
      ...     jnp.array([0.0, 1.0, 5.0]),
      ... )
      >>> found.grad["weight"].shape, found.info["executed"]
      ((3,), 47)

    Source: Engstrom et al., "Optimizing ML training with metagradient descent" (arXiv 2503.13751),
    algorithm 1; Kemaev et al., "Scalable meta-learning via mixed-mode differentiation" (arXiv
    2505.00793), proposition 3.1.
    """
    steps = numbers.count(num_steps, "num_steps")
    for name, fn in (("inner_objective", inner_objective), ("outer_objective", outer_objective)):
        if not isinstance(fn, Gradients):
            check.callable_objective(fn, name)
    if inner_init is not None:
        numbers.function(inner_init, "inner_init", "(outer_params) -> inner_params")
    inner = (
        inner_objective if isinstance(inner_objective, Gradients) else objective(inner_objective)
    )
    if isinstance(optimizer, tuple) and hasattr(optimizer, "update"):
        factory: Callable[..., Any] = Bound("optimizer", _constant, transformation=optimizer)
    elif callable(optimizer):
        numbers.takes(optimizer, "optimizer", "(outer_params) -> transformation")
        factory = optimizer
    else:
        check.transformation(optimizer, "optimizer")
    if schedule is None:
        schedule = schedules.segments()
    if not isinstance(schedule, schedules.Schedule):
        hint = (
            " Call the factory: replay.segments()."
            if callable(schedule)
            else " Try replay.segments()."
        )
        raise TypeError(f"schedule: got {check.describe(schedule)}; expected a Schedule.{hint}")
    if not (at is None or isinstance(at, (list, tuple))):
        raise TypeError(f"at: got {check.describe(at)}; expected steps, or None.")
    points = (steps,) if at is None else tuple(at)
    if not points or any(
        isinstance(t, bool) or not isinstance(t, (int, np.integer)) or not 1 <= t <= steps
        for t in points
    ):
        raise ValueError(f"at: got {at!r}; expected steps from 1 to num_steps, {steps}.")
    parts = numbers.count(microbatches, "microbatches")
    if parts > 1 and (isinstance(inner, Gradients) or inner.stateful):
        raise ValueError(
            f"microbatches: got {parts} with {inner.name}, which has a model state or its own "
            "gradient; expected 1 there."
        )
    if checkpoint is not None and not isinstance(checkpoint, Checkpointing):
        raise TypeError(
            f"checkpoint: got {check.describe(checkpoint)}; expected checkpoint.every(n, "
            "directory), or None."
        )
    if isinstance(states, str) and (not states or "\0" in states or "://" in states):
        raise ValueError(
            f"states: got {states!r}; expected a folder on this machine's file system."
        )
    if states is not None and not isinstance(states, (str, os.PathLike)):
        raise TypeError(
            f"states: got {check.describe(states)}; expected a folder's path, or None for the "
            "host's memory."
        )
    _check_sharding(sharding, inner)
    save = numbers.flag(save_gradients, "save_gradients")
    # the draw is that of the data, which `_pieces` puts in
    training = Training(inner, factory, None, inner_init, parts, save)  # type: ignore[arg-type]
    return MetagradFn(
        training,
        objective(outer_objective),
        steps,
        schedule=schedule,
        at=points,
        sharding=sharding,
        checkpoint=checkpoint,
        states=None if states is None else os.path.abspath(states),
        verify=numbers.flag(verify, "verify"),
        throw=numbers.flag(throw, "throw"),
    )


__all__ = ["MetagradFn", "Metagradient", "gradients", "value_and_metagrad"]
