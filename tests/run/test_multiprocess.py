"""Two processes over gloo against one: the same numbers, the same checkpoints, one end."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from bilevax import RESULTS
from tests.run.multiprocess_problem import CASES, solve

ROOT = pathlib.Path(__file__).parents[2]


def here(folder: pathlib.Path, steps: int) -> dict:
    """The same on four devices of this process."""
    return solve(0, 1, folder, steps, jax.devices()[:4])


def run(processes: int, folder: pathlib.Path, steps: int, *flags: str) -> list[dict]:
    """The results of each process, by case, and what each wrote to stderr as ``"stderr"``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache = str(jax.config.jax_compilation_cache_dir)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
        "JAX_COMPILATION_CACHE_DIR": cache,
    }
    command = [
        sys.executable,
        "-W",
        "error::UserWarning:bilevax",
        "-m",
        "tests.run.multiprocess_problem",
    ]
    children = [
        subprocess.Popen(
            [*command, *map(str, (rank, processes, port, folder, steps)), *flags],
            env=environment,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        words = [child.communicate(timeout=300)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * processes, words[0][-3000:]
    out = []
    for rank in range(processes):
        found = {}
        for case in CASES:
            with np.load(folder / f"{case}.{processes}.{rank}.npz") as file:
                found[case] = dict(file)
        out.append({**found, "stderr": words[rank]})
    return out


def same(a, b, tol=1e-10):
    return all(
        np.max(np.abs(a[k] - b[k])) <= tol * np.max(np.abs(b[k]))
        for k in ("inner", "outer", "value")
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return here(tmp_path_factory.mktemp("one"), 12)


@pytest.mark.turns
def test_two_processes_equal_one(alone, tmp_path):
    first, second = run(2, tmp_path, 12)
    for case in CASES:
        assert first[case]["devices"] == alone[case]["devices"] == 4
        assert same(first[case], alone[case]) and same(second[case], alone[case])
        assert np.array_equal(first[case]["outer"], second[case]["outer"])
    assert (
        "12/12" in first["stderr"] and "12/12" not in second["stderr"]
    )  # one of them shows its progress
    again = here(tmp_path, 14)  # what two saved, one goes on with
    assert all(again[case]["from"] == 12 and again[case]["steps"] == 14 for case in CASES)
    assert all(
        same(
            {**again[c], "value": again[c]["value"][:12]},
            {**alone[c], "inner": again[c]["inner"], "outer": again[c]["outer"]},
        )
        for c in CASES
    )


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_they_go_on(alone, tmp_path):
    first, second = run(2, tmp_path, 12, "terminate")
    for case in CASES:
        assert (
            first[case]["code"] == second[case]["code"] == RESULTS.preempted
            and first[case]["steps"] == second[case]["steps"] == 4
        )
    first, second = run(2, tmp_path, 12)
    for case in CASES:
        assert first[case]["from"] == second[case]["from"] == 4 and same(first[case], alone[case])
