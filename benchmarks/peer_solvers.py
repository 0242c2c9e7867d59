"""The solver classes of a checkout of benchopt/benchmark_bilevel, run without its command line:
what `solvers.py --peer` puts beside ours."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SOLVERS = ("soba", "saba", "srba", "amigo", "stocbio", "mrbo", "bsa", "ttsa", "fsla", "sustain")


class Run(NamedTuple):
    """As in `solvers.py`."""

    start: Callable
    advance: Callable


def _stand_in() -> None:
    """What the solvers take of benchopt itself, where that is not installed: a base class and two
    names."""
    try:
        importlib.import_module("benchopt")
    except ModuleNotFoundError:
        package, criteria = (
            types.ModuleType("benchopt"),
            types.ModuleType("benchopt.stopping_criterion"),
        )
        package.BaseSolver = type("BaseSolver", (), {})
        package.safe_import_context = contextlib.nullcontext
        criteria.SufficientProgressCriterion = lambda **_: None
        sys.modules |= {"benchopt": package, "benchopt.stopping_criterion": criteria}


class Peer(NamedTuple):
    """Their classes by our names."""

    classes: dict[str, Any]

    def has(self, name: str) -> bool:
        return name in self.classes

    def make(self, task, name: str, step: float, ratio: float, block: int) -> Run:
        """One of their solvers on a task, in blocks of `block` steps."""
        return self.maker(task, name, block)(step, ratio)

    def maker(self, task, name: str, block: int) -> Callable[[float, float], Run]:
        """From a step size and a ratio to a `Run`; all of them share one compiled program, since
        theirs takes step sizes as values."""
        cls = self.classes[name]
        solver = cls()
        for key, values in cls.parameters.items():
            setattr(solver, key, values[0])
        solver.batch_size, solver.eval_freq = task.batch, block
        solver.run_once = lambda *_: None  # their warm-up goes through benchopt
        sizes = [len(next(iter(data.values()))) for data in (task.inner_data, task.outer_data)]
        functions = [_sliced(task.inner, task.inner_data), _sliced(task.outer, task.outer_data)]
        solver.set_objective(*functions, *sizes, task.y, task.x)

        def advance(state):
            carry, done = state
            if name == "saba":
                carry = solver.one_epoch(carry[1], carry[0], block)
                point = carry[1]
            elif name == "srba":
                point = carry = solver.one_epoch(carry, block, done)
            else:
                point = carry = solver.one_epoch(carry, block)
            jax.block_until_ready(carry)
            return (
                (carry, done + block),
                point["inner_var"],
                point["outer_var"],
                _calls(name, solver) * block,
            )

        def at(step: float, ratio: float) -> Run:
            def start():
                solver.step_size, solver.outer_ratio = step, ratio
                return solver.init(), 0

            return Run(start, advance)

        return at


def _sliced(objective: Callable, data: dict) -> Callable:
    """An objective of theirs: it slices its batch out of arrays that it holds."""
    arrays = jax.tree.map(jnp.asarray, data)

    @functools.partial(jax.jit, static_argnames="batch_size")
    def f(inner_var, outer_var, start=0, batch_size=1):
        batch = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, batch_size), arrays)
        return objective(inner_var, outer_var, batch)

    return f


def _calls(name: str, solver) -> float:
    """Oracle calls of one of their steps, counted as ours are; full refreshes spread over their
    period."""
    terms, inner = (
        getattr(solver, "n_shia_steps", getattr(solver, "n_hia_steps", 10)),
        getattr(solver, "n_inner_steps", 1),
    )
    if name == "srba":
        batches = (solver.n_inner_samples + solver.n_outer_samples) / solver.batch_size
        return 8 + 2 * batches / max(int(batches * solver.period_frac), 1)
    table = {
        "amigo": 2 * inner + 2,
        "stocbio": inner + terms + 2,
        "mrbo": 2 * terms + 6,
        "sustain": 2 * terms + 6,
        "bsa": inner + terms + 1,
    }
    return table.get(name, {"ttsa": terms + 2, "fsla": 7}.get(name, 4))


def load(path: Path) -> Peer:
    """Their solver classes.

    Args:
      path: a checkout of github.com/benchopt/benchmark_bilevel.

    Raises:
      FileNotFoundError: if `path` holds no such checkout.
    """
    path = Path(path).resolve()
    if not (path / "benchmark_utils" / "stochastic_jax_solver.py").is_file():
        raise FileNotFoundError(
            f"--peer: got {path}; expected a checkout of github.com/benchopt/benchmark_bilevel."
        )
    _stand_in()
    sys.path.insert(0, str(path))
    files = {name: path / "solvers" / f"{name}.py" for name in SOLVERS}
    return Peer(
        {name: _module(name, file).Solver for name, file in files.items() if file.is_file()}
    )


def _module(name: str, file: Path) -> Any:
    """A module by its file: the name of their folder is that of a script here."""
    spec = importlib.util.spec_from_file_location(f"peer_{name}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"--peer: {file} cannot be read as a module.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
