"""The gradient of a trained model's quality in everything that went into its training."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import check, tree
from bilevax._core import numbers
from bilevax.base import Bound, Draw, InnerState, Objective, PyTree, objective, split
from bilevax.data.sources import Source
from bilevax.replay import _steps, schedules
from bilevax.replay._batches import Batches, resolve
from bilevax.replay._placing import Placing
from bilevax.replay._shelf import Host
from bilevax.replay._steps import Given, Gradients, Saved, Training
from bilevax.results import RESULTS, SolveError
from bilevax.run import digest, layout
from bilevax.sharding.placement import Sharding

_RUN_AHEAD = 2  # steps that may wait on the devices while the host goes on


class Metagradient(NamedTuple):
    """What a replay found.

    Attributes:
      value: the outer objective, a scalar or a value a query.
      grad: its derivative in the outer parameters, through the whole training; None at leaves that
        are not floating-point.
      inner_params: the parameters at the end of the training.
      init_grad: its derivative in the initial inner parameters; None where those are a function of
        the outer ones, of which `grad` has the derivative then.
      model_state: the model's state at the end.
      aux: the outer objective's aux at the end.
      info: what to read: ``values`` (the inner objective before each step), ``cotangent_norm`` (of
        the derivative in the state before each step), ``executed`` and ``checked`` (training steps
        that were done in all; those of them done to compare bits), ``held`` and ``host_bytes``
        (the most that was kept at once), ``seconds_there``, ``seconds_back``, and ``code``, a
        `RESULTS`.
    """

    value: Any
    grad: PyTree
    inner_params: PyTree
    init_grad: PyTree
    model_state: PyTree
    aux: PyTree
    info: dict[str, Any]


class _Node(NamedTuple):
    """A state, what the step before it left for its pullback, and whether it may be donated."""

    step: int
    state: InnerState
    saved: Saved | None
    own: bool


class MetagradFn:
    """A training and its way back; made by `value_and_metagrad`."""

    def __init__(
        self,
        training: Training,
        outer: Objective,
        num_steps: int,
        schedule: schedules.Schedule,
        at: tuple,
        sharding,
        verify: bool,
        throw: bool,
    ):
        self.training, self.outer, self.num_steps, self.schedule = (
            training,
            outer,
            num_steps,
            schedule,
        )
        self.at, self.sharding, self.verify, self.throw = at, sharding, verify, throw
        self._compiled: dict = {}

    def __repr__(self) -> str:
        return f"value_and_metagrad({self.training.objective.name}, {self.outer.name}, num_steps={self.num_steps}, schedule={self.schedule!r})"

    def __call__(
        self,
        inner_params: PyTree,
        outer_params: PyTree,
        inner_data: Any = None,
        outer_batch: PyTree = None,
        *,
        model_state: PyTree = None,
        key: jax.Array | None = None,
    ) -> Metagradient:
        """Train, and go back; see `value_and_metagrad`."""
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
            return _Run(self, pieces, batches, given, params, model, outer_batch).there_and_back()
        finally:
            batches.close()

    def _placing(self, params: PyTree, given: Given, model: PyTree) -> Placing:
        if self.sharding is None:
            return Placing()
        state = jax.eval_shape(functools.partial(_steps.begin, self.training), params, given, model)
        return Placing(self.sharding, state, given.outer)

    def _pieces(self, draw: Draw, placing: Placing) -> _Pieces:
        """The compiled pieces for data that is read by `draw`."""
        static, dynamic = split(draw)  # equal draws, if built anew, are compiled once
        name = (draw if dynamic else static, placing.name())
        if name not in self._compiled:
            training, outer = self.training, self.outer
            if self.sharding is not None:
                training = training._replace(objective=layout.wrap(self.sharding, training.objective))  # type: ignore[arg-type]
                outer = layout.wrap(self.sharding, outer)
            self._compiled[name] = _Pieces(training._replace(draw=draw, placing=placing), outer)
        return self._compiled[name]


class _Pieces:
    """The compiled programs of a replay, made once."""

    def __init__(self, training: Training, outer: Objective):
        def bind(fn, *first):
            return lambda *args: fn(*first, *args)

        self.begin = jax.jit(bind(_steps.begin, training))
        # One program for both, so that the same step gives the same bits however it was reached.
        self.advance = jax.jit(bind(_steps.advance, training))
        self.advance_over = jax.jit(bind(_steps.advance, training), donate_argnums=0)
        self.retreat = jax.jit(bind(_steps.retreat, training), donate_argnums=(4, 5))
        self.end = jax.jit(bind(_steps.end, training, outer))
        self.finish = jax.jit(bind(_steps.finish, training))
        self.add = jax.jit(tree.add, donate_argnums=0)


class _Run:
    """One replay, under way."""

    def __init__(
        self,
        fn: MetagradFn,
        pieces: _Pieces,
        batches: Batches,
        given: Given,
        params,
        model,
        outer_batch,
    ):
        self.fn, self.batches, self.given, self.outer_batch = fn, batches, given, outer_batch
        self.params, self.model = params, model
        self.pieces = pieces
        self.shelf = Host()
        self.values: dict[int, Any] = {}
        self.norms: dict[int, Any] = {}
        self.digests: dict[int, list] = {}
        self.waiting: deque = deque()
        self.executed = self.checked = 0
        self.again = fn.schedule.counts(fn.num_steps).executed > fn.num_steps
        self.rebuilt = False  # whether the current state was reached by steps done again
        self.turned = False

    # ---- the loop

    def there_and_back(self) -> Metagradient:
        begin = time.perf_counter()
        self.node = _Node(0, self.pieces.begin(self.params, self.given, self.model), None, False)
        for kind, step in self.fn.schedule.actions(self.fn.num_steps):
            getattr(self, f"_{kind}")(step)
            if kind == "turn":
                jax.block_until_ready(self.value)
                turned = time.perf_counter()
        outer, init = self.pieces.finish(self.params, self.given, self.model, self.cotangent, self.outer_cotangent)
        jax.block_until_ready(outer)
        return self._report(
            outer,
            init,
            {"seconds_there": turned - begin, "seconds_back": time.perf_counter() - turned},
        )

    def _go(self, to: int) -> None:
        while self.node.step < to:
            self.node = self._step(self.node, self.node.own)

    def _step(self, node: _Node, donate: bool) -> _Node:
        advance = self.pieces.advance_over if donate else self.pieces.advance
        state, saved = advance(node.state, self._given(node.step, node.step + 1), np.int32(node.step))
        self.executed += 1
        if not self.turned:
            self.values[node.step] = saved.value
        else:
            self.rebuilt = True
        self._throttle(saved.value)
        return _Node(node.step + 1, state, saved, True)

    def _keep(self, step: int) -> None:
        self._remember(step)
        self.shelf.put(step, (self.node.state, self.node.saved))
        self.node = self.node._replace(own=False)

    def _take(self, step: int) -> None:
        (state, saved), own = self.shelf.take(step)
        self.node, self.rebuilt = _Node(step, state, saved, own), False

    def _drop(self, step: int) -> None:
        self.shelf.drop(step)

    def _turn(self, step: int) -> None:
        last = self._step(self.node, False)
        self.turned, self.rebuilt = True, False
        self.last, self.arrived = last.state, last.saved
        self.value, self.aux, self.cotangent, self.outer_cotangent = self._measure(last.state, last.step)

    def _back(self, step: int) -> None:
        if self.rebuilt and step + 1 in self.digests and not self.checked:
            self._check(step)
        self._remember(step)
        given = self._given(step, step - 1)
        self.cotangent, self.outer_cotangent, norm = self.pieces.retreat(
            self.node.state,
            self.arrived,
            given,
            np.int32(step),
            self.cotangent,
            self.outer_cotangent,
        )
        self.arrived, self.norms[step] = self.node.saved, norm
        self._throttle(norm)
        if step in self.fn.at:
            value, _, cotangent, outer = self._measure(self.node.state, step)
            self.value = self.value + value
            self.cotangent, self.outer_cotangent = self.pieces.add((self.cotangent, self.outer_cotangent), (cotangent, outer))

    # ---- its parts

    def _given(self, step: int, then: int) -> Given:
        return self.given._replace(data=self.batches.at(step, then))

    def _measure(self, state: InnerState, step: int):
        at = self.fn.at
        weight = 1 / len(at) if step in at else 0.0
        key = None if self.given.key is None else jax.random.fold_in(self.given.key, self.fn.num_steps + 1)
        return tree.copy(self.pieces.end(state, self.given, self.outer_batch, key, weight))

    def _throttle(self, marker) -> None:
        """The host runs ahead of the devices by a few steps only: what waits takes memory."""
        self.waiting.append(marker)
        if len(self.waiting) > _RUN_AHEAD:
            jax.block_until_ready(self.waiting.popleft())

    def _remember(self, step: int) -> None:
        """The digest of the current state, for a first comparison."""
        if self.again and self.fn.verify and not self.checked and step not in self.digests:
            self.digests[step] = _digest(self.node)

    def _check(self, step: int) -> None:
        """Compare the bits of a step done again with those of the first time."""
        node = self._step(self.node, False)
        self.checked += 1
        before, now = jax.device_get((self.digests[step + 1], _digest(node)))
        if before != now:
            raise RuntimeError(
                f"replay: training steps done again up to step {step + 1} gave other bits than the first time, so the way back would follow "
                "another training; expected a deterministic step. The batches may differ when they are read again, or the device's programs "
                "are not deterministic. Try XLA_FLAGS=--xla_gpu_deterministic_ops=true, schedule=replay.everything(), or verify=False."
            )

    def _report(self, outer: PyTree, init: PyTree, info: dict) -> Metagradient:
        steps = range(self.fn.num_steps)
        values, norms, value = jax.device_get(([self.values[t] for t in steps], [self.norms[t] for t in steps], self.value))
        info |= {
            "values": np.asarray(values),
            "cotangent_norm": np.asarray(norms),
            "executed": self.executed,
            "checked": self.checked,
        }
        info |= {"held": self.shelf.most, "host_bytes": self.shelf.most_bytes}
        code, where = _code(info, value, self.given.outer, outer)
        info["code"] = code
        start = self.fn.training.start
        found = Metagradient(
            value,
            outer,
            self.last.params,
            init if start is None else None,
            self.last.model,
            self.aux,
            info,
        )
        found = found._replace(
            grad=tree.combine(outer, jax.tree.map(lambda a: None, self.given.outer_fixed)),
            inner_params=tree.combine(self.last.params, self.given.inner_fixed),
        )
        if code.failed and self.fn.throw:
            raise SolveError(code, found, where)
        return found


def _digest(node: _Node) -> list:
    return digest._digests([leaf for leaf in jax.tree.leaves((node.state, node.saved)) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)])


def _code(info: dict, value, outer, grad) -> tuple[RESULTS, str]:
    """How it went, and where it went wrong."""
    bad = np.flatnonzero(~np.isfinite(info["values"]))
    if bad.size:
        return RESULTS.inner_nonfinite, f" at training step {bad[0]}"
    if not np.isfinite(value).all():
        return RESULTS.outer_nonfinite, ""
    bad = np.flatnonzero(~np.isfinite(info["cotangent_norm"]).reshape(len(info["cotangent_norm"]), -1).all(-1))
    if bad.size:
        return RESULTS.hypergradient_nonfinite, f" on the way back over training step {bad[-1]}"
    if not bool(tree.all_finite(grad)):
        return RESULTS.hypergradient_nonfinite, ""
    return RESULTS.success, ""


# ---- the public face


def gradients(fn: Callable, *, stateful: bool = False, keyed: bool = False) -> Gradients:
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
      >>> mean = lambda w, x, batch: jnp.mean(jax.vmap(lambda row: clipped(jax.grad(loss)(w, x, row)))(batch))
      >>> own = bx.replay.gradients(mean)
      >>> fn = bx.replay.value_and_metagrad(own, lambda w, x, batch: w**2, optax.sgd(0.1), num_steps=5)
      >>> found = fn(jnp.float32(0.5), jnp.float32(1.0), jnp.arange(4.0))
      >>> bool(jnp.isfinite(found.grad))
      True
    """
    if not callable(fn):
        raise TypeError(f"fn: got {check.describe(fn)}; expected a function (inner_params, outer_params, batch) -> grads.")
    return Gradients(fn, stateful, keyed)


def _constant(outer, *, transformation):
    return transformation


def _check_sharding(sharding: Any, inner: Any) -> None:
    if sharding is None:
        return
    if not isinstance(sharding, Sharding) or sharding.kind == "tasks" or sharding.dry:
        raise TypeError(f"sharding: got {check.describe(sharding)}; expected sharding.data_parallel(), fsdp() or by_path(...), or None.")
    if isinstance(inner, Gradients):
        raise TypeError(
            f"sharding: got {sharding.kind!r} with {inner.name}, a gradient of your own; expected None. Place the arrays of the call, which stay "
            "where they lie, and split the rows inside."
        )


def value_and_metagrad(
    inner_objective: Callable,
    outer_objective: Callable,
    optimizer: Any,
    num_steps: int,
    *,
    schedule: schedules.Schedule | None = None,
    inner_init: Callable[[PyTree], PyTree] | None = None,
    at: tuple[int, ...] | None = None,
    save_gradients: bool = True,
    microbatches: int = 1,
    sharding: Sharding | None = None,
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
      verify: compare the bits of the first step that is done again (two words of digest a leaf)
        and refuse where they differ.
      throw: raise where no number can come; otherwise say so in ``info["code"]``.

    Returns:
      ``fn(inner_params, outer_params, inner_data=None, outer_batch=None, *, model_state=None,
      key=None) -> Metagradient``. `inner_data` is anything that can be read again at any step:
      arrays, ``data.minibatches``, a pure function ``(key, step) -> batch``, `reader`.

    Raises:
      TypeError, ValueError: for arguments that cannot work, before anything is compiled; in the
      call, RuntimeError where a step done again gives
        other bits, and `SolveError` where something is not finite.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> loss = lambda w, x, batch: jnp.mean(x["weight"] * (w - batch) ** 2)
      >>> quality = lambda w, x, batch: (w - 1.0) ** 2
      >>> sgd = lambda x: optax.sgd(x["rate"])
      >>> fn = bx.replay.value_and_metagrad(loss, quality, sgd, num_steps=20, schedule=bx.replay.tree(3))
      >>> found = fn(jnp.float32(0.0), {"weight": jnp.ones(3), "rate": jnp.float32(0.1)}, jnp.array([0.0, 1.0, 5.0]))
      >>> found.grad["weight"].shape, found.info["executed"]
      ((3,), 47)

    Source: Engstrom et al., "Optimizing ML training with metagradient descent" (arXiv 2503.13751),
    algorithm 1; Kemaev et al., "Scalable meta-learning via mixed-mode differentiation" (arXiv
    2505.00793), proposition 3.1.
    """
    steps = numbers.count(num_steps, "num_steps")
    inner = inner_objective if isinstance(inner_objective, Gradients) else objective(inner_objective)
    if isinstance(optimizer, tuple) and hasattr(optimizer, "update"):
        factory: Callable = Bound("optimizer", _constant, transformation=optimizer)
    elif callable(optimizer):
        factory = optimizer
    else:
        check.transformation(optimizer, "optimizer")
    if schedule is None:
        schedule = schedules.segments()
    if not isinstance(schedule, schedules.Schedule):
        hint = " Call the factory: replay.segments()." if callable(schedule) else " Try replay.segments()."
        raise TypeError(f"schedule: got {check.describe(schedule)}; expected a Schedule.{hint}")
    points = (steps,) if at is None else tuple(at)
    if not points or any(isinstance(t, bool) or not isinstance(t, (int, np.integer)) or not 1 <= t <= steps for t in points):
        raise ValueError(f"at: got {at!r}; expected steps from 1 to num_steps, {steps}.")
    parts = numbers.count(microbatches, "microbatches")
    if parts > 1 and (isinstance(inner, Gradients) or inner.stateful):
        raise ValueError(f"microbatches: got {parts} with {inner.name}, which has a model state or its own gradient; expected 1 there.")
    training = Training(inner, factory, None, inner_init, parts, bool(save_gradients))  # type: ignore[arg-type]
    _check_sharding(sharding, inner)
    return MetagradFn(
        training,
        objective(outer_objective),
        steps,
        schedule,
        points,
        sharding,
        bool(verify),
        bool(throw),
    )


__all__ = ["Metagradient", "gradients", "value_and_metagrad"]
