"""The same metagradients on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.replay import problem as trainings


def problem():
    """Rows and hidden units that eight devices divide."""
    keys = jax.random.split(jax.random.key(0), 4)
    steps, rows = 9, 16
    params = {
        "hidden": jax.random.normal(keys[0], (4, 16)),
        "bias": jnp.zeros(16),
        "out": jax.random.normal(keys[1], (16,)),
    }
    index = jax.random.randint(keys[2], (steps, rows), 0, 40)
    x = jax.random.normal(keys[3], (40, 4))
    data = {"x": x[index], "y": jnp.sin(x[index].sum(-1)), "index": index}
    return (
        params,
        {"weight": jnp.ones(40), "rate": jnp.float64(1e-2)},
        data,
        (x[:8], jnp.cos(x[:8].sum(-1))),
    )


def loss(params, outer, batch):
    return jnp.mean(
        outer["weight"][batch["index"]] * (trainings.predict(params, batch["x"]) - batch["y"]) ** 2
    )


def quality(params, outer, batch):
    return jnp.mean((trainings.predict(params, batch[0]) - batch[1]) ** 2)


def adam(outer):
    return optax.adam(outer["rate"], eps_root=1e-8)


def call(params, outer, data, batch, quality=quality, **keywords):
    fn = bx.replay.value_and_metagrad(loss, quality, adam, 9, **keywords)
    held = jax.tree.map(np.asarray, data)
    return fn(
        params, outer, bx.replay.reader(lambda step: jax.tree.map(lambda a: a[step], held)), batch
    )


@pytest.mark.turns
@pytest.mark.parametrize("name", ["data_parallel", "fsdp"])
def test_eight_devices(name):
    sharding = (
        bx.sharding.data_parallel() if name == "data_parallel" else bx.sharding.fsdp(min_size=16)
    )
    arguments = problem()
    alone = call(*arguments)
    found = call(*arguments, sharding=sharding)
    for got, want in (
        (found.value, alone.value),
        (found.grad, alone.grad),
        (found.init_grad, alone.init_grad),
    ):
        assert trainings.distance(got, want) < 1e-12
    hidden = found.inner_params["hidden"]
    assert len(hidden.sharding.device_set) == 8
    assert hidden.addressable_shards[0].data.shape == (
        (4, 16) if name == "data_parallel" else (4, 2)
    )
    assert (
        found.init_grad["hidden"].addressable_shards[0].data.shape
        == hidden.addressable_shards[0].data.shape
    )
    # What is kept lies on the devices as the state does: of fsdp's, each an eighth.
    assert found.info["executed"] == 13 + 1


def test_queries_on_eight_devices():
    rows = lambda params, outer, batch: (trainings.predict(params, batch[0]) - batch[1]) ** 2
    arguments = problem()
    alone = call(*arguments, quality=rows)
    found = call(*arguments, quality=rows, sharding=bx.sharding.fsdp(min_size=16))
    assert (
        trainings.distance(
            (found.value, found.grad, found.init_grad), (alone.value, alone.grad, alone.init_grad)
        )
        < 1e-12
    )


def test_refusals():
    with pytest.raises(TypeError, match="sharding: got"):
        bx.replay.value_and_metagrad(loss, quality, optax.sgd(0.1), 9, sharding="data")
    own = bx.replay.gradients(jax.grad(loss))
    with pytest.raises(TypeError, match="a gradient of your own"):
        bx.replay.value_and_metagrad(
            own, quality, optax.sgd(0.1), 9, sharding=bx.sharding.data_parallel()
        )
