"""The measurements on docs/choosing.md: every method on one problem, at a short and at a long inner
solve.

python benchmarks/choosing.py            # writes docs/choosing.svg and the tables of the page
python benchmarks/choosing.py --quick    # a small run that writes nothing but to --out
"""

import argparse
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits

import bilevax as bx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import pictures

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAGE = Path(__file__).resolve().parents[1] / "docs" / "choosing.md"
FAMILIES = {  # a marker each for those who see no colours
    "implicit": (pictures.BLUE, "o"),
    "through the steps": (pictures.RED, "s"),
    "first order": (pictures.GREEN, "^"),
    "solves only": (pictures.PURPLE, "D"),
}


# ---- digits, a third of whose training labels are wrong: a weight an example and a decay a class


def problem(rows):
    x, y = load_digits(return_X_y=True)
    x, rng = x.astype(np.float32) / 16, np.random.default_rng(0)
    x = x[:, np.ptp(x[:rows], axis=0) > 0]  # at pixels that are always dark Adam has no derivative
    labels = np.where(rng.random(rows) < 1 / 3, rng.integers(0, 10, rows), y[:rows])
    train, valid = (x[:rows], labels), (x[rows : 2 * rows], y[rows : 2 * rows])
    start = {"w": jnp.zeros((x.shape[1], 10)), "b": jnp.zeros(10)}
    return (
        start,
        {"weights": jnp.zeros(rows), "decay": jnp.full(10, -4.0)},
        *jax.tree.map(jnp.asarray, (train, valid)),
    )


def losses(y, batch):
    return optax.softmax_cross_entropy_with_integer_labels(batch[0] @ y["w"] + y["b"], batch[1])


def inner(y, x, batch):
    return jnp.mean(jax.nn.sigmoid(x["weights"]) * losses(y, batch)) + 0.5 * jnp.sum(
        jnp.exp(x["decay"]) * jnp.sum(y["w"] ** 2, axis=0)
    )


def outer(y, x, batch):
    return jnp.mean(losses(y, batch))


def methods(solver):
    """Family, and what `compare_hypergradients` takes, by name."""
    H, L = bx.hypergradient, bx.linear
    steps = solver.steps
    lbfgs, adam = (
        bx.inner.lbfgs(maxiter=max(5, steps // 4), tol=1e-6),
        bx.inner.optax(optax.adam(0.03), steps),
    )
    return {
        "implicit, CG": ("implicit", H.implicit(L.cg(200, 1e-4), max_residual=jnp.inf)),
        "implicit, 5 CG": ("implicit", H.implicit(L.cg(5), max_residual=jnp.inf)),
        "implicit, 10 Neumann": ("implicit", H.implicit(L.neumann(10), max_residual=jnp.inf)),
        "implicit, Nyström 10": ("implicit", H.implicit(L.nystrom(10), max_residual=jnp.inf)),
        "implicit, CG, after L-BFGS": (
            "implicit",
            (lbfgs, H.implicit(L.cg(200, 1e-4), max_residual=jnp.inf)),
        ),
        "SHINE, after L-BFGS": ("implicit", (lbfgs, H.shine(max_residual=jnp.inf))),
        "unrolled": ("through the steps", H.unrolled()),
        "unrolled, sqrt": ("through the steps", H.unrolled(checkpoint="sqrt")),
        "unrolled, plain": ("through the steps", H.unrolled(checkpoint="none")),
        "unrolled Adam": ("through the steps", (adam, H.unrolled())),
        f"truncated to {steps // 4}": ("through the steps", H.unrolled(last=steps // 4)),
        "one step": ("first order", H.one_step()),
        "finite difference": ("first order", H.finite_difference()),
        "SAMA, after Adam": ("first order", (adam, H.sama())),
        "zeroth order, 16": ("solves only", H.zeroth_order(16, 0.1)),
    }


def compare(rows, steps, repeats):
    y, x, train, valid = problem(rows)
    solver = bx.inner.optax(optax.sgd(0.5, momentum=0.9), steps)
    chosen = methods(solver)
    table = bx.compare_hypergradients(
        inner, outer, y, x, solver=solver, methods={name: pair for name, (_,
        pair) in chosen.items()}, inner_batch=train, outer_batch=valid,
        reference="dense", repeats=repeats, key=jax.random.key(0),
    )  # fmt: skip
    return table, {name: family for name, (family, _) in chosen.items()}


# ---- the picture and the page


def angle(row):
    return float(np.degrees(np.arccos(np.clip(row.cosine, -1, 1))))


PANELS = {
    "relative error": lambda row: max(row.relative_error, 1e-16),
    "angle to the reference [degrees]": lambda row: max(
        angle(row), 0.5
    ),  # what four digits of a cosine resolve
    "time, solve included [ms]": lambda row: row.milliseconds,
    "temporary memory [MiB]": lambda row: row.memory / 2**20,
}


def draw(tables, path):
    """A line a method; hollow markers for the shortest solve, full ones for the longest."""
    plt.rcParams.update(pictures.STYLE | {"font.size": 9})
    names = list(next(iter(tables.values()))[1])
    fig, axes = plt.subplots(
        1, len(PANELS), figsize=(12, 0.3 * len(names) + 1.2), sharey=True, layout="constrained"
    )
    for ax, (label, read) in zip(axes, PANELS.items(), strict=True):
        for place, (table, families) in enumerate(tables.values()):
            for y, (row, family) in enumerate(zip(table.rows, families.values(), strict=True)):
                colour, marker = FAMILIES[family]
                full = place == len(tables) - 1
                ax.plot(
                    read(row),
                    y,
                    marker,
                    color=colour,
                    markersize=6,
                    markerfacecolor=colour if full else "none",
                    zorder=3,
                )
        ax.set(xscale="log", xlabel=label)
        ax.grid()
        ax.tick_params(axis="y", length=0)
    labels = [
        name if "truncated" not in name else "truncated to the last quarter" for name in names
    ]
    axes[0].set_yticks(range(len(names)), labels)
    axes[0].invert_yaxis()
    handles = [
        plt.Line2D([], [], color=c, marker=m, linestyle="", label=name)
        for name, (c, m) in FAMILIES.items()
    ]
    for place, steps in enumerate(tables):
        face = pictures.GREY if place == len(tables) - 1 else "none"
        handles.append(
            plt.Line2D(
                [],
                [],
                color=pictures.GREY,
                marker="o",
                markerfacecolor=face,
                linestyle="",
                label=f"{steps} inner steps",
            )
        )
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    pictures.save(fig, path)
    plt.close(fig)


def write(page, tables):
    text = page.read_text()
    for steps, (table, _) in tables.items():
        block = f"<!-- measured: {steps} steps -->\n{table.to_markdown()}\n<!-- end -->"
        text, count = re.subn(
            rf"<!-- measured: {steps} steps -->\n.*?<!-- end -->",
            lambda _, block=block: block,
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(
                f"{page}: expected one table marked 'measured: {steps} steps', found {count}."
            )
    page.write_text(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a small run that writes nothing but to --out"
    )
    parser.add_argument(
        "--repeats", type=int, help="timed calls of each method (default 9, with --quick 1)"
    )
    parser.add_argument("--out", type=Path, help="folder of choosing.svg, in place of the page")
    args = parser.parse_args(argv)
    rows, lengths, repeats = (
        (60, (8, 16), args.repeats or 1) if args.quick else (600, (20, 200), args.repeats or 9)
    )
    tables = {steps: compare(rows, steps, repeats) for steps in lengths}
    for steps, (table, _) in tables.items():
        print(
            f"## {steps} inner steps\n\n{table.to_markdown()}\n\nexact adjoint at the solver's "
            f"point: {table.solve_error:.1e}"
        )
        print(f"{table.recommendation}\n")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        draw(tables, args.out / "choosing.svg")
    elif not args.quick:
        draw(tables, PAGE.with_suffix(".svg"))
        write(PAGE, tables)
    return tables


if __name__ == "__main__":
    sys.exit(main() is None)
