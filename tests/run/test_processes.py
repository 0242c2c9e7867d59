"""Two processes, one of which is not as the other: what differs is named, and none waits for
ever."""

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


def run(modes, folder, seconds=300):
    """What both processes printed, by mode."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache = str(jax.config.jax_compilation_cache_dir)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": cache,
    }
    command = [sys.executable, "-m", "tests.run.process_problem", ",".join(modes)]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(folder)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = []
        for child in children:
            if "freeze" in modes and child is children[1]:
                child.send_signal(signal.SIGKILL)
            out, words = child.communicate(timeout=seconds)
            lines = dict(
                line.split(" ", 1) for line in out.split("\n") if line.startswith(tuple(modes))
            )
            said.append({mode: lines.get(mode, words[-2000:]) for mode in modes})
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


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """All of it in one pair of processes, the last of which dies."""
    folder = tmp_path_factory.mktemp("processes")
    return (
        *run([*DIFFERING, "taken", "sees", "stop", "raise", "kill"], folder),
        folder / "kill",
        time.time(),
    )


@pytest.mark.turns
@pytest.mark.parametrize("mode", list(DIFFERING))
def test_what_differs_is_named_on_both(mode, together):
    for said in together[:2]:
        assert said[mode].startswith("ERROR ValueError") and re.search(
            DIFFERING[mode], said[mode]
        ), said[mode]


def test_a_folder_that_the_first_may_not_have_is_told_to_all(together):
    first, second = (said["taken"] for said in together[:2])
    assert first.startswith("ERROR RuntimeError checkpoint: the directory"), first
    assert "process 0 of 2 ended the run by RuntimeError: checkpoint: the directory" in second


def test_a_folder_that_is_not_the_same_for_all_is_refused(together):
    for said in together[:2]:
        assert re.search(r"other checkpoints \(process 0: \[32\], process 1: \[\]\)", said["sees"])


def test_a_stop_on_one_stops_all(together):
    assert [said["stop"] for said in together[:2]] == ["DONE stopped 64"] * 2


def test_an_error_on_one_is_told_to_the_other(together):
    first, second = (said["raise"] for said in together[:2])
    assert (
        "process 1 of 2 ended the run by ZeroDivisionError: of this process alone" in first
        and first.endswith("steps 64")
    ), first
    assert second.startswith("ERROR ZeroDivisionError") and second.endswith("steps 64"), second


def gone(words, folder, end):
    assert words.startswith("ERROR"), words
    saved = [path.stat().st_mtime for path in folder.iterdir() if path.name.startswith("step_")]
    assert (
        saved and end - max(saved) < 60
    )  # what was saved is there, and the end came within a minute of it


def test_a_process_that_is_gone_is_not_waited_for(together):
    gone(together[0]["kill"], *together[2:])


@pytest.mark.slow
def test_a_process_that_stands_still_is_not_waited_for(tmp_path):
    gone(run(["freeze"], tmp_path)[0]["freeze"], tmp_path / "freeze", time.time())
