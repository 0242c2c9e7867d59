# %% [markdown]
# # Hyper-cleaning
#
# Half of the training labels are wrong, and nobody knows which. A few examples have
# been checked. The lower level trains a classifier on *weighted* examples, the
# upper level asks for the weights with which that classifier is best on the checked
# ones.

# %%
import bilevax as bx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

images, labels = load_digits(return_X_y=True)
rng = np.random.default_rng(0)
order = rng.permutation(len(images))
x, y = images[order].astype(np.float32) / 16, labels[order]

train_x, train_y = x[:400], y[:400].copy()
wrong = rng.random(400) < 0.5
train_y[wrong] = rng.integers(0, 10, wrong.sum())
wrong = train_y != y[:400]  # a random label may be the right one
valid, test = (x[400:500], y[400:500]), (x[500:], y[500:])
print(f"{wrong.mean():.0%} of the labels are wrong")

# %% [markdown]
# ## Two functions
#
# Both take the inner parameters, the outer parameters and a batch, in this order.
# The model is linear; the outer parameters are a score an example, whose sigmoid is
# its weight.


# %%
def losses(w, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
        batch[0] @ w, batch[1]
    )


def inner(w, scores, batch):
    return jnp.mean(
        jax.nn.sigmoid(scores) * losses(w, batch)
    ) + 1e-3 * jnp.sum(w**2)


def outer(w, scores, batch):
    return jnp.mean(losses(w, batch))


# %% [markdown]
# ## A run
#
# The lower level is smooth and strongly convex, so it is solved by L-BFGS and
# differentiated implicitly. Adam moves the scores. A metric on data that neither
# level sees is taken on the way.

# %%
algorithm = bx.algorithms.double_loop(
    bx.inner.lbfgs(tol=1e-3),
    bx.hypergradient.implicit(bx.linear.cg(maxiter=20, tol=1e-3)),
    optax.adam(0.3),
)
accuracy = lambda w, scores, data: {
    "accuracy": jnp.mean(jnp.argmax(data[0] @ w, 1) == data[1])
}
solution = bx.solve_bilevel(
    inner,
    outer,
    jnp.zeros((64, 10)),
    jnp.zeros(400),
    inner_data=(train_x, train_y),
    outer_data=valid,
    algorithm=algorithm,
    num_steps=30,
    metrics=bx.metrics(accuracy, test),
)
history = solution.history["accuracy"]
print(
    f"test accuracy: {history[0]:.3f} with equal weights, "
    f"{history[-1]:.3f} with learned ones"
)
assert history[-1] > history[0] + 0.05

# %% [markdown]
# ## What the weights found
#
# Nobody told them which labels are wrong.

# %%
weights = np.asarray(jax.nn.sigmoid(solution.outer_params))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.plot(history, color="#0072B2")
left.set(xlabel="outer step", ylabel="test accuracy")
bins = np.linspace(0, 1, 21)
right.hist(weights[~wrong], bins, color="#0072B2", label="right label")
right.hist(
    weights[wrong], bins, color="#E69F00", alpha=0.7, label="wrong label"
)
right.set(xlabel="learned weight", ylabel="examples")
right.legend()
print(
    "mean weight: "
    f"{weights[wrong].mean():.2f} of wrong labels, "
    f"{weights[~wrong].mean():.2f} of right ones"
)
assert weights[wrong].mean() < 0.5 * weights[~wrong].mean()

# %% [markdown]
# ## How far to trust it

# %%
print("\n".join(line[:100] for line in solution.summary().splitlines()[1:5]))

# %% [markdown]
# The two residuals are small, so the hypergradient is right. Whether the *weights*
# are is another question: they are fitted to a hundred checked examples, and the
# test accuracy is what tells. `examples/hyper_cleaning.py` does this on MNIST with
# baselines and seeds.
