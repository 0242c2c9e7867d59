"""Networks that say what an example is worth, and what its label should be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from bilevax._core import numbers
from bilevax.nn._streams import streams


class WeightNet(nnx.Module):
    """A weight in (0, 1) for each example, from its loss and whatever else is known of it.

    ``w_i = σ(b + a' tanh(W [l_i, c_i]))``. It starts at a weight of a half everywhere, so that the
    first steps are ordinary training.

    Args:
      features: numbers that are known of an example besides its loss, such as a one-hot class.
      hidden: hidden units.
      rngs: ``nnx.Rngs``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from bilevax import nn
      >>> nn.WeightNet(rngs=nnx.Rngs(0))(jnp.array([0.1, 3.0])).tolist()
      [0.5, 0.5]
      >>> by_class = nn.WeightNet(10, rngs=nnx.Rngs(0))
      >>> by_class(jnp.array([0.1, 3.0]), jax.nn.one_hot(jnp.array([2, 7]), 10)).shape
      (2,)

    Source: Shu et al., "Meta-Weight-Net: learning an explicit mapping for sample weighting"
    (NeurIPS 2019).
    """

    def __init__(self, features: int = 0, hidden: int = 32, *, rngs: nnx.Rngs):
        features, rngs = numbers.count(features, "features", least=0), streams(rngs)
        self.hidden = nnx.Linear(1 + features, numbers.count(hidden, "hidden"), rngs=rngs)
        self.out = nnx.Linear(hidden, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, losses: jax.Array, features: jax.Array | None = None) -> jax.Array:
        """Weights ``(n,)`` from losses ``(n,)``, of which no gradient is taken, and features ``(n,
        d)``.
        """
        seen = jax.lax.stop_gradient(losses)[
            :, None
        ]  # a weight judges a loss; the model must not be trained to please it
        seen = (
            seen if features is None else jnp.concatenate([seen, features.astype(seen.dtype)], -1)
        )
        return jax.nn.sigmoid(self.out(jnp.tanh(self.hidden(seen)))[:, 0])


class LabelNet(nnx.Module):
    """Corrected labels: a distribution over classes for each example, from the label it has and
    what a model sees in it.

    ``p_i = softmax(c · onehot(y_i) + W₂ tanh(W₁ [z_i, onehot(y_i)]))``. It starts close to the
    labels as they are.

    Args:
      features: size of what is known of an example: a frozen embedding, or a model's logits.
      classes: number of classes.
      hidden: hidden units.
      trust: ``c``, how much the given labels count at first.
      rngs: ``nnx.Rngs``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from bilevax import nn
      >>> correct = nn.LabelNet(5, 3, rngs=nnx.Rngs(0))
      >>> correct(jnp.ones((2, 5)), jnp.array([0, 2])).argmax(-1).tolist()
      [0, 2]

    Source: Zheng, Awadallah and Dumais, "Meta label correction for noisy label learning" (AAAI
    2021).
    """

    def __init__(
        self, features: int, classes: int, hidden: int = 64, *, trust: float = 4.0, rngs: nnx.Rngs
    ):
        features, rngs = numbers.count(features, "features"), streams(rngs)
        classes, hidden = numbers.count(classes, "classes"), numbers.count(hidden, "hidden")
        self.classes, trust = classes, numbers.real(trust, "trust", 4.0)
        self.trust = nnx.Param(jnp.full((), trust, jnp.float32))
        self.hidden = nnx.Linear(features + classes, hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, classes, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, features: jax.Array, labels: jax.Array) -> jax.Array:
        """Probabilities ``(n, classes)`` from features ``(n, d)`` and integer labels ``(n,)``."""
        given = jax.nn.one_hot(labels, self.classes, dtype=features.dtype)
        change = self.out(
            jnp.tanh(self.hidden(jnp.concatenate([jax.lax.stop_gradient(features), given], -1)))
        )
        return jax.nn.softmax(self.trust[...].astype(given.dtype) * given + change)


__all__ = ["LabelNet", "WeightNet"]
