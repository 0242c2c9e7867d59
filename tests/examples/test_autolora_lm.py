"""Ranks of a language model's adapters: a component with a factor of zero is not there, rows of
equal parameters, the gates' hypergradient through the model, and the shapes of all its layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

pytestmark = pytest.mark.usefixtures("as_run")


@pytest.fixture(scope="module")
def own(load):
    return load("autolora_lm")


def begun(own, layers, rank, seed=0):
    """Adapters whose B is not zero any more."""
    params = own.adapters(jax.random.key(seed), layers, rank)
    noise = lambda b: 0.3 * jax.random.normal(jax.random.key(seed + 1), b.shape)
    return {name: (a, noise(b)) for name, (a, b) in params.items()}


def batch_of(own, seed=0, rows=2, length=5):
    rng = np.random.default_rng(seed)
    return {
        "hidden": jnp.float32(rng.normal(size=(rows, length, own.smollm.WIDTH))),
        "y": jnp.int32(rng.integers(0, 16, (rows, length))),
    }


def test_a_factor_of_zero_is_a_smaller_adapter(own):
    """The loss of four components of which some are masked is that of an adapter that has only the
    others, whatever is in the masked ones, and these get no gradient."""
    frozen, batch = own.smollm.random(jax.random.key(0), 2), batch_of(own)
    params, ranks = begun(own, 2, 4), np.tile([[1], [3]], 7)
    of = jax.jit(jax.value_and_grad(own.loss))
    got, grads = of(params, own.kept(ranks, 4), frozen, batch)
    matrices = dict(frozen["layers"])
    for name, (a, b) in params.items():
        change = [a[i, :, :r] @ b[i, :r] for i, r in enumerate((1, 3))]
        matrices[name] = matrices[name] + jnp.stack(change)
        for part, masked in zip(
            (0, 1), ((0, ..., slice(1, None)), (0, slice(1, None))), strict=True
        ):
            assert np.all(grads[name][part][masked] == 0), name
            assert np.any(grads[name][part][1] != 0), name
    x = own.smollm.through(matrices, batch["hidden"])
    logits = own.smollm.norm(x, frozen["norm"]) @ frozen["embed"].T
    want = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    np.testing.assert_allclose(got, want, rtol=1e-5)
    changed = {
        name: (a.at[0, :, 1:].set(9.0), b.at[0, 1:].set(9.0)) for name, (a, b) in params.items()
    }
    np.testing.assert_allclose(of(changed, own.kept(ranks, 4), frozen, batch)[0], got, rtol=1e-6)
    same = own.adapters(jax.random.key(0), 2, 3)["up"][0], params["up"][0][..., :3]
    np.testing.assert_array_equal(*same)  # a component begins the same whatever the rank


def test_rows_have_equal_parameters(own):
    found = np.random.default_rng(0).integers(1, 6, (4, 7))
    total, norms = own.parameters(found), np.random.default_rng(1).uniform(size=(4, 7, own.RANK))
    rows = own.choices(found, norms, 0)
    dealt = rows.pop(own.SHUFFLED)
    assert own.parameters(dealt) == total and (dealt != found).any()
    for group in ((0, 3), (1, 2), (4, 5, 6)):  # of the same cost
        columns = list(group)
        np.testing.assert_array_equal(
            np.sort(dealt[:, columns], None), np.sort(found[:, columns], None)
        )
    for name, ranks in rows.items():
        many = own.parameters(ranks) / (total * (2 if name == own.TWICE else 1))
        assert 1 <= many < 1.02, name
        assert ranks.max() <= own.MOST
    assert np.ptp(rows[own.UNIFORM]) <= 1 and np.ptp(rows[own.LAST][-1]) <= 1
    assert rows[own.LAST][:-1].sum() == 0
    scores = np.zeros((1, 7, 2))
    scores[0, 2] = 3.0, 2.0
    scores[0, 5, 1] = 1.0
    np.testing.assert_array_equal(own.largest(scores, 2 * 768 + 1), [[0, 0, 2, 0, 0, 1, 0]])


def test_places_are_in_order(own):
    """What a compiled function hands back is sorted by name; ranks are by the order of `NAMES`."""
    params = own.adapters(jax.random.key(0), 2, 3)
    marked = {name: (a, b + i) for i, (name, (a, b)) in enumerate(params.items())}
    norms = own.sizes_of(jax.jit(lambda tree: tree)(marked))
    assert norms.shape == (2, 7, 3)
    for i, name in enumerate(own.NAMES):
        a, b = marked[name]
        want = np.linalg.norm(a[1, :, 2]) * np.linalg.norm(b[1, 2])
        np.testing.assert_allclose(norms[1, i, 2], want, rtol=1e-5)
    logits = {name: c.at[1, 2].set(i) for i, (name, c) in enumerate(own.logits_of_gates(2).items())}
    factors = own.by_place(jax.jit(own.gated)(logits))
    np.testing.assert_allclose(factors.sum(-1), 1, rtol=1e-5)
    assert np.all(np.diff(factors[1, :, 2]) > 0)


@pytest.mark.slow
def test_the_hypergradient_of_gates(own):
    """Labels come from a model with the first of two components at every matrix: its logits are to
    rise. SAMA is near to the derivative through one step, and that to differences."""
    frozen, batch = own.smollm.random(jax.random.key(0), 1), batch_of(own, rows=4)
    params, start = begun(own, 1, 2), own.logits_of_gates(1, 2)
    only = own.kept(np.ones((1, 7), int), 2)
    merged = {name: (a * only[name], b) for name, (a, b) in params.items()}
    layers = {name: frozen["layers"][name] + a @ b for name, (a, b) in merged.items()}
    x = own.smollm.through(frozen["layers"] | layers, batch["hidden"])
    batch["y"] = jnp.argmax(own.smollm.norm(x, frozen["norm"]) @ frozen["embed"].T, -1)
    other = batch_of(own, 1)

    def inner(params, logits, batch):
        return own.loss(params, own.gated(logits), frozen, batch)

    def found(method):
        fn = bx.value_and_hypergrad(
            inner, inner, solver=bx.inner.optax(optax.sgd(1e-3), 1), hypergradient=method
        )
        return jax.jit(lambda logits: fn(params, logits, other, batch))

    flat = lambda tree: np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])
    whole = found(bx.hypergradient.unrolled())
    exact, sama = flat(whole(start).grad), flat(found(bx.hypergradient.sama())(start).grad)
    first = exact.reshape(7, 2)[:, 0]
    assert first.sum() < 0 and (first < 0).mean() > 0.5, first
    np.testing.assert_allclose(exact.reshape(7, 2).sum(1), 0, atol=1e-4)
    assert np.linalg.norm(sama - exact) < 0.1 * np.linalg.norm(exact)
    values = []
    for by in (0.05, -0.05):
        moved = jax.tree.map(lambda c: c + by * jnp.array([1.0, 0.0]), start)  # noqa: B023
        values.append(float(whole(moved).value))
    np.testing.assert_allclose((values[0] - values[1]) / 0.1, first.sum(), rtol=2e-2)


def test_shapes_of_all_layers(own):
    """Gradients of adapters and gates at all 30 layers have their shapes."""
    layers, key = own.smollm.LAYERS, jax.random.key(0)
    made = lambda: (own.adapters(key, layers, own.RANK), own.logits_of_gates(layers))
    learned = jax.eval_shape(made)
    frozen = jax.eval_shape(lambda: own.smollm.random(key, layers))
    of = lambda learned, *rest: own.loss(learned[0], own.gated(learned[1]), *rest)
    value, grads = jax.eval_shape(jax.value_and_grad(of), learned, frozen, batch_of(own))
    assert value.shape == ()
    assert jax.tree.map(lambda a: a.shape, grads) == jax.tree.map(lambda a: a.shape, learned)
    count = [sum(a.size for a in jax.tree.leaves(part)) for part in learned]
    assert count == [layers * own.RANK * own.COST.sum(), layers * own.RANK * 7]
