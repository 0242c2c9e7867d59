# %% [markdown]
# # Distillation of a data set
#
# Ten images from which a classifier is trained that does as well as one trained on
# hundreds: one image a class, learned pixel by pixel. The lower level trains on the
# ten, the upper level judges the result on the real data.

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
x, y = (images[order] / 16).astype(np.float32), labels[order]
train, test = (x[:1000], y[:1000]), (x[1000:], y[1000:])
ten = np.stack(
    [x[:1000][y[:1000] == digit][0] for digit in range(10)]
)  # a real one of each class, to begin with
targets = jnp.eye(10) - 0.1


# %% [markdown]
# ## Two levels
#
# A kernel regression on ten points is solved exactly, so the lower level is a
# system of ten equations, and its best response is differentiable by `bx.argmin` as
# well; here it is a ridge regression in random features, which L-BFGS solves.


# %%
features = jax.random.normal(jax.random.key(0), (64, 200)) / 4


def scores(w, x):
    return jnp.maximum(x @ features, 0.0) @ w


def inner(w, distilled, batch):  # train on the ten
    return jnp.mean((scores(w, distilled) - targets) ** 2) + 1e-3 * jnp.sum(
        w**2
    )


def outer(w, distilled, batch):  # judge on the real ones
    return jnp.mean((scores(w, batch[0]) - targets[batch[1]]) ** 2)


algorithm = bx.algorithms.double_loop(
    bx.inner.lbfgs(tol=1e-3, maxiter=100),
    bx.hypergradient.implicit(bx.linear.cg(maxiter=50, tol=1e-3)),
    optax.adam(2e-2),
)
accuracy = lambda w, distilled, data: {
    "accuracy": jnp.mean(jnp.argmax(scores(w, data[0]), 1) == data[1])
}
solution = bx.solve_bilevel(
    inner,
    outer,
    jnp.zeros((200, 10)),
    jnp.asarray(ten),
    outer_data=train,
    algorithm=algorithm,
    num_steps=150,
    project=lambda images: jnp.clip(images, 0.0, 1.0),
    metrics=bx.metrics(accuracy, test),
)
found = solution.history["accuracy"]
print(
    f"trained on ten real images: {found[0]:.2f}; "
    f"on the ten learned ones: {found[-1]:.2f}"
)
assert found[-1] > found[0] + 0.1

# %%
figure, axes = plt.subplots(2, 10, figsize=(9, 2.2))
for row, shown in zip(axes, (ten, solution.outer_params), strict=True):
    for ax, image in zip(row, np.asarray(shown), strict=True):
        ax.imshow(image.reshape(8, 8), cmap="gray", vmin=0, vmax=1)
        ax.set_axis_off()

# %% [markdown]
# Above the images that it began with, below the learned ones. For networks that are
# trained by SGD from a random start, take `unrolled()` and `inner_init=` with a
# `key`, so that the images work from any start; the [recipes](../recipes.md) have
# that.
