# %% [markdown]
# # MAML
#
# Sinusoids of random amplitude and phase; ten points of each are shown, and a
# network is to adapt to them in a few gradient steps. What is learned is the
# *initialisation* from which these steps start: it is the outer variable, and the
# lower level has one copy of the network a task.

# %%
import bilevax as bx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

TASKS, SHOTS = 16, 10


def network(w, x):
    hidden = jnp.tanh(x[:, None] * w["a"] + w["b"])
    return jnp.tanh(hidden @ w["c"]) @ w["d"]


def loss(
    w, start, batch
):  # of one task; the start enters by where the steps begin
    return jnp.mean((network(w, batch["x"]) - batch["y"]) ** 2)


# %% [markdown]
# ## Episodes
#
# One draw an outer step feeds both levels: the tasks that are adapted to are the
# tasks that are judged. Each task's points are cut into the support, on which it
# adapts, and the query, on which it is judged.


# %%
def draw(key, step):
    amplitude, phase, points = jax.random.split(key, 3)
    a = jax.random.uniform(amplitude, (TASKS, 1), minval=0.5, maxval=3.0)
    p = jax.random.uniform(phase, (TASKS, 1), maxval=jnp.pi)
    x = jax.random.uniform(
        points, (TASKS, 2 * SHOTS), minval=-4.0, maxval=4.0
    )
    return {"x": x, "y": a * jnp.sin(x + p)}


episodes = bx.data.episodes(draw)
support = episodes.map(
    lambda batch: {name: a[:, :SHOTS] for name, a in batch.items()}
)
query = episodes.map(
    lambda batch: {name: a[:, SHOTS:] for name, a in batch.items()}
)

# %% [markdown]
# ## The run
#
# `bx.tasks` makes an objective of many tasks from that of one: the sum inside, so
# that each task's gradient is its own, and the mean outside. Every solve starts at
# copies of the outer parameters, and only unrolling sees a start.

# %%
keys = jax.random.split(jax.random.key(0), 3)
start = {
    "a": jax.random.normal(keys[0], (40,)),
    "b": jnp.zeros(40),
    "c": jax.random.normal(keys[1], (40, 40)) / 40**0.5,
    "d": jax.random.normal(keys[2], (40,)) / 40**0.5,
}
copies = bx.task_copies(TASKS)
algorithm = bx.algorithms.double_loop(
    bx.inner.optax(optax.sgd(0.02), 5),
    bx.hypergradient.unrolled(),
    optax.adam(3e-3),
)
solution = bx.solve_bilevel(
    bx.tasks(loss, "sum"),
    bx.tasks(loss),
    copies(start),
    start,
    inner_data=support,
    outer_data=query,
    inner_init=copies,
    algorithm=algorithm,
    num_steps=1000,
    key=jax.random.key(1),
    keep="last",
)
value = solution.history["value"]
print(
    f"query loss after five steps: {value[:50].mean():.2f} at first, "
    f"{value[-50:].mean():.2f} at last"
)
assert value[-50:].mean() < 0.5 * value[:50].mean()

# %% [markdown]
# ## A task that was never seen
#
# Five steps from the learned start, and from the random one.

# %%
grid = jnp.linspace(-4, 4, 200)
x = jnp.linspace(-3.5, 0.5, SHOTS)
new = {"x": x, "y": 2.2 * jnp.sin(x + 1.0)}
figure, axes = plt.subplots(figsize=(7, 3))
axes.plot(grid, 2.2 * jnp.sin(grid + 1.0), color="#808080", label="the task")
axes.plot(new["x"], new["y"], "o", color="#808080", label="shown")
errors = {}
for name, w, color in (
    ("random start", start, "#E69F00"),
    ("learned start", solution.outer_params, "#0072B2"),
):
    for _ in range(5):
        w = jax.tree.map(
            lambda a, g: a - 0.02 * g, w, jax.grad(loss)(w, None, new)
        )
    axes.plot(
        grid, network(w, grid), color=color, label=f"{name}, five steps"
    )
    errors[name] = float(
        jnp.mean((network(w, grid) - 2.2 * jnp.sin(grid + 1.0)) ** 2)
    )
axes.legend()
print({name: round(error, 2) for name, error in errors.items()})
assert errors["learned start"] < 0.5 * errors["random start"]

# %% [markdown]
# iMAML is the same with `bx.hypergradient.implicit()` and a term in the lower
# level that pulls to the start, the sum of `(w - start) ** 2` over the leaves, so
# strong that the few inner steps solve it; networks with BatchNorm hand
# `task_copies(n, model_state)` their statistics. [Data
# loaders](../data-loaders.md#episodes) says more of episodes.
