"""Soft choices that are learned by gradient: between operations, and of which weights to keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bilevax._core import numbers
from bilevax._core.types import Key
from bilevax.base import PyTree
from bilevax.nn._streams import streams


def soft_choice(
    logits: jax.Array,
    options: Sequence[Any],
    *,
    temperature: float = 1.0,
    key: Key | None = None,
    hard: bool = False,
) -> jax.Array:
    """A mixture of options, by softmax or by Gumbel noise.

    ``Σ_k p_k o_k`` with ``p = softmax((logits + noise) / temperature)``.

    Args:
      logits: ``(k,)``.
      options: k arrays of one shape.
      temperature: towards 0 the mixture becomes a choice.
      key: PRNG key: adds Gumbel noise, so that p is a sample and not a mean. None: plain softmax.
      hard: one option in the value, the mixture in the derivative (straight-through).

    Returns:
      An array of the options' shape.

    Raises:
      TypeError, ValueError: for another number of logits than options, or a temperature that is not
        positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import nn
      >>> nn.soft_choice(jnp.zeros(2), [jnp.array([0.0]), jnp.array([4.0])]).tolist()
      [2.0]

    Source: Liu, Simonyan and Yang, "DARTS" (ICLR 2019); Jang, Gu and Poole, "Categorical
    reparameterization with Gumbel-softmax" (ICLR 2017).
    """
    numbers.arrays(logits, "logits")
    temperature = numbers.positive(temperature, "temperature", example=1.0)
    hard = numbers.flag(hard, "hard")
    if (
        jnp.ndim(logits) != 1
        or not isinstance(options, (list, tuple, np.ndarray, jax.Array))
        or len(options) != len(logits)
    ):
        count = len(options) if isinstance(options, (list, tuple)) else numbers.describe(options)
        raise ValueError(
            f"logits: got {numbers.describe(logits)} for the options {count}; expected a logit an "
            "option, in one axis."
        )
    numbers.arrays(list(options), "options")
    if key is not None:
        numbers.key(key)
    noise = (
        jnp.zeros_like(logits)
        if key is None
        else jax.random.gumbel(key, logits.shape, logits.dtype)
    )
    p = jax.nn.softmax((logits + noise) / temperature)
    p = straight_through(jax.nn.one_hot(jnp.argmax(p), p.size, dtype=p.dtype), p) if hard else p
    return sum(p[k].astype(option.dtype) * option for k, option in enumerate(options))


class ArchParam(nnx.Param):  # type: ignore[type-arg]  # nnx looks at its base classes
    """Architecture parameters, so that ``wrt=nn.ArchParam`` finds them: ``nn.from_nnx(net,
    (nnx.Not(nn.ArchParam), nn.ArchParam))``.
    """


class SoftChoice(nnx.Module):
    """A layer that is a learned mixture of operations; see `soft_choice`.

    Args:
      operations: modules or functions of one argument, with outputs of one shape.
      temperature: as in `soft_choice`.
      gumbel: add Gumbel noise, in training mode.
      hard: straight-through, as in `soft_choice`.
      rngs: ``nnx.Rngs``; its stream ``gumbel``, or the default one, is drawn from.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from bilevax import nn
      >>> layer = nn.SoftChoice([nnx.relu, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.zeros_like])
      >>> layer(jnp.ones((4, 2))).shape, layer.chosen
      ((4, 2), 0)
      >>> net = nn.from_nnx(layer, wrt=(nnx.Not(nnx.OfType(nn.ArchParam)), nn.ArchParam))
    """

    def __init__(
        self,
        operations: Sequence[Callable[..., Any]],
        *,
        temperature: float = 1.0,
        gumbel: bool = False,
        hard: bool = False,
        rngs: nnx.Rngs | None = None,
    ):
        if not isinstance(operations, Sequence) or isinstance(operations, (str, bytes)):
            raise TypeError(
                f"operations: got {numbers.describe(operations)}; expected a list of functions."
            )
        if not operations:
            raise ValueError("operations: got none; expected at least one function.")
        for i, operation in enumerate(operations):
            numbers.function(operation, f"operations[{i}]", "(x) -> x")
        temperature = numbers.positive(temperature, "temperature", example=1.0)
        gumbel, hard = numbers.flag(gumbel, "gumbel"), numbers.flag(hard, "hard")
        rngs = None if rngs is None else streams(rngs)
        if gumbel and rngs is None:
            raise ValueError("rngs: got None with gumbel=True, which draws; expected nnx.Rngs.")
        self.operations = nnx.List(operations)
        self.logits = ArchParam(jnp.zeros(len(operations), jnp.float32))
        self.temperature, self.gumbel, self.hard, self.deterministic = (
            temperature,
            gumbel,
            hard,
            False,
        )
        self.rngs = rngs["gumbel"].fork() if gumbel and rngs is not None else None

    @property
    def chosen(self) -> int:
        """The operation with the largest weight."""
        return int(jnp.argmax(self.logits[...]))

    def __call__(self, x: jax.Array) -> jax.Array:
        key = None if self.rngs is None or self.deterministic else self.rngs()
        return soft_choice(
            self.logits[...],
            [op(x) for op in self.operations],
            temperature=self.temperature,
            key=key,
            hard=self.hard,
        )


# ---- masks


def straight_through(value: PyTree, surrogate: PyTree) -> PyTree:
    """`value`, with the derivative of `surrogate`.

    Args:
      value: pytree of arrays, such as rounded numbers.
      surrogate: pytree of the same structure, whose derivative stands in for that of `value`.

    Returns:
      A pytree equal to `value`.

    Raises:
      TypeError, ValueError: for what is no array, or other shapes.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from bilevax import nn
      >>> value, grad = jax.value_and_grad(lambda x: nn.straight_through(jnp.round(x), x**2))(0.7)
      >>> float(value), round(float(grad), 6)
      (1.0, 1.4)

    Source: Bengio, Léonard and Courville, "Estimating or propagating gradients through stochastic
    neurons" (arXiv 1308.3432).
    """
    for given, name in ((value, "value"), (surrogate, "surrogate")):
        numbers.arrays(given, name)
    shapes = [
        (jax.tree.structure(one), [jnp.shape(leaf) for leaf in jax.tree.leaves(one)])
        for one in (value, surrogate)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"value and surrogate: got {shapes[0]} and {shapes[1]}; expected one structure with "
            "the same shapes."
        )
    return jax.tree.map(lambda v, s: jax.lax.stop_gradient(v - s) + s, value, surrogate)


def mask(scores: PyTree, keep: float | None = None) -> PyTree:
    """Zeros and ones from scores, with the derivative of a sigmoid: ``m = 1[score > threshold]``.

    Args:
      scores: pytree of arrays, such as one like the parameters to prune.
      keep: the fraction of all entries that are kept, those of the largest scores over the whole
        tree. None: those above zero.

    Returns:
      A pytree of arrays of the scores' shapes. Multiply parameters by it,
      ``jax.tree.map(jnp.multiply, params, mask(scores, 0.1))``.

    Raises:
      ValueError: if `keep` is not a fraction.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import nn
      >>> nn.mask({"w": jnp.array([1.0, -2.0, 3.0, 0.5])}, keep=0.5)["w"].tolist()
      [1.0, 0.0, 1.0, 0.0]

    Source: Ramanujan et al., "What's hidden in a randomly weighted neural network?" (CVPR 2020);
    Zhang et al., "Advancing model pruning via bi-level optimization" (NeurIPS 2022).
    """
    numbers.arrays(scores, "scores")
    scores = jax.tree.map(jnp.asarray, scores)
    if not jax.tree.leaves(scores) or not all(
        jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(scores)
    ):
        raise TypeError(
            f"scores: got {numbers.describe(scores)}; expected a pytree of floating-point arrays."
        )
    if keep is None:
        return jax.tree.map(
            lambda s: straight_through((s > 0).astype(s.dtype), jax.nn.sigmoid(s)), scores
        )
    keep = numbers.positive(keep, "keep", upper=1.0)
    flat = jnp.sort(jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(scores)]))
    threshold = flat[flat.size - max(1, round(keep * flat.size))]
    return jax.tree.map(
        lambda s: straight_through((s >= threshold).astype(s.dtype), jax.nn.sigmoid(s)), scores
    )


__all__ = ["ArchParam", "SoftChoice", "mask", "soft_choice", "straight_through"]
