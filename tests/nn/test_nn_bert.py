"""The BERT encoder: a tiny one saved and loaded, and MiniLM's published embeddings."""

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bilevax import nn
from bilevax.nn.bert import _LAYER, _TOP, Bert, BertConfig, features, load_bert, tokenize

TINY = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=16,
)
TOKENS = jnp.asarray([[3, 1, 4, 1], [5, 9, 0, 0]], jnp.int32)
MASK = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]], bool)


def published(model):
    """The arrays of `model` under the names of a published file."""
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    modules = {(*path,): name for name, path in _TOP.items()}
    modules |= {
        ("layers", n, ours): f"encoder.layer.{n}.{theirs}"
        for n in range(TINY.num_hidden_layers)
        for theirs, ours in _LAYER.items()
    }
    out = {}
    for path, variable in flat.items():
        value = np.asarray(variable[...])
        out[f"bert.{modules[path[:-1]]}.{'bias' if path[-1] == 'bias' else 'weight'}"] = (
            np.ascontiguousarray(value.T if path[-1] == "kernel" else value)
        )
    return out


def test_a_saved_encoder_loads_as_it_was(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    model = Bert(TINY, rngs=nnx.Rngs(1))
    model.eval()
    (tmp_path / "config.json").write_text(
        json.dumps({**TINY._asdict(), "model_type": "bert", "hidden_act": "gelu"})
    )
    safetensors.save_file(published(model), tmp_path / "model.safetensors")
    loaded = load_bert(tmp_path)
    np.testing.assert_array_equal(loaded(TOKENS, MASK), model(TOKENS, MASK))
    loaded.train()  # its dropout has streams of its own
    assert not (np.asarray(loaded(TOKENS, MASK)) == np.asarray(model(TOKENS, MASK))).all()
    weights = published(model)
    del weights["bert.encoder.layer.1.attention.self.key.bias"]
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"encoder\.layer\.1\.attention\.self\.key\.bias is missing"
    ):
        load_bert(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({**TINY._asdict(), "model_type": "roberta", "hidden_act": "gelu"})
    )
    with pytest.raises(ValueError, match="expected a 'bert'"):
        load_bert(tmp_path)


def test_padding_changes_nothing():
    model = Bert(TINY, rngs=nnx.Rngs(1))
    model.eval()
    wide = jnp.concatenate([TOKENS, jnp.full((2, 3), 7, jnp.int32)], 1)
    mask = jnp.concatenate([MASK, jnp.zeros((2, 3), bool)], 1)
    np.testing.assert_allclose(model.sentence(wide, mask), model.sentence(TOKENS, MASK), atol=1e-6)


def test_a_prompt_in_front_of_a_frozen_encoder_is_learned():
    class Prompted(nnx.Module):
        def __init__(self):
            self.encoder, self.prompt = (
                Bert(TINY, rngs=nnx.Rngs(1)),
                nn.Prompt(2, TINY.hidden_size, rngs=nnx.Rngs(2)),
            )

        def __call__(self, tokens, mask):
            seen = jnp.concatenate([jnp.ones((len(mask), 2), bool), mask], 1)
            return self.encoder.encode(self.prompt(self.encoder.embed(tokens)), seen)

    net = nn.from_nnx(Prompted(), wrt=nn.paths("prompt"))
    assert [leaf.shape for leaf in jax.tree.leaves(net.params)] == [(2, TINY.hidden_size)]
    model, _ = net.bind(net.params, net.state, jax.random.key(0), False)
    assert model(TOKENS, MASK).shape == (2, 6, TINY.hidden_size)


@pytest.fixture(scope="module")
def minilm():
    if not os.environ.get("BILEVAX_DATA"):
        pytest.skip("BILEVAX_DATA is unset: MiniLM's weights are not looked for")
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    try:
        from data import Unavailable
        from encoder import folder

        return folder()
    except Unavailable as error:
        pytest.skip(str(error))
    finally:
        sys.path.pop(0)


def test_minilm_s_published_cosines(minilm, tmp_path):
    texts = [
        "That is a happy person",
        "That is a happy dog",
        "That is a very happy person",
        "Today is a sunny day",
    ]
    found = features(minilm, texts, cache=tmp_path)
    np.testing.assert_allclose(found[1:] @ found[0], [0.6946, 0.9429, 0.2569], atol=1e-3)
    assert len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(features(minilm, texts, cache=tmp_path), found)
    np.testing.assert_allclose(
        features(minilm, texts[::-1], batch=3)[::-1], found, atol=1e-6
    )  # in any order and batch


def test_kept_features_belong_to_the_encoder_s_content(tmp_path, monkeypatch):
    """Another encoder of the same size is another one; a file that was cut off is made anew, and
    never left half."""
    from bilevax.nn import bert

    monkeypatch.setattr(
        bert,
        "load_bert",
        lambda folder: float((Path(folder) / "model.safetensors").read_bytes()[0]),
    )
    monkeypatch.setattr(bert.nnx, "split", lambda model: (None, model))
    monkeypatch.setattr(
        bert,
        "tokenize",
        lambda folder, texts, length: (
            np.zeros((len(texts), 2), int),
            np.ones((len(texts), 2), bool),
        ),
    )
    monkeypatch.setattr(
        bert,
        "_sentences",
        lambda graphdef, state, tokens, mask: np.full((len(tokens), 3), state, np.float32),
    )
    encoder, cache = tmp_path / "encoder", tmp_path / "cache"
    encoder.mkdir()
    for byte in (1, 2):
        (encoder / "model.safetensors").write_bytes(bytes([byte]) * 100)
        assert (features(encoder, ["a", "b"], cache=cache) == byte).all()
    assert len(list(cache.iterdir())) == 2
    for path in cache.iterdir():
        for content in (path.read_bytes()[:140], b"", path.read_bytes()[:-4]):
            path.write_bytes(content)
            assert (features(encoder, ["a", "b"], cache=cache) == 2).all()
    (encoder / "tokenizer.json").write_text("{}")
    features(encoder, ["a", "b"], cache=cache)
    assert len(list(cache.iterdir())) == 3


def test_tokens_are_padded_to_few_widths(minilm):
    tokens, mask = tokenize(minilm, ["one two three", "word " * 300], length=64)
    assert tokens.shape == mask.shape == (2, 64) and mask[1].all() and mask[0].sum() == 5
    assert tokenize(minilm, ["one two three"])[0].shape == (1, 16)
