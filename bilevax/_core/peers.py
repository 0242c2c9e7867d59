"""The processes of one run: what they must agree on, and how long one waits for another."""

from __future__ import annotations

import itertools
import json
import threading
import time
from typing import Any

import jax

BEAT = 3.0  # seconds between two signs of life
SILENCE = 45.0  # seconds without one after which a process counts as gone
LIMIT = 1800.0  # seconds after which one that lives, but does not come, is no longer waited for
_GONE = "gone: "
_RUNS = itertools.count()  # the same number on every process, since all make the same runs


def _client() -> Any:
    from jax._src import distributed  # the only way to a barrier with a time limit

    return distributed.global_state.client


class Peers:
    """What the processes of a run tell each other, through the coordination service that JAX starts
    for them.

    No devices take part, so it works while a device program waits for a process that is gone.
    """

    def __init__(self) -> None:
        self.count, self.rank = jax.process_count(), jax.process_index()
        self._name, self._turn, self._end = f"bilevax/{next(_RUNS)}", 0, threading.Event()
        self._client: Any = _client() if self.count > 1 else None
        if self._client is not None:
            threading.Thread(target=self._beats, daemon=True).start()

    def close(self, error: BaseException | None = None) -> None:
        """No more signs of life; an error is told to those that wait."""
        self._end.set()
        if self._client is not None and error is not None:
            word = f"{_GONE}{type(error).__name__}: {error}"[:500]
            self._client.key_value_set(
                f"{self._name}/alive/{self.rank}", word, allow_overwrite=True
            )

    def _beats(self) -> None:
        for beat in itertools.count():
            try:
                self._client.key_value_set(
                    f"{self._name}/alive/{self.rank}", str(beat), allow_overwrite=True
                )
            # the service is gone, and with it the run: the main thread meets the same and says so
            except Exception:
                return
            if self._end.wait(BEAT):
                return

    def gather(self, value: Any) -> list[Any]:
        """What each process gave, in their order; `value` is anything that JSON holds."""
        if self._client is None:
            return [value]
        turn, self._turn = self._turn, self._turn + 1
        self._client.key_value_set(f"{self._name}/{turn}/{self.rank}", json.dumps(value))
        if turn >= 2:  # all have read what was told two turns ago
            self._client.key_value_delete(f"{self._name}/{turn - 2}/{self.rank}")
        return [
            value
            if rank == self.rank
            else json.loads(self._of(rank, f"{self._name}/{turn}/{rank}"))
            for rank in range(self.count)
        ]

    def _of(self, rank: int, key: str) -> str:
        watch = _Watch(self, [rank])
        while True:
            try:
                return self._client.blocking_key_value_get(key, 2000)
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            watch.look()

    def beats(self, rank: int) -> str | None:
        """The last sign of life of a process."""
        found = self._client.key_value_try_get(f"{self._name}/alive/{rank}")
        return found or None

    def wait(self, array: Any) -> None:
        """Until `array` is computed, or a process that takes part in it is gone."""
        if self._client is None:
            return
        watch, pause = _Watch(self, [rank for rank in range(self.count) if rank != self.rank]), 1e-4
        while not array.is_ready():
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
            watch.look()


class _Watch:
    """Whether processes that are waited for still live."""

    def __init__(self, peers: Peers, ranks: list[int]):
        now = time.monotonic()
        self.peers, self.begin, self.last = peers, now, now
        self.seen: dict[int, tuple[str | None, float]] = dict.fromkeys(ranks, (None, now))

    def look(self) -> None:
        now = time.monotonic()
        if now - self.last < BEAT / 2:
            return
        self.last = now
        for rank, (beat, since) in self.seen.items():
            try:
                found = self.peers.beats(rank)
            except Exception as error:
                if "NOT_FOUND" not in str(error):
                    raise
                found = None
            if found is not None and found.startswith(_GONE):
                raise RuntimeError(
                    f"processes: process {rank} of {self.peers.count} ended the run by "
                    f"{found.removeprefix(_GONE)}"
                )
            if found != beat:
                self.seen[rank] = found, now
            elif now - since > SILENCE:
                raise TimeoutError(
                    f"processes: got no sign of life from process {rank} of {self.peers.count} for "
                    f"{SILENCE:.0f} s; expected all of them. It was "
                    "killed, stopped or cut off. Start the run again, and it goes on from its last "
                    "checkpoint."
                )
        if now - self.begin > LIMIT:
            raise TimeoutError(
                f"processes: waited {LIMIT:.0f} s for {sorted(self.seen)} of {self.peers.count}, "
                "which live; expected every process to make the same "
                "calls. Try py-spy on them, to see where they stand."
            )


def agree(values: dict[str, Any], what: str, expected: str) -> None:
    """Raise, on every process alike, where processes give different values of the same name.

    Args:
      values: what JSON holds, by the name that a message is to have.
      what: begins the message: whose values they are.
      expected: ends it.
    """
    if jax.process_count() == 1:
        return
    peers = Peers()
    try:
        all_of_them = peers.gather(values)
    finally:
        peers.close()
    names = dict.fromkeys(name for one in all_of_them for name in one)
    shown = []
    for name in names:
        given = [one.get(name) for one in all_of_them]
        if any(one != given[0] for one in given):
            by_process = ", ".join(
                f"process {rank}: {value}" for rank, value in enumerate(given[:8])
            )
            shown.append(f"{name} ({by_process})")
    if shown:
        raise ValueError(
            f"{what}: got values that differ between processes: {'; '.join(shown)}. {expected}"
        )
