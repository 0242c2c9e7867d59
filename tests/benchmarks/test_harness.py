"""The benchmark harness: what is inside the clock, the order of the runs, ratios, the files and the
table."""

import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks import harness, solvers


@pytest.fixture
def spend(monkeypatch):
    """The harness on a clock that moves only when an entry spends time."""
    now = [0.0]
    monkeypatch.setattr(
        harness,
        "time",
        SimpleNamespace(perf_counter=lambda: now[0], strftime=time.strftime, gmtime=time.gmtime),
    )

    def spend(seconds):
        now[0] += seconds

    return spend


def test_runs_take_turns_and_ratios_are_to_the_reference(spend):
    calls = []

    def entry(name, seconds):
        def run():
            calls.append(name)
            spend(seconds * len(calls))  # a machine that slows down, entry by entry
            return jnp.ones(())

        return run

    measured = harness.measure(
        harness.Case("c", {"a": entry("a", 1.0), "b": entry("b", 5.0)}, reference="a"), rounds=5
    )
    # One call each to compile, one each to warm up, then five rounds in turn.
    assert calls == ["a", "b"] * 7
    a, b = measured["entries"]["a"], measured["entries"]["b"]
    assert a["seconds"] == [5.0, 7.0, 9.0, 11.0, 13.0]
    assert a["time"] == {"median": 9.0, "low": 7.0, "high": 11.0}
    assert a["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    # Round by round: 5 times the next call's factor over this one's.
    assert b["ratio"] == pytest.approx(
        {"median": 5 * 10 / 9, "low": 5 * 12 / 11, "high": 5 * 8 / 7}
    )


def test_compilation_is_outside_the_clock(spend):
    def slow_to_trace(x):
        def body():
            spend(7.0)  # while tracing only
            return jnp.arange(4.0) * x

        return jax.jit(body)

    ahead, jitted = slow_to_trace(2.0), slow_to_trace(3.0)

    def lazy():
        spend(1.0)
        return jitted()

    def steady():
        spend(1.0)
        return jnp.ones(())

    case = harness.Case("jit", {"ahead": ahead, "lazy": lazy, "steady": steady}, reference="steady")
    entries = harness.measure(case, rounds=3)["entries"]
    assert (entries["ahead"]["compile_timed_as"], entries["ahead"]["compile_seconds"]) == (
        "trace and compile",
        7.0,
    )
    assert (entries["lazy"]["compile_timed_as"], entries["lazy"]["compile_seconds"]) == (
        "first call",
        8.0,
    )
    assert entries["ahead"]["seconds"] == [0.0] * 3
    assert entries["lazy"]["seconds"] == [1.0] * 3


def test_compile_time_is_not_read_from_the_cache():
    seen = []
    harness.measure(
        harness.Case(
            "c", {"a": lambda: seen.append(jax.config.jax_enable_compilation_cache)}, reference="a"
        ),
        rounds=2,
    )
    assert seen == [False] + [jax.config.jax_enable_compilation_cache] * 3


def test_waits_for_the_device():
    """Dispatch is asynchronous: the clock must stop when the arrays are there."""
    ready = []

    class Slow:
        def block_until_ready(self):
            ready.append(None)
            return self

    harness.measure(harness.Case("c", {"a": Slow}, reference="a"), rounds=2)
    assert len(ready) == 4


def _cases(args):
    yield harness.Case(
        "small" if args.quick else "large",
        {"one": lambda: jnp.ones(()), "two": lambda: 2 * jnp.ones(())},
        reference="one",
        metrics=lambda out: {"value": out},
    )


def test_main_writes_json_and_prints_a_table(tmp_path, capsys):
    out = tmp_path / "deep" / "r.json"
    harness.main("demo", "A demonstration.", _cases, ["--rounds", "2", "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["cases"][0]["label"] == "large"
    assert record["cases"][0]["entries"]["two"]["metrics"] == {"value": 2.0}
    assert record["environment"]["packages"]["jax"] == jax.__version__
    assert len(record["environment"]["devices"]) == jax.device_count()
    lines = capsys.readouterr().out.splitlines()
    header = lines.index("| case | entry | time | ratio | compile | value |")
    assert lines[header + 1] == "| --- | --- | --- | --- | --- | --- |"
    assert lines[header + 2].startswith("| large | one | ")
    assert "| 1 (reference) |" in lines[header + 2]
    assert lines[header + 3].endswith("| 2 |")


def test_quick_keeps_no_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    measured = harness.main("demo", "A demonstration.", _cases, ["--quick"])
    assert measured[0]["label"] == "small"
    assert measured[0]["rounds"] == harness.QUICK_ROUNDS
    assert not (tmp_path / "results").exists()
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reference", "rounds", "message"), [("c", 3, "reference: got 'c'"), ("a", 1, "rounds: got 1")]
)
def test_bad_arguments(reference, rounds, message):
    with pytest.raises(ValueError, match=message):
        harness.measure(harness.Case("x", {"a": lambda: jnp.ones(())}, reference=reference), rounds)


def test_a_target_is_reached_where_the_score_comes_to_stay():
    """Between two measurements by the logarithm: from 1e-4 at 2 s to 1e-8 at 4 s, 1e-6 is passed at
    3 s; the first visit does not count."""
    curve = {
        "seconds": [0.0, 1.0, 2.0, 4.0],
        "calls": [0.0, 10.0, 20.0, 60.0],
        "score": [1.0, 1e-7, 1e-4, 1e-8],
    }
    assert solvers.reached(curve, 1e-6) == pytest.approx((3.0, 40.0))
    assert solvers.reached(curve, 1e-9) == (float("inf"), float("inf"))
