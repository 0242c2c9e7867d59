"""What a run returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from bilevax import tree
from bilevax.base import PyTree
from bilevax.results import RESULTS, warnings_in
from bilevax.run import reading


class Solution(NamedTuple):
    """A finished run.

    Attributes:
      inner_params: the kept iterate's inner parameters.
      outer_params: the kept iterate's outer parameters.
      model_state: its model state (BatchNorm statistics, ...), None without any.
      result: a `RESULTS` code (an integer array under a transformation).
      history: numpy arrays by column name, one row a step of this call; with ``aux`` where the
        outer objective has one. ``code`` has a `RESULTS` code a step, ``warnings`` a mask of what
        was rough (`results.warnings_in`).
      state: the run's whole state after its last good step; ``solve_bilevel(...,
        state=solution.state)`` goes on from it.
      stats: ``steps`` done by this call, ``total_steps``, ``seconds``, ``first_chunk_seconds``
        (compilation included), ``best_step``, ``failed_steps``,
        ``resumed_from`` (the step that this process began at), ``algorithm`` (its name, for where
        none was given); ``checkpoint_seconds`` for which saving kept the run waiting.
    """

    inner_params: PyTree
    outer_params: PyTree
    model_state: PyTree
    result: RESULTS
    history: dict[str, Any]
    state: Any
    stats: dict[str, Any]

    @property
    def warnings(self) -> dict[RESULTS, Any]:
        """In how many steps of this call which warning stood: what is known to be rough about them.

        Integers by `RESULTS` code; arrays of counts under ``vmap``, a lane each.
        """
        return warnings_in(self.history.get("warnings", ()))

    def summary(self) -> str:
        """The run in the order in which to read it: how it ended, the value, how far it came, how
        far to trust it, what was rough.

        Returns:
          A text of a line a point, to be printed. A quantity that the algorithm does not report has
          no line.

        Raises:
          TypeError: for a solution under a transformation, whose numbers are not there to be read.

        Examples:
          >>> import jax.numpy as jnp, optax, bilevax as bx
          >>> inner = lambda y, x, batch: 0.5 * jnp.sum((y - x) ** 2)
          >>> outer = lambda y, x, batch: 0.5 * jnp.sum(y**2)
          >>> algorithm = bx.algorithms.double_loop(
          ...     bx.inner.optax(optax.sgd(1.0), 1), bx.hypergradient.implicit(), optax.sgd(0.5)
          ... )
          >>> solution = bx.solve_bilevel(
          ...     inner, outer, jnp.zeros(2), jnp.ones(2), algorithm=algorithm, num_steps=5
          ... )
          >>> print(solution.summary().splitlines()[1])
          value               1 -> 0.003906; returned is that of step 4
        """
        if isinstance(self.result, jax.Array):
            raise TypeError(
                "solution: got one of a transformation (jit, vmap); expected one run's. Try "
                "jax.tree.map(lambda a: a[i], solution)."
            )
        return reading.summary(self)

    def __repr__(self) -> str:
        if isinstance(self.result, jax.Array):
            return f"Solution(result={self.result}, outer_params={_shapes(self.outer_params)})"
        rough = ", ".join(f"{code.name} in {count}" for code, count in self.warnings.items())
        rough = f", warnings: {rough} steps" if rough else ""
        values = self.history.get("value")
        value = (
            f", value {values[0]:.4g} -> {values[-1]:.4g}"
            if values is not None and len(values)
            else ""
        )
        steps, best = self.stats["steps"], self.stats["best_step"]
        sizes = (
            f"{tree.size(self.inner_params)} inner and {tree.size(self.outer_params)} outer "
            "parameters"
        )
        name = self.stats.get("algorithm")
        by = f" of {name}" if name else ""
        return (
            f"Solution({self.result.name}, {steps} steps{by} in {self.stats['seconds']:.3g} "
            f"s{value}, kept step {best}{rough}, {sizes})"
        )


def _shapes(value: Any) -> str:
    return str(jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", value))
