"""What the parts of accelerator.py share: a record that survives a kill, the device in turn,
compilation in threads, interleaved clocks."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

MIB = 2**20


def write(path: Path, value: Any) -> None:
    """JSON beside the file, then in its place."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(value, indent=1, default=float) + "\n")
    os.replace(beside, path)


class Part:
    """What a part is given: where it writes, how large its problems are, and when its time is over.

    ``rows`` are written after each one. ``device()`` waits until it is this part's turn to take
    times: until then it should have compiled.
    """

    def __init__(self, name: str, folder: Path, rehearse: bool, options: Mapping[str, Any]):
        self.name, self.folder, self.rehearse, self.options = name, folder, rehearse, dict(options)
        self.lock = threading.RLock()  # parts compile and check in threads
        self.began, self.deadline = time.time(), float("inf")
        self.record: dict[str, Any] = {"rows": [], "skipped": {}, "errors": {}, "notes": {}}
        self.save()

    def save(self) -> None:
        with self.lock:
            write(
                self.folder / f"{self.name}.json",
                self.record | {"seconds": round(time.time() - self.began, 1)},
            )

    def pick(self, small: Any, full: Any) -> Any:
        return small if self.rehearse else full

    def add(self, **row: Any) -> None:
        with self.lock:
            self.record["rows"].append(row)
            self.save()

    def note(self, **values: Any) -> None:
        with self.lock:
            self.record["notes"].update(values)
            self.save()

    def skip(self, what: str, why: str) -> None:
        with self.lock:
            self.record["skipped"][what] = why
            self.save()

    @contextlib.contextmanager
    def recorded(self, what: str) -> Iterator[None]:
        """What is raised inside is written down, and the part goes on."""
        try:
            yield
        except Exception:
            with self.lock:
                self.record["errors"][what] = traceback.format_exc(limit=-8)[-3000:]
                self.save()

    def left(self) -> float:
        return self.deadline - time.time()

    @contextlib.contextmanager
    def device(self) -> Iterator[None]:
        """The device alone, for times."""
        self.note(prepared_after=round(time.time() - self.began, 1))
        (self.folder / f"{self.name}.ready").touch()
        go = self.folder / f"{self.name}.go"
        while not go.exists():
            time.sleep(0.02)
        self.deadline = float(go.read_text() or "inf")
        begin = time.time()
        yield
        self.note(device_seconds=round(time.time() - begin, 1))

    def items(self, jobs: Mapping[str, Callable[[], Any]], why: str = "no time left") -> None:
        """Each job in turn, while there is time; what fails is recorded."""
        for what, job in jobs.items():
            if self.left() < 0:
                self.skip(what, why)
                continue
            with self.recorded(what):
                job()


# ---- compilation


def compile_all(part: Part, programs: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Each entry makes a ``jax.stages.Lowered``; they are traced and compiled side by side. What
    fails is recorded and left out."""

    def one(name: str) -> Any:
        begin = time.perf_counter()
        with part.recorded(f"compile {name}"):
            compiled = programs[name]().compile()
            return compiled, time.perf_counter() - begin
        return None

    with ThreadPoolExecutor(max(len(programs), 1)) as pool:
        done = dict(zip(programs, pool.map(one, programs), strict=True))
    part.note(compile_seconds={name: round(found[1], 1) for name, found in done.items() if found})
    return {name: found[0] for name, found in done.items() if found}


def memory(compiled: Any) -> dict[str, float]:
    """XLA's own count for a compiled program, in MiB; "peak" is arguments, outputs and temporary
    buffers, what is donated counted once."""
    found = compiled.memory_analysis()
    if found is None:
        return {}
    whole = (
        found.temp_size_in_bytes
        + found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )
    return {"temp MiB": round(found.temp_size_in_bytes / MIB, 1), "peak MiB": round(whole / MIB, 1)}


def loops(compiled: Any) -> dict[str, int]:
    """Loops and branches of a compiled program; the host reads on for each turn of a loop whose
    length is not known."""
    text = compiled.as_text()
    return {
        "loops": text.count(" while("),
        "known length": text.count("known_trip_count"),
        "branches": text.count(" conditional("),
    }


def peak() -> float | None:
    """Most device memory that this process has held, MiB."""
    stats = jax.devices()[0].memory_stats() or {}
    return round(stats["peak_bytes_in_use"] / MIB, 1) if "peak_bytes_in_use" in stats else None


# ---- clocks


def once(fn: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - begin


def interleaved(entries: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds a round of each entry, A B A B, after one call of each to warm up. An entry waits for
    its own work."""
    for fn in entries.values():
        once(fn)
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    for _ in range(rounds):
        for name, fn in entries.items():
            seconds[name].append(once(fn))
    return seconds


def ratio(seconds: list[float], reference: list[float]) -> float:
    """Median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def median(values: list[float]) -> float:
    return statistics.median(values)
