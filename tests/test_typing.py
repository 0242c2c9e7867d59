"""Types: the package's own functions have them; a user's checkers accept what the documentation
shows, and point at what is wrong."""

import ast
import doctest
import importlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.test_public import SPACES

ROOT = Path(__file__).resolve().parents[1]

GOOD = """
from typing import Any
import jax
import bilevax as bx
from bilevax.base import Ctx, Feed, Hypergradient, InnerSolver, InnerState, LinearInfo, LinearSolver, Lower, Objective

def step(objective: Objective, state: InnerState, outer: Any, ctx: Ctx) -> tuple[InnerState, dict[str, Any]]:
    return state, {}

def init(params: Any) -> Any:
    return ()

solver = InnerSolver(init=init, step=step, steps=3)

def linear(matvec: Any, b: Any, x0: Any) -> tuple[Any, LinearInfo]:
    return b, LinearInfo(0, 0.0, 0)

known: LinearSolver = linear
method: Hypergradient = bx.hypergradient.implicit(known)
solution: bx.Solution = bx.solve_bilevel(lambda y, x, b: y, lambda y, x, b: y, 0.0, 0.0, num_steps=3)
reached: bool = solution.result.failed
watched = bx.solve_bilevel(
    lambda y, x, b: y, lambda y, x, b: y, 0.0, 0.0, tol=1e-3,
    callbacks=[bx.callbacks.early_stopping("value", patience=5), bx.callbacks.every(10, lambda event: None), print],
)
own: LinearSolver = bx.base.Linear(linear, products=3)
given = bx.hypergradient.implicit(bx.base.Linear(linear, products=3))
"""

BAD = """
from typing import Any
from bilevax.base import InnerSolver, InnerState

def init(params: Any) -> Any:
    return ()

def step(state: InnerState) -> InnerState:
    return state

solver = InnerSolver(init=init, step=step, steps="three")
"""


# ---- the package


def test_functions_of_modules_and_classes_are_annotated():
    """Those inside functions are traced on whatever surrounds them, and are left to inference."""

    def bare(body, where):
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from bare(node.body, f"{where}.{node.name}")
            elif isinstance(node, ast.FunctionDef):
                given = node.args
                named = [
                    *given.posonlyargs,
                    *given.args,
                    *given.kwonlyargs,
                    given.vararg,
                    given.kwarg,
                ]
                untyped = [
                    a.arg
                    for a in named
                    if a is not None and a.annotation is None and a.arg not in ("self", "cls")
                ]
                if untyped or (node.returns is None and node.name != "__init__"):
                    yield f"{where}.{node.name}: {untyped or 'returns'}"

    found = [
        line
        for path in sorted((ROOT / "bilevax").rglob("*.py"))
        for line in bare(ast.parse(path.read_text()).body, path.stem)
    ]
    assert not found, "\n".join(found)


# ---- a user's script


def mypy(file: Path) -> str:
    pytest.importorskip("mypy")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--no-error-summary",
        "--follow-imports=silent",
        "--ignore-missing-imports",
    ]
    command += ["--cache-dir", str(file.parent / "cache"), str(file)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=file.parent, env=paths()
    ).stdout


def pyright(file: Path) -> str:
    pytest.importorskip("pyright")
    settings = {
        "include": [str(file)],
        "extraPaths": [str(ROOT)],
        "pythonVersion": "3.11",
        "reportMissingImports": "warning",
    }
    (file.parent / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [
        sys.executable,
        "-m",
        "pyright",
        "-p",
        str(file.parent),
        "--pythonpath",
        sys.executable,
    ]
    said = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=file.parent
    ).stdout
    return "\n".join(line for line in said.splitlines() if "error:" in line)


def paths() -> dict[str, str]:
    return {**os.environ, "MYPYPATH": str(ROOT)}


def documented() -> str:
    """The examples of all public names, each in a function."""
    seen, out = set(), []

    def add(value, name):
        examples = doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")
        if id(value) in seen or not examples:
            return
        seen.add(id(value))
        body = "".join(example.source for example in examples)
        out.append(f"def example_{len(out)}() -> None:  # {name}\n{textwrap.indent(body, '    ')}")
        if inspect.isclass(value):
            for key, method in vars(value).items():
                if not key.startswith("_") and inspect.isfunction(method):
                    add(method, f"{name}.{key}")

    for space in ("", *SPACES):
        module = importlib.import_module(f"bilevax.{space}".rstrip("."))
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.ismodule(value):
                add(value, f"{space}.{name}".lstrip("."))
    assert len(out) > 100
    return "\n\n".join(out)


@pytest.mark.slow
@pytest.mark.parametrize("checker", [mypy, pyright])
def test_user_code(checker, tmp_path):
    for name, code in {"good": GOOD, "documented": documented()}.items():
        (tmp_path / f"{name}.py").write_text(code)
        assert checker(tmp_path / f"{name}.py") == ""
    (tmp_path / "bad.py").write_text(BAD)
    found = checker(tmp_path / "bad.py")
    assert (
        "InnerState" in found and "steps" in found
        if checker is pyright
        else 'expected "int"' in found
    )
    assert found.count("error:") >= 2
