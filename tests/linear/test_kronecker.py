"""Curvature of networks: what is captured, what is approximated, and what comes of it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import bilevax as bx
from bilevax import tree
from bilevax.linear._capture import Walk, layout, matrices, rows
from bilevax.linear._curvature import plan

KEY = jax.random.key(0)


def normal(*shape, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.fold_in(KEY, seed), shape)


@pytest.fixture(autouse=True)
def broadcasting():
    """The networks here are written as users write them; a linear one holds the library's own code
    to the suite's rule."""
    with jax.numpy_rank_promotion("allow"):
        yield


# ---- what is captured: per-example gradients, against jax.grad


def dense(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"])
    return jnp.einsum("nhd,ohd->no", h.reshape(-1, 2, 3), p["v"])


def convolution(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated(
        x.reshape(-1, 4, 4, 1), p["w"], (1, 1), "SAME", dimension_numbers=numbers
    )
    h = jax.nn.relu(h + p["b"])
    h = lax.conv_general_dilated(
        h,
        p["v"],
        (2, 2),
        ((1, 0), (0, 1)),
        rhs_dilation=(1, 2),
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
    )
    return h.reshape(h.shape[0], -1)


def embedding(p, ids):
    h = jnp.take(p["e"], ids, axis=0) + p["position"]
    mean, spread = jnp.mean(h, -1, keepdims=True), jnp.var(h, -1, keepdims=True)
    h = (h - mean) * lax.rsqrt(spread + 1e-6) * p["scale"] + p["shift"]
    return h @ p["e"].T  # shared, its sides changed


def scanned(p, x):
    def layer(h, w):
        return jnp.tanh(h @ w["w"] @ p["shared"] + w["b"]), None

    return lax.scan(layer, x[:, :4], p["layers"])[0] @ p["shared"]


def recurrent(p, ids):
    def step(h, e):
        return jnp.tanh(h @ p["w"] + e @ p["u"]), h

    h, _ = lax.scan(step, jnp.zeros((ids.shape[0], 3)), jnp.moveaxis(jax.nn.one_hot(ids, 7), 1, 0))
    return h @ p["v"]


def experts(p, x):
    return jnp.einsum("nei,eio->no", x.reshape(-1, 4, 4), p["w"])


def rematerialised(p, x):
    return jax.checkpoint(jax.jit(dense))(p, x)


def nested(p, x):
    def outer(h, w):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, w)[0], None

    return lax.scan(outer, x[:, :3], p["w"])[0]


IDS = jax.random.randint(KEY, (5, 4), 0, 7)
FLOATS = normal(5, 16)
NETWORKS = {
    "dense": (dense, {"w": normal(16, 6), "b": normal(6), "v": normal(2, 2, 3)}, FLOATS, {"w",
    "v"}),
    "convolution": (convolution, {"w": normal(3, 3, 1, 2), "b": normal(2), "v": normal(3, 2, 2,
    1)}, FLOATS, {"w", "v"}),
    "embedding, shared": (
        embedding, {"e": normal(7, 3), "position": normal(4, 3), "scale": normal(3),
        "shift": normal(3)}, IDS, {"e"},
    ),
    "scanned": (
        scanned, {"layers": {"w": normal(2, 4, 4, scale=0.5), "b": normal(2, 4)},
        "shared": normal(4, 4, seed=3, scale=0.5)}, FLOATS, {"layers.w", "shared"},
    ),
    "recurrent": (recurrent, {"w": normal(3, 3), "u": normal(7, 3), "v": normal(3, 2)}, IDS, {"w",
    "u", "v"}),
    "experts": (experts, {"w": normal(4, 4, 3)}, FLOATS, {"w"}),
    "checkpoint": (rematerialised, {"w": normal(16, 6), "b": normal(6), "v": normal(2, 2, 3)},
    FLOATS, {"w", "v"}),
    "nested scans": (nested, {"w": normal(2, 3, 3, 3, scale=0.5)}, FLOATS, {"w"}),
}  # fmt: skip


def captured(network, params, batch):
    """Each leaf's gradient of each example, from the rows of its uses; None where it has none."""
    value = lambda p, x: jnp.sum(jnp.sin(network(p, x)))
    one = lambda x: jax.tree.map(lambda a: a[None], x)
    walk = Walk(value, params, one(batch[0]))
    leaves, treedef = jax.tree.flatten(params)

    def gradients(x):
        got, found = jax.grad(lambda added: walk(params, one(x), added), has_aux=True)(walk.zeros())
        out = [None] * len(leaves)
        for use, other, g in zip(walk.uses, found, got, strict=True):
            a, b = rows(use, other, g)
            leaf, how = leaves[use.tag.leaf], layout(use)
            looked = lambda: jnp.zeros(matrices(how, leaf).shape).at[0, a[0]].add(b[0])  # noqa: B023
            whole = looked() if use.kind == "gather" else jnp.einsum("ltr,ltc->lrc", a, b)
            (back,) = jax.linear_transpose(lambda leaf, how=how: matrices(how, leaf), leaf)(whole)
            out[use.tag.leaf] = back if out[use.tag.leaf] is None else out[use.tag.leaf] + back
        return out

    found = jax.jit(jax.vmap(gradients))(batch)
    direct = jax.jit(jax.vmap(lambda x: jax.grad(lambda p: value(p, one(x)))(params)))(batch)
    names = [
        ".".join(str(k.key) for k in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    return {n: (a, b) for n, a, b in zip(names, found, jax.tree.leaves(direct), strict=True)}


@pytest.mark.turns
@pytest.mark.parametrize(
    "name",
    [
        n
        if n in ("convolution", "embedding, shared", "scanned")
        else pytest.param(n, marks=pytest.mark.slow)
        for n in NETWORKS
    ],
)
def test_captured_gradients_are_those_of_jax(name):
    network, params, batch, expected = NETWORKS[name]
    found = captured(network, params, batch)
    assert {n for n, (a, _) in found.items() if a is not None} == expected
    for a, b in found.values():
        if a is not None:
            np.testing.assert_allclose(a, b, atol=1e-13 * (1 + np.abs(b).max()))


def flax_network(kind):
    """Convolution, layer norm, embedding, attention and dense layers; parameters, network, and the
    leaves that must be captured."""
    x, ids = normal(3, 8, 8, 1).astype(jnp.float32), IDS[:3, 0]
    if kind == "nnx":
        from flax import nnx

        class Model(nnx.Module):
            def __init__(self, r):
                self.conv, self.dense = (
                    nnx.Conv(1, 2, (3, 3), strides=2, rngs=r),
                    nnx.Linear(32, 8, rngs=r),
                )
                self.norm, self.embed = nnx.LayerNorm(8, rngs=r), nnx.Embed(7, 8, rngs=r)
                self.attention = nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=r)
                self.general = nnx.LinearGeneral((8,), (2, 3), rngs=r)

            def __call__(self, x, t):
                h = self.norm(self.dense(nnx.relu(self.conv(x)).reshape(x.shape[0], -1)))
                return self.general(self.attention(jnp.stack([h, self.embed(t)], 1)))

        definition, state = nnx.split(Model(nnx.Rngs(0)))
        params = jax.tree.map(lambda a: a, nnx.to_pure_dict(state))
        return params, lambda p, b: nnx.merge(definition, _filled(state, p))(*b), (x, ids)
    from flax import linen as nn

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            h = nn.relu(nn.Conv(2, (3, 3), strides=2)(x)).reshape(x.shape[0], -1)
            h = nn.LayerNorm()(nn.Dense(8)(h))
            h = nn.MultiHeadDotProductAttention(2)(jnp.stack([h, nn.Embed(7, 8)(t)], 1))
            return nn.DenseGeneral((2, 3))(h)

    model = Linen()
    params = model.init(KEY, x, ids)["params"]
    return params, lambda p, b: model.apply({"params": p}, *b), (x, ids)


def _filled(state, pure):
    from flax import nnx

    new = jax.tree.map(lambda a: a, state)
    nnx.replace_by_pure_dict(new, pure)
    return new


def flax_layers(kind, dtype=jnp.float32):
    """Three residual layers with layer norm, stacked and scanned."""
    x, width, depth = normal(4, 5, 6).astype(dtype), 6, 3
    if kind == "nnx":
        from flax import nnx

        class Block(nnx.Module):
            def __init__(self, r):
                settings = dict(rngs=r, dtype=dtype, param_dtype=dtype)
                self.norm = nnx.LayerNorm(width, **settings)
                self.up = nnx.Linear(width, 8, **settings)
                self.down = nnx.Linear(8, width, **settings)

            def __call__(self, h):
                return h + self.down(nnx.gelu(self.up(self.norm(h))))

        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(r):
            return Block(r)

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(block, h):
            return block(h)

        definition, state = nnx.split(stacked(nnx.Rngs(0)))
        params = nnx.to_pure_dict(state)
        return params, lambda p, h: through(nnx.merge(definition, _filled(state, p)), h), x
    from flax import linen as nn

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, h, _):
            settings = dict(dtype=dtype, param_dtype=dtype)
            inside = nn.gelu(nn.Dense(8, **settings)(nn.LayerNorm(**settings)(h)))
            return h + nn.Dense(width, **settings)(inside), None

    rules = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=depth)
    model = nn.scan(Linen, **rules)()
    params = model.init(KEY, x, None)["params"]
    return params, lambda p, h: model.apply({"params": p}, h, None)[0], x


def check_captured(params, network, batch, kronecker, tol):
    """Every leaf's gradient of each example is that of ``jax.grad``; the leaves that `kronecker`
    names have factors."""
    from bilevax.linear._curvature import gradients, of_block

    value = lambda p, b: jnp.sum(jnp.sin(network(p, b)))
    one = jax.tree.map(lambda a: a[:1], batch)
    made = plan(value, params, one, small=64, largest=100)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for name, block in zip(names, made.layers, strict=True):
        assert (block.kind == "kronecker") == kronecker(name), f"{name}: {block}"
    alone = jax.tree.map(lambda a: a[:, None], batch)
    got = jax.jit(jax.vmap(lambda e: gradients(made, params, e)))(alone)
    direct = jax.jit(jax.vmap(jax.grad(value), (None, 0)))(params, alone)
    for number, (block, b) in enumerate(zip(made.layers, jax.tree.leaves(direct), strict=True)):
        mine = of_block(made, number, got) if made.uses[number] else got.rest[number]
        want = (
            jax.vmap(lambda leaf, block=block: matrices(block.layout, leaf))(b)
            if made.uses[number]
            else b.reshape(b.shape[0], -1)
        )
        mine, want = np.asarray(mine, np.float64), np.asarray(want, np.float64)
        np.testing.assert_allclose(mine, want, atol=tol * (1 + np.abs(want).max()))


def is_weight(name):
    return "kernel" in name or "embedding" in name


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_every_kernel_of_flax_is_found(kind, remat):
    pytest.importorskip("flax")
    params, network, batch = flax_network(kind)
    check_captured(params, jax.checkpoint(network) if remat else network, batch, is_weight, 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tol", [(jnp.float32, 3e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_scanned_layers_of_flax_are_found(kind, dtype, tol):
    pytest.importorskip("flax")
    with jax.numpy_dtype_promotion("standard"):  # Flax's normalisation computes in float32
        check_captured(*flax_layers(kind, dtype), is_weight, tol)


# ---- what is approximated: exact cases


def regression(width=1, tokens=()):
    """A linear network: its Gauss-Newton matrix is E[xx'] times the identity."""
    network = lambda w, b: b["x"] @ w
    loss = lambda out, b: (
        0.5 * jnp.mean(jnp.sum((out - b["y"]) ** 2, -1), tuple(range(1, out.ndim - 1)))
    )
    batch = {
        "x": normal(40, *tokens, 5, seed=1) * jnp.arange(1.0, 6.0),
        "y": normal(40, *tokens, width, seed=2),
    }
    return network, loss, batch, normal(5, width, seed=3)


def exact(network, loss, batch, params, b, damping):
    """The dense damped Gauss-Newton matrix, solved."""
    flat, back = jax.flatten_util.ravel_pytree(params)
    out = network(params, batch)
    jacobian = jax.jacobian(lambda v: network(back(v), batch).ravel())(flat)
    curve = jax.hessian(lambda o: jnp.mean(loss(o.reshape(out.shape), batch)))(out.ravel())
    matrix = jacobian.T @ curve @ jacobian + damping * jnp.eye(flat.size)
    return back(jnp.linalg.solve(matrix, jax.flatten_util.ravel_pytree(b)[0]))


def cosine(a, b):
    return float(tree.dot(a, b) / (tree.norm(a) * tree.norm(b)))


def answer(solver, network, loss, batch, params, b, damping, matvec=None):
    """By the door that influence functions take."""
    from bilevax.linear.preconditioner import Point, at

    value = lambda p, rows: jnp.mean(loss(network(p, rows), rows))
    call = lambda fn, first, rows, **keywords: fn(first, rows, **keywords)

    @jax.jit
    def found(params, batch, b):
        point = Point(value, params, batch, call, damping)
        product = jax.linearize(jax.grad(lambda p: value(p, batch)), params)[1]
        return at(solver, point)(lambda v: tree.axpy(damping, v, product(v)), b, None)

    return found(params, batch, b)


EXACT = {
    "one output": ((1, ()), {"draws": "all"}, 1e-12),
    "three outputs": ((3, ()), {"draws": "all"}, 1e-12),
    "tokens, whose mean is the loss": ((2, (4,)), {"draws": 400}, 0.1),
    "one example at a time": ((3, ()), {"draws": "all", "at_once": 7}, 1e-12),
}


@pytest.mark.turns
@pytest.mark.parametrize(
    "case", [c if "at a time" in c else pytest.param(c, marks=pytest.mark.slow) for c in EXACT]
)
def test_a_linear_network_is_exact(case):
    how, settings, tol = EXACT[case]
    network, loss, batch, params = regression(*how)
    b = normal(*params.shape, seed=5)
    want = exact(network, loss, batch, params, b, 0.3)
    for make in (bx.linear.kfac, bx.linear.ekfac):
        with jax.numpy_rank_promotion("raise"):
            x, info = answer(
                make((network, loss), **settings), network, loss, batch, params, b, 0.3
            )
        assert float(tree.norm(tree.sub(x, want)) / tree.norm(want)) < tol
        assert float(info.residual) < max(10 * tol, 1e-10)


def test_the_regulariser_stays_out():
    """A term that all examples share does not move the factors, of captured leaves or of others."""
    network = lambda p, x: jnp.tanh(x @ p["w"] + p["b"])
    batch, params = normal(30, 4), {"w": normal(4, 2), "b": normal(2)}
    plain = lambda p, x: jnp.mean(network(p, x) ** 2)
    with_term = lambda p, x: (
        plain(p, x)
        + 50.0 * jnp.sum(p["b"])
        + 20.0 * jnp.sum(p["w"] ** 2)
        + jnp.sum(p["w"] @ jnp.ones((2, 3)))
    )
    from bilevax.linear.preconditioner import Point, at

    def made(value):
        point = Point(value, params, batch, lambda fn, first, rows: fn(first, rows), 0.1)
        held = at(bx.linear.ekfac(), point).preconditioner
        return held.apply(held.refresh(None, None), params)

    a, b = jax.jit(lambda: (made(plain), made(with_term)))()
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-10), a, b)


@functools.cache
def digits(size=300):
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x, y = jnp.asarray(images[order] / 16.0), jnp.asarray(labels[order], jnp.int32)
    return {"x": x[:size], "y": y[:size]}, {"x": x[size : size + 300], "y": y[size : size + 300]}


def classes(out, rows):
    return -jnp.take_along_axis(jax.nn.log_softmax(out), rows["y"][..., None], -1)[..., 0]


def mlp(p, rows):
    h = rows["x"]
    for i, layer in enumerate(p):
        h = h @ layer["w"] + layer["b"]
        h = jnp.tanh(h) if i < len(p) - 1 else h
    return h


def mlp_params(sizes=(64, 20, 20, 10)):
    return [
        {"w": normal(a, b, seed=i, scale=a**-0.5), "b": jnp.zeros(b)}
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    ]


def trained(network, params, batch, steps=1000, rate=5e-3, decay=1e-3):
    objective = lambda p: jnp.mean(classes(network(p, batch), batch)) + 0.5 * decay * tree.dot(p, p)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def run(params):
        def body(carry, _):
            p, state = carry
            updates, state = optimizer.update(jax.grad(objective)(p), state)
            return (optax.apply_updates(p, updates), state), None

        return lax.scan(body, (params, optimizer.init(params)), length=steps)[0][0]

    with jax.numpy_dtype_promotion("standard"):  # Adam raises floats to integer powers
        return run(params)


@pytest.mark.turns
def test_the_inverse_on_digits_points_where_the_exact_one_does():
    """Cosine with the exact damped inverse at a thousandth and a hundredth of the largest
    eigenvalue: at least .7 and .85, and above the identity's."""
    train, valid = digits(600)
    params = trained(mlp, mlp_params((64, 12, 10)), train)
    matrix, b, back = dense_curvature(params, train, valid)

    @jax.jit
    def made(damping):
        from bilevax.linear.preconditioner import Point, at

        value = lambda p, rows: jnp.mean(classes(mlp(p, rows), rows))
        call = lambda fn, first, rows, **keywords: fn(first, rows, **keywords)
        solver = bx.linear.ekfac((mlp, classes), draws="all")
        held = at(solver, Point(value, params, train, call, damping)).preconditioner
        return held.apply(held.refresh(None, None), b)

    v = np.ones(len(matrix))
    for _ in range(50):
        v = matrix @ (v / np.linalg.norm(v))
    largest = np.linalg.norm(v)
    for share, least in ((1e-3, 0.7), (1e-2, 0.85)):
        vector = jax.flatten_util.ravel_pytree(b)[0]
        want = back(np.linalg.solve(matrix + share * largest * np.eye(len(matrix)), vector))
        found = cosine(made(share * largest), want)
        print(share, found, cosine(b, want))
        assert found > max(least, cosine(b, want))


def dense_curvature(params, train, valid):
    """The Gauss-Newton matrix of the digits network, the gradient of its validation loss, and the
    way back from a vector."""
    flat, back = jax.flatten_util.ravel_pytree(params)

    @jax.jit
    def both(flat):
        out = mlp(back(flat), train)
        jacobian = jax.jacobian(lambda v: mlp(back(v), train))(flat)
        chance = jax.nn.softmax(out)
        curve = jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(chance) / len(out)
        half = jnp.einsum("nci,ncd->ndi", jacobian, curve).reshape(-1, flat.size)
        matrix = half.T @ jacobian.reshape(-1, flat.size)
        return matrix, jax.grad(lambda p: jnp.mean(classes(mlp(p, valid), valid)))(back(flat))

    matrix, b = both(flat)
    return np.asarray(matrix), b, back


@pytest.mark.slow
def test_as_a_direct_inverse_on_digits():
    """Cosine with the exact damped inverse at damping 1e-3 and 1e-2 of the largest eigenvalue: at
    least .7 and .85, above the identity and the diagonal."""
    train, valid = digits(600)
    params = trained(mlp, mlp_params(), train)
    matrix, b, back = dense_curvature(params, train, valid)
    vector = jax.flatten_util.ravel_pytree(b)[0]
    largest = float(jnp.linalg.eigvalsh(matrix)[-1])
    for share, least in ((1e-3, 0.7), (1e-2, 0.85)):
        damping = share * largest
        want = back(jnp.linalg.solve(matrix + damping * jnp.eye(len(matrix)), vector))
        found = {}
        for name, make in (
            ("kfac", bx.linear.kfac),
            ("ekfac", bx.linear.ekfac),
            ("diagonal", bx.linear.diagonal),
        ):
            x, info = answer(
                make((mlp, classes), draws="all"), mlp, classes, train, params, b, damping
            )
            found[name] = cosine(x, want)
            assert np.isfinite(info.residual)
        found["sampled"] = cosine(
            answer(
                bx.linear.ekfac((mlp, classes), draws=4), mlp, classes, train, params, b, damping
            )[0],
            want,
        )
        found["identity"] = cosine(b, want)
        print(share, {k: round(v, 3) for k, v in found.items()})
        assert min(found["ekfac"], found["kfac"]) > least and found["sampled"] > least - 0.05
        assert found["ekfac"] > max(found["diagonal"], found["identity"])


# ---- as users come: through estimates, runs, devices and checkpoints


def small_network(p, outer, batch):
    return jnp.tanh(batch["x"] @ p["w"] + p["b"][None]) @ p["v"]


def small_loss(out, outer, batch):
    return jnp.mean(jax.nn.sigmoid(outer)[batch["y"]] * classes(out, batch))


def small_inner(p, outer, batch):
    return small_loss(small_network(p, outer, batch), outer, batch) + 5e-3 * sum(
        jnp.sum(a * a) for a in jax.tree.leaves(p)
    )


def small_outer(p, outer, batch):
    return jnp.mean(classes(small_network(p, outer, batch), batch))


PAIR = (small_network, small_loss)
SMALL = {"w": normal(5, 6), "b": normal(6), "v": normal(6, 3, scale=0.3)}
ROWS = {"x": normal(32, 5, seed=7), "y": jax.random.randint(jax.random.key(8), (32,), 0, 3)}
WEIGHTS = jnp.zeros(3)
FOUND = bx.linear.layers(small_inner, SMALL, WEIGHTS, ROWS)
SOLVER = bx.inner.optax(optax.sgd(0.5), 30)


def estimate(linear, **settings):
    method = bx.hypergradient.implicit(linear, **settings)
    return bx.value_and_hypergrad(small_inner, small_outer, solver=SOLVER, hypergradient=method)


def test_layers_say_what_they_are():
    lines = repr(FOUND).splitlines()
    assert len(lines) == 4 and "5 x 6" in lines[3] and "full 6" in lines[1]
    assert "diagonal" in repr(bx.linear.layers(small_inner, SMALL, WEIGHTS, ROWS, kronecker=False))
    objective = bx.objective(lambda p, o, b, key: small_inner(p, o, b), keyed=True)
    assert bx.linear.layers(objective, SMALL, WEIGHTS, ROWS) == FOUND


@pytest.mark.turns
@pytest.mark.parametrize(
    "solver", [bx.linear.cg, pytest.param(bx.linear.minres, marks=pytest.mark.slow)]
)
def test_preconditioned_hypergradients_are_the_plain_ones_for_fewer_products(solver):
    held = bx.linear.ekfac(PAIR, damping=1e-2, layers=FOUND)
    plain = bx.linear.gauss_newton(
        *PAIR, solver(200, 1e-8), regularizer=lambda p, o, b: 5e-3 * tree.dot(p, p)
    )
    better = bx.linear.gauss_newton(
        *PAIR,
        solver(200, 1e-8, preconditioner=held),
        regularizer=lambda p, o, b: 5e-3 * tree.dot(p, p),
    )
    a = jax.jit(estimate(plain))(SMALL, WEIGHTS, ROWS, ROWS)
    fn = jax.jit(estimate(better, refresh=2))
    b = fn(SMALL, WEIGHTS, ROWS, ROWS)
    np.testing.assert_allclose(b.grad, a.grad, rtol=1e-5, atol=1e-9)
    assert int(b.info["adjoint_iterations"]) < int(a.info["adjoint_iterations"])
    first = fn(SMALL, WEIGHTS, ROWS, ROWS, state=estimate(better, refresh=2).init(SMALL))
    second = fn(SMALL, WEIGHTS, ROWS, ROWS, state=first.state)
    third = fn(SMALL, WEIGHTS, ROWS, ROWS, state=second.state)
    keys = [
        jax.random.key_data(jax.tree.leaves(e.state.method.preconditioner.key)[0])
        for e in (first, second, third)
    ]
    assert (keys[0] == keys[1]).all() and (keys[1] != keys[2]).any()  # made, kept, made


def run(num_steps, linear, **given):
    algorithm = bx.algorithms.double_loop(
        SOLVER, bx.hypergradient.implicit(linear, refresh=2, max_residual=jnp.inf), optax.sgd(0.3)
    )
    return bx.solve_bilevel(
        small_inner,
        small_outer,
        SMALL,
        WEIGHTS,
        inner_data=ROWS,
        outer_data=ROWS,
        algorithm=algorithm,
        num_steps=num_steps,
        key=KEY,
        **given,
    )


@pytest.mark.slow
@pytest.mark.parametrize("make", [bx.linear.kfac, bx.linear.ekfac, bx.linear.diagonal])
def test_a_run_descends_and_goes_on_to_the_bit(make, tmp_path):
    kronecker = make is not bx.linear.diagonal
    linear = make(
        PAIR,
        damping=1e-2,
        layers=bx.linear.layers(small_inner, SMALL, WEIGHTS, ROWS, kronecker=kronecker),
    )
    whole = run(6, linear)
    rest = run(3, linear, state=run(3, linear).state)
    same = jax.tree.map(
        lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()),
        whole.state.algorithm.outer,
        rest.state.algorithm.outer,
    )
    assert all(jax.tree.leaves(same))
    assert whole.history["value"][-1] < whole.history["value"][0] and not whole.result.failed
    checkpoint = bx.checkpoint.every(3, tmp_path)
    run(3, linear, checkpoint=checkpoint)
    resumed = run(6, linear, checkpoint=checkpoint)
    np.testing.assert_array_equal(resumed.outer_params, whole.outer_params)


@pytest.mark.slow
@pytest.mark.parametrize("make", [bx.linear.kfac, bx.linear.ekfac])
def test_eight_devices_are_one(make):
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    fn = jax.jit(estimate(make(PAIR, damping=1e-2, draws="all"), max_residual=jnp.inf))
    alone = fn(SMALL, WEIGHTS, ROWS, ROWS).grad
    rows = jax.device_put(ROWS, NamedSharding(mesh, P("data")))
    params, weights = jax.device_put((SMALL, WEIGHTS), NamedSharding(mesh, P()))
    np.testing.assert_allclose(fn(params, weights, rows, rows).grad, alone, rtol=1e-8, atol=1e-12)
    wide = {"w": normal(8, 16), "b": normal(16), "v": normal(16, 3, scale=0.3)}
    data = {"x": normal(32, 8, seed=9), "y": ROWS["y"]}
    alone = fn(wide, WEIGHTS, data, data).grad
    fsdp = {
        "w": NamedSharding(mesh, P(None, "data")),
        "b": NamedSharding(mesh, P("data")),
        "v": NamedSharding(mesh, P("data", None)),
    }
    found = fn(
        jax.device_put(wide, fsdp),
        weights,
        jax.device_put(data, NamedSharding(mesh, P("data"))),
        data,
    ).grad
    np.testing.assert_allclose(found, alone, rtol=1e-7, atol=1e-12)


def test_gauss_newton_products_are_dense_ones():
    from bilevax.linear.gauss_newton import product
    from bilevax.linear.preconditioner import Point

    call = lambda fn, first, rows: fn(first, WEIGHTS, rows)
    flat, back = jax.flatten_util.ravel_pytree(SMALL)
    v = normal(flat.size, seed=11)

    @jax.jit
    def both(v):
        point = Point(None, SMALL, ROWS, call, 0.1)
        mine = product(point, *PAIR)
        out = small_network(SMALL, WEIGHTS, ROWS)
        jacobian = jax.jacobian(lambda f: small_network(back(f), WEIGHTS, ROWS).ravel())(flat)
        curve = jax.hessian(lambda o: small_loss(o.reshape(out.shape), WEIGHTS, ROWS))(out.ravel())
        return jax.flatten_util.ravel_pytree(mine(back(v)))[0], jacobian.T @ (
            curve @ (jacobian @ v)
        ) + 0.1 * v

    mine, dense_product = both(v)
    np.testing.assert_allclose(mine, dense_product, atol=1e-12)


@pytest.mark.slow
def test_influence_by_layers_and_with_iterations():
    """On a small network: the direct answer points where the damped Gauss-Newton system's does, and
    iterations go there."""
    train = trained(lambda p, b: small_network(p, WEIGHTS, b), SMALL, ROWS, steps=300)
    pair = (lambda p, b: small_network(p, WEIGHTS, b), classes)
    measure = lambda p, b: classes(pair[0](p, b), b)[:3]
    scores = lambda linear: bx.attribution.implicit(
        lambda p, b: classes(pair[0](p, b), b),
        measure,
        train,
        ROWS,
        ROWS,
        linear=linear,
        damping=1e-2,
    )
    inside = bx.linear.ekfac(pair, draws="all")
    exact_ = scores(bx.linear.gauss_newton(*pair, bx.linear.cholesky()))
    alone, iterated = (
        scores(inside),
        scores(bx.linear.gauss_newton(*pair, bx.linear.cg(100, 1e-10, preconditioner=inside))),
    )
    astra = scores(bx.linear.gauss_newton(*pair, bx.linear.neumann(200, preconditioner=inside)))
    flat = lambda found: np.asarray(found.scores).ravel()
    angle = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert angle(flat(alone), flat(exact_)) > 0.8
    np.testing.assert_allclose(flat(iterated), flat(exact_), atol=1e-6 * np.abs(flat(exact_)).max())
    assert angle(flat(astra), flat(exact_)) > 0.999
    # the answer alone is no solution of this system, and says so
    assert np.isfinite(alone.info["residual"]).all()
    np.testing.assert_array_equal(alone.info["code"] == 0, alone.info["residual"] < 1)


def test_labels_drawn_from_the_model_are_the_fisher_matrix():
    """With labels of a regression drawn with variance one, half squares have the Gauss-Newton
    matrix as Fisher matrix."""
    network, loss, batch, params = regression(1)
    relabel = lambda w, rows, key: {
        **rows,
        "y": network(w, rows) + jax.random.normal(key, rows["y"].shape),
    }
    b = normal(*params.shape, seed=5)
    want = exact(network, loss, batch, params, b, 3.0)
    x, _ = answer(bx.linear.ekfac(relabel=relabel, draws=300), network, loss, batch, params, b, 3.0)
    assert float(tree.norm(tree.sub(x, want)) / tree.norm(want)) < 0.1


def test_where_only_products_are_known():
    for solver in (
        bx.linear.ekfac(),
        bx.linear.cg(preconditioner=bx.linear.kfac()),
        bx.linear.gauss_newton(*PAIR, bx.linear.cg()),
    ):
        with pytest.raises(TypeError, match="the objective behind it"):
            solver(lambda v: v, jnp.ones(3), None)
    with pytest.raises(ValueError, match="refresh: got 2"):
        bx.hypergradient.implicit(bx.linear.ekfac(), refresh=2)
    with pytest.raises(ValueError, match="layers: got"):
        estimate(bx.linear.ekfac(layers=FOUND)).init({**SMALL, "v": jnp.ones((6, 4))})


def test_half_precision_keeps_its_dtype():
    down = lambda t: jax.tree.map(lambda a: a.astype(jnp.bfloat16) if tree.is_float(a) else a, t)
    found = jax.jit(estimate(bx.linear.ekfac(PAIR, damping=1e-2), max_residual=jnp.inf))(
        down(SMALL), down(WEIGHTS), down(ROWS), down(ROWS)
    )
    assert found.grad.dtype == jnp.bfloat16 and bool(jnp.isfinite(found.grad).all())


@pytest.mark.slow
def test_lanes():
    fn = estimate(bx.linear.ekfac(PAIR, damping=1e-2), max_residual=jnp.inf)
    weights = jnp.stack([WEIGHTS, WEIGHTS + 1.0])
    together = jax.jit(jax.vmap(lambda o: fn(SMALL, o, ROWS, ROWS).grad))(weights)
    np.testing.assert_allclose(
        together[1], jax.jit(fn)(SMALL, weights[1], ROWS, ROWS).grad, rtol=1e-8, atol=1e-12
    )
