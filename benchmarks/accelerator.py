"""All that a device can tell of the library, in one short run: right, fast, small, and the same to
the bit.

    python benchmarks/accelerator.py --out results                  # every part, some six minutes
    python benchmarks/accelerator.py --out results --parts bert     # some of them
    python benchmarks/accelerator.py --out results --rehearse       # in small, on a CPU

A part is a process of its own, so that what it breaks, leaks or outlasts is its own. The parts of
a wave compile side by side, and take times one after the other, when all of them have compiled.
What was measured is in ``accelerator.json`` after each row; a part whose feature is missing, whose
time is over or which has failed is there by name, too. Peers: ``--peer``, a checkout of
benchopt/benchmark_bilevel; Betty (torch) where this Python can import both.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
GRACE = 20.0  # seconds after its time in which a part ends what it is at
PACKAGES = (
    "bilevax",
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "optax",
    "flax",
    "torch",
    "betty-ml",
    "jaxopt",
    "optimistix",
    "numpy",
)
RECORDED = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
GRAPHS = f"--xla_gpu_enable_command_buffer={RECORDED} --xla_gpu_graph_min_graph_size=1"
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


class Spec(NamedTuple):
    """A part: its module, the seconds that it may hold the device, flags of its own, and GB of the
    host's memory that are pinned before it begins (XLA else pins them while it goes on)."""

    name: str
    module: str
    seconds: float
    flags: str = ""
    pinned: int = 0


WAVES: tuple[tuple[Spec, ...], ...] = (
    (
        Spec("bert", "bert", 70),
        Spec("replay", "replay", 190, DETERMINISTIC, pinned=72),
        Spec("driver", "driver", 35),
        Spec("betty", "betty_bert", 50),
        Spec("precision", "precision", 15),
        Spec("right", "right", 5),
    ),
    (
        Spec("mixflow", "mixflow", 15),
        Spec("bits", "bits", 5),
        Spec("solvers", "solvers", 40, "--xla_disable_hlo_passes=constant_folding"),
        Spec("driver, graphs", "driver", 20, GRAPHS),
        Spec("replay, no flags", "replay", 15),
    ),
)


# ---- one part, in its own process


def work(args: argparse.Namespace) -> None:
    from benchmarks._accelerator.common import Part

    part = Part(args.worker, args.folder, args.rehearse, {"peer": args.peer})
    with part.recorded("part"):
        module = importlib.import_module(f"benchmarks._accelerator.{args.module}")
        part.note(platform=__import__("jax").default_backend())
        module.run(part)
    part.record["done"] = True
    part.save()


# ---- all of them


def environment() -> dict[str, Any]:
    """Versions, the device and its driver; asked without touching the device from this process."""
    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    try:
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total",
            "--format=csv,noheader",
        ]
        device = subprocess.run(
            query, capture_output=True, text=True, check=False, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        device = ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        "packages": packages,
        "device": device or platform.processor() or "cpu",
        "cores": cores,
    }


class Worker:
    """A part's process."""

    def __init__(self, spec: Spec, args: argparse.Namespace, folder: Path):
        self.spec, self.folder = spec, folder
        self.file = spec.name.replace(", ", "_")
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--worker",
            self.file,
            "--module",
            spec.module,
            "--folder",
            str(folder),
        ]
        command += ["--rehearse"] * args.rehearse + (
            ["--peer", str(args.peer)] if args.peer else []
        )
        flags = [os.environ.get("XLA_FLAGS", "")] + (
            [spec.flags] if spec.flags and not args.rehearse else []
        )
        if args.rehearse and "host_platform_device_count" not in flags[0]:
            flags.append(
                "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
            )
        settings = {
            "XLA_FLAGS": " ".join(filter(None, flags)),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
        if spec.pinned and not args.rehearse:
            settings["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] = str(spec.pinned)
            settings["XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE"] = "true"
        if args.rehearse:
            settings["JAX_PLATFORMS"] = "cpu"
        self.log = open(folder / f"{self.file}.log", "w")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            command,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings},
            cwd=ROOT,
            process_group=0,
        )
        self.limit = float("inf")  # when it is killed

    def ended(self) -> bool:
        return self.process.poll() is not None

    def ready(self) -> bool:
        return (self.folder / f"{self.file}.ready").exists()

    def grant(self, until: float) -> None:
        beside = self.folder / f"{self.file}.until"
        beside.write_text(str(until))
        os.replace(beside, self.folder / f"{self.file}.go")
        self.limit = until + GRACE

    def kill(self) -> None:
        if not self.ended():
            os.killpg(self.process.pid, signal.SIGKILL)  # and what it has started
            self.process.wait()
        self.log.close()

    def record(self, why: str = "") -> dict[str, Any]:
        path = self.folder / f"{self.file}.json"
        record = (
            json.loads(path.read_text())
            if path.exists()
            else {"rows": [], "skipped": {}, "errors": {}, "notes": {}}
        )
        if not record.pop("done", False):
            record["skipped"]["the rest"] = why or f"ended with exit status {self.process.poll()}"
            record["log"] = (self.folder / f"{self.file}.log").read_text(errors="replace")[-3000:]
        return record


class Runner:
    """Waves of parts within a budget, and the file of all results."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.begin = args, folder, time.time()
        self.end = self.begin + args.budget
        self.result: dict[str, Any] = {
            "name": "accelerator",
            "rehearsal": args.rehearse,
            "environment": environment(),
            "budget": args.budget,
            "parts": {},
        }

    def save(self) -> None:
        from_begin = round(time.time() - self.begin, 1)
        beside = self.args.out / "accelerator.json.new"
        beside.write_text(json.dumps(self.result | {"seconds": from_begin}, indent=1) + "\n")
        os.replace(beside, self.args.out / "accelerator.json")

    def keep(self, workers: Sequence[Worker], why: str = "") -> None:
        for worker in workers:
            self.result["parts"][worker.spec.name] = worker.record(
                why or ("still at it" if not worker.ended() else "")
            )
        self.save()

    def wave(self, specs: Sequence[Spec]) -> None:
        workers = [Worker(spec, self.args, self.folder) for spec in specs]
        gate = min(
            time.time() + self.args.gate, self.end
        )  # times are taken from then on, whoever still compiles
        holder: Worker | None = None
        try:
            while any(not worker.ended() for worker in workers) and time.time() < self.end + GRACE:
                now = time.time()
                if holder is not None and (holder.ended() or now > holder.limit):
                    holder.kill()
                    holder = None
                waiting = [
                    worker
                    for worker in workers
                    if worker.ready() and not worker.ended() and worker.limit == float("inf")
                ]
                still = [worker for worker in workers if not worker.ready() and not worker.ended()]
                if holder is None and waiting and (not still or now > gate) and now < self.end:
                    holder = waiting[0]
                    holder.grant(min(now + holder.spec.seconds * self.args.slow, self.end))
                if (
                    holder is None and not waiting and now > gate + self.args.gate
                ):  # what has not compiled by now will not
                    break
                if holder is None and now > self.end:
                    break
                self.keep(workers)
                time.sleep(0.2)
        finally:
            for worker in workers:
                late = not worker.ended()
                worker.kill()
                self.result["parts"][worker.spec.name] = worker.record(
                    "no time left" if late else ""
                )
            self.save()
        for worker in workers:
            took = self.result["parts"][worker.spec.name].get("seconds")
            print(
                f"{worker.spec.name}: {took} s, {time.time() - self.begin:.0f} s in all", flush=True
            )

    def run(self) -> dict[str, Any]:
        waves = WAVES
        if self.args.parts:  # few, which compile together
            named = (spec for specs in WAVES for spec in specs if spec.name in self.args.parts)
            waves = (tuple(named),)
        for specs in waves:
            chosen = list(specs)
            if (
                self.args.rehearse and not self.args.parts
            ):  # flags are a device's: without them these are other parts again
                chosen = [spec for spec in chosen if spec.name == spec.name.split(", ")[0]]
            if time.time() > self.end - 20:
                for spec in chosen:
                    self.result["parts"][spec.name] = {
                        "rows": [],
                        "skipped": {"all of it": "no time left"},
                        "errors": {},
                        "notes": {},
                    }
            elif chosen:
                self.wave(chosen)
        self.save()
        return self.result


# ---- what is printed


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {shown(part)}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(shown(part) for part in value)
    return str(value)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of one set of columns together; lists of single measurements are left to the file."""
    lines: list[str] = []
    last: list[str] = []
    for row in rows:
        columns = [key for key, value in row.items() if not isinstance(value, list)]
        if columns != last:
            lines += ["", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
            last = columns
        lines.append("| " + " | ".join(shown(row[key]) for key in columns) + " |")
    return lines


def report(result: dict[str, Any]) -> str:
    where = result["environment"]
    lines = [
        f"### accelerator{' (rehearsal)' if result['rehearsal'] else ''}",
        "",
        f"{where['device']}; {shown(where['packages'])}",
    ]
    for name, part in result["parts"].items():
        lines += ["", f"#### {name} ({part.get('seconds', 0)} s)", *table(part["rows"])]
        if part["notes"].get("found"):
            lines += [
                "",
                *(f"- {what}: {shown(value)}" for what, value in part["notes"]["found"].items()),
            ]
        lines += [f"- skipped: {what}: {why}" for what, why in part["skipped"].items()]
        lines += [
            f"- FAILED: {what}: {trace.strip().splitlines()[-1][:300]}"
            for what, trace in part["errors"].items()
        ]
    return "\n".join(lines) + "\n"


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of accelerator.json and accelerator.md")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="small problems on CPU: to see that it runs; its numbers mean nothing",
    )
    parser.add_argument(
        "--parts", nargs="*", help=f"of: {', '.join(spec.name for wave in WAVES for spec in wave)}"
    )
    parser.add_argument(
        "--budget", type=float, help="seconds for all of it (default 370; 900 with --rehearse)"
    )
    parser.add_argument(
        "--gate",
        type=float,
        help=(
            "seconds that a wave may compile before times are taken (default 110; 600 with "
            "--rehearse)"
        ),
    )
    parser.add_argument("--peer", type=Path, help="a checkout of benchopt/benchmark_bilevel")
    for hidden in ("--worker", "--module"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.budget = args.budget or (900.0 if args.rehearse else 370.0)
    args.gate = args.gate or (600.0 if args.rehearse else 110.0)
    args.slow = 10.0 if args.rehearse else 1.0
    known = [spec.name for wave in WAVES for spec in wave]
    unknown = [name for name in args.parts or () if name not in known]
    if unknown:
        parser.error(f"--parts: got {', '.join(unknown)}; expected some of {', '.join(known)}")
    if args.worker is None and args.out is None:
        parser.error("--out: expected a folder")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    args = parsed(argv)
    if args.worker is not None:
        work(args)
        return None
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        result = Runner(args, Path(folder)).run()
    text = report(result)
    (args.out / "accelerator.md").write_text(text)
    print(text)
    return result


def broken(result: dict[str, Any]) -> list[str]:
    """Parts in which something was raised, or which did not come to their end."""
    return [
        name
        for name, part in result["parts"].items()
        if part["errors"] or "the rest" in part["skipped"]
    ]


if __name__ == "__main__":
    found = main()
    if found and broken(found):
        sys.exit(f"not whole: {', '.join(broken(found))}")
