"""What becomes of a run whose step failed."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from bilevax import tree
from bilevax.results import RESULTS
from bilevax.run.state import CHUNK, RunState

SPACING = 32  # steps between two states that a failure may go back to
PATIENCE = 10  # failures in a row after which a run that passes over failures ends all the same


class Recovery:
    """What becomes of a failed step: see `on_failure`."""

    def __init__(self, policy: str):
        self.policy, self.in_a_row, self.clean = policy, 0, 0
        self.snapshots: list[Any] = []

    def before(self, run: RunState, done: int) -> int:
        """Prepare for the chunk after `done` steps: how many steps it may have at most.

        Where the states are kept depends on `done` alone, so that a failure goes back to the same
        one however long the chunks are.
        """
        if self.policy != "rollback":
            return CHUNK**3  # any number
        if not self.snapshots or (done % SPACING == 0 and self.clean):
            self.snapshots = [*self.snapshots, (tree.copy(run.algorithm), run.step - run.skipped)][
                -2:
            ]
        return SPACING - done % SPACING

    def after(self, run: RunState, count: int) -> tuple[RunState, RESULTS]:
        """The state to go on with after a chunk of `count` steps, the last of which may have
        failed.
        """
        result = RESULTS(int(run.code))
        self.clean += count
        if not result.failed:
            return run, result
        # A rolled-back run that diverges does so again only after the steps that it was taken back.
        row = self.clean == 1 if self.policy == "skip" else self.clean <= CHUNK
        self.in_a_row, self.clean = self.in_a_row + 1 if row else 1, 0
        if self.policy == "stop" or self.in_a_row >= PATIENCE:
            return run, result
        run = run._replace(
            code=jnp.zeros_like(run.code), step=run.step + 1, skipped=run.skipped + 1
        )
        if self.policy == "rollback":
            self.snapshots = self.snapshots[:1]
            algorithm, done = self.snapshots[0]
            run = run._replace(algorithm=tree.copy(algorithm), skipped=run.step - done)
        return run, RESULTS.success

    def state(self, run: RunState) -> dict[str, Any]:
        """All of this as arrays, to be saved beside `run`; of the same structure at any time under
        one policy.
        """
        out: dict[str, Any] = {
            "counts": jnp.asarray([self.in_a_row, self.clean, len(self.snapshots)], jnp.int32)
        }
        if self.policy == "rollback":
            kept = self.snapshots or [(run.algorithm, run.step - run.skipped)]
            out["snapshots"] = (kept[0], kept[-1])
        return out if self.policy != "stop" else {}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        if not state:
            return
        self.in_a_row, self.clean, kept = (int(n) for n in state["counts"])
        self.snapshots = list(state.get("snapshots", ()))[:kept]
