"""The algorithm that runs when none is named, on problems that people bring: what it reaches, and
what that costs.

    python benchmarks/default.py [--only PART_OF_A_NAME] [--keys 3] [--more] [--quick]

Eighteen problems have limits: values that were reached once, by whatever method. ``--more`` runs
ten further problems, whose limits are the best of three long reference runs, made in the same call.
Costs are counted: inner gradients and products with second derivatives; no time is taken.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _default import more, problems
from _default.judge import judge
from harness import environment

import bilevax as bx
from bilevax import data

STEPS = {False: 100, True: 300}  # by whether batches are sampled
# what three keys may be above a limit, and the further problems above their references
SLACK = 1.02
A, H = bx.algorithms, bx.hypergradient


def adam(rate):
    inner = bx.inner.optax(optax.adam(rate, eps_root=1e-8), 10)
    return A.double_loop(inner, H.unrolled(), optax.adam(10 * rate))


def exact(rate):
    solver = bx.inner.lbfgs(maxiter=2000, tol=1e-6)
    return A.double_loop(solver, H.implicit(bx.linear.cg(maxiter=500, tol=1e-5)), optax.adam(rate))


# long runs, by whether batches are sampled: name -> (algorithm, times the steps)
REFERENCES = {
    False: {
        "exact adam .1": (lambda: exact(0.1), 10),
        "exact adam .03": (lambda: exact(0.03), 10),
        "maid": (A.maid, 10),
    },
    True: {
        "adam 1e-3": (lambda: adam(1e-3), 3),
        "adam 3e-3": (lambda: adam(3e-3), 3),
        "adam 3e-4": (lambda: adam(3e-4), 5),
    },
}


def run(problem, key, algorithm=None, times=1.0):
    """A solution of `problem`."""
    sampled = problem.batch is not None
    kinds = dict(inner_data=problem.train, outer_data=problem.held_out)
    if sampled:
        pairs = zip(kinds.items(), problem.batch, strict=True)
        kinds = {name: data.minibatches(rows, size) for (name, rows), size in pairs}
        kinds |= dict(key=jax.random.key(key), keep="last")
    if problem.model is not None:
        kinds["model_state"] = problem.model
    return bx.solve_bilevel(
        problem.inner, problem.outer, problem.y, problem.x, project=problem.project,
        algorithm=algorithm,
        num_steps=max(int(times * STEPS[sampled]), 2), throw=False, **kinds,
    )  # fmt: skip


def counted(history):
    return {
        name: int(np.sum(history[name]))
        for name in ("lower_steps", "adjoint_steps")
        if name in history
    }


def row(name, problem, measure, limit, keys, times):
    """What the default comes to on one problem."""
    start = judge(problem, problem.y, problem.x, problem.model)[measure]
    reached, ended = [], []
    for key in range(keys if problem.batch else 1):
        solution = run(problem, key, times=times)
        found = judge(problem, solution.inner_params, solution.outer_params, solution.model_state)
        reached.append(found.get(measure, float("nan")))
        ended.append(solution.result.name)
    steps, wanted = solution.stats["steps"], max(int(times * STEPS[problem.batch is not None]), 2)
    met = np.mean(reached) <= (SLACK if len(reached) > 1 else 1.0) * limit and steps == wanted
    warnings = {code.name: count for code, count in solution.warnings.items()}
    return {
        "problem": name, "by": solution.stats["algorithm"], "measure": measure, "start": start,
        "limit": limit, "reached": reached,
        "result": ended, "steps": steps, **counted(solution.history), "warnings": warnings,
        "met": bool(met),
    }  # fmt: skip


def reference(problem, measure, times):
    """The best of three long runs."""
    found = []
    for make, longer in REFERENCES[problem.batch is not None].values():
        solution = run(problem, 0, make(), longer * times)
        value = judge(problem, solution.inner_params, solution.outer_params, solution.model_state)
        found.append(value.get(measure, float("inf")))
    return found


def slack(value):
    """A value that may be 1.02 times `value`, or as much above it where that is negative."""
    return value + (SLACK - 1) * abs(value)


def shown(entry):
    reached = ", ".join(f"{value:.5g}" for value in entry["reached"])
    spent = entry.get("lower_steps", 0) + entry.get("adjoint_steps", 0)
    cost = f"{spent:,}" if spent else ""
    return (
        f"| {entry['problem']} | {entry['by']} | {entry['measure']} | {entry['start']:.5g} | "
        f"{entry['limit']:.5g} | {reached} "
        f"| {cost} | {'yes' if entry['met'] else 'no'} |"
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="part of a problem's name")
    parser.add_argument("--keys", type=int, default=1, help="runs of a sampled problem")
    parser.add_argument("--more", action="store_true", help="the ten further problems")
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the steps, for a look at whether all runs"
    )
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args(argv)
    times, rows = 0.1 if args.quick else 1.0, []
    print("| problem | by | judged by | start | limit | reached | gradients and products | met |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name, (make, measure, *limit) in (
        more.PROBLEMS if args.more else problems.PROBLEMS
    ).items():
        if args.only not in name:
            continue
        problem = make()
        references = [] if limit else reference(problem, measure, times)
        entry = row(
            name, problem, measure, limit[0] if limit else slack(min(references)), args.keys, times
        )
        rows.append(entry | ({"references": references} if references else {}))
        print(shown(entry), flush=True)
    if args.out:
        args.out.write_text(
            json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
