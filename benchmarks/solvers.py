"""Every stochastic algorithm on the problems of the field's common benchmark: time a step, and time
and oracle calls to a target.

    python benchmarks/solvers.py                              # ours
    python benchmarks/solvers.py --peer ~/benchmark_bilevel   # and beside them the solver classes
                                                              # of a checkout of benchmark_bilevel
    python benchmarks/solvers.py --small                      # to see that it runs

Both sides get the same objectives, the same batches' size, the same grid of step sizes and ratios
with the same seconds for each point, on the same machine, and every clock is read after results are
there. Compilation is outside all clocks. What counts is measured apart from the runs, in numpy and
float64: the squared norm of the true hypergradient at the outer parameters, or the error on
held-out examples. Data: quadratics are drawn here; the others need a9a.npz, w8a.npz or mnist.npz in
the folder that BILEVAX_DATA names, and are skipped without.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

if (
    "--peer" in sys.argv
    # theirs hold their data as constants, which XLA folds for a quarter of an hour; a step's time
    # is the same without
):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_disable_hlo_passes=constant_folding"
    )

import jax
import jax.numpy as jnp
import numpy as np
import pictures
from scipy.sparse import csr_array

import bilevax as bx
from benchmarks import peer_solvers
from benchmarks.harness import RESULTS, Case, environment, measure, table

NAME, BATCH, KEY = "solvers", 64, jax.random.key(0)
A = bx.algorithms
STEPS, RATIOS = (
    (0.03, 0.1, 0.3),
    (1.0, 3.0, 10.0),
)  # inner step sizes, and inner over outer: nine points for everybody
CLEANING = (1e-4, 1e-3, 1e-2)  # a weight of one example in thousands moves by a small gradient

# A step and a ratio -> an algorithm. Where the peer has one of that name, numbers of inner steps
# and series terms are its defaults.
OURS: dict[str, Callable[[float, float, int], Any]] = {
    "soba": lambda a, b, period: A.soba(a, b),
    "ma_soba": lambda a, b, period: A.ma_soba(a, b),
    "saba": lambda a, b, period: A.saba(a, b),
    "srba": lambda a, b, period: A.srba(a, b, period=period),
    "spaba": lambda a, b, period: A.spaba(a, b, probability=1 / period),
    "amigo": lambda a, b, period: A.amigo(a, b),
    "stocbio": lambda a, b, period: A.stocbio(a, b),
    "bsa": lambda a, b, period: A.bsa(a, b),
    "ttsa": lambda a, b, period: A.ttsa(a, b),
    "fsla": lambda a, b, period: A.fsla(a, b),
    "mrbo": lambda a, b, period: A.mrbo(a, b),
    "sustain": lambda a, b, period: A.sustain(a, b),
    "vrbo": lambda a, b, period: A.vrbo(a, b, period=period),
    "f2sa": lambda a, b, period: A.f2sa(a, b),
    "bome": lambda a, b, period: A.bome(a, b),
    "pzobo": lambda a, b, period: A.pzobo(a, b),
}
FULL = {"maid": A.maid(), "s_tfbo": A.s_tfbo()}  # full batches, nothing to tune
STEP_TIMES = ("soba", "saba", "srba", "amigo", "stocbio", "mrbo")
CHEAP = ("soba", "saba", "srba")  # a step is one or two passes; the others' are twenty and more


class Task(NamedTuple):
    """A problem: both objectives of a batch, their data, where both levels start, and how good a
    pair of parameters is."""

    inner: Callable
    outer: Callable
    inner_data: dict
    outer_data: dict
    y: Any
    x: Any
    score: Callable[[np.ndarray, np.ndarray], float]
    target: float
    what: str = "squared norm of the hypergradient"
    batch: int = BATCH
    # in one timed call, whose own few milliseconds are no step's; an eighth of them for algorithms
    # of twenty passes a step
    steps: int = 32_768
    block: int = 4096  # between two measurements of a race; likewise
    ratios: tuple[float, ...] = RATIOS  # of the inner over the outer step

    @property
    def period(self) -> int:
        """Steps to a full refresh: half of the batches of both levels, as the peer's default."""
        return max(
            (len(next(iter(self.inner_data.values()))) + len(next(iter(self.outer_data.values()))))
            // (2 * self.batch),
            1,
        )


# ---- problems


def quadratic(n_inner, n_outer, dim_inner, dim_outer, seed=0) -> Task:
    """Means of quadratics whose Hessians are z z' with a covariance of spectrum .1 to 1; each
    example holds its own matrices."""
    rng = np.random.default_rng(seed)

    def rank_one(n, dim):
        basis = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
        z = (
            rng.standard_normal((n, dim)) @ (basis * np.sqrt(np.geomspace(0.1, 1, dim))) @ basis.T
        ).astype(np.float32)
        return z[:, :, None] * z[:, None, :]

    def coupling(n):
        left, right = (
            np.linalg.qr(rng.standard_normal((dim, dim)))[0] for dim in (dim_outer, dim_inner)
        )
        k = min(dim_inner, dim_outer)
        matrix = 0.1 * (left[:, :k] * np.geomspace(0.1, 1, k)) @ right[:, :k].T
        return (matrix + 0.01 * rng.standard_normal((n, dim_outer, dim_inner))).astype(np.float32)

    def rows(n):
        linear = (
            rng.standard_normal((n, dim)).astype(np.float32) for dim in (dim_inner, dim_outer)
        )
        return dict(
            zip(
                "ABCab",
                (rank_one(n, dim_inner), rank_one(n, dim_outer), coupling(n), *linear),
                strict=True,
            )
        )

    def one(y, x, A, B, C, a, b):
        return 0.5 * y @ (A @ y) + 0.5 * x @ (B @ x) + x @ C @ y + a @ y + b @ x

    def mean(y, x, batch):
        return jnp.mean(
            jax.vmap(one, (None, None, 0, 0, 0, 0, 0))(y, x, *(batch[k] for k in "ABCab"))
        )

    inner_data, outer_data = rows(n_inner), rows(n_outer)
    g, f = (
        {k: v.mean(axis=0, dtype=np.float64) for k, v in d.items()}
        for d in (inner_data, outer_data)
    )

    def score(y, x):
        y = -np.linalg.solve(g["A"], g["C"].T @ x + g["a"])
        q = np.linalg.solve(g["A"], f["A"] @ y + f["C"].T @ x + f["a"])
        return float(np.sum((f["B"] @ x + f["C"] @ y + f["b"] - g["C"] @ q) ** 2))

    return Task(
        mean,
        mean,
        inner_data,
        outer_data,
        jnp.zeros(dim_inner),
        jnp.zeros(dim_outer),
        score,
        1e-6,
        steps=256,
        block=64,
    )


def _file(name):
    path = Path(os.environ.get("BILEVAX_DATA", "")) / name
    return np.load(path) if os.environ.get("BILEVAX_DATA") and path.is_file() else None


def logistic(name, rows=None) -> Task | None:
    """Logistic regression with a penalty a weight, trained on one half, judged on the other."""
    file = _file(f"{name}.npz")
    if file is None:
        return None
    n, d = (int(k) for k in file["shape"])
    dense = np.zeros((n, d), np.float32)
    dense[np.repeat(np.arange(n), np.diff(file["indptr"])), file["indices"]] = 1
    labels = np.where(file["y"] > np.mean([file["y"].min(), file["y"].max()]), 1, -1).astype(
        np.float32
    )
    order = np.random.default_rng(0).permutation(n)
    half = (rows or n // 2) // BATCH * BATCH
    (x_train, y_train), (x_valid, y_valid) = (
        (dense[i], labels[i]) for i in (order[:half], order[half : 2 * half])
    )

    def loss(w, lam, batch):
        return jnp.mean(jax.nn.softplus(-batch["y"] * (batch["x"] @ w)))

    def penalised(w, lam, batch):
        return loss(w, lam, batch) + 0.5 * jnp.sum(jnp.exp(lam) * w * w)

    def parts(w, x, y):
        """Gradient of the loss, and the curvature of each example's."""
        p = 1 / (1 + np.exp(np.clip(y * (x @ w), -50, 50)))
        return -x.T @ (p * y) / len(y), p * (1 - p)

    train = csr_array(x_train.astype(np.float64))  # a tenth of the entries and less are not 0

    def score(w, lam):
        w, penalty = np.array(w, np.float64), np.exp(lam)
        for _ in range(50):  # Newton from the run's own point
            grad, weight = parts(w, train, y_train)
            grad, hessian = (
                grad + penalty * w,
                (train.multiply(weight[:, None]).T @ train).toarray() / half + np.diag(penalty),
            )
            w = w - np.linalg.solve(hessian, grad)
            if np.linalg.norm(grad) < 1e-12:
                break
        return float(
            np.sum((penalty * w * np.linalg.solve(hessian, parts(w, x_valid, y_valid)[0])) ** 2)
        )

    data = dict(x=x_train, y=y_train), dict(x=x_valid, y=y_valid)
    return Task(penalised, loss, *data, jnp.zeros(d), jnp.full(d, -2.0), score, 1e-6)


def cleaning(rows=20_000, valid=5_000) -> Task | None:
    """MNIST hyper-cleaning: a weight for each training image, half of whose labels are drawn
    anew."""
    file = _file("mnist.npz")
    if file is None:
        return None
    rng = np.random.default_rng(0)
    order = rng.permutation(len(file["x_train"]))[: rows + valid]
    x, y = (
        file["x_train"][order].reshape(-1, 784).astype(np.float32) / 255,
        file["y_train"][order].astype(np.int32),
    )
    y[:rows] = np.where(rng.random(rows) < 0.5, rng.integers(0, 10, rows), y[:rows])
    x_test, y_test = file["x_test"].reshape(-1, 784).astype(np.float32) / 255, file["y_test"]

    def losses(w, batch):
        logits = batch["x"] @ w.reshape(784, 10)
        return (
            jax.nn.logsumexp(logits, axis=-1)
            - jnp.take_along_axis(logits, batch["y"][:, None], axis=1)[:, 0]
        )

    def inner(w, lam, batch):
        return jnp.mean(jax.nn.sigmoid(lam[batch["place"]]) * losses(w, batch)) + 0.1 * jnp.sum(
            w * w
        )

    def outer(w, lam, batch):
        return jnp.mean(losses(w, batch))

    def score(w, lam):
        return float(np.mean(np.argmax(x_test @ w.reshape(784, 10), axis=1) != y_test))

    data = (
        dict(x=x[:rows], y=y[:rows], place=np.arange(rows, dtype=np.int32)),
        dict(x=x[rows:], y=y[rows:]),
    )
    return Task(
        inner,
        outer,
        *data,
        jnp.zeros(7840),
        jnp.zeros(rows),
        score,
        0.175,
        "test error",
        steps=512,
        block=256,
        ratios=CLEANING,
    )


TASKS: dict[str, Callable[[], Task | None]] = {
    "quadratic, n=1024, d=100/100": lambda: quadratic(1024, 1024, 100, 100),
    "quadratic, n=1024, d=100/10": lambda: quadratic(1024, 1024, 100, 10),
    "quadratic, n=32768, d=100/10": lambda: quadratic(32_768, 1024, 100, 10),
    "logistic, a9a": lambda: logistic("a9a"),
    "logistic, w8a": lambda: logistic("w8a"),
    "hyper-cleaning, MNIST": cleaning,
}
SMALL: dict[str, Callable[[], Task | None]] = {
    "quadratic, n=128, d=5/4": lambda: quadratic(128, 128, 5, 4),
    "logistic, a9a, 512 rows": lambda: logistic("a9a", 512),
}


# ---- runs: a start, and a block of steps from there


class Run(NamedTuple):
    """``start() -> state``; ``advance(state) -> (state, y, x, oracle calls)``, a block of steps,
    blocking."""

    start: Callable
    advance: Callable


def ours(task: Task, algorithm, block: int, full=False) -> Run:
    source = bx.data.full if full else functools.partial(bx.data.partitioned, batch_size=task.batch)
    data = dict(inner_data=source(task.inner_data), outer_data=source(task.outer_data))
    batches = task.period * 2 if full else 1

    def advance(state):
        solution = bx.solve_bilevel(
            task.inner,
            task.outer,
            task.y,
            task.x,
            **data,
            algorithm=algorithm,
            num_steps=block,
            key=KEY,
            keep="last",
            state=state,
            throw=False,
        )
        jax.block_until_ready(solution.outer_params)
        columns = ("inner_gradients", "products", "outer_gradients", "lower_steps", "adjoint_steps")
        calls = (
            sum(float(np.sum(solution.history[c])) for c in columns if c in solution.history)
            * batches
        )
        return solution.state, solution.inner_params, solution.outer_params, calls

    return Run(lambda: None, advance)


def race(task: Task, run: Run, seconds: float) -> dict[str, list[float]]:
    """Blocks until the seconds are over: seconds, oracle calls and score after each. Scoring is
    outside the clock."""
    state, spent, calls = run.start(), 0.0, 0.0
    curve: dict[str, list[float]] = {
        "seconds": [0.0],
        "calls": [0.0],
        "score": [task.score(np.asarray(task.y), np.asarray(task.x, np.float64))],
    }
    while spent < seconds:
        begin = time.perf_counter()
        state, y, x, more = run.advance(state)
        spent, calls = spent + time.perf_counter() - begin, calls + more
        y, x = np.asarray(y, np.float64), np.asarray(x, np.float64)
        score = (
            task.score(y, x) if np.all(np.isfinite(x)) and np.all(np.isfinite(y)) else float("inf")
        )
        for key, value in (("seconds", spent), ("calls", calls), ("score", score)):
            curve[key].append(float(f"{value:.5g}"))
        if not np.isfinite(score) or score < 1e-3 * task.target:
            break
    return curve


def reached(curve, target) -> tuple[float, float]:
    """Seconds and oracle calls from which on the score stays below the target, between two
    measurements by its logarithm; infinite if it does not."""
    score, limit = np.log(np.maximum(curve["score"], 1e-300)), np.log(target)
    above = np.flatnonzero(score > limit)
    if len(above) == 0 or above[-1] == len(score) - 1:
        return (0.0, 0.0) if len(above) == 0 else (float("inf"), float("inf"))
    k = above[-1]
    share = (score[k] - limit) / (score[k] - score[k + 1]) if np.isfinite(score[k]) else 1.0
    return tuple(
        float(column[k] + share * (column[k + 1] - column[k]))
        for column in (curve["seconds"], curve["calls"])
    )  # type: ignore[return-value]


def tuned(task: Task, make: Callable[[float, float], Run], args) -> dict[str, Any]:
    """The grid's best point, by the time to the target and then by the last score, and its longer
    run."""
    points = [(step, ratio) for step in STEPS for ratio in task.ratios][: 2 if args.small else None]
    runs = {point: make(*point) for point in points}
    runs[points[0]].advance(runs[points[0]].start())  # compiles

    def order(point):
        curve = race(task, runs[point], args.grid_seconds)
        return reached(curve, task.target)[0], curve["score"][-1]

    best = min(points, key=order)
    return {"step": best[0], "ratio": best[1], **race(task, runs[best], args.seconds)}


# ---- the two parts


def step_times(task: Task, args, theirs) -> list[Case]:
    """A step of each algorithm, as one long call of `solve_bilevel` and of the peer's compiled
    scan, from the same start."""
    for name in STEP_TIMES:
        steps = 64 if args.small else task.steps if name in CHEAP else task.steps // 8
        run = ours(task, OURS[name](1e-4, 1e-4, task.period), steps)
        entries = {f"bilevax {name}, {steps} steps": functools.partial(run.advance, None)}
        if theirs is not None:
            peer = theirs.make(task, name, 1e-4, 1.0, steps)
            entries |= {f"peer {name}, {steps} steps": lambda peer=peer: peer.advance(peer.start())}
        yield Case(name, entries, list(entries)[-1])


def picture(path: Path, label: str, task: Task, curves: dict[str, dict]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(pictures.STYLE)
    fig, axes = plt.subplots(1, 2, figsize=(15, 5), layout="constrained", sharey=True)
    colors = plt.get_cmap("tab20").colors
    names = sorted({name.removeprefix("peer ") for name in curves})
    for name, curve in sorted(curves.items(), key=lambda item: item[1]["score"][-1]):
        color, dashes = (
            colors[names.index(name.removeprefix("peer ")) % 20],
            "--" if name.startswith("peer ") else "-",
        )
        for ax, key in zip(axes, ("seconds", "calls"), strict=True):
            ax.plot(
                curve[key][1:], curve["score"][1:], dashes, color=color, label=name, linewidth=1.6
            )
    for ax, key in zip(axes, ("seconds", "oracle calls, in batches"), strict=True):
        ax.axhline(task.target, color=pictures.GREY, linewidth=0.8)
        ax.set(xscale="log", yscale="log", xlabel=key)
        ax.grid()
    axes[0].set(ylabel=task.what)
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=9, loc="outside right center")
    fig.suptitle(label + (" (dashed: peer)" if any(n.startswith("peer ") for n in curves) else ""))
    pictures.save(fig, path)
    plt.close(fig)


def race_table(task: Task, curves: dict[str, dict]) -> str:
    lines = [
        "| algorithm | step | ratio | seconds to target | oracle calls to target | last score | "
        "seconds |",
        "|" + " --- |" * 7,
    ]
    for name, curve in sorted(
        curves.items(), key=lambda item: (reached(item[1], task.target)[0], item[1]["score"][-1])
    ):
        seconds, calls = reached(curve, task.target)
        cells = [
            name,
            curve.get("step", ""),
            curve.get("ratio", ""),
            f"{seconds:.3g}",
            f"{calls:.4g}",
            f"{curve['score'][-1]:.3g}",
        ]
        lines.append("| " + " | ".join(map(str, [*cells, f"{curve['seconds'][-1]:.3g}"])) + " |")
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="tiny problems, to see that it runs; writes only where --out says",
    )
    parser.add_argument("--peer", type=Path, help="a checkout of benchopt/benchmark_bilevel")
    parser.add_argument(
        "--problems", nargs="*", help="parts of problems' names (default: all of them)"
    )
    parser.add_argument(
        "--parts", nargs="*", default=["steps", "races"], choices=["steps", "races"]
    )
    parser.add_argument(
        "--algorithms", nargs="*", help=f"of the races (default: all): {', '.join([*OURS, *FULL])}"
    )
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 9; 3 with --small)")
    parser.add_argument(
        "--grid-seconds", type=float, help="seconds for each point of a grid (default 1)"
    )
    parser.add_argument("--seconds", type=float, help="seconds of the tuned run (default 10)")
    parser.add_argument(
        "--out", type=Path, help="folder of results (default benchmarks/results; none with --small)"
    )
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (3 if args.small else 9)
    args.grid_seconds = args.grid_seconds or (0.02 if args.small else 1.0)
    args.seconds = args.seconds or (0.05 if args.small else 10.0)
    out = args.out or (None if args.small else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    theirs = None if args.peer is None else peer_solvers.load(args.peer)
    names = args.algorithms or ([*STEP_TIMES[:2], "maid"] if args.small else [*OURS, *FULL])
    record: dict[str, Any] = {
        "name": NAME,
        "environment": environment(),
        "load": os.getloadavg(),
        "problems": {},
    }
    text = [f"### {NAME}", "", __doc__.split("\n\n")[0], ""]

    for label, build in (SMALL if args.small else TASKS).items():
        if args.problems and not any(part in label for part in args.problems):
            continue
        task = build()
        if task is None:
            print(f"skipped: {label}: its data is not in BILEVAX_DATA")
            continue
        print(f"{NAME}: {label}", file=sys.stderr)
        entry: dict[str, Any] = {"target": task.target, "what": task.what}
        text += [f"#### {label}", ""]
        if "steps" in args.parts:
            entry["steps"] = [measure(case, args.rounds) for case in step_times(task, args, theirs)]
            text += [table(entry["steps"]), ""]
        if "races" in args.parts:
            curves = {}
            for name in names:
                block = (
                    16
                    if args.small
                    else task.block
                    if name in CHEAP or name in ("ma_soba", "spaba", "fsla")
                    else task.block // 8
                )
                if name in FULL:
                    run = ours(task, FULL[name], 2 if name == "maid" else 16, full=True)
                    run.advance(run.start())  # compiles
                    curves[name] = race(task, run, args.seconds)
                else:
                    make = lambda a, ratio, task=task, name=name, block=block: ours(
                        task, OURS[name](a, a / ratio, task.period), block
                    )
                    curves[name] = tuned(task, make, args)
                    if theirs is not None and theirs.has(name):
                        curves[f"peer {name}"] = tuned(task, theirs.maker(task, name, block), args)
                print(
                    f"  {name}: {reached(curves[name], task.target)[0]:.3g} s to {task.target:g}",
                    file=sys.stderr,
                )
            entry["races"] = curves
            text += [f"To a {task.what} of {task.target:g}:", "", race_table(task, curves), ""]
            if out is not None:
                plain = (
                    label.replace(", ", "_").replace("=", "").replace("/", "-").replace(" ", "_")
                )
                picture(out / f"{NAME}_{plain}.svg", label, task, curves)
        record["problems"][label] = entry
        if out is not None:
            (out / f"{NAME}.json").write_text(json.dumps(record) + "\n")
            (out / f"{NAME}.md").write_text("\n".join(text))
    where = record["environment"]
    text.append(
        f"{where['cores']} cores ({where['platform']}), load {record['load'][0]:.1f} at the start, "
        f"jax {where['packages']['jax']}."
    )
    print("\n".join(text))
    if out is not None:
        (out / f"{NAME}.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
