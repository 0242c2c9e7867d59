"""Killed on the way there or on the way back, a replay goes on to the same bits."""

import os

import jax
import numpy as np
import pytest

import bilevax as bx
from bilevax.replay import _shelf
from tests.replay import problem as trainings
from tests.replay.killing import killed_after

SCHEDULES = {
    "everything": bx.replay.everything(),
    "segments": bx.replay.segments(),
    "tree": bx.replay.tree(3),
}


class Killed(BaseException):
    """Stands for a kill that leaves the process's files as they are."""


def killing(problem, at):
    """A reader that dies at its `at`-th batch."""
    data, reads = jax.tree.map(np.asarray, problem.data), []

    def read(step):
        reads.append(step)
        if len(reads) >= at:
            raise Killed
        return jax.tree.map(lambda a: a[step], data)

    return bx.replay.reader(read)


def same(one, two):
    leaves = [jax.tree.leaves((f.value, f.grad, f.inner_params, f.init_grad)) for f in (one, two)]
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(*leaves, strict=True))


@pytest.mark.parametrize("name", ["everything", "segments", "tree"])
def test_goes_on_to_the_same_bits(name, tmp_path):
    schedule = SCHEDULES[name]
    problem = trainings.make(20)
    fn = lambda **keywords: bx.replay.value_and_metagrad(
        trainings.inner,
        trainings.quality,
        trainings.adam,
        20,
        schedule=schedule,
        at=(9, 20),
        **keywords,
    )
    whole = fn()(problem.params, problem.outer, trainings.reader(problem), problem.batch)
    saved = fn(checkpoint=bx.checkpoint.every(4, tmp_path))
    left, reads, found = [], 7, None
    while found is None:  # killed again and again, each time a little later
        try:
            found = saved(problem.params, problem.outer, killing(problem, reads), problem.batch)
        except Killed:
            left.append({name.split("_")[0] for name in os.listdir(tmp_path)})
            reads += 1
    assert len(left) >= 4 and left[0] == {"there"} and "back" in left[-1]
    assert found.info["resumed_from"] > 0
    assert same(found, whole)
    assert np.array_equal(found.info["values"], whole.info["values"])
    assert np.array_equal(found.info["cotangent_norm"], whole.info["cotangent_norm"])
    assert os.listdir(tmp_path) == []


def test_another_replay_in_the_same_folder_is_refused(tmp_path):
    problem = trainings.make(20)
    fn = bx.replay.value_and_metagrad(
        trainings.inner,
        trainings.quality,
        trainings.adam,
        20,
        checkpoint=bx.checkpoint.every(4, tmp_path),
    )
    with pytest.raises(Killed):
        fn(problem.params, problem.outer, killing(problem, 10), problem.batch)
    other = problem.outer | {"decay": problem.outer["decay"] + 1e-9}
    with pytest.raises(ValueError, match="belongs to another replay"):
        fn(problem.params, other, trainings.reader(problem), problem.batch)


def test_a_damaged_file_is_passed_over(tmp_path):
    """A flipped byte anywhere in the newest file: said, and the one before it is used."""
    problem = trainings.make(20)
    fn = bx.replay.value_and_metagrad(
        trainings.inner,
        trainings.quality,
        trainings.adam,
        20,
        checkpoint=bx.checkpoint.every(4, tmp_path),
    )
    whole = fn(problem.params, problem.outer, trainings.reader(problem), problem.batch)
    with pytest.raises(Killed):
        fn(problem.params, problem.outer, killing(problem, 15), problem.batch)
    newest = max(tmp_path.iterdir())
    raw = bytearray(newest.read_bytes())
    raw[-20] ^= 1
    newest.write_bytes(raw)
    with pytest.warns(RuntimeWarning, match="is damaged"):
        found = fn(problem.params, problem.outer, trainings.reader(problem), problem.batch)
    assert found.info["resumed_from"] == 8
    assert same(found, whole)


@pytest.mark.parametrize("name", ["everything", "segments"])
def test_states_in_a_folder(name, tmp_path):
    problem = trainings.make(20)
    fn = lambda **keywords: bx.replay.value_and_metagrad(
        trainings.inner, trainings.quality, trainings.adam, 20, schedule=SCHEDULES[name], **keywords
    )
    arguments = problem.params, problem.outer, trainings.reader(problem), problem.batch
    assert same(fn()(*arguments), fn(states=tmp_path)(*arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["everything", "tree"])
def test_states_that_leave_the_device(name, monkeypatch):
    """As on an accelerator: copied to the host, put back when taken up, and nothing is compiled for
    that."""
    problem, traces = trainings.make(20), []

    def counted(params, outer, batch, *, inner_step):
        traces.append(1)
        return trainings.loss(params, outer, batch, inner_step=inner_step)

    fn = lambda objective: bx.replay.value_and_metagrad(
        bx.objective(objective, indexed=True),
        trainings.quality,
        trainings.adam,
        20,
        schedule=SCHEDULES[name],
    )
    arguments = problem.params, problem.outer, trainings.reader(problem), problem.batch
    want = fn(trainings.loss)(*arguments)
    monkeypatch.setattr(_shelf, "_on_host", lambda leaf: False)
    kinds, take = [], _shelf.Host.take

    def seen(shelf, step):
        kinds.extend(leaf.sharding.memory_kind for leaf in jax.tree.leaves(shelf._held[step]))
        return take(shelf, step)

    monkeypatch.setattr(_shelf.Host, "take", seen)
    got = fn(counted)(*arguments)
    assert same(got, want) and len(traces) <= 6
    assert kinds and set(kinds) == {"pinned_host"}


def test_more_states_than_are_pinned_are_refused_first(monkeypatch):
    """A GPU's pool of the host's memory has a limit, which a schedule may exceed hours later."""
    problem, batches = trainings.make(20), []

    def read(step):
        batches.append(step)
        return trainings.reader(problem).fn(step)

    fn = bx.replay.value_and_metagrad(
        trainings.inner, trainings.quality, trainings.adam, 20, schedule=bx.replay.everything()
    )
    arguments = problem.params, problem.outer, bx.replay.reader(read), problem.batch
    monkeypatch.setattr(_shelf, "_on_host", lambda leaf: False)
    monkeypatch.setattr(_shelf, "_pooled", lambda leaf: True)
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "1e-6")
    with pytest.raises(ValueError, match=r"schedule: got one that keeps 19 states.*1e-06 GiB"):
        fn(*arguments)
    assert len(batches) <= 1
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "1")
    assert fn(*arguments).info["held"] == 19


@pytest.mark.turns
def test_killed_processes(tmp_path):
    """Without a word, on the way there, on the way back, and to the end in a fourth process: the
    undisturbed bits."""
    problem = trainings.make(40)
    fn = bx.replay.value_and_metagrad(trainings.inner, trainings.quality, trainings.adam, 40)
    whole = fn(problem.params, problem.outer, trainings.reader(problem), problem.batch)
    for lines in (25, 35, 30):
        assert not killed_after(tmp_path / "folder", tmp_path / "found.npz", lines)
    assert killed_after(tmp_path / "folder", tmp_path / "found.npz", 10_000)
    found = np.load(tmp_path / "found.npz")
    leaves = jax.tree.leaves((whole.value, whole.grad, whole.inner_params, whole.init_grad))
    assert all(np.array_equal(np.asarray(leaf), found[f"arr_{i}"]) for i, leaf in enumerate(leaves))
