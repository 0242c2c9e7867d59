"""The building blocks, each by what it is for; and constraints against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.optimize import minimize

import bilevax as bx
from bilevax import base, nn

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)


def value_and_grads(net, loss, key=None):
    """A loss of one divided model, as an objective of both groups."""
    obj = nn.objective(loss, model=net)
    return jax.value_and_grad(lambda y, x: obj(y, x, base.Ctx(None, key))[0], (0, 1))(*net.params)


def test_weight_net_starts_even_and_passes_no_gradient_to_the_losses():
    weigh = nn.WeightNet(4, rngs=nnx.Rngs(0))
    features = jax.nn.one_hot(jnp.arange(3), 4, dtype=jnp.float32)
    losses = jnp.asarray([0.1, 1.0, 5.0], jnp.float32)
    np.testing.assert_array_equal(weigh(losses, features), [0.5] * 3)
    weigh.out.kernel[...] = jnp.ones_like(weigh.out.kernel[...])
    assert len(set(np.asarray(weigh(losses, features)).tolist())) == 3
    assert not np.asarray(jax.jacobian(lambda losses: weigh(losses, features))(losses)).any()


def test_weight_net_finds_the_bad_quarter():
    """A quarter of the examples of a scalar mean are off by 3, and so have large losses: the
    weights learn to leave them out."""
    y = jnp.concatenate([jnp.zeros(12), jnp.full(4, 3.0)]).astype(jnp.float32)

    def inner(m, weigh, batch):
        losses = (m - y) ** 2
        w = weigh(losses)
        return jnp.sum(w * losses) / jnp.sum(w)

    problem = nn.bilevel(
        inner,
        lambda m, weigh, batch: m**2,
        jnp.float32(0.75),
        nn.WeightNet(hidden=8, rngs=nnx.Rngs(0)),
    )
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.3), 5), bx.hypergradient.unrolled(), optax.adam(0.05)
    )
    solution = bx.solve_bilevel(**problem.arguments, algorithm=algorithm, num_steps=150)
    assert abs(float(solution.inner_params)) < 0.1  # the even start is at 0.75


def test_label_net_starts_at_the_labels_and_can_leave_them():
    correct = nn.LabelNet(3, 4, rngs=nnx.Rngs(0))
    labels = jnp.asarray([0, 1, 2, 3, 0, 1], jnp.int32)
    p = correct(X, labels)
    np.testing.assert_allclose(p.sum(-1), 1.0, rtol=1e-6)
    assert (np.asarray(p).argmax(-1) == np.asarray(labels)).all() and float(p.max()) < 0.96
    grads = nnx.grad(lambda net: -jnp.mean(jnp.log(net(X, labels)[:, 3])))(correct)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads["out"]))


def test_lora_starts_as_the_base_and_its_gates_scale_components():
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    )
    before = model(X)
    assert nn.add_lora(model, nn.paths("layers/2"), rank=3, rngs=nnx.Rngs(1)) == 1
    np.testing.assert_array_equal(model(X), before)
    layer = model.layers[2]
    layer.b[...] = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)), jnp.float32)
    layer.logits[...] = jnp.log(jnp.asarray([0.5, 0.25, 0.25], jnp.float32))
    hidden = jax.nn.relu(model.layers[0](X))
    change = sum(g * np.outer(layer.a[:, k], layer.b[k]) for k, g in enumerate([0.5, 0.25, 0.25]))
    np.testing.assert_allclose(
        model(X),
        hidden @ (layer.base.kernel[...] + change) + layer.base.bias[...][None],
        rtol=1e-5,
        atol=1e-6,
    )
    net = nn.from_nnx(
        model, wrt=(nnx.LoRAParam, nn.GateParam)
    )  # adapters below, gates above, the rest frozen
    assert sorted(leaf.shape for leaf in jax.tree.leaves(net.params[0])) == [(3, 2), (4, 3)]
    _, (adapters, gates) = value_and_grads(net, lambda model, batch: jnp.mean(model(X) ** 2))
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves((adapters, gates)))
    with pytest.raises(ValueError, match="takes no nnx.Linear"):
        nn.add_lora(model, nn.paths("nowhere"), rank=3, rngs=nnx.Rngs(1))


def test_soft_choice_mixes_samples_and_decides():
    logits, options = (
        jnp.asarray([0.3, -1.0, 0.8], jnp.float32),
        [jnp.full(2, v, jnp.float32) for v in (1.0, 10.0, 100.0)],
    )
    p = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(
        nn.soft_choice(logits, options), np.full(2, p @ [1, 10, 100]), rtol=1e-6
    )
    # hard Gumbel samples follow the softmax, and the derivative is that of the mixture
    samples = jax.vmap(lambda key: nn.soft_choice(logits, options, key=key, hard=True)[0])(
        jax.random.split(jax.random.key(0), 4000)
    )
    np.testing.assert_allclose(
        [np.mean(np.isclose(samples, v)) for v in (1, 10, 100)], p, atol=0.03
    )
    soft, hard = (
        jax.grad(lambda z, hard=hard: nn.soft_choice(z, options, hard=hard)[0])(logits)
        for hard in (False, True)
    )
    np.testing.assert_allclose(soft, hard, rtol=1e-5)


def test_soft_choice_layer_draws_in_training_mode_only():
    layer = nn.SoftChoice([nnx.relu, nnx.tanh], gumbel=True, rngs=nnx.Rngs(0))
    net = nn.from_nnx(
        nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(1)), layer),
        wrt=(nnx.Not(nnx.OfType(nn.ArchParam)), nn.ArchParam),
    )
    assert net.keyed
    obj = {
        train: nn.objective(lambda model, batch: jnp.mean(model(X)), model=net, train=train)
        for train in (True, False)
    }
    value = {
        train: [obj[train](*net.params, base.Ctx(None, jax.random.key(k)))[0] for k in (0, 1)]
        for train in obj
    }
    assert value[True][0] != value[True][1] and value[False][0] == value[False][1]
    with pytest.raises(ValueError, match="which draws"):
        nn.SoftChoice([nnx.relu], gumbel=True)


def test_masks_keep_a_fraction_and_pass_gradients():
    scores = {
        "a": jnp.asarray([[0.2, -1.0], [3.0, 0.1]], jnp.float32),
        "b": jnp.asarray([-0.3, 0.6], jnp.float32),
    }
    kept = nn.mask(scores, keep=0.5)
    assert kept["a"].tolist() == [[1, 0], [1, 0]] and kept["b"].tolist() == [0, 1]
    assert nn.mask(scores)["a"].tolist() == [[1, 0], [1, 1]]
    grad = jax.grad(lambda s: sum(jnp.sum(m) for m in jax.tree.leaves(nn.mask(s, keep=0.5))))(
        scores
    )
    s = jax.nn.sigmoid(scores["a"])
    np.testing.assert_allclose(grad["a"], s * (1 - s), rtol=1e-6)
    with pytest.raises(ValueError, match="keep: got 0"):
        nn.mask(scores, keep=0)


# ---- constraints


def test_constrained_ends_where_the_projection_says():
    """A box, the non-negative numbers and a simplex on a quadratic, against scipy with bounds and
    constraints."""
    target = np.array([0.9, -0.4, 0.3])
    hessian = np.array([[2.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 1.5]])
    sets = {
        "box": (
            nn.constrained(optax.projections.projection_box, lower=-0.1, upper=0.5),
            dict(bounds=[(-0.1, 0.5)] * 3),
        ),
        "non-negative": (
            nn.constrained(optax.projections.projection_non_negative),
            dict(bounds=[(0, None)] * 3),
        ),
        "simplex": (
            nn.constrained(optax.projections.projection_simplex),
            dict(bounds=[(0, None)] * 3, constraints={"type": "eq", "fun": lambda x: x.sum() - 1}),
        ),
    }
    inner = lambda y, x, batch: 0.5 * jnp.sum((y - x) ** 2)
    outer = lambda y, x, batch: 0.5 * (y - target) @ jnp.asarray(hessian) @ (y - target)
    for name, (constraint, conditions) in sets.items():
        algorithm = bx.algorithms.double_loop(
            bx.inner.optax(optax.sgd(1.0), 1),
            bx.hypergradient.implicit(),
            optax.chain(optax.sgd(0.3), constraint),
        )
        solution = bx.solve_bilevel(
            inner,
            outer,
            jnp.zeros(3),
            jnp.full(3, 1 / 3),
            algorithm=algorithm,
            num_steps=150,
            keep="last",
        )
        start, fun = np.full(3, 1 / 3), lambda x: 0.5 * (x - target) @ hessian @ (x - target)
        want = minimize(fun, start, method="SLSQP", options={"ftol": 1e-14}, **conditions).x
        np.testing.assert_allclose(solution.outer_params, want, atol=1e-6, err_msg=name)


def test_constrained_leaves_other_leaves_alone():
    opt = nn.constrained(optax.projections.projection_non_negative, nn.paths("rate"))
    params = {"rate": jnp.asarray([0.1, 0.1]), "bias": jnp.asarray([0.1])}
    updates, _ = opt.update(
        {"rate": jnp.asarray([-1.0, 1.0]), "bias": jnp.asarray([-1.0])}, opt.init(params), params
    )
    np.testing.assert_allclose((params["rate"] + updates["rate"]), [0.0, 1.1])
    np.testing.assert_allclose(updates["bias"], [-1.0])
    with pytest.raises(TypeError, match="params: got None"):
        opt.update(params, opt.init(params))
    with pytest.raises(TypeError, match="projection"):
        nn.constrained(3.0)
