"""Small trainable parts for large frozen models: low-rank adapters with gated ranks, and
prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bilevax import check
from bilevax._core import numbers
from bilevax.nn._streams import streams
from bilevax.nn.net import Paths


class GateParam(nnx.Param):  # type: ignore[type-arg]  # nnx looks at its base classes
    """Rank gates, so that ``wrt=nn.GateParam`` finds them."""


class LoRALinear(nnx.Module):
    """A linear layer with a low-rank change whose ranks are gated.

    ``y = base(x) + x A diag(gate(c)) B``, with B zero at first, so that nothing changes.

    Args:
      base: the layer, called as it is.
      features: its inputs and outputs.
      rank: components.
      gate: from the logits ``c`` to the components' factors. A softmax shares one unit among them.
      rngs: ``nnx.Rngs``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from bilevax import nn
      >>> layer = nn.LoRALinear(
      ...     nnx.Linear(3, 2, rngs=nnx.Rngs(0)), (3, 2), rank=4, rngs=nnx.Rngs(1)
      ... )
      >>> layer.gates.tolist()
      [0.25, 0.25, 0.25, 0.25]
      >>> nn.from_nnx(layer, wrt=(nnx.LoRAParam, nn.GateParam))
      Net(24 learned numbers)

    Source: Hu et al., "LoRA" (ICLR 2022); Zhang et al., "AutoLoRA" (NAACL 2024, arXiv 2403.09113),
    for the gates.
    """

    def __init__(
        self,
        base: Callable[..., Any],
        features: tuple[int, int],
        rank: int,
        *,
        gate: Callable[..., Any] = jax.nn.softmax,
        rngs: nnx.Rngs,
    ):
        numbers.function(base, "base", "(x) -> x")
        numbers.function(gate, "gate", "(logits) -> gates")
        if not (isinstance(features, (list, tuple)) and len(features) == 2):
            raise TypeError(
                f"features: got {check.describe(features)}; expected two sizes, (inputs, outputs)."
            )
        inputs, outputs = (numbers.count(one, f"features[{i}]") for i, one in enumerate(features))
        rank, rngs = numbers.count(rank, "rank"), streams(rngs)
        self.base, self.gate = base, gate
        self.a = nnx.LoRAParam(
            jax.random.normal(rngs.params(), (inputs, rank), jnp.float32) * inputs**-0.5
        )
        self.b = nnx.LoRAParam(jnp.zeros((rank, outputs), jnp.float32))
        self.logits = GateParam(jnp.zeros(rank, jnp.float32))

    @property
    def gates(self) -> jax.Array:
        """Factors of the components, ``(rank,)``."""
        return self.gate(self.logits[...])

    def __call__(self, x: jax.Array) -> jax.Array:
        gated = self.a[...] * self.gates[None]
        return self.base(x) + (x @ gated.astype(x.dtype)) @ self.b[...].astype(x.dtype)


def add_lora(
    model: nnx.Module,
    chosen: Callable[[tuple[Any, ...], nnx.Module], bool] | Paths,
    rank: int,
    *,
    gate: Callable[..., Any] = jax.nn.softmax,
    rngs: nnx.Rngs,
) -> int:
    """Put a `LoRALinear` in the place of chosen ``nnx.Linear`` layers of a model, in place.

    Args:
      model: an nnx module.
      chosen: a predicate ``(path, layer) -> bool``, such as `paths`.
      rank: components of each.
      gate: as in `LoRALinear`.
      rngs: ``nnx.Rngs``.

    Returns:
      How many layers were changed.

    Raises:
      ValueError: if none was.

    Examples:
      >>> from flax import nnx
      >>> from bilevax import nn
      >>> model = nnx.Sequential(
      ...     nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      ... )
      >>> nn.add_lora(model, nn.paths("layers"), rank=2, rngs=nnx.Rngs(1))
      2
      >>> nn.from_nnx(model, wrt=(nnx.LoRAParam, nn.GateParam))
      Net(30 learned numbers)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model: got {check.describe(model)}; expected an nnx.Module.")
    numbers.function(chosen, "chosen", "(path, layer) -> bool")
    numbers.function(gate, "gate", "(logits) -> gates")
    rank, rngs = numbers.count(rank, "rank"), streams(rngs)
    found = [
        (path, layer)
        for path, layer in nnx.iter_graph(model)
        if isinstance(layer, nnx.Linear) and path and chosen(path, layer)
    ]
    if not found:
        names = [
            "/".join(map(str, path))
            for path, layer in nnx.iter_graph(model)
            if isinstance(layer, nnx.Linear)
        ]
        raise ValueError(
            f"chosen: {chosen!r} takes no nnx.Linear; expected at least one of {names[:8]}."
        )
    for path, layer in found:
        parent: Any = model
        for part in path[:-1]:
            parent = parent[part] if isinstance(part, int) else getattr(parent, str(part))
        changed = LoRALinear(
            layer, (layer.in_features, layer.out_features), rank, gate=gate, rngs=rngs
        )
        if isinstance(path[-1], int):
            parent[path[-1]] = changed
        else:
            setattr(parent, str(path[-1]), changed)
    return len(found)


class Prompt(nnx.Module):
    """Learned vectors in front of a sequence of embeddings.

    Args:
      length: vectors.
      features: their size.
      scale: standard deviation at first.
      rngs: ``nnx.Rngs``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from bilevax import nn
      >>> nn.Prompt(4, 8, rngs=nnx.Rngs(0))(jnp.ones((2, 10, 8))).shape
      (2, 14, 8)

    Source: Lester, Al-Rfou and Constant, "The power of scale for parameter-efficient prompt tuning"
    (EMNLP 2021).
    """

    def __init__(self, length: int, features: int, *, scale: float = 0.02, rngs: nnx.Rngs):
        length, features = numbers.count(length, "length"), numbers.count(features, "features")
        scale, rngs = numbers.positive(scale, "scale", zero=True, example=0.02), streams(rngs)
        self.vectors = nnx.Param(
            scale * jax.random.normal(rngs.params(), (length, features), jnp.float32)
        )

    def __call__(self, embeddings: jax.Array) -> jax.Array:
        """``(n, length + t, d)`` from ``(n, t, d)``."""
        vectors = self.vectors[...].astype(embeddings.dtype)
        return jnp.concatenate(
            [jnp.broadcast_to(vectors[None], (embeddings.shape[0], *vectors.shape)), embeddings],
            axis=1,
        )


__all__ = ["GateParam", "LoRALinear", "Prompt", "add_lora"]
