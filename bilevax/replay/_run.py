"""One replay, under way: the loop of the host over the compiled pieces."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import tree
from bilevax._core.showing import screenful
from bilevax.base import InnerState, Objective, PyTree, join, split
from bilevax.replay import _files, _resuming, _steps
from bilevax.replay._batches import Batches
from bilevax.replay._shelf import Folder, Host, bound
from bilevax.replay._steps import Given, Saved, Training
from bilevax.results import RESULTS, SolveError
from bilevax.run import digest

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
        (the most that was kept at once), ``seconds_there``, ``seconds_back``,
        ``resumed_from`` (a step, 0 for a fresh start) and ``code``, a `RESULTS`.
    """

    value: Any
    grad: PyTree
    inner_params: PyTree
    init_grad: PyTree
    model_state: PyTree
    aux: PyTree
    info: dict[str, Any]

    def __repr__(self) -> str:
        return screenful(self)


class Pieces:
    """The programs of a replay. Trainings that differ in numbers, length or schedule only are
    compiled once for all.
    """

    def __init__(self, training: Training, outer: Objective):
        self.static, self.numbers = split((training, outer))
        self.begin = self._piece(_BEGIN)
        # One program for both, so that the same step gives the same bits however it was reached.
        self.advance, self.advance_over = self._piece(_ADVANCE), self._piece(_ADVANCE_OVER)
        self.retreat = self._piece(_RETREAT)
        self.end = self._piece(_END)
        self.finish = self._piece(_FINISH)

    def _piece(self, program: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(program, self.static, self.numbers)


def _program(fn: Callable[..., Any], donate: tuple[int, ...] = ()) -> Callable[..., Any]:
    """A compiled piece of any training; `donate` counts its own arguments."""

    def run(static, numbers, *args):
        return fn(join(static, numbers), *args)

    return jax.jit(run, static_argnums=0, donate_argnums=tuple(2 + n for n in donate))


_BEGIN = _program(lambda pieces, *args: _steps.begin(pieces[0], *args))
_ADVANCE = _program(lambda pieces, *args: _steps.advance(pieces[0], *args))
_ADVANCE_OVER = _program(lambda pieces, *args: _steps.advance(pieces[0], *args), (0,))
_RETREAT = _program(lambda pieces, *args: _steps.retreat(pieces[0], *args), (4, 5))
_END = _program(lambda pieces, *args: _steps.end(*pieces, *args))
_FINISH = _program(lambda pieces, *args: _steps.finish(pieces[0], *args))
_add = jax.jit(tree.add, donate_argnums=0)


class _Node(NamedTuple):
    """A state, what the step before it left for its pullback, and whether it may be donated."""

    step: int
    state: InnerState
    saved: Saved | None
    own: bool


class _End(NamedTuple):
    """What is known once the training is over, and how far the way back has come."""

    value: Any
    aux: PyTree
    cotangent: InnerState
    outer_cotangent: PyTree
    arrived: Saved | None  # of the step that is pulled back next
    params: PyTree
    model: PyTree


class Run:
    """One replay: where it stands on its way there or back."""

    def __init__(
        self,
        fn: Any,
        pieces: Pieces,
        batches: Batches,
        given: Given,
        params: PyTree,
        model: PyTree,
        outer_batch: Any,
    ):
        self.fn, self.batches, self.given, self.outer_batch = fn, batches, given, outer_batch
        self.params, self.model, self.pieces = params, model, pieces
        self.shelf = Host() if fn.states is None else Folder(fn.states)
        self.progress: _resuming.Progress | None = None
        self.owed: set[int] = (
            set()
        )  # states that the schedule has kept and a killed process has lost
        self.values: dict[int, Any] = {}
        self.norms: dict[int, Any] = {}
        self.digests: dict[int, list[Any]] = {}
        self.waiting: deque[Any] = deque()
        self.executed = self.checked = 0
        self.counts = fn.schedule.counts(fn.num_steps)
        self.again = self.counts.executed > fn.num_steps
        self.rebuilt = False  # whether the current state was reached by steps done again
        self.turned = False

    # ---- the loop

    def there_and_back(self) -> Metagradient:
        """All of it."""
        begin = turned = time.perf_counter()
        self.node = self._first()
        grads = self.node.state.params if self.fn.training.save else None
        self.shelf.expect(self.counts.held, (self.node.state, grads))
        where, resumed = self._resume()
        try:
            for kind, step in self.fn.schedule.actions(self.fn.num_steps):
                if where is not None:  # done by a process before this one
                    where = self._pass_over(kind, step, where, resumed)
                    if where is not None or kind != "go":
                        continue
                getattr(self, f"_{kind}")(step)
                if kind == "turn":
                    jax.block_until_ready(self.end.value)
                    turned = time.perf_counter()
            outer, init = self._finish()
        except BaseException:
            self._close(False)
            raise
        self._close(True)
        info = {
            "seconds_there": turned - begin,
            "seconds_back": time.perf_counter() - turned,
            "resumed_from": resumed,
        }
        return self._report(outer, init, info)

    def _first(self) -> _Node:
        return _Node(0, bound(self.pieces.begin(self.params, self.given, self.model)), None, False)

    def _finish(self) -> tuple[PyTree, PyTree]:
        end = self.end
        return jax.block_until_ready(
            self.pieces.finish(
                self.params, self.given, self.model, end.cotangent, end.outer_cotangent
            )
        )

    def _close(self, done: bool) -> None:
        self.shelf.close()
        if self.progress is not None:
            self.progress.close(done)

    # ---- the actions of a schedule

    def _go(self, to: int) -> None:
        while self.node.step < to:
            self.node = self._step(self.node, self.node.own)
            if not self.turned and self.progress is not None and self.progress.due(self.node.step):
                self.node = self.node._replace(own=False)
                values = self._read(self.values, range(self.node.step))
                self.progress.save(
                    "there", self.node.step, (self.node.state, self.node.saved, values)
                )

    def _keep(self, step: int) -> None:
        self._remember(step)
        self.shelf.put(step, (self.node.state, self.node.saved))
        self.node = self.node._replace(own=False)

    def _take(self, step: int) -> None:
        if step not in self.shelf:
            self._rebuild(step)
            return
        (state, saved), own = self.shelf.take(step)
        self.node, self.rebuilt = _Node(step, state, saved, own), False

    def _drop(self, step: int) -> None:
        self.owed.discard(step)
        if step in self.shelf:
            self.shelf.drop(step)

    def _turn(self, step: int) -> None:
        last = self._step(self.node, False)
        self.turned, self.rebuilt = True, False
        value, aux, cotangent, outer = self._measure(last.state, last.step)
        self.end = _End(
            value, aux, cotangent, outer, last.saved, last.state.params, last.state.model
        )

    def _back(self, step: int) -> None:
        if self.rebuilt and step + 1 in self.digests and not self.checked:
            self._check(step)
        self._remember(step)
        end, given = self.end, self._given(step, step - 1)
        state, number = self.node.state, np.int32(step)
        cotangent, outer, norm = self.pieces.retreat(
            state, end.arrived, given, number, end.cotangent, end.outer_cotangent
        )
        value, self.norms[step] = end.value, norm
        self._throttle(norm)
        if step in self.fn.at:
            more, _, *cotangents = self._measure(state, step)
            value = value + more
            cotangent, outer = _add((cotangent, outer), tuple(cotangents))
        self.end = end._replace(
            value=value, cotangent=cotangent, outer_cotangent=outer, arrived=self.node.saved
        )
        if self.progress is not None and self.progress.due(step):
            self._save_back(step)

    # ---- their parts

    def _step(self, node: _Node, donate: bool) -> _Node:
        advance = self.pieces.advance_over if donate else self.pieces.advance
        state, saved = advance(
            node.state, self._given(node.step, node.step + 1), np.int32(node.step)
        )
        self.executed += 1
        if not self.turned:
            self.values[node.step] = saved.value
        else:
            self.rebuilt = True
        self._throttle(saved.value)
        return _Node(node.step + 1, state, saved, True)

    def _given(self, step: int, then: int) -> Given:
        return self.given._replace(data=self.batches.at(step, then))

    def _measure(self, state: InnerState, step: int) -> Any:
        at = self.fn.at
        weight = 1 / len(at) if step in at else 0.0
        key = (
            None
            if self.given.key is None
            else jax.random.fold_in(self.given.key, self.fn.num_steps + 1)
        )
        return tree.copy(self.pieces.end(state, self.given, self.outer_batch, key, weight))

    def _throttle(self, marker: Any) -> None:
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
        if [int(word) for word in before] != [int(word) for word in now]:
            raise RuntimeError(
                f"replay: training steps done again up to step {step + 1} gave other bits than the "
                "first time, so the way "
                "back would follow another training; expected a deterministic step. The batches "
                "may differ when they are "
                "read again, or the device's programs are not deterministic. Try "
                "XLA_FLAGS=--xla_gpu_deterministic_ops=true, schedule=replay.everything(), or "
                "verify=False."
            )

    def _read(self, column: dict[int, Any], steps: range) -> np.ndarray:
        """Numbers by step; what was on the devices is fetched once."""
        column.update(
            jax.device_get(
                {step: column[step] for step in steps if not isinstance(column[step], np.ndarray)}
            )
        )
        column.update({step: np.asarray(column[step]) for step in steps})
        return np.stack([column[step] for step in steps]) if steps else np.zeros(0)

    # ---- going on after a kill

    def _resume(self) -> tuple[str | None, int]:
        """Where a process before this one came to: ``("there" or "back" or None, step)``."""
        spec = self.fn.checkpoint
        if spec is None:
            return None, 0
        self.progress = _resuming.Progress(spec, self._name())
        forms = self._forms()
        found = self.progress.newest("back", forms["back"])
        if found is not None:
            step, (self.end, values, norms), notes = found
            self.values = dict(enumerate(values))
            self.norms = dict(enumerate(norms, start=step))
            self.digests[step], self.turned, self.again = notes["digest"], True, True
            return "back", step
        found = self.progress.newest("there", forms["there"])
        if found is None:
            return None, 0
        step, (state, saved, values), _ = found
        self.node, self.values = _Node(step, state, saved, False), dict(enumerate(values))
        self.again = True
        return "there", step

    def _pass_over(self, kind: str, step: int, where: str, resumed: int) -> str | None:
        """Take note of an action that is done already; None where the replay goes on from here."""
        if where == "there" and (kind == "turn" or (kind == "go" and step >= resumed)):
            return None
        if kind == "keep":
            self.owed.add(step)
        elif kind == "drop":
            self.owed.discard(step)
        return None if where == "back" and kind == "back" and step == resumed else where

    def _rebuild(self, step: int) -> None:
        """Reach a state that is kept no longer, from the nearest one before it; others that were
        lost are kept on the way.
        """
        assert self.progress is not None, "the schedule takes up a state that it has not kept"
        found: _Node | None = None
        for base in sorted((b for b in self.progress.there() if b <= step), reverse=True):
            read = self.progress.read("there", base, self._forms()["there"])
            if read is not None:
                found = _Node(base, read[0][0], read[0][1], False)
                break
        nearest = max((s for s in self.shelf.steps() if s <= step), default=-1)
        if nearest >= (0 if found is None else found.step):
            (state, saved), own = self.shelf.take(nearest)
            found = _Node(nearest, state, saved, own)
        self.node = self._first() if found is None else found
        self.turned, self.rebuilt = True, False
        while True:
            if self.node.step in self.owed:
                self.owed.discard(self.node.step)
                self._keep(self.node.step)
            if self.node.step == step:
                return
            self.node = self._step(self.node, self.node.own)

    def _save_back(self, step: int) -> None:
        steps = range(self.fn.num_steps)
        values, norms = self._read(self.values, steps), self._read(self.norms, steps[step:])
        words = [int(word) for word in jax.device_get(_digest(self.node))]
        assert self.progress is not None
        self.progress.save("back", step, (tree.copy(self.end), values, norms), digest=words)

    def _forms(self) -> dict[str, Any]:
        """How the parts of a file lie once they are read."""
        forms = _files.forms(self.node.state)
        lead = jax.eval_shape(lambda: self._measure(self.node.state, self.fn.num_steps))
        host, plain = _files.Form(()), _files.Form.of(jnp.zeros(()))
        grads = forms.params if self.fn.training.save else None
        saved = Saved(plain, grads)
        moving = tree.partition(self.node.state)[0]
        like = (moving, self.given.outer)
        axis = lead[0].ndim
        cotangent, outer = jax.tree.map(lambda leaf: _files.Form.of(leaf).behind(axis), like)
        anywhere = lambda value: jax.tree.map(lambda a: plain, value)
        end = _End(
            anywhere(lead[0]), anywhere(lead[1]), cotangent, outer, saved, forms.params, forms.model
        )
        return {"there": (forms, saved, host), "back": (end, host, host)}

    def _name(self) -> str:
        state, given = self.node.state, self._given(0, 0)
        key = None if self.given.key is None else jax.random.fold_in(self.given.key, 0)
        texts = [
            str(jax.make_jaxpr(self.pieces.advance)(state, given, np.int32(0))),
            str(jax.make_jaxpr(self.pieces.end)(state, given, self.outer_batch, key, 1.0)),
            f"{self.fn.num_steps} {self.fn.at} {self.pieces.numbers}",
        ]
        return _resuming.fingerprint(texts, (state, given, self.outer_batch))

    # ---- the end

    def _report(self, outer: PyTree, init: PyTree, info: dict[Any, Any]) -> Metagradient:
        steps = range(self.fn.num_steps)
        value = jax.device_get(self.end.value)
        info |= {
            "values": self._read(self.values, steps),
            "cotangent_norm": self._read(self.norms, steps),
        }
        info |= {"executed": self.executed, "checked": self.checked}
        info |= {"held": self.shelf.most, "host_bytes": self.shelf.most_bytes}
        info["code"], where = _code(info, value, outer)
        found = Metagradient(
            value=self.end.value,
            grad=tree.combine(outer, jax.tree.map(lambda a: None, self.given.outer_fixed)),
            inner_params=tree.combine(self.end.params, self.given.inner_fixed),
            init_grad=init if self.fn.training.start is None else None,
            model_state=self.end.model,
            aux=self.end.aux,
            info=info,
        )
        if info["code"].failed and self.fn.throw:
            raise SolveError(info["code"], found, where)
        return found


def _digest(node: _Node) -> list[Any]:
    leaves = jax.tree.leaves((node.state, node.saved))
    return digest.words(
        [leaf for leaf in leaves if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    )


def _code(info: dict[Any, Any], value: Any, grad: Any) -> tuple[RESULTS, str]:
    """How it went, and where it went wrong."""
    bad = np.flatnonzero(~np.isfinite(info["values"]))
    if bad.size:
        return RESULTS.inner_nonfinite, f" at training step {bad[0]}"
    if not np.isfinite(value).all():
        return RESULTS.outer_nonfinite, ""
    norms = info["cotangent_norm"]
    bad = np.flatnonzero(~np.isfinite(norms).reshape(len(norms), -1).all(-1))
    if bad.size:
        return RESULTS.hypergradient_nonfinite, f" on the way back over training step {bad[-1]}"
    if not bool(tree.all_finite(grad)):
        return RESULTS.hypergradient_nonfinite, ""
    return RESULTS.success, ""
