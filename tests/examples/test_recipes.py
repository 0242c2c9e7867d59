"""The recipes run as they stand, from step 0 on; here with few steps. Their own numbers are printed
by themselves."""

import importlib
import math
import sys
from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "recipes"

RECIPES = {
    "penalties": dict(steps=3),
    "weight_net": dict(steps=3),
    "reweight": dict(steps=3),
    "distillation": dict(steps=3),
    "schedule": dict(steps=2),
    "darts": dict(steps=3),
    "hypernetwork": dict(steps=5),
    "augmentation": dict(steps=3),
    "svm": dict(steps=2, across=2, starts=1),
    "dispatch": dict(steps=2, seeds=1),
    "fairness": dict(steps=2, seeds=1),
    "groups": dict(steps=3, seeds=1),
    **{f"maml_sinusoids/{form}": dict(form=form, steps=3, test=2) for form in
       ("maml", "maml_plus_plus", "anil", "meta_sgd")},
    **{f"maml_cheaper/{form}": dict(form=form, steps=3, test=2) for form in ("first_order",
    "imaml", "reptile")},
}  # fmt: skip
QUICK = (
    "schedule",
    "hypernetwork",
)  # tested on every change; CI runs the others in turn, and the slow tests all


@pytest.fixture(autouse=True)
def as_run():
    """As a script is run: single precision, no strictness, and the recipes' folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(FOLDER), *sys.path])
        with (
            jax.enable_x64(False),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
        ):
            yield


def test_every_recipe_is_here():
    names = {path.stem for path in FOLDER.glob("*.py")} - {"recipes", "maml_omniglot"}
    assert names == {name.split("/")[0] for name in RECIPES}


def test_recipes_are_short():
    longer = {"recipes", "dispatch", "fairness", "groups", "svm"}  # data and baselines of their own
    lines = {path.stem: len(path.read_text().splitlines()) for path in FOLDER.glob("*.py")}
    assert {name for name, count in lines.items() if count >= 60} <= longer


@pytest.mark.turns
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES],
)
def test_a_recipe_runs_and_prints_its_number(name, capsys):
    number = importlib.import_module(name.split("/")[0]).main(**RECIPES[name])
    assert math.isfinite(number) and any(c.isdigit() for c in capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_omniglot_runs_where_its_data_is(capsys):
    recipe = importlib.import_module("maml_omniglot")
    import data
    import omniglot_tasks

    try:
        omniglot_tasks.characters()
    except data.Unavailable:
        pytest.skip("Omniglot is not on this machine")
    assert 0 <= recipe.main(steps=2, test=1) <= 1
