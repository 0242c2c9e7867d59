"""Pictures hold what the history holds; how they look is for eyes."""

import json

import matplotlib as mpl
import numpy as np
import pytest

import bilevax as bx

mpl.use("Agg")

HISTORY = {
    "value": np.array([3.0, 2.0, 1.0]),
    "inner_value": np.array([1.0, 0.5, 0.4]),
    "grad_norm": np.array([1.0, 0.1, 0.01]),
    "adjoint_residual": np.array([0.0, 1e-3, 1e-5]),
    "hvps": np.array([4, 2, 1]),
    "accuracy": np.array([np.nan, 0.5, np.nan]),
    "code": np.array([0, 0, 11]),
    "warnings": np.array([0, 1, 0]),
    "aux": {"w": np.zeros((3, 2))},
}


def lines(ax):
    return {
        line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")
    }


def test_dashboard_shows_each_column_once():
    figure = bx.plots.dashboard(HISTORY)
    shown = {name: line for ax in figure.axes for name, line in lines(ax).items()}
    assert set(shown) == {"outer", "inner", "hypergradient", "adjoint residual", "HVPs", "accuracy"}
    np.testing.assert_array_equal(shown["outer"].get_ydata(), HISTORY["value"])
    np.testing.assert_array_equal(shown["accuracy"].get_xdata(), [1])  # NaN between its evaluations
    titles = [ax.get_title() for ax in figure.axes]
    assert "Step sizes" not in titles and "accuracy" in titles
    assert all(ax.get_legend() is not None for ax in figure.axes if ax.lines)
    assert [ax.get_yscale() for ax in figure.axes[:3]] == ["linear", "log", "log"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["warning", "failed step"]
    marked = [
        list(line.get_xdata())
        for line in figure.axes[0].get_lines()
        if line.get_label().startswith("_")
    ]
    assert marked == [[1], [2, 2]]


def test_the_kept_step_is_marked_in_a_run_that_went_on():
    stats = {"steps": 3, "total_steps": 13, "seconds": 1.0, "best_step": 11}
    run = bx.Solution(None, None, None, bx.RESULTS.success, HISTORY, None, stats)
    figure = bx.plots.dashboard(run)
    assert figure.legends[0].get_texts()[0].get_text() == "kept step"
    marked = [
        list(line.get_xdata())
        for line in figure.axes[0].get_lines()
        if line.get_label().startswith("_")
    ]
    assert marked[0] == [1, 1]


def test_a_log_draws_as_its_run(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(
        "".join(
            json.dumps({"step": i + 5, "value": v, "x": None}) + "\n"
            for i, v in enumerate([2.0, 1.0])
        )
    )
    (ax,) = bx.plots.dashboard(path).axes[:1]
    np.testing.assert_array_equal(lines(ax)["outer"].get_xdata(), [5, 6])


def test_runs_over_cost():
    ax = bx.plots.runs({"a": HISTORY, "b": HISTORY}, cost="hvps")
    np.testing.assert_array_equal(lines(ax)["b"].get_xdata(), [4, 6, 7])
    with pytest.raises(KeyError, match="loss"):
        bx.plots.runs({"a": HISTORY}, "loss")


@pytest.mark.parametrize(
    ("run", "error"), [(3, TypeError), ({}, ValueError), ({"value": []}, ValueError)]
)
def test_refusals(run, error):
    with pytest.raises(error, match="run: got"):
        bx.plots.dashboard(run)


def test_a_front_leaves_out_what_is_dominated():
    rng = np.random.default_rng(0)
    points = rng.random((40, 2))
    by_hand = [not any((q <= p).all() and (q < p).any() for q in points) for p in points]
    np.testing.assert_array_equal(bx.plots.undominated(points), by_hand)
    ax = bx.plots.front({"mine": points}, labels=("loss", "gap"))
    assert len(ax.get_lines()[0].get_xdata()) == sum(by_hand) and ax.get_xlabel() == "loss"
