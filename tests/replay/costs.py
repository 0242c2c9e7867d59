"""Floating-point operations of compiled programs, counted by the compiler, on a transformer and a
perceptron."""

import jax
import jax.numpy as jnp
import optax

WIDTH, HEADS, LAYERS, LENGTH, ROWS, SYMBOLS = 64, 4, 2, 64, 16, 65


def transformer():
    """``(loss, params, weights, batch)`` of a character model with a weight a row."""
    keys = iter(jax.random.split(jax.random.key(0), 4 * LAYERS + 3))
    normal = lambda *shape: jax.random.normal(next(keys), shape, jnp.float32) * shape[0] ** -0.5
    layer = lambda: {
        "qkv": normal(WIDTH, 3 * WIDTH),
        "out": normal(WIDTH, WIDTH),
        "up": normal(WIDTH, 4 * WIDTH),
        "down": normal(4 * WIDTH, WIDTH),
    }
    params = {
        "embed": normal(SYMBOLS, WIDTH),
        "place": normal(LENGTH, WIDTH),
        "head": normal(WIDTH, SYMBOLS),
        "layers": [layer() for _ in range(LAYERS)],
    }
    return (
        language_loss,
        params,
        jnp.ones(ROWS, jnp.float32),
        jnp.zeros((ROWS, LENGTH + 1), jnp.int32),
    )


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)


def language_loss(params, weights, tokens):
    x = params["embed"][tokens[:, :-1]] + params["place"][None]
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, None]
    for layer in params["layers"]:
        parts = (norm(x) @ layer["qkv"]).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        query, key, value = (parts[:, :, i] for i in range(3))
        scores = jnp.einsum("bihd,bjhd->bhij", query, key) * (WIDTH // HEADS) ** -0.5
        mixed = jnp.einsum(
            "bhij,bjhd->bihd", jax.nn.softmax(jnp.where(mask, scores, -1e9), -1), value
        )
        x = x + mixed.reshape(x.shape) @ layer["out"]
        x = x + jax.nn.gelu(norm(x) @ layer["up"]) @ layer["down"]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        norm(x) @ params["head"], tokens[:, 1:]
    )
    return jnp.mean(weights * jnp.mean(losses, -1))


def perceptron():
    """The same of a network with two hidden layers."""
    params = {
        "a": jnp.zeros((64, 128), jnp.float32),
        "b": jnp.zeros((128, 128), jnp.float32),
        "c": jnp.zeros((128, 10), jnp.float32),
    }
    return (
        dense_loss,
        params,
        jnp.ones(64, jnp.float32),
        (jnp.zeros((64, 64), jnp.float32), jnp.zeros(64, jnp.int32)),
    )


def dense_loss(params, weights, batch):
    logits = jnp.tanh(jnp.tanh(batch[0] @ params["a"]) @ params["b"]) @ params["c"]
    return jnp.mean(weights * optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


def count(fn, *args) -> tuple[float, int]:
    """Operations of one call (a loop's body counts once) and bytes of temporaries."""
    compiled = jax.jit(fn).lower(*args).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


OPTIMIZER = optax.adam(1e-3, eps_root=1e-8)


def training_step(loss):
    """A plain step, as anyone would write it: what costs are counted in."""

    def step(params, opt, weights, batch):
        with jax.numpy_dtype_promotion("standard"):
            updates, opt = OPTIMIZER.update(jax.grad(loss)(params, weights, batch), opt, params)
        return optax.apply_updates(params, updates), opt

    return step
