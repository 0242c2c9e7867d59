"""A finished run in words, in the order in which to read it."""

from __future__ import annotations

from typing import Any

import numpy as np

# What a number says of the hypergradient, and from where on it says that it is rough.
_TRUST = (
    ("inner gradient", "inner_grad_norm", "how far the lower level was from solved"),
    (
        "adjoint residual",
        "adjoint_residual",
        "how far the linear system was from solved; small is below 1e-2",
    ),
    ("error bound", "error_bound", "on the hypergradient"),
)
_WIDTH = 20


def summary(solution: Any) -> str:
    """A line a point; what the history does not have is left out."""
    history, stats = solution.history, solution.stats
    algorithm = f" of {stats['algorithm']}" if stats.get("algorithm") else ""
    lines = [
        _line(
            "result",
            f"{solution.result.name}, {stats['steps']} steps{algorithm} in {stats['seconds']:.3g} "
            "s",
        )
    ]
    values = _seen(history, "value")
    if values is not None:
        kept = stats["best_step"]
        returned = f"that of step {kept}" if 0 <= kept < stats["total_steps"] else "the last"
        lines.append(_line("value", f"{values[0]:.4g} -> {values[-1]:.4g}; returned is {returned}"))
    norms = _seen(history, "grad_norm")
    if norms is not None:
        ratio = f", {norms[-1] / norms[0]:.1e} of the first" if norms[0] > 0 else ""
        lines.append(_line("hypergradient", f"norm {norms[0]:.3g} -> {norms[-1]:.3g}{ratio}"))
    for called, column, meaning in _TRUST:
        found = _seen(history, column)
        if found is not None:
            lines.append(
                _line(
                    called,
                    f"{found[0]:.1e} -> {found[-1]:.1e}, at most {found.max():.1e} ({meaning})",
                )
            )
    for code, count in solution.warnings.items():
        lines.append(
            _line(
                "warning",
                f"{code.name} in {count} of {stats['steps']} steps: "
                f"{_first_sentence(code.message)}",
            )
        )
        advice = _advice(code.message)
        if advice:
            lines.append(_line("", advice))
    if stats.get("failed_steps"):
        lines.append(_line("failed steps", str(stats["failed_steps"])))
    if solution.result.failed:
        lines.append(_line("what to do", solution.result.message))
    return "\n".join(lines)


def _line(called: str, text: str) -> str:
    return f"{called:<{_WIDTH}}{text}"


def _seen(history: dict[str, Any], column: str) -> np.ndarray | None:
    """The finite entries of a column; None without any."""
    if column not in history:
        return None
    values = np.asarray(history[column], np.float64)
    values = values[np.isfinite(values)]
    return values if len(values) else None


def _advice(message: str) -> str:
    """The sentence that says what to try."""
    return next((f"Try {part.rstrip('.')}." for part in message.split(" Try ")[1:]), "")


def _first_sentence(message: str) -> str:
    return message.split(". ")[0].rstrip(".") + "."
