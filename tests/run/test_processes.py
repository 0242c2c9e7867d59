"""Two processes, one of which is not as the other: what differs is named, and none waits for ever."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


def run(mode, folder, seconds=100):
    """What both processes printed, and how long the first took after the second was done with (or was meddled with)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache = str(jax.config.jax_compilation_cache_dir)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": cache}
    command = [sys.executable, "-m", "tests.run.process_problem", mode]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(folder)], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        said = []
        for child in children:
            if mode == "freeze" and child is children[1]:
                child.send_signal(signal.SIGKILL)
            out, words = child.communicate(timeout=seconds)
            said.append("\n".join(line for line in out.split("\n") if line.startswith(("DONE", "ERROR"))) or words[-2000:])
        return said
    finally:
        for child in children:
            child.kill()
            child.communicate()


DIFFERING = {
    "rows": r"from_process: got values that differ between processes: arrays \(process 0: float32\[8, 4\], process 1: float32\[5, 4\]\)",
    "start": r"processes: got values that differ between processes: start \(process 0: \w+, process 1: \w+\)\. Expected",
    "key": r"got values that differ between processes: key \(",
    "steps": r"got values that differ between processes: num_steps \(process 0: 400, process 1: 300\)",
}


@pytest.mark.parametrize("mode", ["rows", pytest.param("start", marks=pytest.mark.slow), pytest.param("key", marks=pytest.mark.slow), "steps"])
def test_what_differs_is_named_on_both(mode, tmp_path):
    for words in run(mode, tmp_path):
        assert words.startswith("ERROR ValueError") and re.search(DIFFERING[mode], words), words


def test_a_stop_on_one_stops_all(tmp_path):
    assert run("stop", tmp_path) == ["DONE stopped 64"] * 2


def test_an_error_on_one_is_told_to_the_other(tmp_path):
    first, second = run("raise", tmp_path)
    assert "process 1 of 2 ended the run by ZeroDivisionError: of this process alone" in first and first.endswith("steps 64"), first
    assert second.startswith("ERROR ZeroDivisionError") and second.endswith("steps 64"), second


@pytest.mark.parametrize("mode", ["kill", pytest.param("freeze", marks=pytest.mark.slow)])
def test_a_process_that_is_gone_is_not_waited_for(mode, tmp_path):
    first, _ = run(mode, tmp_path, 300)
    assert first.startswith("ERROR"), first
    saved = [path.stat().st_mtime for path in tmp_path.iterdir() if path.name.startswith("step_")]
    assert saved and time.time() - max(saved) < 75  # what was saved is there, and the end came within a minute of it
