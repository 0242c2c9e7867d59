# %% [markdown]
# # Three levels
#
# A model is *pretrained* on weighted examples from elsewhere, then *finetuned* on a
# few of its own, pulled towards the pretrained one, and the weights are learned by
# how the finetuned model does on validation data. Three objectives, one function
# each, and nothing else is declared.

# %%
import bilevax as bx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

keys = jax.random.split(jax.random.key(0), 6)
truth = jax.random.normal(keys[0], (20,))
source_x = jax.random.normal(keys[1], (200, 20))
related = np.arange(200) < 120  # the others come from another task
source_y = jnp.where(
    related, source_x @ truth, source_x @ jax.random.normal(keys[2], (20,))
)
own_x, valid_x = (
    jax.random.normal(keys[3], (12, 20)),
    jax.random.normal(keys[4], (40, 20)),
)
data = {
    "pretrained": (source_x, source_y),
    "finetuned": (
        own_x,
        own_x @ truth + 0.3 * jax.random.normal(keys[5], (12,)),
    ),
    "weights": (valid_x, valid_x @ truth),
}

# %% [markdown]
# ## One function a level
#
# Each reads what it needs from a dict of all variables.


# %%
def error(w, batch):
    return (batch[0] @ w - batch[1]) ** 2


def pretrain(params, batch):
    shares = jax.nn.sigmoid(params["weights"])
    return jnp.mean(
        shares * error(params["pretrained"], batch)
    ) + 1e-3 * jnp.sum(params["pretrained"] ** 2)


def finetune(params, batch):
    near = jnp.sum((params["finetuned"] - params["pretrained"]) ** 2)
    return jnp.mean(error(params["finetuned"], batch)) + 0.1 * near


def judge(params, batch):
    return jnp.mean(error(params["finetuned"], batch))


levels = [
    bx.Level(
        "pretrained",
        pretrain,
        solver=bx.inner.optax(optax.sgd(0.3), 10),
        hypergradient=bx.hypergradient.implicit(),
    ),
    bx.Level(
        "finetuned",
        finetune,
        solver=bx.inner.optax(optax.sgd(0.1), 10),
        hypergradient=bx.hypergradient.implicit(),
    ),
    bx.Level("weights", judge, solver=optax.adam(0.1)),
]
start = {
    "pretrained": jnp.zeros(20),
    "finetuned": jnp.zeros(20),
    "weights": jnp.zeros(200),
}
print(bx.explain(levels, start, data))

# %% [markdown]
# The finetuned model reads the pretrained one, which does not react to it: a chain.
# Written the other way, with the pretrained model's objective reading the finetuned
# one, it would be a nest, and its gradient another; the functions say which.

# %%
solution = bx.solve_multilevel(levels, start, data=data, num_steps=150)
value = solution.history["value"]
shares = np.asarray(jax.nn.sigmoid(solution.outer_params))
print(f"validation loss {value[0]:.2f} -> {value[-1]:.3f}")
print(
    f"mean weight of related examples {shares[related].mean():.2f}, "
    f"of the others {shares[~related].mean():.2f}"
)
assert shares[related].mean() > 1.5 * shares[~related].mean()

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.semilogy(value, color="#0072B2")
left.set(xlabel="step", ylabel="validation loss")
right.hist(
    shares[related], np.linspace(0, 1, 21), color="#0072B2", label="related"
)
right.hist(
    shares[~related],
    np.linspace(0, 1, 21),
    color="#E69F00",
    alpha=0.7,
    label="another task",
)
right.set(xlabel="learned weight")
right.legend()

# %% [markdown]
# Both models are linear and each is solved, hence `implicit()`. Where a level is a
# network that is trained for a few steps, write `unrolled()` in its place.
#
# [Multilevel](../multilevel.md) has nests, methods across levels and loops of one's
# own; `examples/learning_by_ignoring.py` is such a chain on images.
