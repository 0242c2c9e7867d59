"""The Protocols, as a user's own type checker sees them: a right piece passes, a wrong one is pointed at."""

import subprocess
import sys

import pytest

pytest.importorskip("mypy")

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


def check(code: str, folder) -> str:
    file = folder / "user.py"
    file.write_text(code)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--follow-imports=silent", "--cache-dir", str(folder / "cache"), str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder).stdout


@pytest.mark.slow
def test_user_code(tmp_path):
    assert check(GOOD, tmp_path) == ""
    found = check(BAD, tmp_path)
    assert 'incompatible type "Callable[[InnerState], InnerState]"' in found and 'expected "int"' in found
