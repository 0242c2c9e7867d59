"""Draws are pure functions of (key, step): the same batches at any step, in any order, and every
example once an epoch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevax import data
from bilevax.base import Feed
from bilevax.data import draws, loaders, permutation, sources

KEY = jax.random.key(3)


@pytest.mark.parametrize("total", [1, 2, 3, 10, 64, 97, 1000])
def test_permuted_is_a_permutation(total):
    images = jax.jit(permutation.permuted, static_argnums=2)(
        KEY, jnp.arange(total, dtype=jnp.uint32), total
    )
    assert sorted(images.tolist()) == list(range(total))


def test_permuted_looks_random():
    """Over 2,000 keys each place's image is uniform (chi-square), and neighbours are not
    correlated."""
    keys = jax.random.split(KEY, 2000)
    images = np.asarray(
        jax.vmap(lambda k: permutation.permuted(k, jnp.arange(10, dtype=jnp.uint32), 10))(keys)
    ).astype(int)
    for place in range(10):
        counts = np.bincount(images[:, place], minlength=10)
        assert ((counts - 200) ** 2 / 200).sum() < 33.7  # chi-square, 9 degrees, p = 1e-4
    assert abs(np.corrcoef(images[:, 0], images[:, 1])[0, 1] + 1 / 9) < 0.08


def rows(source, steps, start=0):
    feed = Feed(source.data, KEY, jnp.int32(start))
    draw = jax.jit(lambda feed, i: source.draw(feed, i).batch)
    return [np.asarray(draw(feed, i)) for i in range(steps)]


def test_by_epoch_every_example_once():
    source = data.minibatches(np.arange(10), 5)
    batches = rows(source, 6)
    epochs = [np.concatenate(batches[i : i + 2]) for i in (0, 2, 4)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert not all((epochs[0] == e).all() for e in epochs[1:])


def test_the_rest_of_an_epoch_is_left_out_and_differs():
    source = data.minibatches(np.arange(10), 4)
    batches = rows(source, 40)
    missed = set()
    for i in range(0, 40, 2):
        epoch = np.concatenate(batches[i : i + 2])
        assert len(set(epoch.tolist())) == 8
        missed |= set(range(10)) - set(epoch.tolist())
    assert missed == set(range(10))


@pytest.mark.parametrize("replace", [False, True])
def test_any_step_without_the_ones_before(replace):
    source = data.minibatches(np.arange(100), 7, replace=replace)
    whole, later = rows(source, 30), rows(source, 10, start=20)
    assert all((a == b).all() for a, b in zip(whole[20:], later, strict=True))
    assert any((a != b).any() for a, b in zip(whole[:10], later, strict=True))


def test_with_replacement_is_uniform():
    source = data.minibatches(np.arange(8), 64, replace=True)
    counts = np.bincount(np.concatenate(rows(source, 100)), minlength=8)
    assert ((counts - 800) ** 2 / 800).sum() < 29.9  # chi-square, 7 degrees, p = 1e-4


def test_pytrees_are_drawn_together():
    arrays = {"x": np.arange(20.0)[:, None] * np.ones(3), "y": np.arange(20)}
    source = data.minibatches(arrays, 6)
    batch = source.draw(Feed(source.data, KEY, 0), 2).batch
    assert batch["x"].shape == (6, 3)
    assert (batch["x"][:, 0].astype(int) == batch["y"]).all()


def test_generated_sees_key_and_step():
    source = sources.as_source(lambda key, step: (step, jax.random.normal(key)), "inner_data")
    (a, ra), (b, rb) = (source.draw(Feed(None, KEY, 5), i).batch for i in (0, 1))
    assert (int(a), int(b)) == (5, 6) and float(ra) != float(rb)
    assert float(source.draw(Feed(None, KEY, 4), 1).batch[1]) == float(ra)


def test_forms():
    assert sources.as_source(None, "d").draw is data.same
    assert sources.as_source([np.zeros(3), np.zeros((3, 2))], "d").draw is data.same
    assert isinstance(sources.as_source(iter([np.zeros(3)]), "d"), loaders.Stream)
    stream = sources.as_source(range(3), "d")
    assert [stream.next() for _ in range(5)] == [
        0,
        1,
        2,
        0,
        1,
    ]  # what can be iterated again starts over
    once = sources.as_source(iter(range(2)), "d")
    assert [once.next(), once.next()] == [0, 1]
    with pytest.raises(StopIteration):
        once.next()


def test_evaluations_of_one_draw_share_a_key_and_draws_do_not():
    source = data.minibatches(np.arange(10), 5)
    feed = Feed(source.data, KEY, 0)
    first, again, second = (
        jax.random.key_data(source.draw(feed, i).key).tolist() for i in (0, 0, 1)
    )
    assert first == again != second


@pytest.mark.turns
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("total", [2, 5, pytest.param(16, marks=pytest.mark.slow)])
def test_an_order_found_at_once_is_that_of_the_draws(total, replace):
    """The compiled loop reads which batch comes next from a table; a draw of its own works it
    out."""
    source = data.partitioned(jnp.arange(3.0 * total).reshape(-1, 1), 3, replace=replace)
    feed = Feed(source.data, KEY, jnp.int32(7))  # in the middle of an epoch
    count = 2 * total + 1

    @jax.jit
    def both(feed):
        order = draws.ordered(source.draw, feed, count)
        alone = [source.draw(feed, i) for i in range(count)]
        told = [source.draw(feed._replace(order=order), i) for i in range(count)]
        return (
            order,
            jnp.stack([ctx.index for ctx in alone]),
            [jnp.stack([ctx.batch for ctx in many]) for many in (alone, told)],
        )

    order, index, (alone, told) = both(feed)
    assert np.array_equal(order, index) and np.array_equal(alone, told)
