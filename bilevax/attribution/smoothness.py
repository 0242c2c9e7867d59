"""Whether a metagradient says what a finite change does: the metasmoothness of a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevax import check, tree
from bilevax._core import numbers
from bilevax.base import PyTree

ADVICE = (
    "eps_root of Adam and its like: 1e-8 or 1e-6 in place of 0, at a price in loss when larger",
    "a normalisation before each activation and not after it",
    "average pooling in place of max pooling",
    "a smaller scale of the last layer's output (harmful in large language models)",
    "a larger batch",
    "a wider model",
    "no dropout while training",
)


class Smoothness(NamedTuple):
    """How smooth a training is in what is varied.

    Attributes:
      score: between -1 and 1. Near 1 two equal changes in a row move nearly all of the parameters
        the same way, and a metagradient predicts finite changes; near 0 it predicts nothing.
      finite: whether the three trainings ended in finite parameters. A separate matter: an update
        without a derivative (Adam at a zero gradient without eps_root) can be smooth here and its
        metagradient NaN.
      moved: how far the first and the second change moved the parameters, relative to their norm.
      variants: the same for each variant that was tried.
      advice: where the score is below 0.9: the variant that helps most, if one does, and knobs that
        are known to help.
    """

    score: float
    finite: bool
    moved: tuple[float, float]
    variants: dict[str, Smoothness]
    advice: tuple[str, ...]

    @property
    def best(self) -> str | None:
        """The variant of the highest score among those that are finite, None where none is above
        this training's own.
        """
        found = {name: one.score for name, one in self.variants.items() if one.finite}
        name = max(found, key=lambda name: found[name], default=None)
        return name if name is not None and found[name] > self.score else None

    def table(self) -> str:
        """The scores as a Markdown table, this training first, a variant a row.

        Examples:
          >>> import jax.numpy as jnp, bilevax as bx
          >>> rough = lambda z: jnp.stack([z, 10 * jnp.cos(40.0 * z)])
          >>> found = bx.attribution.metasmoothness(
          ...     rough, jnp.array(1.0), jnp.array(1.0), variants={"no cosine": lambda z: z[None]}
          ... )
          >>> print(found.table())
          | training  | score | finite | first move | second move |
          | --------- | ----- | ------ | ---------- | ----------- |
          | as it is  | -0.15 | yes    |        2.5 |         2.4 |
          | no cosine |  1.00 | yes    |        0.1 |         0.1 |
          >>> found.best, found.advice[0]
          ('no cosine', 'no cosine: a score of 1.00 in place of -0.15')
        """
        return _table([("as it is", self), *self.variants.items()])


def metasmoothness(
    train: Callable[[PyTree], PyTree],
    at: PyTree,
    direction: PyTree,
    *,
    step: float = 0.1,
    variants: Mapping[str, Callable[[PyTree], PyTree]] | None = None,
) -> Smoothness:
    r"""Train at three points in a row, and compare the signs of the two changes.

    .. math::
        S = \sum_i w_i \,\mathrm{sign}(\Delta_{1i})\,\mathrm{sign}(\Delta_{2i}), \quad
        \Delta_1 = \theta_h - \theta_0,\; \Delta_2
        = \theta_{2h} - \theta_h,\; w \propto |\theta_{2h} - \theta_0|,\; \textstyle\sum_i w_i = 1

    Args:
      train: from what is varied (data weights, a rate, anything) to trained parameters. For a
        `training`: its ``retrain``.
      at: where, say weights of one.
      direction: which way, of the structure of `at`.
      step: h, how far, times `direction`.
      variants: other ways to train, by name, tried in turn at the same points: one knob of `advice`
        turned in each, say. Their parameters may be of another structure. What each costs in
        quality is for the caller to measure.

    Returns:
      A `Smoothness`, whose ``table()`` has a row a variant and whose ``best`` names one.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> losses = lambda w, rows: 0.5 * (w - rows) ** 2
      >>> train = bx.attribution.training(
      ...     losses, optax.sgd(0.5), jnp.float32(0.0), jnp.array([1.0, 3.0]), [[0, 1]] * 20
      ... )
      >>> bx.attribution.metasmoothness(train.retrain, jnp.ones(2), jnp.array([1.0, 0.0])).score
      1.0

    Source: Engstrom et al., "Optimizing ML training with metagradient descent" (arXiv 2503.13751),
    definition 1.
    """
    numbers.function(train, "train", "(varied) -> trained parameters")
    if variants is not None and not isinstance(variants, Mapping):
        raise TypeError(
            f"variants: got {check.describe(variants)}; expected functions by name, or None."
        )
    for name, other in (variants or {}).items():
        numbers.function(other, f"variants[{name!r}]", "(varied) -> trained parameters")
    h = numbers.positive(step, "step")
    at, direction = check.arrays(at, "at"), check.arrays(direction, "direction")
    check.same_structure(direction, at, "direction", "at")
    tried = {name: _measured(other, at, direction, h) for name, other in (variants or {}).items()}
    found = _measured(train, at, direction, h)
    found = found._replace(variants=tried)
    if found.score >= 0.9:
        return found
    best = found.best
    helps = (
        ()
        if best is None
        else (f"{best}: a score of {tried[best].score:.2f} in place of {found.score:.2f}",)
    )
    return found._replace(advice=helps + ADVICE)


def _measured(train: Callable[..., Any], at: PyTree, direction: PyTree, step: float) -> Smoothness:
    points = [tree.partition(train(tree.axpy(k * step, direction, at)))[0] for k in range(3)]
    start, middle, end = (_flat(point) for point in points)
    if not all(np.isfinite(point).all() for point in (start, middle, end)):
        return Smoothness(0.0, False, (math.nan, math.nan), {}, ())
    first, second, weights = middle - start, end - middle, np.abs(end - start)
    total = weights.sum()
    score = float((weights * np.sign(first) * np.sign(second)).sum() / total) if total > 0 else 0.0
    norm = np.linalg.norm(start) or 1.0
    moved = (float(np.linalg.norm(first) / norm), float(np.linalg.norm(second) / norm))
    return Smoothness(score, True, moved, {}, ())


def _table(rows: Sequence[tuple[str, Smoothness]]) -> str:
    cells = [["training", "score", "finite", "first move", "second move"]]
    cells += [
        [name, f"{one.score:.2f}", "yes" if one.finite else "no", *(f"{m:.2g}" for m in one.moved)]
        for name, one in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    put = (str.ljust, str.rjust, str.ljust, str.rjust, str.rjust)
    return "\n".join(
        "| " + " | ".join(p(c, w) for p, c, w in zip(put, line, widths, strict=True)) + " |"
        for line in cells
    )


def _flat(params: PyTree) -> np.ndarray:
    return np.concatenate(
        [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(params)]
    )


__all__ = ["Smoothness", "metasmoothness"]
