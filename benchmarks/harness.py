"""One harness for every benchmark: interleaved runs, ratios to a reference, JSON and a Markdown
table.

A benchmark is a script that yields cases and hands them to `main`:

    def cases(args):
        n = 200 if args.quick else 2000
        ...
        yield Case(f"n={n}", {"bilevax": lambda: ours(data), "by hand": lambda: theirs(data)},
        reference="by hand")

    if __name__ == "__main__":
        main("overhead", "What the library costs over the same mathematics by hand.", cases)

The entries of a case take turns, A B A B, so that a machine which slows down slows all of them;
each round's ratio is taken against the reference of the same round. Compilation is outside the
clock and reported apart. Set OPENBLAS_NUM_THREADS=1 where LAPACK is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax

RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS, QUICK_ROUNDS = 15, 3


class Case(NamedTuple):
    """What is compared on one problem.

    Attributes:
      label: the problem, a row's first column.
      entries: callables without arguments, each returning arrays. One with a `lower` method (a
        jitted function) is lowered and compiled ahead of time; any other is compiled by its first
        call.
      reference: the entry that ratios are taken against.
      metrics: numbers to report from an entry's result (an error, an accuracy), so that speed is
        never shown without what it bought.
    """

    label: str
    entries: Mapping[str, Callable[[], Any]]
    reference: str
    metrics: Callable[[Any], Mapping[str, Any]] | None = None


def environment() -> dict[str, Any]:
    """Where the numbers were taken."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "packages": {
            package: installed(package)
            for package in ("bilevax", "jax", "jaxlib", "optax", "flax", "jaxopt", "numpy")
        },
        "devices": [device.device_kind for device in jax.devices()],
        "platform": jax.default_backend(),
        "x64": jax.config.jax_enable_x64,
        "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS"),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = jax.block_until_ready(fn())
    return time.perf_counter() - start, out


def _prepare(fn: Callable[[], Any]) -> tuple[Callable[[], Any], str, float]:
    """The compiled entry, how its preparation was timed, and the seconds that took."""
    if hasattr(fn, "lower"):
        start = time.perf_counter()
        compiled = fn.lower().compile()
        return compiled, "trace and compile", time.perf_counter() - start
    return fn, "first call", _timed(fn)[0]


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Time the entries of a case in turn, `rounds` times each.

    Returns:
      The case as plain data: for each entry the seconds of all rounds, their median and quartiles,
      the compile time, the metrics, and the median and quartiles of the ratio to the reference,
      taken round by round.
    """
    if case.reference not in case.entries:
        raise ValueError(
            f"reference: got {case.reference!r}; expected one of {list(case.entries)}."
        )
    if rounds < 2:
        raise ValueError(f"rounds: got {rounds}; expected at least 2, for a spread.")
    # A compile time read from the persistent cache is the time of a file.
    cache = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        prepared = {name: _prepare(fn) for name, fn in case.entries.items()}
    finally:
        jax.config.update("jax_enable_compilation_cache", cache)
    results = {name: _timed(fn)[1] for name, (fn, _, _) in prepared.items()}  # the warm-up
    seconds: dict[str, list[float]] = {name: [] for name in prepared}
    for _ in range(rounds):
        for name, (fn, _, _) in prepared.items():
            seconds[name].append(_timed(fn)[0])
    entries = {}
    for name, (_, how, compile_seconds) in prepared.items():
        ratios = [
            mine / reference
            for mine, reference in zip(seconds[name], seconds[case.reference], strict=True)
        ]
        entries[name] = {
            "seconds": seconds[name],
            "time": _summary(seconds[name]),
            "ratio": _summary(ratios),
            "compile_seconds": compile_seconds,
            "compile_timed_as": how,
            "metrics": {key: float(value) for key, value in case.metrics(results[name]).items()}
            if case.metrics
            else {},
        }
    return {"label": case.label, "reference": case.reference, "rounds": rounds, "entries": entries}


def _summary(values: Sequence[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def table(measured: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table: a row an entry; times and ratios as median [quartiles]."""
    measured = list(measured)
    keys = list(
        dict.fromkeys(
            key
            for case in measured
            for entry in case["entries"].values()
            for key in entry["metrics"]
        )
    )
    rows = [["case", "entry", "time", "ratio", "compile", *keys]]
    for case in measured:
        for name, entry in case["entries"].items():
            ratio = entry["ratio"]
            is_reference = name == case["reference"]
            rows.append(
                [
                    case["label"],
                    name,
                    f"{_duration(entry['time']['median'])} [{_duration(entry['time']['low'])}, "
                    f"{_duration(entry['time']['high'])}]",
                    "1 (reference)"
                    if is_reference
                    else f"{ratio['median']:.3g} [{ratio['low']:.3g}, {ratio['high']:.3g}]",
                    _duration(entry["compile_seconds"])
                    + (" *" if entry["compile_timed_as"] == "first call" else ""),
                    *(
                        f"{entry['metrics'][key]:.4g}" if key in entry["metrics"] else ""
                        for key in keys
                    ),
                ]
            )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    if any(
        entry["compile_timed_as"] == "first call"
        for case in measured
        for entry in case["entries"].values()
    ):
        lines += ["", "\\* the whole first call: compilation and one run."]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def main(
    name: str,
    description: str,
    cases: Callable[[argparse.Namespace], Iterable[Case]],
    argv: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Run a benchmark from the command line: measure its cases, print the table, write
    ``results/NAME.json``.

    A ``--quick`` run is to see that a benchmark works. Its numbers mean little, so it writes no
    file unless ``--out`` names one.

    Args:
      name: names the results file.
      description: one sentence, the heading of the table.
      cases: from the parsed arguments (`quick`, `rounds`, `out`) to cases; a generator keeps one
        problem in memory at a time.
      argv: arguments in place of the command line's.

    Returns:
      The measured cases.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick", action="store_true", help="small problems and few rounds, to see that it runs"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help=f"runs of each entry (default {ROUNDS}; {QUICK_ROUNDS} with --quick)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"results file (default benchmarks/results/{name}.json; none with --quick)",
    )
    args = parser.parse_args(argv)
    rounds = args.rounds if args.rounds is not None else QUICK_ROUNDS if args.quick else ROUNDS
    measured = []
    for case in cases(args):
        print(f"{name}: {case.label}", file=sys.stderr)
        measured.append(measure(case, rounds))
    where = environment()
    packages = ", ".join(
        f"{package} {number}" for package, number in where["packages"].items() if number
    )
    print(f"### {name}\n\n{description}\n\n{table(measured)}\n")
    print(
        f"{where['cores']} cores, {len(where['devices'])} device(s) ({where['platform']}), Python "
        f"{where['python']}, {packages}."
    )
    print(f"Median [quartiles] of {rounds} interleaved rounds; ratios are taken round by round.")
    out = args.out or (None if args.quick else RESULTS / f"{name}.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "name": name,
            "description": description,
            "quick": args.quick,
            "environment": where,
            "cases": measured,
        }
        out.write_text(json.dumps(record, indent=1, allow_nan=True) + "\n")
    return measured
