"""Episodes: every level sees the draw of the outer step, and so does every inner step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import hypergradient as H

KEY = jax.random.key(3)
TASKS = jnp.arange(32.0)


def adapt(w, meta, task):
    return 0.5 * (w - task) ** 2


def query(W, meta, tasks):
    return jnp.mean((W - tasks) ** 2), (W, tasks)


ALGORITHM = bx.algorithms.double_loop(
    bx.inner.optax(optax.sgd(1.0), 2), H.unrolled(), optax.sgd(0.1)
)


def solve(inner_data, outer_data, steps=4, **keywords):
    return bx.solve_bilevel(
        bx.tasks(adapt, "sum"), bx.objective(query, has_aux=True), jnp.zeros(4), jnp.zeros(()),
        inner_data=inner_data,
        outer_data=outer_data, inner_init=bx.task_copies(4), algorithm=ALGORITHM, num_steps=steps,
        **{"key": KEY, **keywords},
    )  # fmt: skip


class Rows:
    def __iter__(self):
        for i in range(8):
            yield np.asarray(TASKS[4 * i : 4 * i + 4])


def drawn_by_hand(key, step):
    return jax.random.uniform(key, (4,), TASKS.dtype)


SOURCES = {
    "minibatches": lambda: bx.data.minibatches(TASKS, 4),
    "partitioned": lambda: bx.data.partitioned(TASKS, 4),
    "function": lambda: drawn_by_hand,
    "iterable": Rows,
    "arrays": lambda: TASKS[:4],
}


@pytest.mark.turns
@pytest.mark.parametrize("name", SOURCES)
def test_the_tasks_adapted_to_are_those_asked_about(name):
    episodes = bx.data.episodes(SOURCES[name]())
    out = solve(episodes, episodes)
    adapted, asked = out.history["aux"]
    assert np.array_equal(adapted, asked) and (out.history["value"] == 0).all()
    assert (
        name == "arrays" or len({tuple(row) for row in asked.tolist()}) == 4
    )  # and others at each step


def half(batch):
    return 0.5 * batch


def test_maps_share_the_draws_of_their_parent():
    episodes = bx.data.episodes(bx.data.minibatches(TASKS, 4))
    out = solve(episodes, episodes.map(half).map(jnp.square))
    adapted, asked = out.history["aux"]
    assert np.array_equal((0.5 * adapted) ** 2, asked)


def test_a_second_parent_draws_for_itself():
    one, two = (bx.data.episodes(bx.data.minibatches(TASKS, 4)) for _ in range(2))
    adapted, asked = solve(one, two).history["aux"]
    assert not np.array_equal(adapted, asked)


@pytest.mark.turns
@pytest.mark.parametrize("name", ["minibatches", "iterable"])
def test_episodes_resume_to_the_bit(name, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    make = SOURCES[name]
    run = lambda steps, **keywords: solve(
        *[bx.data.episodes(make())] * 2, steps=steps, keep="last", **keywords
    )
    whole, first = run(6), run(2)
    second = run(4, state=first.state)
    assert np.array_equal(second.history["aux"][1], whole.history["aux"][1][2:])
    assert second.outer_params == whole.outer_params
    run(2, checkpoint=bx.checkpoint.every(2, tmp_path))
    resumed = run(6, checkpoint=bx.checkpoint.every(2, tmp_path))
    assert resumed.stats["resumed_from"] == 2 and resumed.outer_params == whole.outer_params


def test_second_order_products_see_the_episode():
    """The one-step pullback reads the batch of its mixed product: that of the step's episode."""
    g = lambda y, x, batch: 0.5 * y**2 + x * y * batch
    f = bx.objective(lambda y, x, batch: (y, batch), has_aux=True)
    episodes = bx.data.episodes(lambda key, step: jax.random.uniform(key, (), jnp.float64))
    loop = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.5), 3), H.one_step(), optax.sgd(0.0)
    )
    out = bx.solve_bilevel(
        g,
        f,
        jnp.zeros(()),
        jnp.zeros(()),
        inner_data=episodes,
        outer_data=episodes,
        algorithm=loop,
        num_steps=4,
        key=KEY,
    )
    assert np.array_equal(out.history["aux"], out.history["grad_norm"])


@pytest.mark.parametrize("nested", [False, True])
def test_levels_share_an_episode(nested):
    """Three levels land on what the episode says; a level inside another's objective sees it,
    too."""
    episodes = bx.data.episodes(bx.data.minibatches(TASKS, 1)).map(jnp.sum)
    z = lambda p, batch: 0.5 * (p["z"] - batch - (p["y"] if nested else 0.0)) ** 2 + 0.0 * p["x"]
    y = lambda p, batch: 0.5 * (p["y"] - batch) ** 2 + 0.0 * p["z"] + 0.0 * p["x"]
    top = bx.objective(
        lambda p, batch: ((p["z"] - batch) ** 2 + (p["y"] - batch) ** 2 + 0 * p["x"], batch),
        has_aux=True,
    )
    solver = bx.inner.optax(optax.sgd(1.0), 2)
    levels = [
        bx.Level("z", z, solver=solver, hypergradient=H.implicit()),
        bx.Level("y", y, solver=solver, hypergradient=H.implicit()),
        bx.Level("x", top, solver=optax.sgd(0.1)),
    ]
    out = bx.solve_multilevel(
        levels,
        dict.fromkeys("zyx", jnp.zeros(())),
        data=dict.fromkeys("zyx", episodes),
        num_steps=4,
        key=KEY,
    )
    wanted = (
        out.history["aux"] ** 2 if nested else 0 * out.history["aux"]
    )  # z = 2 batch where it follows y
    assert np.allclose(out.history["value"], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.turns
def test_a_run_of_episodes_under_vmap():
    episodes = bx.data.episodes(bx.data.minibatches(TASKS, 4))
    out = jax.vmap(lambda key: solve(episodes, episodes, key=key).history["value"])(
        jax.random.split(KEY, 3)
    )
    assert (out == 0).all()


@pytest.mark.turns
@pytest.mark.parametrize("name", ["minibatches", "iterable"])
@pytest.mark.parametrize("sharding", [bx.sharding.data_parallel, bx.sharding.tasks])
def test_episodes_on_several_devices(name, sharding):
    episodes = lambda: [bx.data.episodes(SOURCES[name]())] * 2
    lay = sharding(jax.devices()[:4])
    outer = bx.tasks(lambda w, meta, task: (w - task - 1) ** 2)
    run = lambda **keywords: bx.solve_bilevel(
        bx.tasks(adapt, "sum"), outer, jnp.zeros(4), jnp.zeros(()), **dict(zip(("inner_data",
        "outer_data"), episodes(), strict=True)),
        inner_init=bx.task_copies(4), algorithm=ALGORITHM, num_steps=3, key=KEY, **keywords,
    )  # fmt: skip
    assert np.allclose(run(sharding=lay).history["value"], run().history["value"], rtol=1e-12)


def test_refusals():
    with pytest.raises(TypeError, match="fn: got int; expected a function of a batch"):
        bx.data.episodes(TASKS).map(3)
    episodes = bx.data.episodes(bx.data.minibatches(TASKS, 4))
    with pytest.raises(ValueError, match="key: got None although the data is sampled"):
        solve(episodes, episodes, key=None)


@pytest.mark.parametrize("name", ["minibatches", "partitioned"])
def test_tasks_drawn_apart_are_refused(name):
    """Sampled for each level by itself, tasks adapted to are none of those asked about."""
    apart, episodes = SOURCES[name](), bx.data.episodes(SOURCES[name]())
    with pytest.raises(ValueError, match=r"inner_data: got a sample of tasks.*bx\.data\.episodes"):
        solve(apart, apart)
    arguments = bx.tasks(adapt, "sum"), bx.tasks(adapt), jnp.zeros(4), jnp.zeros(())
    with pytest.raises(ValueError, match="outer_data: got a sample of tasks"):
        bx.solve_bilevel(*arguments, inner_data=episodes, outer_data=apart, key=KEY)
