"""What the systems are built from: the pullback through a mask, the share that a mask keeps, the
proximal term."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

SYSTEMS = Path(__file__).resolve().parents[2] / "examples" / "systems"


@pytest.fixture(autouse=True)
def as_run():
    """As a script is run: single precision, no strictness."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@pytest.fixture(scope="module")
def load():
    """A system by name; a recipe has the name of one of them."""
    pytest.importorskip("sklearn")
    before = list(sys.path)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"systems_{name}", SYSTEMS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path[:] = before


def test_bilinear_pullback_has_the_mask_in_it(load):
    """Loss a'(m w) + b'(m w)^2 / 2 with curvature 2 for the proximal term: by hand
    -m c (a + b m w) / 2 from below, w (a + b m w) from above; for b = 0 that is what the exact
    mixed product gives, as well."""
    pruning = load("pruning")
    a, b = jnp.array([1.0, -2.0, 3.0]), jnp.array([0.5, 1.0, 2.0])
    w, s = {"w": [jnp.array([0.3, 0.7, -1.0])], "b": []}, [jnp.array([1.0, -1.0, 2.0])]

    def loss(params, scores, batch):
        kept = [(t > 0).astype(t.dtype) for t in scores]
        (m,), (y,) = bx.nn.straight_through(kept, scores), params["w"]
        return jnp.sum(a * m * y + 0.5 * batch * b * (m * y) ** 2)

    def found(method, curved):
        solver = bx.inner.optax(optax.sgd(0.0), 1)
        fn = bx.value_and_hypergrad(loss, loss, solver=solver, hypergradient=method)
        batch = jnp.float32(curved)
        return fn(w, s, batch, batch).grad[0]

    def hand(curved):
        m, y = jnp.array([1.0, 0.0, 1.0]), w["w"][0]
        g = a + curved * b * m * y
        return y * g - m * (m * g) * g / 2

    for curved in (0.0, 1.0):
        np.testing.assert_allclose(found(pruning.bilinear(0.5), curved), hand(curved), rtol=1e-6)
    np.testing.assert_allclose(found(bx.hypergradient.one_step(0.5), 0.0), hand(0.0), rtol=1e-6)
    direct = found(pruning.bilinear(0.0), 1.0)
    assert np.abs(direct - hand(1.0)).max() > 0.1


def test_a_mask_keeps_its_share(load):
    pruning = load("pruning")
    scores = [jax.random.normal(jax.random.key(i), (50, 40)) * (i + 1) for i in range(2)]
    kept = [s > 0 for s in pruning.largest(scores, 0.01)]
    assert sum(int(k.sum()) for k in kept) == 40
    lowest = min(float(s[k].min()) for s, k in zip(scores, kept, strict=True) if k.any())
    assert all(float(s[~k].max()) < lowest for s, k in zip(scores, kept, strict=True))


def test_the_proximal_term_pulls_to_where_the_solve_began(load):
    """min (p - 1)^2 / 2 + (p - p_0)^2 / 2 has its minimum half way, in each solve anew."""
    pruning = load("pruning")
    opt = optax.chain(pruning.pull_back(1.0, 20), optax.sgd(0.5))
    p, state = jnp.zeros(()), opt.init(jnp.zeros(()))
    for target in (0.5, 0.75):
        for _ in range(20):
            updates, state = opt.update(p - 1.0, state, p)
            p = p + updates
        np.testing.assert_allclose(p, target, atol=1e-5)
