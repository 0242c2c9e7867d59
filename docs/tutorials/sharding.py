# %% [markdown]
# # Eight devices
#
# The same run on one device and on eight. Where no eight accelerators are at hand,
# a processor can pretend: start with
# `XLA_FLAGS=--xla_force_host_platform_device_count=8`. What runs there runs on
# eight GPUs.

# %%
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import bilevax as bx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

print(jax.device_count(), "devices")


def inner(w, scale, batch):
    hidden = jnp.tanh(batch["x"] @ (w["in"] * jnp.exp(scale)[:, None]))
    return jnp.mean((hidden @ w["out"] - batch["y"]) ** 2) + 1e-3 * sum(
        jnp.sum(a**2) for a in jax.tree.leaves(w)
    )


def outer(w, scale, batch):
    return jnp.mean(
        (
            jnp.tanh(batch["x"] @ (w["in"] * jnp.exp(scale)[:, None]))
            @ w["out"]
            - batch["y"]
        )
        ** 2
    )


def rows(seed):
    x = jax.random.normal(jax.random.key(seed), (256, 64))
    return {"x": x, "y": jnp.sin(x[:, 0]) + 0.1 * x[:, 1]}


start = (
    {
        "in": jax.random.normal(jax.random.key(2), (64, 128)) / 8,
        "out": jnp.zeros(128),
    },
    jnp.zeros(64),
)
algorithm = bx.algorithms.double_loop(
    bx.inner.optax(optax.adam(1e-2), 5),
    bx.hypergradient.sama(),
    optax.adam(1e-2),
)
settings = dict(
    inner_data=bx.data.minibatches(rows(0), 64),
    outer_data=rows(1),
    algorithm=algorithm,
    num_steps=20,
    key=jax.random.key(3),
)

# %% [markdown]
# ## One argument
#
# `data_parallel` keeps the state whole on every device and splits the rows of a
# batch; `fsdp` splits the state as well. The objectives stay what they are.

# %%
runs = {
    "one device": bx.solve_bilevel(inner, outer, *start, **settings),
    "data parallel": bx.solve_bilevel(
        inner, outer, *start, sharding=bx.sharding.data_parallel(), **settings
    ),
    "fsdp": bx.solve_bilevel(
        inner, outer, *start, sharding=bx.sharding.fsdp(), **settings
    ),
}
for name, run in runs.items():
    held = run.inner_params["in"].addressable_shards[0].data.shape
    print(
        f"{name}: value {run.history['value'][-1]:.4f}, "
        f"a device holds {held} of the first matrix"
    )
alone = runs["one device"].history["value"]
assert all(
    np.allclose(run.history["value"], alone, rtol=1e-3)
    for run in runs.values()
)

# %% [markdown]
# The same key draws the same batches on any number of devices, so the curves lie on
# each other, up to rounding:

# %%
figure, axes = plt.subplots(figsize=(6, 3))
for (name, run), style in zip(runs.items(), ("-", "--", ":"), strict=True):
    axes.semilogy(run.history["value"], style, label=name, linewidth=2)
axes.set(xlabel="outer step", ylabel="outer value")
axes.legend()

# %% [markdown]
# ## What it takes, before it runs
#
# A dry run compiles a step and counts what every device holds, and what the devices
# say to each other.

# %%
report = bx.sharding.dry_run(
    bx.solve_bilevel,
    inner,
    outer,
    *start,
    sharding=bx.sharding.fsdp(),
    **{**settings, "num_steps": 1},
)
print(
    f"{report.state_bytes:,} bytes of state a device, "
    f"of {report.total_bytes:,} in all"
)

# %% [markdown]
# [Scaling](../scaling.md) has tasks over devices, several hosts, checkpoints, and
# what each method communicates.
