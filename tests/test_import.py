"""Importing bilevax is quiet, light and quick."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bilevax

# Heavy or optional: imported by the one module that needs each, when it is first used.
LAZY = [
    "jaxopt",
    "matplotlib",
    "orbax",
    "tqdm",
    "sklearn",
    "optimistix",
    "lineax",
    "pandas",
    "torch",
    "tensorflow",
]


def _python(code: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""},  # or each would compile the sources anew
    )
    assert done.returncode == 0, done.stderr
    return done


def test_import_is_quiet():
    done = _python(
        "import jax, optax\nimport sys; sys.stderr.flush(); print('MARK', file=sys.stderr, "
        "flush=True)\nimport bilevax"
    )
    assert done.stdout == ""
    # What jax and optax themselves warn of comes before the mark and is theirs.
    assert done.stderr.split("MARK\n", 1)[1] == ""


def test_import_is_lazy():
    done = _python(
        "import sys, jax, optax; before = set(sys.modules); import bilevax; print([m for m in "
        f"{LAZY} if m in set(sys.modules) - before])"
    )
    assert done.stdout.strip() == "[]"


def test_import_starts_no_backend():
    done = _python(
        "import bilevax, jax._src.xla_bridge as bridge; print(bridge.backends_are_initialized())"
    )
    assert done.stdout.strip() == "False"


def test_import_leaves_configuration_alone():
    code = (
        "import jax, optax; before = dict(jax.config.values); import bilevax; "
        "print(dict(jax.config.values) == before)"
    )
    assert _python(code).stdout.strip() == "True"


def test_nothing_of_jax_is_imported_by_the_first_call():
    """What a part of jax adds to its configuration makes every program compiled before compile
    again."""
    code = (
        "import sys, jax.numpy as jnp, bilevax as bx\n"
        "f = lambda y, x, b: jnp.sum((y - x) ** 2)\n"
        "fn = bx.value_and_hypergrad(f, f, solver=bx.inner.lbfgs(), "
        "hypergradient=bx.hypergradient.implicit())\n"
        "before = set(sys.modules)\n"
        "fn(jnp.zeros(2), jnp.ones(2))\n"
        "print(sorted(m for m in set(sys.modules) - before if m.startswith('jax.e')))"
    )
    assert _python(code).stdout.strip() == "[]"


@pytest.mark.turns
def test_import_costs_little():
    """Under 0.3 s more than importing jax and optax: the least of five fresh processes, since other
    work on the machine only adds.

    Processor time, which is the wall clock's on an idle machine. Up to half of it is one garbage
    collection of what jax has built before.
    """
    code = (
        "import time, jax, optax; start = time.process_time(); import bilevax; "
        "print(time.process_time() - start)"
    )
    seconds = [float(_python(code).stdout) for _ in range(5)]
    assert min(seconds) < 0.3, seconds


def test_version():
    """The package and its metadata name one version."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())[
        "project"
    ]
    assert bilevax.__version__ == project["version"]
