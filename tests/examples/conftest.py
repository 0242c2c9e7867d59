"""How the examples' own functions are tested: loaded by name, run as scripts run."""

import importlib.util
import sys
from pathlib import Path

import jax
import pytest

SYSTEMS = Path(__file__).resolve().parents[2] / "examples" / "systems"


@pytest.fixture
def as_run():
    """As a script is run: single precision, no strictness."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@pytest.fixture(scope="module")
def load():
    """A system by name, or an example of a folder beside them; a recipe has the name of a system."""
    pytest.importorskip("sklearn")
    before = list(sys.path)
    sys.path.insert(0, str(SYSTEMS.parent))

    def load(name, folder="."):
        spec = importlib.util.spec_from_file_location(
            f"systems_{name}", SYSTEMS / folder / f"{name}.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path[:] = before
