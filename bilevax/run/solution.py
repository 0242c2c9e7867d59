"""What a run returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from bilevax import tree
from bilevax.base import PyTree
from bilevax.results import RESULTS


class Solution(NamedTuple):
    """A finished run.

    Attributes:
      inner_params: the kept iterate's inner parameters.
      outer_params: the kept iterate's outer parameters.
      model_state: its model state (BatchNorm statistics, ...), None without any.
      result: a `RESULTS` code (an integer array under a transformation).
      history: numpy arrays by column name, one row a step of this call; with ``aux`` where the outer objective has one.
      state: the run's whole state after its last good step; ``solve_bilevel(..., state=solution.state)`` goes on from it.
      stats: ``steps`` done by this call, ``total_steps``, ``seconds``, ``first_chunk_seconds`` (compilation included), ``best_step``,
        ``failed_steps``,
        ``resumed_from`` (the step that this process began at); ``checkpoint_seconds`` for which saving kept the run waiting.
    """

    inner_params: PyTree
    outer_params: PyTree
    model_state: PyTree
    result: RESULTS
    history: dict[str, Any]
    state: Any
    stats: dict[str, Any]

    def __repr__(self) -> str:
        if isinstance(self.result, jax.Array):
            return f"Solution(result={self.result}, outer_params={_shapes(self.outer_params)})"
        values = self.history.get("value")
        value = f", value {values[0]:.4g} -> {values[-1]:.4g}" if values is not None and len(values) else ""
        return (
            f"Solution({self.result.name}, {self.stats['steps']} steps in {self.stats['seconds']:.3g} s{value}, kept step {self.stats['best_step']}, "
            f"{tree.size(self.inner_params)} inner and {tree.size(self.outer_params)} outer parameters)"
        )


def _shapes(value) -> str:
    return str(jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", value))
