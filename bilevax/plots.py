"""Pictures of runs and of comparisons, by matplotlib (extra ``plots``). From histories alone, so of
live and of saved runs alike.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bilevax import check, results
from bilevax._core import numbers
from bilevax.run import logfile

# Okabe and Ito's colours, distinguishable with any kind of colour vision; with line styles and
# markers, also without colour.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.titlesize": "medium",
    "axes.grid": True,
    "grid.color": "0.9",
}

# The panels of a dashboard, a kind of quantity each: title, axis label, and the columns in it with
# what they are called.
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Objectives", "value", {"value": "outer", "inner_value": "inner"}),
    ("Hypergradient", "norm", {"grad_norm": "hypergradient", "error_bound": "bound on its error"}),
    ("Lower level: how far from solved", "norm", {"inner_grad_norm": "inner gradient"}),
    ("Adjoint: how far from solved", "relative residual", {"adjoint_residual": "adjoint residual"}),
    (
        "Work a step",
        "number",
        {
            "inner_iterations": "inner iterations",
            "adjoint_iterations": "adjoint iterations",
            "gradients": "gradients",
            "hvps": "HVPs",
        },
    ),
    (
        "Step sizes",
        "step size",
        {
            "step_size": "outer",
            "inner_step": "inner",
            "outer_step": "outer",
            "adjoint_step": "adjoint",
        },
    ),
)
DECADES = 100.0  # values that span so much are drawn on a logarithmic axis
FAILED, ROUGH, KEPT = "#D55E00", "#E69F00", "#009E73"
KNOWN = {name for panel in PANELS for name in panel[2]} | {
    "code",
    "aux",
    "inner_aux",
    "step",
    "warnings",
    "mixed_products",
    "cotangent_norm",
}


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "bilevax.plots needs matplotlib; try pip install 'bilevax[plots]'."
        ) from error
    return plt


def history(run: Any) -> dict[str, np.ndarray]:
    """The scalar columns of a run, wherever it is.

    Args:
      run: a `Solution`, a history, a `callbacks.Event`, or the file that `callbacks.jsonl` or
        `callbacks.csv` writes.

    Returns:
      Columns by name, as float64 arrays; NaN where a row has no value.

    Raises:
      TypeError: for anything else.
      ValueError: for a run without a row.

    Examples:
      >>> from bilevax import plots
      >>> plots.history({"value": [3.0, 2.0]})["value"].tolist()
      [3.0, 2.0]
    """
    if isinstance(run, (str, os.PathLike)):
        columns: Any = _of_log(Path(run))
    else:
        columns = getattr(run, "history", run)
    if not isinstance(columns, Mapping):
        raise TypeError(
            f"run: got {check.describe(run)}; expected a Solution, its history, or the name of a "
            "file that callbacks.jsonl wrote."
        )
    out = {}
    for name, column in columns.items():
        if isinstance(column, (Mapping, tuple)):
            continue
        values = np.asarray(column)
        if values.ndim == 1:
            out[name] = np.array(
                [np.nan if value is None else value for value in values], np.float64
            )
    if not out or not len(next(iter(out.values()))):
        raise ValueError("run: got one without any row; expected at least one step.")
    return out


def _of_log(path: Path) -> dict[str, list[Any]]:
    """The columns of a log, which may be one that is being written: its last row may be cut off."""
    if not path.is_file():
        raise FileNotFoundError(
            f"run: got {str(path)!r}, which is not there; expected a file that callbacks.jsonl or "
            "callbacks.csv wrote."
        )
    if path.suffix == ".csv":
        rows = [row for _, _, row in logfile.read_csv(path).rows]
        rows = [{name: float(cell) if cell else None for name, cell in row.items()} for row in rows]
    else:
        rows = [row for _, _, row in logfile.read_jsonl(path).rows]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def dashboard(run: Any, *, title: str | None = None) -> Any:
    """One run at a glance: objectives, hypergradient, how far both systems are from solved, the
    work a step, step sizes, metrics.

    A kind of quantity has a panel, a metric one of its own; panels for which the history has no
    column are left out. An axis is logarithmic where its values cross decades. The kept step, steps
    with warnings and steps that failed are marked.

    Args:
      run: a `Solution`, a history, a `callbacks.Event`, or the file that `callbacks.jsonl` or
        `callbacks.csv` writes.
      title: above all panels; for a `Solution`, by default, how it ended and what it took.

    Returns:
      A matplotlib figure; save it by ``.savefig(path)``.

    Raises:
      ImportError: where matplotlib is not installed.
      TypeError, ValueError: for a run that is none or empty.

    Examples:
      >>> from bilevax import plots
      >>> figure = plots.dashboard({"value": [3.0, 2.0, 1.5], "grad_norm": [1.0, 0.3, 0.1]})
      >>> [axes.get_title() for axes in figure.axes]
      ['Objectives', 'Hypergradient']
    """
    plt = _pyplot()
    if title is not None:
        title = numbers.word(title, "title", "A run")
    columns = history(run)
    panels = [
        (name, label, {n: called for n, called in names.items() if n in columns})
        for name, label, names in PANELS
    ]
    panels += [
        (name, "value", {name: name})
        for name in columns
        if name not in KNOWN and not name.startswith("aux")
    ]
    panels = [panel for panel in panels if panel[-1]]
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    steps = columns.get("step", np.arange(len(next(iter(columns.values())))))
    marks = _marks(columns, getattr(run, "stats", {}))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            down, across, figsize=(4.6 * across, 3.2 * down), layout="constrained", squeeze=False
        )
        for ax, (name, label, names) in zip(axes.flat, panels, strict=False):
            for i, (column, called) in enumerate(names.items()):
                _curve(ax, steps, columns[column], i, called)
            if _crosses_decades([columns[column] for column in names]):
                ax.set_yscale("log")
            for rows, style in marks.values():
                _mark(ax, steps[rows], style)
            ax.set(title=name, xlabel="step", ylabel=label)
            ax.legend(fontsize="small")
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        if marks:
            keys = [
                plt.Line2D([], [], **style, label=called) for called, (_, style) in marks.items()
            ]
            figure.legend(
                handles=keys, loc="outside lower center", ncols=len(keys), fontsize="small"
            )
        if title is None and hasattr(run, "stats"):
            title = (
                f"{run.result.name}: {run.stats['steps']} steps in {run.stats['seconds']:.3g} s, "
                f"kept step {run.stats['best_step']}"
            )
        if title:
            figure.suptitle(title)
    return figure


def _crosses_decades(curves: list[np.ndarray]) -> bool:
    """Whether all that is drawn is positive and spans more than a linear axis shows."""
    values = np.concatenate([curve[np.isfinite(curve)] for curve in curves])
    positive = values[values > 0]
    return (
        len(positive) > 1
        and not (values < 0).any()
        and bool(positive.max() >= DECADES * positive.min())
    )


def _marks(
    columns: dict[str, np.ndarray], stats: dict[str, Any]
) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """Steps that mean something, by what they mean: their rows, and how they are drawn."""
    none = np.array([], int)
    rows = len(next(iter(columns.values())))
    first = int(stats.get("total_steps", rows)) - rows
    best = stats.get("best_step")
    kept = (
        none if best is None or not 0 <= int(best) - first < rows else np.array([int(best) - first])
    )
    rough = (
        np.flatnonzero(np.nan_to_num(columns["warnings"]) > 0) if "warnings" in columns else none
    )
    failed = np.flatnonzero(results.failed(columns["code"])) if "code" in columns else none
    tick = dict(linestyle="", marker="|", markersize=7)
    found = {
        "kept step": (kept, dict(color=KEPT, linestyle=":", linewidth=1.4)),
        "warning": (rough, dict(color=ROUGH, **tick)),
        "failed step": (failed, dict(color=FAILED, linewidth=0.9)),
    }
    return {called: mark for called, mark in found.items() if len(mark[0])}


def _mark(ax: Any, steps: np.ndarray, style: dict[str, Any]) -> None:
    """A line over the height of the axes a step, or a tick at their foot."""
    if "marker" in style:
        ax.plot(
            steps, np.full(len(steps), 0.02), transform=ax.get_xaxis_transform(), zorder=0, **style
        )
        return
    for step in steps:
        ax.axvline(step, zorder=0, **style)


def _check_axes(ax: Any) -> None:
    if ax is not None and not callable(getattr(ax, "plot", None)):
        raise TypeError(
            f"ax: got {check.describe(ax)}; expected matplotlib axes, or None. Try "
            "plt.subplots()[1]."
        )


def _curve(ax: Any, x: np.ndarray, y: np.ndarray, i: int, label: str) -> None:
    seen = np.isfinite(y)  # a metric has no value between its evaluations
    marker = MARKERS[i % len(MARKERS)] if seen.sum() == 1 else None
    ax.plot(
        x[seen],
        y[seen],
        STYLES[i % len(STYLES)],
        marker=marker,
        color=COLORS[i % len(COLORS)],
        linewidth=1.8,
        label=label,
    )


def runs(
    runs: Mapping[str, Any],
    column: str = "value",
    *,
    cost: str | Sequence[str] | None = None,
    log: bool = False,
    ax: Any = None,
) -> Any:
    """One column of several runs over their steps, or over what they cost.

    Args:
      runs: runs by name, each as `history` takes it.
      column: what is drawn.
      cost: a column, or several to be added up, whose running sum is the horizontal axis, such as
        ``("gradients", "hvps")``. None: steps.
      log: logarithmic vertical axis.
      ax: matplotlib axes to draw into; None makes new ones.

    Returns:
      The axes.

    Raises:
      ImportError: where matplotlib is not installed.
      KeyError: for a run without such a column.

    Examples:
      >>> from bilevax import plots
      >>> ax = plots.runs({"slow": {"value": [3.0, 2.5]}, "fast": {"value": [3.0, 0.1]}}, log=True)
      >>> [line.get_label() for line in ax.get_lines()]
      ['slow', 'fast']
    """
    plt = _pyplot()
    if not isinstance(runs, Mapping):
        raise TypeError(
            f"runs: got {check.describe(runs)}; expected a mapping from names to runs. Try "
            f"{{'mine': solution}}."
        )
    column, log = numbers.word(column, "column", "value"), numbers.flag(log, "log")
    if cost is not None and not isinstance(cost, (str, tuple, list)):
        raise TypeError(
            f"cost: got {check.describe(cost)}; expected a column, several, or None. Try "
            "('gradients', 'hvps')."
        )
    _check_axes(ax)
    costs = (cost,) if isinstance(cost, str) else tuple(cost or ())
    with plt.rc_context(STYLE):
        ax = plt.subplots(figsize=(6, 4), layout="constrained")[1] if ax is None else ax
        for i, (name, run) in enumerate(runs.items()):
            columns = history(run)
            for wanted in (column, *costs):
                if wanted not in columns:
                    raise KeyError(
                        f"{'column' if wanted is column else 'cost'}: got {wanted!r}, which run "
                        f"{name!r} does not have; "
                        f"expected one of {sorted(columns)}."
                    )
            x = (
                np.cumsum(sum(columns[c] for c in costs))
                if costs
                else columns.get("step", np.arange(len(columns[column])))
            )
            _curve(ax, x, columns[column], i, name)
        ax.set(xlabel=" + ".join(costs) or "step", ylabel=column, yscale="log" if log else "linear")
        ax.legend()
    return ax


def comparison(found: Any, ax: Any = None) -> Any:
    """Error against time of the methods that `compare_hypergradients` found, the Pareto front among
    them joined.

    Args:
      found: a `HypergradientComparison`.
      ax: matplotlib axes to draw into; None makes new ones.

    Returns:
      The axes. The dashed line is the error that the inner solve alone leaves; no implicit method
      does better.

    Raises:
      ImportError: where matplotlib is not installed.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> inner = lambda y, x, batch: 0.5 * jnp.sum((y - x) ** 2)
      >>> outer = lambda y, x, batch: jnp.sum(y**2)
      >>> solver = bx.inner.optax(optax.sgd(0.5), 5)
      >>> methods = {
      ...     "implicit": bx.hypergradient.implicit(),
      ...     "one step": bx.hypergradient.one_step(),
      ... }
      >>> found = bx.compare_hypergradients(
      ...     inner, outer, jnp.zeros(2), jnp.ones(2), solver=solver, methods=methods, repeats=1
      ... )
      >>> bx.plots.comparison(found).get_xscale()
      'log'
    """
    plt = _pyplot()
    if not hasattr(found, "rows") or not hasattr(found, "solve_error"):
        raise TypeError(
            f"found: got {check.describe(found)}; expected what compare_hypergradients returns."
        )
    _check_axes(ax)
    with plt.rc_context(STYLE):
        ax = plt.subplots(figsize=(7, 4.5), layout="constrained")[1] if ax is None else ax
        points = [
            (row.milliseconds, max(row.relative_error, 1e-16), row.name) for row in found.rows
        ]
        front, lowest = [], np.inf
        for point in sorted(points):
            if point[1] < lowest:
                front.append(point)
                lowest = point[1]
        ax.plot([p[0] for p in front], [p[1] for p in front], color="0.75", linewidth=1.2, zorder=1)
        for i, (time, error, name) in enumerate(points):
            ax.scatter(
                time,
                error,
                s=46,
                color=COLORS[i % len(COLORS)],
                marker=MARKERS[i % len(MARKERS)],
                zorder=2,
                label=name,
            )
        ax.axhline(
            max(found.solve_error, 1e-16),
            color="0.5",
            linestyle="--",
            linewidth=1,
            zorder=0,
            label="error of the solve alone",
        )
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="time of one call, solve included [ms]",
            ylabel="relative error of the hypergradient",
        )
        ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def front(
    points: Mapping[str, Any],
    labels: Sequence[str] = ("first objective", "second objective"),
    ax: Any = None,
) -> Any:
    """Points of two objectives, the less the better, and the front of each set joined.

    Args:
      points: by name, arrays of shape ``(n, 2)``, as of the last rows of ``history["aux"]`` of runs
        of `algorithms.multi_objective`.
      labels: what the two axes say.
      ax: matplotlib axes to draw into; None makes new ones.

    Returns:
      The axes.

    Raises:
      ImportError: where matplotlib is not installed.
      TypeError, ValueError: for points of another shape.

    Examples:
      >>> from bilevax import plots
      >>> ax = plots.front({"a": [[0.0, 2.0], [1.0, 1.0], [2.0, 1.5]], "b": [[2.0, 2.0]]})
      >>> first = ax.get_lines()[0]  # what no other point of its set is better than in both
      >>> first.get_xydata().tolist()
      [[0.0, 2.0], [1.0, 1.0]]
    """
    plt = _pyplot()
    if not isinstance(points, Mapping):
        raise TypeError(
            f"points: got {check.describe(points)}; expected a mapping from names to arrays of two "
            "columns."
        )
    if (
        isinstance(labels, (str, bytes))
        or not isinstance(labels, Sequence)
        or len(labels) != 2
        or not all(isinstance(name, str) for name in labels)
    ):
        raise TypeError(
            f"labels: got {check.describe(labels)}; expected two texts. Try ('loss', 'gap')."
        )
    _check_axes(ax)
    sets = {}
    for name, given in points.items():
        sets[name] = np.asarray(given)
        if sets[name].ndim != 2 or sets[name].shape[1] != 2 or sets[name].dtype.kind not in "fiu":
            raise ValueError(
                f"points: got {check.describe(given)} for {name!r}; expected numbers in an array "
                "of two columns."
            )
    with plt.rc_context(STYLE):
        ax = plt.subplots(figsize=(6, 4), layout="constrained")[1] if ax is None else ax
        for i, (name, values) in enumerate(sets.items()):
            color = COLORS[i % len(COLORS)]
            best = values[undominated(values)]
            best = best[np.argsort(best[:, 0])]
            ax.plot(best[:, 0], best[:, 1], STYLES[i % len(STYLES)], color=color, linewidth=1.2)
            ax.scatter(
                values[:, 0],
                values[:, 1],
                s=36,
                color=color,
                marker=MARKERS[i % len(MARKERS)],
                label=name,
            )
        ax.set(xlabel=labels[0], ylabel=labels[1])
        ax.legend()
    return ax


def undominated(points: Any) -> np.ndarray:
    """Which points no other one is better than: at most as large in every column, and smaller in
    one.

    Args:
      points: an array of shape ``(n, objectives)``.

    Returns:
      A boolean array of length n.

    Raises:
      TypeError, ValueError: for points of another kind or shape.

    Examples:
      >>> from bilevax import plots
      >>> plots.undominated([[0.0, 2.0], [1.0, 1.0], [2.0, 1.5]]).tolist()
      [True, True, False]
    """
    try:
        points = np.asarray(points, np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"points: got {check.describe(points)}; expected an array of shape (n, objectives)."
        ) from error
    if points.ndim != 2:
        raise ValueError(
            f"points: got {check.describe(points)}; expected an array of shape (n, objectives)."
        )
    no_worse = (points[:, None, :] <= points[None, :, :]).all(axis=2)
    better = (points[:, None, :] < points[None, :, :]).any(axis=2)
    return ~(no_worse & better).any(axis=0)


def __dir__() -> list[str]:
    return __all__


__all__ = ["comparison", "dashboard", "front", "history", "runs", "undominated"]
