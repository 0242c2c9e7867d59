"""``python -m bilevax doctor`` prints all of its report, and looks at a problem of one's own."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from bilevax.__main__ import main
from tests.readers import as_reader

PROBLEMS = """
import jax, jax.numpy as jnp

curvature = jnp.array([1.0, 4.0, 100.0])

def made(inner, start=jnp.array([0.3, -0.7, 0.4])):
    return dict(inner_objective=inner, outer_objective=lambda y, x, batch: jnp.sum(y**2), inner_params=start, outer_params=jnp.ones(3))

def convex():
    return made(lambda y, x, batch: 0.5 * jnp.sum(curvature * (y - x) ** 2))

def saddle():
    return made(lambda y, x, batch: 0.5 * jnp.sum(jnp.array([1.0, -2.0, 3.0]) * y**2) + jnp.sum(x * y))

def kink():
    return made(lambda y, x, batch: jnp.sum(jnp.abs(y)) + 0.5 * jnp.sum((y - x) ** 2), jnp.array([1e-4, 1e-4, 1e-4]))

def deaf():
    return made(lambda y, x, batch: jnp.sum(y**2))

def from_zero():
    return made(lambda y, x, batch: jnp.sum((y - 1) ** 2) + jnp.sum(jnp.exp(x) * y**2), jnp.zeros(3))

def nothing():
    return {}
"""


def test_doctor_prints_versions_settings_and_a_right_hypergradient(capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "JAX_DEBUG_NANS", "somehow")
    with jax.default_matmul_precision("highest"):
        assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"jax {jax.__version__}\n" in printed
    assert f"jax_enable_x64: {jax.config.jax_enable_x64}\n" in printed
    assert "jax_default_matmul_precision: highest\n" in printed
    assert "JAX_DEBUG_NANS=somehow\n" in printed
    assert "as it should be" in printed and "WRONG" not in printed


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "convex",
            [
                "1 to 100, condition about 1.0e+02, none negative",
                "changes smoothly",
                "below 0.02",
                "implicit(linear.cg())",
            ],
        ),
        ("saddle", ["-2 to 3", "NEGATIVE", "take: hypergradient.unrolled()"]),
        ("kink", ["JUMPS", "fixed_point"]),
        ("deaf", ["a hypergradient through it is zero"]),
        ("from_zero", ["none negative", "take: hypergradient."]),
    ],
)
def test_a_problem_of_ones_own(name, said, tmp_path, capsys, monkeypatch):
    (tmp_path / f"problems_{name}.py").write_text(PROBLEMS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with as_reader(tmp_path):
        assert main(["doctor", "--problem", f"problems_{name}:{name}"]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in said), printed


def test_the_command_line_itself(tmp_path):
    (tmp_path / "mine.py").write_text(PROBLEMS)
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "bilevax", "doctor", "--problem", "mine:deaf"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "a hypergradient through it is zero" in done.stdout


@pytest.mark.parametrize(
    "where", ["mine", "no_such_module:f", "mine_too:nothing", "mine_too:absent"]
)
def test_a_problem_that_is_none_is_refused(where, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine_too.py").write_text(PROBLEMS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with as_reader(tmp_path):
        assert main(["doctor", "--problem", where]) == 2
    assert "Error: " in capsys.readouterr().err
