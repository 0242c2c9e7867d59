"""The judge of influence: does it predict what a training without some of the examples gives?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import check
from bilevax._core import numbers
from bilevax._core.types import Key

_RESAMPLES = 1000  # of the bootstrap


class Score(NamedTuple):
    """How well scores predict.

    Attributes:
      correlation: Spearman's rank correlation between predicted and retrained quantities over the
        subsets, the mean over queries.
      standard_error: of it, by resampling the subsets.
      predicted: by the scores, ``[subsets]`` or ``[subsets, queries]``, up to a constant.
      retrained: what the retrainings gave, likewise.
      removed: which examples were left out, ``[subsets, examples]``.
    """

    correlation: float
    standard_error: float
    predicted: np.ndarray
    retrained: np.ndarray
    removed: np.ndarray


def linear_datamodeling_score(
    scores: Any,
    retrain: Callable[[jax.Array], Any],
    key: Key,
    *,
    subsets: int = 50,
    fraction: float = 0.5,
) -> Any:
    """Retrain without random subsets, and correlate what came out with what the scores predict.

    The prediction for a subset is minus the sum of the scores of what is left out. Ranks are
    correlated, since most methods have no scale. 1 is a perfect prediction of the order, 0 none.

    Args:
      scores: ``[examples]``, ``[queries, examples]``, an `Influence`, or a dict of those by name,
        which share the retrainings.
      retrain: the measured quantity of trainings with given weights: ``[subsets, examples]`` of
        zeros and ones to ``[subsets]`` or ``[subsets, queries]``. For a `training`: ``lambda
        weights: jax.vmap(quality)(train.retrain(weights))``.
      key: decides what is left out.
      subsets: how many, at least 4.
      fraction: the part of the examples that is left out each time, between 0 and 1.

    Returns:
      A `Score`, or a dict of them.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, bilevax as bx
      >>> data = jax.random.normal(jax.random.key(0), (20,))
      >>> losses = lambda w, rows: 0.5 * (w - rows) ** 2
      >>> train = bx.attribution.training(
      ...     losses, optax.sgd(0.5), jnp.float32(0.0), data, [list(range(20))] * 30
      ... )
      >>> exact = bx.attribution.metagradient(train, lambda w, _: w)
      >>> judged = bx.attribution.linear_datamodeling_score(
      ...     {"metagradient": exact, "nothing": jnp.arange(20.0)},
      ...     train.retrain,
      ...     jax.random.key(1),
      ...     fraction=0.2,
      ... )
      >>> judged["metagradient"].correlation > 0.9, judged["nothing"].correlation < 0.5
      (True, True)

    Source: Park et al., "TRAK: attributing model behavior at scale" (ICML 2023), definition 2.4.
    """
    numbers.key(key)
    count = numbers.count(subsets, "subsets", least=4)
    part = numbers.positive(fraction, "fraction", upper=1.0)
    numbers.function(retrain, "retrain", "(weights) -> measured")
    named = scores if isinstance(scores, dict) else {"": scores}
    for name, value in named.items():
        given = getattr(value, "scores", value)
        if given is None or isinstance(given, dict):
            raise TypeError(
                f"scores: got {check.describe(given)}; expected an Influence or arrays."
            )
        place = f"scores[{name!r}]" if name else "scores"
        numbers.arrays(given, place)
        if np.iscomplexobj(given):
            raise TypeError(f"{place}: got {check.describe(given)}; expected real numbers.")
    arrays = {
        name: np.asarray(getattr(value, "scores", value), np.float64)
        for name, value in named.items()
    }
    lengths = {array.shape[-1] for array in arrays.values() if array.ndim in (1, 2)}
    if len(lengths) != 1 or any(array.ndim not in (1, 2) for array in arrays.values()):
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        raise ValueError(
            f"scores: got shapes {shapes}; expected [examples] or [queries, examples], the same "
            "examples in all."
        )
    examples = lengths.pop()
    left_out = max(1, round(part * examples))
    keys = jax.random.split(key, count)
    removed = np.asarray(jax.vmap(lambda k: jax.random.permutation(k, examples) < left_out)(keys))
    retrained = np.asarray(retrain(jnp.asarray(~removed, jnp.float32)), np.float64)
    if retrained.ndim not in (1, 2) or retrained.shape[0] != count:
        raise ValueError(
            f"retrain: returned {list(retrained.shape)}; expected [{count}], a value a subset, or "
            f"[{count}, queries]."
        )
    out = {
        name: _judged(-removed.astype(np.float64) @ array.T, retrained, removed)
        for name, array in arrays.items()
    }
    return out if isinstance(scores, dict) else out[""]


def _judged(predicted: np.ndarray, retrained: np.ndarray, removed: np.ndarray) -> Score:
    if predicted.shape != retrained.shape:
        raise ValueError(
            f"scores: predict {list(predicted.shape)} where retrain gave {list(retrained.shape)}; "
            "expected the same queries."
        )
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(predicted), (_RESAMPLES, len(predicted)))
    spread = np.std([rank_correlation(predicted[draw], retrained[draw]) for draw in draws], ddof=1)
    return Score(
        rank_correlation(predicted, retrained), float(spread), predicted, retrained, removed
    )


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, over the first axis; the mean over the others. Of a constant: 0."""
    a, b = (x.reshape(len(x), -1) for x in (a, b))
    return float(np.mean([_pearson(_ranks(x), _ranks(y)) for x, y in zip(a.T, b.T, strict=True)]))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norms = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norms) if norms > 0 else 0.0


__all__ = ["Score", "linear_datamodeling_score"]
