"""Betty (torch) on the problem of bert.py, on the same device, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

from benchmarks._accelerator import bert
from benchmarks._accelerator.common import Part

METHODS = ("plain", "sama", "neumann", "darts", "cg")


def run(part: Part) -> None:
    # The script's folder is the first place that Python imports from, and holds no module named
    # betty.
    worker = Path(__file__).with_name("betty_worker.py")
    if subprocess.run(
        [sys.executable, "-c", "import torch, betty.engine"],
        capture_output=True,
        check=False,
        cwd=worker.parent,
    ).returncode:
        part.skip("betty", "this Python has no torch or no betty-ml")
        return
    shape, rows, examples = bert.problem(part)
    order = {
        "shape": shape._asdict(),
        "rows": rows,
        "examples": examples,
        "warm": part.pick(1, 3),
    }
    lengths = {
        "neumann": part.pick((2, 1), (3, 3)),
        "cg": part.pick((2, 1), (3, 3)),
    }  # rounds, and steps a round
    process = subprocess.Popen(
        [sys.executable, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        with part.device():
            base = None
            for method in METHODS:
                if part.left() < 0:
                    part.skip(method, "no time left")
                    continue
                several = lengths.get(method, part.pick((2, 1), (5, 8)))
                process.stdin.write(
                    json.dumps(
                        order | {"method": method, "rounds": several[0], "steps": several[1]}
                    )
                    + "\n"
                )
                process.stdin.flush()
                answer = json.loads(
                    process.stdout.readline() or '{"error": "the process has ended"}'
                )
                if "error" in answer:
                    part.record["errors"][method] = answer["error"]
                    part.save()
                    continue
                middle = median(answer["seconds"])
                base = middle if method == "plain" else base
                part.add(
                    method=method,
                    milliseconds=1e3 * middle,
                    over_plain=middle / base if base else None,
                    **answer,
                )
    finally:
        process.kill()
        process.wait()
