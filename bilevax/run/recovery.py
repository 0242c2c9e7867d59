"""What becomes of a run whose step failed."""

from __future__ import annotations

import jax.numpy as jnp

from bilevax import tree
from bilevax.results import RESULTS
from bilevax.run.chunk import CHUNK, RunState

ROLLBACK_CHUNK = 32  # the same where a failure undoes one or two chunks
PATIENCE = 10  # failures in a row after which a run that passes over failures ends all the same


class Recovery:
    """What becomes of a failed step: see `on_failure`."""

    def __init__(self, policy: str):
        self.policy, self.in_a_row, self.clean = policy, 0, 0
        self.snapshots: list = []

    def before(self, run: RunState, due: list[int]) -> None:
        """Prepare for a chunk, which `due` may shorten."""
        if self.policy == "rollback":
            due.append(ROLLBACK_CHUNK)
            if self.clean or not self.snapshots:
                self.snapshots = [*self.snapshots, (tree.copy(run.algorithm), run.step - run.skipped)][-2:]

    def after(self, run: RunState, count: int) -> tuple[RunState, RESULTS]:
        """The state to go on with after a chunk of `count` steps, the last of which may have failed."""
        result = RESULTS(int(run.code))
        self.clean += count
        if not result.failed:
            return run, result
        # A rolled-back run that diverges does so again only after the steps that it was taken back.
        row = self.clean == 1 if self.policy == "skip" else self.clean <= CHUNK
        self.in_a_row, self.clean = self.in_a_row + 1 if row else 1, 0
        if self.policy == "stop" or self.in_a_row >= PATIENCE:
            return run, result
        run = run._replace(code=jnp.zeros_like(run.code), step=run.step + 1, skipped=run.skipped + 1)
        if self.policy == "rollback":
            self.snapshots = self.snapshots[:1]
            algorithm, done = self.snapshots[0]
            run = run._replace(algorithm=tree.copy(algorithm), skipped=run.step - done)
        return run, RESULTS.success
