"""Runs that are killed again and again end as if they had not been: ``python -m
tests.campaigns.run_kills --kills 100``.

Kinds of runs in turn: sampled arrays, an iterable, a stateful objective, rollback after failures,
fsdp on eight devices; each with a checkpoint every few steps and two logs. Half of the kills come
while a save is being written. The last line is the summary.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import bilevax as bx

KINDS = ("sampled", "iterable", "stateful", "rollback", "fsdp")
STEPS, EVERY = 300, 10


def work(kind: str, folder: pathlib.Path) -> None:
    """One process of a run, that may be killed at any time."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 8)).astype(np.float32)
    data = (x, x.sum(1))

    def inner(w, lam, b):
        return jnp.mean((b[0] @ w - b[1]) ** 2) + jnp.exp(lam) * jnp.sum(w**2)

    def outer(w, lam, b):
        return jnp.mean((b[0] @ w - b[1]) ** 2)

    class Loader:
        def __iter__(self):
            order = np.random.default_rng(1)
            while True:
                rows = order.integers(0, 64, 8)
                yield data[0][rows], data[1][rows]

    keywords = dict(
        inner_data=bx.data.minibatches(data, 8),
        outer_data=bx.data.minibatches(data, 8),
        key=jax.random.key(0),
    )
    objective = inner
    if kind == "iterable":
        keywords["inner_data"] = Loader()
    if kind == "stateful":
        objective = bx.objective(
            lambda w, lam, b, m: (inner(w, lam, b), 0.9 * m + 0.1 * b[1].mean()), stateful=True
        )
        keywords["model_state"] = jnp.float32(0.0)
    if kind == "rollback":
        keywords["outer_data"] = lambda key, step: (
            jnp.where(step % 90 == 70, jnp.nan, jnp.asarray(data[0])),
            jnp.asarray(data[1]),
        )
        keywords |= dict(on_failure="rollback", throw=False)
    if kind == "fsdp":
        keywords["sharding"] = bx.sharding.fsdp(min_size=1)

    def note(event):
        (folder / "at").write_text(str(event.step))
        time.sleep(0.002 * EVERY)

    logs = [
        bx.callbacks.jsonl(folder / "log.jsonl", flush_every=7),
        bx.callbacks.csv(folder / "log.csv", flush_every=7),
    ]
    solution = bx.solve_bilevel(
        objective, outer, jnp.zeros(8), jnp.float32(-2.0), algorithm=bx.algorithms.soba(0.02,
        0.02), num_steps=STEPS,
        checkpoint=bx.checkpoint.every(EVERY, folder / "saved"), callbacks=[*logs,
        bx.callbacks.every(EVERY, note)], **keywords,
    )  # fmt: skip
    found = {name: np.asarray(column) for name, column in solution.history.items()}
    np.savez(
        folder / "part.npz",
        outer=np.asarray(solution.outer_params),
        inner=np.asarray(solution.inner_params),
        **found,
    )
    os.replace(folder / "part.npz", folder / "end.npz")


class Life:
    """A process of a run, forked from this one, which has imported everything and asked for no
    device."""

    def __init__(
        self, work: Callable[[pathlib.Path], None], folder: pathlib.Path, devices: int = 1
    ):
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            words = os.open(folder / "words", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(words, 1), os.dup2(words, 2)
            jax.config.update("jax_num_cpu_devices", devices)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            work(folder)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self, seconds: float = 600.0) -> int:
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        return self.status  # type: ignore[return-value]


def life(kind: str, folder: pathlib.Path) -> Life:
    return Life(functools.partial(work, kind), folder, 8 if kind == "fsdp" else 1)


def ends(folder: pathlib.Path) -> dict[str, bytes]:
    with np.load(folder / "end.npz") as file:
        return {name: file[name].tobytes() for name in file}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    given = parser.parse_args()
    import orbax.checkpoint  # noqa: F401 (before the forks)

    rng, done, inside, different, lost, torn = random.Random(given.seed), 0, 0, 0, 0, 0
    summary = ""
    with tempfile.TemporaryDirectory() as top:
        if (
            jax.config.jax_compilation_cache_dir is None
        ):  # the lives compile the same again and again
            jax.config.update("jax_compilation_cache_dir", f"{top}/compiled")
        for number, kind in enumerate(itertools.cycle(given.kinds)):
            if done >= given.kills:
                break
            whole = pathlib.Path(top) / f"{kind}.whole"
            if not whole.exists():
                whole.mkdir()
                if life(kind, whole).wait() != 0:
                    raise RuntimeError(
                        f"{kind}: the undisturbed run failed: "
                        f"{(whole / 'words').read_text()[-2000:]}"
                    )
            folder = pathlib.Path(top) / f"{kind}.{number}"
            (folder / "saved").mkdir(parents=True)
            for _ in range(min(5, given.kills - done)):
                child, saving = life(kind, folder), rng.random() < 0.5
                target = int((folder / "at").read_text() or 0) if (folder / "at").exists() else 0
                target += rng.randrange(0, STEPS // 5, EVERY)
                while child.poll() is None:
                    reached = (folder / "at").exists() and int(
                        (folder / "at").read_text() or 0
                    ) > target
                    writing = (
                        any("tmp" in path.name for path in (folder / "saved").iterdir())
                        if (folder / "saved").exists()
                        else False
                    )
                    if reached and writing == saving:
                        os.kill(child.pid, signal.SIGKILL)
                        done, inside = done + 1, inside + writing
                        break
                    time.sleep(0.0005)
                child.wait()
                if (folder / "end.npz").exists():
                    break
            if not (folder / "end.npz").exists() and life(kind, folder).wait() != 0:
                lost += 1
                summary = f"{done} kills, {lost} lost"
                print(kind, (folder / "words").read_text()[-2000:])
                continue
            different += ends(folder) != ends(whole)
            steps = [
                json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()
            ]
            rows = (folder / "log.csv").read_text().splitlines()
            with np.load(folder / "end.npz") as file:
                torn += steps != list(range(len(file["value"]))) or len(rows) != len(steps) + 1
            summary = (
                f"{done} kills, {inside} inside a save: {different} runs with different bits, "
                f"{lost} lost, {torn} logs with errors"
            )
            print(f"{kind}: {summary}", flush=True)
    print(summary)


if __name__ == "__main__":
    main()
