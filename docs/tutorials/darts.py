# %% [markdown]
# # DARTS
#
# Which operation belongs into each layer? All candidates are mixed by a softmax of
# logits; the weights are trained on one half of the data, and the logits by how the
# *trained* network does on the other half. At the end, the largest logit of each
# layer is the architecture.

# %%
import bilevax as bx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
x, y = (
    (images[order] / 16).astype(np.float32).reshape(-1, 8, 8, 1),
    labels[order],
)
train, valid, test = (
    (x[:500], y[:500]),
    (x[500:1000], y[500:1000]),
    (x[1000:], y[1000:]),
)

# %% [markdown]
# ## A mixed layer
#
# Three candidates: a convolution of 3 x 3, one of 1 x 1, and nothing. Only the
# first sees neighbours.

# %%
NAMES = ("conv 3x3", "conv 1x1", "skip")
LAYERS, CHANNELS = 2, 8


def conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def network(w, logits, x):
    x = conv(x, w["stem"])
    for layer, logit in zip(w["layers"], logits, strict=True):
        share = jax.nn.softmax(logit)
        x = (
            share[0] * conv(jax.nn.relu(x), layer["3"])
            + share[1] * conv(jax.nn.relu(x), layer["1"])
            + share[2] * x
        )
    return jnp.mean(jax.nn.relu(x), (1, 2)) @ w["head"]


def loss(w, logits, batch):
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(
            network(w, logits, batch[0]), batch[1]
        )
    )


def inner(w, logits, batch):
    return loss(w, logits, batch) + 1e-4 * sum(
        jnp.sum(a**2) for a in jax.tree.leaves(w)
    )


# %% [markdown]
# ## The search
#
# The paper differentiates through one step of SGD by a central difference:
# `finite_difference`. Its length is the step size's; Adam outside forgives that.
# Any other method is the same line: `unrolled()` differentiates all inner steps.

# %%
keys = iter(jax.random.split(jax.random.key(0), 8))
kernel = lambda size, a, b: (
    jax.random.normal(next(keys), (size, size, a, b))
    / (size * size * a) ** 0.5
)
weights = {
    "stem": kernel(1, 1, CHANNELS),
    "head": jax.random.normal(next(keys), (CHANNELS, 10)) / CHANNELS**0.5,
    "layers": [
        {
            "3": kernel(3, CHANNELS, CHANNELS),
            "1": kernel(1, CHANNELS, CHANNELS),
        }
        for _ in range(LAYERS)
    ],
}
algorithm = bx.algorithms.double_loop(
    bx.inner.optax(optax.adam(1e-2), 5),
    bx.hypergradient.finite_difference(),
    optax.adam(5e-2),
)
solution = bx.solve_bilevel(
    inner,
    loss,
    weights,
    jnp.zeros((LAYERS, 3)),
    inner_data=bx.data.minibatches(train, 64),
    outer_data=bx.data.minibatches(valid, 64),
    algorithm=algorithm,
    num_steps=100,
    key=jax.random.key(1),
    keep="last",
    metrics=bx.metrics(
        lambda w, a, d: {
            "accuracy": jnp.mean(jnp.argmax(network(w, a, d[0]), 1) == d[1])
        },
        test,
        every=10,
    ),
)
shares = np.asarray(jax.nn.softmax(solution.outer_params, axis=-1))
for layer, share in enumerate(shares):
    print(
        f"layer {layer}: "
        + ", ".join(
            f"{name} {part:.2f}"
            for name, part in zip(NAMES, share, strict=True)
        )
    )
print(
    "test accuracy of the mixture:",
    round(float(solution.history["accuracy"][90]), 2),
)
assert shares[:, 0].max() > 0.5  # a digit is its neighbours

# %%
figure, axes = plt.subplots(figsize=(6, 2.5))
bottom = np.zeros(LAYERS)
for name, part, color in zip(
    NAMES, shares.T, ("#0072B2", "#E69F00", "#009E73"), strict=True
):
    axes.barh(range(LAYERS), part, left=bottom, color=color, label=name)
    bottom += part
axes.set(
    yticks=range(LAYERS),
    yticklabels=[f"layer {i}" for i in range(LAYERS)],
    xlabel="share",
)
figure.legend(loc="outside upper center", ncols=3)

# %% [markdown]
# Train the network with the largest share alone afresh before you judge it: the
# mixture's own accuracy is not what a chosen architecture reaches. With Flax the
# mixture is `bx.nn.SoftChoice`, see [With Flax](../flax.md).
