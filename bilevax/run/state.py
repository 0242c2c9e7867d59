"""What a run is made of: its plan, and the state that goes from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bilevax._core.showing import screenful
from bilevax.base import Algorithm, PyTree
from bilevax.run.judging import Watch
from bilevax.run.metrics import Metrics
from bilevax.run.options import Options
from bilevax.run.solution import Solution
from bilevax.run.window import stream_of

CHUNK = 256  # steps between two looks at the host for whoever asks for nothing else


class Best(NamedTuple):
    """The kept iterate: its score (smaller is better), the step it belongs to, its parameters and
    model state.
    """

    score: Any
    step: Any
    inner: PyTree
    model: PyTree
    outer: PyTree


class RunState(NamedTuple):
    """All that the next step needs; saved, it is a full checkpoint. `skipped` of the `step` steps
    so far left no trace: passed over or taken back.

    `place`: what loaders said of where they stand, as bytes by argument; between runs only, and
    None where none can say.
    """

    algorithm: PyTree
    key: Any
    step: Any
    skipped: Any
    code: Any
    first_norm: Any
    best: Best | None
    watch: Watch
    place: Any = None

    def __repr__(self) -> str:
        return screenful(self)


class Plan(NamedTuple):
    """What a compiled chunk is made of: a pytree whose functions and integers are static and whose
    numbers are leaves.
    """

    problem: Any  # what the algorithm takes: a `Problem`, or the levels of a multilevel one
    algorithm: Algorithm
    metrics: Metrics | None
    tol: float | None
    layout: Any = None  # where the state lives on several devices: the `Layout` of a sharding
    strict: int = 0  # the mask of the warnings that end the run
    warnings: int = 0  # of those that stand at every step


class Ready(NamedTuple):
    """A run that can begin.

    Attributes:
      plan: what a step is made of.
      static: its static half, and
      dynamic: its numbers, as compiled code takes them.
      run: where it begins.
      sources: of the data, a stream each.
      solution: ``(run state, result, history, stats) -> Solution``.
      options: what was asked.
      fingerprint: ``() -> parts`` that a checkpoint tells other problems by.
      place: what an earlier run's loaders said of where they stood; None where none did.
    """

    plan: Plan
    static: Any
    dynamic: tuple[Any, ...]
    run: RunState
    sources: tuple[Any, ...]
    solution: Callable[..., Solution]
    options: Options
    fingerprint: Callable[[], dict[str, Any]]
    place: dict[str, Any] | None = None

    @property
    def traced(self) -> bool:
        """Whether the run stands inside a JAX transformation."""
        held = [source.data for source in self.sources if stream_of(source) is None]
        return any(
            isinstance(leaf, jax.core.Tracer)
            for leaf in jax.tree.leaves((self.run, self.dynamic, held))
        )
