"""What the examples share: the device that was asked for, and pieces that a second call reads
back."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx


@pytest.fixture
def report():
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    try:
        import report

        return report
    finally:
        sys.path.pop(0)


@pytest.fixture
def parsed(report, tmp_path):
    def parse(*argv):
        parser = report.parser(
            "What.\n\nHow.", full=dict(seeds=5, steps=10), small=dict(seeds=1, steps=2), pieces=True
        )
        return report.parse(parser, ["--out", str(tmp_path / "out"), *argv])

    before = jax.config.jax_default_device
    yield parse
    jax.config.update("jax_default_device", before)


def test_device_is_where_arrays_are_made(parsed):
    assert parsed().device is None
    assert jnp.ones(2).devices() == {jax.devices()[0]}
    parsed("--device", "cpu:3")
    assert jnp.ones(2).devices() == {jax.devices("cpu")[3]}


@pytest.mark.parametrize("name", ["cpu:99", "cpu:x", "abacus"])
def test_device_that_is_not_there(parsed, capsys, name):
    with pytest.raises(SystemExit):
        parsed("--device", name)
    assert f"--device: got '{name}'" in capsys.readouterr().err


def test_small_numbers_are_not_shown_as_zeros(report):
    assert report.mean_se([2.7e-6], 5) == "2.7e-06" and report.mean_se([0.0], 2) == "0.00"
    assert report.mean_se([2e-5, 4e-5]) == "3.0e-05 ± 1.0e-05"
    assert report.mean_se([0.012, -0.01], signed=True) == "+0.001 ± 0.011"


def test_pictures_are_small_and_suit_both_schemes(report, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "bars.svg"
    for _ in range(2):
        before = path.read_text() if path.exists() else None
        with report.figure(path, 1) as (_, ax):
            report.bars(ax, {"a": {"n": [0.1234, 0.2]}, "b": {"n": [0.3]}}, "n", {}, "number")
    drawn = path.read_text()
    assert drawn == before and len(drawn) < 20_000 and "metadata" not in drawn
    assert report.GREY.lower() in drawn
    assert not {"#000000", "#ffffff"} & set(re.findall(r"(?:fill|stroke): (#\w{6})", drawn))


def test_pieces_are_read_back(report, parsed, tmp_path, capsys):
    calls = []

    def make():
        calls.append(1)
        return {"accuracy": jnp.float32(0.5), "curve": np.arange(3)}

    args = parsed("--checkpoint", str(tmp_path / "kept"))
    pieces = report.Pieces(args, {"steps": args.steps})
    first = pieces("n = 50, CG/Neumann", make)
    assert first == {"accuracy": 0.5, "curve": [0, 1, 2]}
    assert (
        report.Pieces(args, {"steps": args.steps})("n = 50, CG/Neumann", make) == first
        and len(calls) == 1
    )
    assert "n = 50, CG/Neumann: read back" in capsys.readouterr().out
    report.Pieces(args, {"steps": 11})("n = 50, CG/Neumann", make)  # other settings: another result
    pieces("n = 50", make)  # another piece
    assert len(calls) == 3


def test_pieces_without_a_folder(report, parsed):
    pieces = report.Pieces(parsed(), {})
    assert pieces.checkpoint("a", every=2) is None
    results = iter([1, 2])
    assert pieces("a", lambda: next(results)) == 1 and pieces("a", lambda: next(results)) == 2


def test_the_run_in_flight_goes_on(report, parsed, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    args = parsed("--checkpoint", str(tmp_path))
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(1.0), 1), bx.hypergradient.implicit(), optax.sgd(0.5)
    )

    def run(pieces, fails):
        solution = bx.solve_bilevel(
            lambda y, x, batch: 0.5 * jnp.sum((y - x) ** 2),
            lambda y, x, batch: 0.5 * jnp.sum((y - 3.0) ** 2),
            jnp.zeros(2),
            jnp.zeros(2),
            algorithm=algorithm,
            num_steps=6,
            checkpoint=pieces.checkpoint("run", every=2),
        )
        if fails:
            raise KeyboardInterrupt
        return solution.stats["resumed_from"]

    pieces = report.Pieces(args, {})
    with pytest.raises(KeyboardInterrupt):
        pieces("piece", lambda: run(pieces, fails=True))
    assert pieces("piece", lambda: run(pieces, fails=False)) == 6
    assert not (pieces.folder / "running").exists()


def test_a_run_that_a_signal_ended_is_no_result(report, parsed, tmp_path):
    solution = bx.solve_bilevel(
        lambda y, x, batch: jnp.sum((y - x) ** 2),
        lambda y, x, batch: jnp.sum(y**2),
        jnp.zeros(2),
        jnp.ones(2),
        algorithm=bx.algorithms.double_loop(
            bx.inner.optax(optax.sgd(0.1), 2), bx.hypergradient.implicit(), optax.sgd(0.1)
        ),
        num_steps=2,
    )
    assert report.unless_preempted(solution) is solution
    ended = solution._replace(result=bx.RESULTS.preempted)
    pieces = report.Pieces(parsed("--checkpoint", str(tmp_path / "kept")), {})
    with pytest.raises(SystemExit, match="goes on from here"):
        pieces("a run", lambda: report.unless_preempted(ended).history)
    assert not list(pieces.folder.glob("a run*"))
