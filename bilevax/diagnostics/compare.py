"""Hypergradient methods side by side on one problem."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevax import check, linear, tree
from bilevax import hypergradient as methods_of
from bilevax._core import numbers
from bilevax._core.types import Key
from bilevax.base import Hypergradient, InnerSolver, PyTree
from bilevax.diagnostics import _reference
from bilevax.diagnostics.checking import compared, flat, prepare, reference_kind
from bilevax.results import RESULTS

COLUMNS = (
    "method",
    "cosine",
    "norm ratio",
    "relative error",
    "gradients",
    "HVPs",
    "mixed",
    "ms",
    "MiB",
)


class ComparisonRow(NamedTuple):
    """One method's line.

    Attributes:
      name: as given.
      cosine: of the angle to the reference.
      norm_ratio: ``‖grad‖ / ‖reference‖``.
      relative_error: ``‖grad − reference‖ / ‖reference‖``.
      gradients: the method's cost beyond the inner solve; None where it does not count.
      hvps: likewise.
      mixed_products: likewise.
      milliseconds: median of one call, solve included, compilation not.
      memory: bytes of temporaries of the compiled call; NaN where the backend does not tell.
      result: what the method itself said.
    """

    name: str
    cosine: float
    norm_ratio: float
    relative_error: float
    gradients: int | None
    hvps: int | None
    mixed_products: int | None
    milliseconds: float
    memory: float
    result: RESULTS


class HypergradientComparison(NamedTuple):
    """What `compare_hypergradients` found; printing it gives the table and the recommendation.

    Attributes:
      rows: a `ComparisonRow` for each method, in the order given.
      kind: of the reference.
      precision: of the reference.
      reference: the hypergradient that all are compared with, flat.
      solve_error: relative error of the exact adjoint at the solver's point: no implicit method
        does better at this inner accuracy.
      recommendation: which to take, and why.
    """

    rows: tuple[ComparisonRow, ...]
    kind: str
    precision: str
    reference: np.ndarray
    solve_error: float
    recommendation: str

    def row(self, name: str) -> ComparisonRow:
        """The line of the method of this name."""
        return next(row for row in self.rows if row.name == name)

    def _cells(self) -> list[tuple[str, ...]]:
        def count(value):
            return "" if value is None else str(value)

        return [
            (
                row.name,
                f"{row.cosine:.4f}",
                f"{row.norm_ratio:.3g}",
                f"{row.relative_error:.1e}",
                *(count(c) for c in (row.gradients, row.hvps, row.mixed_products)),
                f"{row.milliseconds:.3g}",
                "" if math.isnan(row.memory) else f"{row.memory / 2**20:.3g}",
            )
            for row in self.rows
        ]

    def to_markdown(self) -> str:
        """The table in Markdown."""
        lines = [
            COLUMNS,
            tuple("---" if i == 0 else "---:" for i in range(len(COLUMNS))),
            *self._cells(),
        ]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def __repr__(self) -> str:
        lines = [COLUMNS, *self._cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
        text = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        return "\n".join([*text, f"reference: {self.kind}, {self.precision}", self.recommendation])

    def plot(self, ax: Any = None) -> Any:
        """Error against time, a point a method; returns the matplotlib axes."""
        from bilevax import plots  # only here: what computes does not need what draws

        return plots.comparison(self, ax)


def default_methods(solver: InnerSolver, key: Key | None = None) -> dict[str, Hypergradient]:
    """The methods that `compare_hypergradients` takes when none are given: those that work with
    this solver.
    """
    out = {
        "implicit, CG": methods_of.implicit(
            linear.cg(maxiter=200, tol=1e-8), max_residual=math.inf
        ),
        "implicit, 5 CG": methods_of.implicit(linear.cg(maxiter=5), max_residual=math.inf),
        "implicit, 10 Neumann": methods_of.implicit(
            linear.neumann(terms=10), max_residual=math.inf
        ),
        "implicit, Nyström 10": methods_of.implicit(linear.nystrom(rank=10), max_residual=math.inf),
        "one step": methods_of.one_step(),
        "finite difference": methods_of.finite_difference(),
    }
    if solver.update is not None:
        out["SAMA"] = methods_of.sama()
    if solver.reversible:
        out["unrolled"] = methods_of.unrolled()
        if solver.steps > 1:
            out["unrolled, last half"] = methods_of.unrolled(last=max(1, solver.steps // 2))
    if solver.inverse_hessian is not None:
        out["SHINE"] = methods_of.shine(max_residual=math.inf)
    if key is not None:
        out["zeroth order, 16"] = methods_of.zeroth_order(samples=16)
    return out


def compare_hypergradients(
    inner_objective: Callable[..., Any],
    outer_objective: Callable[..., Any],
    inner_params: PyTree,
    outer_params: PyTree,
    *,
    solver: InnerSolver,
    methods: Mapping[str, Hypergradient | tuple[InnerSolver, Hypergradient]] | None = None,
    inner_batch: PyTree = None,
    outer_batch: PyTree = None,
    model_state: PyTree = None,
    reference: str = "auto",
    directions: int | None = None,
    repeats: int = 5,
    key: Key | None = None,
) -> HypergradientComparison:
    """Run several hypergradient methods on your problem, and compare accuracy, cost, time and
    memory.

    All start from `inner_params`, with batches and randomness frozen as in `check_hypergradient`,
    against one reference: the hypergradient at the exact lower-level solution. Timings are medians
    over interleaved calls.

    Args:
      inner_objective: ``g(inner_params, outer_params, batch) -> scalar``, or an `objective`.
      outer_objective: ``f(inner_params, outer_params, batch) -> scalar``, or an `objective`.
      inner_params: the solver's start. A point a few steps into training says more than a random
        one.
      outer_params: where to compare.
      solver: the `InnerSolver` to compare with.
      methods: name to `Hypergradient`, or to ``(solver, hypergradient)`` where one needs a solver
        of its own. None: those of the library that work with this solver, zeroth order only with a
        key.
      inner_batch: data of the inner objective.
      outer_batch: data of the outer objective.
      model_state: of a stateful inner objective.
      reference: "dense", "finite_difference" or "auto", as for `check_hypergradient`.
      directions: of finite differences, as there.
      repeats: timed calls of each method.
      key: PRNG key for keyed objectives and methods that draw.

    Returns:
      A `HypergradientComparison`; print it, ``to_markdown()``, ``plot()``, or read its ``rows``.

    Raises:
      TypeError, ValueError: for arguments that cannot work, and a method's own refusals.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> inner = lambda y, x, batch: jnp.sum(jnp.array([1.0, 2.0]) * (y - x) ** 2) / 2
      >>> outer = lambda y, x, batch: jnp.sum(y**2) / 2
      >>> methods = {
      ...     "implicit": bx.hypergradient.implicit(),
      ...     "unrolled": bx.hypergradient.unrolled(),
      ... }
      >>> solver = bx.inner.optax(optax.sgd(0.3), steps=30)
      >>> table = bx.compare_hypergradients(
      ...     inner, outer, jnp.zeros(2), jnp.ones(2), solver=solver, methods=methods, repeats=1
      ... )
      >>> [row.name for row in table.rows if row.cosine > 0.999]
      ['implicit', 'unrolled']

    Source: Grazzi et al., "On the iteration complexity of hypergradient computation" (ICML 2020),
    for the comparison of unrolled and implicit.
    """
    repeats = numbers.count(repeats, "repeats")
    numbers.choice(reference, "reference", ("auto", *_reference.KINDS))
    if directions is not None:
        directions = numbers.count(directions, "directions")
    if methods is None and not isinstance(solver, InnerSolver):
        raise TypeError(
            f"solver: got {numbers.shown(solver)}; expected an InnerSolver. Try "
            "inner.optax(optax.sgd(0.1), steps=10)."
        )
    chosen = (
        default_methods(solver, key)
        if methods is None and isinstance(solver, InnerSolver)
        else methods
    )
    if not isinstance(chosen, Mapping) or not chosen:
        raise TypeError(
            f"methods: got {numbers.describe(chosen)}; expected a mapping from names to "
            "Hypergradient methods, or None."
        )
    # By type: a Hypergradient is itself a named tuple.
    pairs: dict[str, Any] = {
        name: value if type(value) is tuple else (solver, value) for name, value in chosen.items()
    }
    for name, (own, method) in pairs.items():
        check.pieces(own, method, f"methods[{name!r}]", f"methods[{name!r}]")
    if reference == "solver":
        raise ValueError(
            "reference: got 'solver'; expected 'dense', 'finite_difference' or 'auto', since "
            "methods differ in what they see of it."
        )
    prepared = prepare(
        inner_objective,
        outer_objective,
        inner_params,
        outer_params,
        inner_batch,
        outer_batch,
        model_state,
        None,
        key,
    )
    kind = reference_kind(reference, tree.size(prepared.inner))

    compiled, results = {}, {}
    for name, pair in pairs.items():
        arguments = prepared.arguments(*pair)
        compiled[name] = (jax.jit(prepared.run(*pair)).lower(*arguments).compile(), arguments)
        results[name] = jax.block_until_ready(compiled[name][0](*arguments))
    times: dict[str, list[float]] = {name: [] for name in pairs}
    for _ in range(repeats):
        for name, (fn, arguments) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(fn(*arguments))
            times[name].append(time.perf_counter() - start)

    solution = next(
        (results[name][0] for name, pair in pairs.items() if pair[0] is solver),
        next(iter(results.values()))[0],
    )
    ref = _reference.reference(
        prepared.problem,
        solver,
        prepared.point(solution),
        kind,
        directions,
        jax.random.key(0) if key is None else key,
    )
    rows = []
    for name, (_, est) in results.items():
        score = compared(flat(est.grad), ref, numbers.rounding_unit(est.grad))
        gradients, hvps, mixed = (
            int(est.info[c]) if c in est.info else None
            for c in ("gradients", "hvps", "mixed_products")
        )
        analysis = compiled[name][0].memory_analysis()
        memory = math.nan if analysis is None else float(analysis.temp_size_in_bytes)
        milliseconds = 1e3 * float(np.median(times[name]))
        said = RESULTS(int(est.info["code"]))
        rows.append(
            ComparisonRow(
                name,
                score.cosine,
                score.norm_ratio,
                score.relative_error,
                gradients,
                hvps,
                mixed,
                milliseconds,
                memory,
                said,
            )
        )
    solve_error = compared(
        np.asarray(ref.at_point), ref, numbers.rounding_unit(prepared.outer)
    ).relative_error
    return HypergradientComparison(
        tuple(rows),
        kind,
        ref.precision,
        np.asarray(ref.grad),
        solve_error,
        _recommend(rows, solve_error),
    )


def _recommend(rows: list[ComparisonRow], solve_error: float) -> str:
    finite = [row for row in rows if math.isfinite(row.relative_error) and not row.result.failed]
    if not finite:
        return (
            "No method gave a usable hypergradient: run check_hypergradient on one of them for the "
            "causes."
        )
    best = min(finite, key=lambda row: row.relative_error)
    good = [row for row in finite if row.relative_error <= max(2 * best.relative_error, 1e-3)]
    fast = min(good, key=lambda row: row.milliseconds)
    small = min(good, key=lambda row: row.memory if math.isfinite(row.memory) else math.inf)
    said = [
        f"Take {fast.name!r}: the fastest ({fast.milliseconds:.3g} ms) among the most accurate "
        f"(relative error {fast.relative_error:.1e})."
    ]
    if small.name != fast.name and small.memory < 0.8 * fast.memory:
        said.append(
            f"If memory is short, {small.name!r} needs {small.memory / max(fast.memory, 1):.0%} of "
            "its temporaries."
        )
    cheap = [
        row for row in finite if row.cosine >= 0.9 and row.milliseconds < 0.7 * fast.milliseconds
    ]
    if cheap:
        rough = min(cheap, key=lambda row: row.milliseconds)
        share = rough.milliseconds / fast.milliseconds
        said.append(
            f"For a rough direction, {rough.name!r} takes {share:.0%} of the time at a cosine of "
            f"{rough.cosine:.3f}."
        )
    if solve_error > 0.1 and best.relative_error > 0.05:
        said.append(
            "The inner solve limits them all: at its point even an exact adjoint is off by "
            f"{solve_error:.1e}. More inner steps first."
        )
    failed = [row for row in rows if row.result.failed]
    if failed:
        said.append(f"Failed: {', '.join(f'{row.name} ({row.result.name})' for row in failed)}.")
    return " ".join(said)
