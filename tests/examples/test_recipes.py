"""The recipes run as they stand, from step 0 on; here with few steps. Their own numbers are printed by themselves."""

import importlib
import math
import sys
from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "recipes"

RECIPES = {"schedule": dict(steps=2), "hypernetwork": dict(steps=5)}


@pytest.fixture(autouse=True)
def as_run():
    """As a script is run: single precision, no strictness, and the recipes' folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(FOLDER), *sys.path])
        with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield


def test_every_recipe_is_here():
    names = {path.stem for path in FOLDER.glob("*.py")} - {"recipes"}
    assert names == set(RECIPES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_and_prints_its_number(name, capsys):
    number = importlib.import_module(name).main(**RECIPES[name])
    assert math.isfinite(number) and any(c.isdigit() for c in capsys.readouterr().out)
