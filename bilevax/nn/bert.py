"""Encoders of the BERT type: the architecture in nnx, and a loader for published weights and their
tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class BertConfig(NamedTuple):
    """What ``config.json`` says of an architecture, by its names there."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1


class BertLayer(nnx.Module):
    """Self-attention and a feed-forward block, each with a residual and a normalisation after
    it.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        d, norm = (
            config.hidden_size,
            partial(nnx.LayerNorm, config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs),
        )
        self.heads = config.num_attention_heads
        self.query, self.key, self.value, self.attention_out = (
            nnx.Linear(d, d, rngs=rngs) for _ in range(4)
        )
        self.up, self.down = (
            nnx.Linear(d, config.intermediate_size, rngs=rngs),
            nnx.Linear(config.intermediate_size, d, rngs=rngs),
        )
        self.attention_norm, self.norm = norm(), norm()
        self.dropout = nnx.Dropout(config.hidden_dropout_prob, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """``(n, t, d)`` from ``(n, t, d)`` and a mask ``(n, t)`` that is False at padding."""
        split = lambda z: z.reshape(*z.shape[:-1], self.heads, -1)
        attended = jax.nn.dot_product_attention(
            split(self.query(x)),
            split(self.key(x)),
            split(self.value(x)),
            mask=mask[:, None, None, :],
        )
        x = self.attention_norm(x + self.dropout(self.attention_out(attended.reshape(x.shape))))
        return self.norm(x + self.dropout(self.down(jax.nn.gelu(self.up(x), approximate=False))))


class Bert(nnx.Module):
    """A BERT encoder: ``(tokens, mask) -> hidden states``.

    Args:
      config: sizes.
      rngs: ``nnx.Rngs``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = Bert(BertConfig(50, 8, 2, 2, 16, 12), rngs=nnx.Rngs(0))
      >>> tokens, mask = jnp.array([[1, 2, 3]]), jnp.array([[True, True, False]])
      >>> model(tokens, mask).shape, model.sentence(tokens, mask).shape
      ((1, 3, 8), (1, 8))

    Source: Devlin et al., "BERT" (NAACL 2019); Reimers and Gurevych, "Sentence-BERT" (EMNLP 2019),
    for the mean over tokens.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.words = nnx.Embed(config.vocab_size, d, rngs=rngs)
        self.positions = nnx.Embed(config.max_position_embeddings, d, rngs=rngs)
        self.types = nnx.Embed(config.type_vocab_size, d, rngs=rngs)
        self.norm = nnx.LayerNorm(d, epsilon=config.layer_norm_eps, rngs=rngs)
        self.dropout = nnx.Dropout(config.hidden_dropout_prob, rngs=rngs)
        self.layers = nnx.List(
            [BertLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeddings ``(n, t, d)`` before any normalisation: where a prompt goes in front."""
        positions = self.positions(jnp.arange(tokens.shape[1], dtype=jnp.int32))
        return self.words(tokens) + positions[None] + self.types(jnp.zeros_like(tokens))

    def encode(self, embeddings: jax.Array, mask: jax.Array) -> jax.Array:
        """Hidden states ``(n, t, d)`` from embeddings."""
        x = self.dropout(self.norm(embeddings))
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Hidden states ``(n, t, d)`` from tokens ``(n, t)`` and a mask ``(n, t)`` that is False at
        padding.
        """
        return self.encode(self.embed(tokens), mask.astype(bool))

    def sentence(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Unit vectors ``(n, d)``, the mean over tokens."""
        hidden = self(tokens, mask)
        kept = mask.astype(hidden.dtype)[..., None]
        mean = jnp.sum(hidden * kept, axis=1) / jnp.sum(kept, axis=1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


# ---- published weights

_TOP = {
    "embeddings.word_embeddings": ("words",),
    "embeddings.position_embeddings": ("positions",),
    "embeddings.token_type_embeddings": ("types",),
    "embeddings.LayerNorm": ("norm",),
}
_LAYER = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
}


def load_bert(folder: str | Path) -> Bert:
    """A published encoder from ``config.json`` and ``model.safetensors``, in evaluation mode. Needs
    the extra ``text``.

    Args:
      folder: where the two files are. Weights may stand under a prefix ``bert.``; a pooler or a
        language model's head is left out.

    Returns:
      A `Bert`.

    Raises:
      FileNotFoundError: if there are none.
      ValueError: for another architecture, or weights that are missing or of another shape.
    """
    from safetensors.numpy import load_file

    folder = Path(folder)
    content = json.loads((folder / "config.json").read_text())
    if content.get("model_type") != "bert" or content.get("hidden_act") != "gelu":
        raise ValueError(
            f"{folder}: got a {content.get('model_type')!r} with {content.get('hidden_act')!r}; "
            "expected a 'bert' with 'gelu'."
        )
    config = BertConfig(**{name: content[name] for name in BertConfig._fields if name in content})
    weights = {
        name.removeprefix("bert."): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    model = nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))
    names: dict[tuple[Any, ...], str] = {
        (*ours, part): f"{theirs}.{part}"
        for theirs, ours in _TOP.items()
        for part in ("weight", "bias")
    }
    for number in range(config.num_hidden_layers):
        for theirs, ours in _LAYER.items():
            names |= {
                ("layers", number, ours, part): f"encoder.layer.{number}.{theirs}.{part}"
                for part in ("weight", "bias")
            }

    def find(path, variable):
        kind = path[-1]
        name = names[(*path[:-1], "bias" if kind == "bias" else "weight")]
        if name not in weights:
            raise ValueError(f"{folder}/model.safetensors: {name} is missing.")
        value = weights[name].T if kind == "kernel" else weights[name]  # they store the transpose
        if value.shape != variable.shape:
            raise ValueError(
                f"{folder}/model.safetensors: {name} is {value.shape}; expected {variable.shape}, "
                "as config.json says."
            )
        return variable.replace(jnp.asarray(value))

    graphdef, *parts = nnx.split(model, nnx.Param, ...)
    params, rest = parts
    loaded = nnx.from_flat_state(
        [(path, find(path, variable)) for path, variable in nnx.to_flat_state(params)]
    )
    model = nnx.merge(graphdef, loaded, _concrete(rest))
    model.eval()
    return model


def _concrete(rest: nnx.State[Any, Any]) -> nnx.State[Any, Any]:
    """Random streams in the place of their shapes, each with a key of its own."""
    made = []
    for number, (path, variable) in enumerate(nnx.to_flat_state(rest)):
        is_key = jnp.issubdtype(variable.dtype, jax.dtypes.prng_key)
        made.append(
            (
                path,
                variable.replace(
                    jax.random.key(number) if is_key else jnp.zeros(variable.shape, variable.dtype)
                ),
            )
        )
    return nnx.from_flat_state(made)


def tokenize(
    folder: str | Path, texts: Sequence[str], length: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask ``(n, t)`` of some texts, by the ``tokenizer.json`` in `folder`. Needs the
    extra ``text``.

    Args:
      folder: where ``tokenizer.json`` is.
      texts: strings.
      length: where longer texts are cut. Rows are padded to the longest, rounded up to 16, so that
        few shapes are compiled.

    Returns:
      int32 tokens, and a boolean mask that is False at padding.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.no_padding()  # a published tokenizer may pad everything to its longest
    tokenizer.enable_truncation(length)
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    longest = max(map(len, rows))
    width = min(length, -(-longest // 16) * 16)
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for number, row in enumerate(rows):
        tokens[number, : len(row)], mask[number, : len(row)] = row, True
    return tokens, mask


@partial(jax.jit, static_argnums=0)
def _sentences(
    graphdef: Any, state: Any, tokens: Any, mask: Any
) -> Any:  # weights are an argument: closed over, they would be folded as constants for a minute
    return nnx.merge(graphdef, state, copy=True).sentence(tokens, mask)


def features(
    folder: str | Path,
    texts: Sequence[str],
    *,
    cache: str | Path | None = None,
    batch: int = 64,
    length: int = 128,
) -> np.ndarray:
    """Frozen sentence embeddings, computed once and kept in a file.

    Args:
      folder: of the encoder; see `load_bert` and `tokenize`.
      texts: strings.
      cache: folder of the files, named by the texts and the encoder's own files, whose content
        decides. None: nothing is kept. A file that was cut off is made anew.
      batch: texts encoded at a time, the shortest together.
      length: where longer texts are cut.

    Returns:
      float32 unit vectors ``(n, d)``.
    """
    path = (
        None
        if cache is None
        else Path(cache) / f"features-{_about(Path(folder), texts, length)}.npy"
    )
    if path is not None and (kept := _read(path, len(texts))) is not None:
        return kept
    graphdef, state = nnx.split(load_bert(folder))
    order = np.argsort([len(text) for text in texts], kind="stable")
    out: Any = None
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        padded = (
            np.resize(rows, batch) if start else rows
        )  # the last batch is filled up, so that its shape is compiled already
        tokens, mask = tokenize(folder, [texts[row] for row in padded], length)
        found = np.asarray(_sentences(graphdef, state, tokens, mask))[: len(rows)]
        out = np.zeros((len(texts), found.shape[1]), np.float32) if out is None else out
        out[rows] = found
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with beside.open("wb") as file:
            np.save(file, out)
        os.replace(beside, path)  # whole, or not there
    return out


def _about(folder: Path, texts: Sequence[str], length: int) -> str:
    """What the features depend on: the texts, where they are cut, and the bytes of the encoder's
    files.
    """
    total = hashlib.sha256(json.dumps([list(texts), length]).encode())
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:20]


def _read(path: Path, rows: int) -> np.ndarray | None:
    """The features in a file; None where there is none that is whole."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.dtype == np.float32 and found.ndim == 2 and len(found) == rows else None


__all__ = ["Bert", "BertConfig", "features", "load_bert", "tokenize"]
