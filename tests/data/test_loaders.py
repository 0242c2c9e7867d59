"""Iterables of batches: each is trained on once and in order, none is lost, and what cannot work is
named."""

import collections
import itertools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import RESULTS
from bilevax import hypergradient as H

ROWS = 6  # batches of a loader


class Numbers:
    """A loader whose i-th batch is the number i, in one buffer that it uses again and again;
    `reads` counts what was taken of it in all."""

    def __init__(self, rows=ROWS):
        self.rows, self.reads = rows, 0

    def __iter__(self):
        buffer = np.zeros((), np.int32)
        for i in range(self.rows):
            self.reads += 1
            buffer[...] = i
            yield buffer


def tracing(fn):
    """`fn` with a model state that writes down the batches of its real inner steps."""

    def traced(y, x, batch, trace):
        count, seen = trace
        return fn(y, x, batch), (count + 1, seen.at[count].set(batch))

    return bx.objective(traced, stateful=True)


def empty(steps):
    return jnp.int32(0), jnp.full(steps, -1, jnp.int32)


def seen(trace):
    count, batches = trace
    return batches[: int(count)].tolist()


def expected(steps, rows=ROWS):
    return [i % rows for i in range(steps)]


def inner(y, x, batch):
    return 0.5 * (y - x) ** 2 + 0.01 * y * batch.astype(y.dtype)


def outer(y, x, batch):
    return 0.5 * (y - 1.0) ** 2


METHODS = {
    "implicit": H.implicit(),
    "unrolled": H.unrolled(),
    "truncated": H.unrolled(1),
    "forward": H.forward(),
    "one_step": H.one_step(),
    "finite_difference": H.finite_difference(),
    "sama": H.sama(),
    "zeroth_order": H.zeroth_order(2),
}


def loop(method, steps):
    return bx.algorithms.double_loop(bx.inner.optax(optax.sgd(0.5), steps), method, optax.sgd(0.01))


CASES = [(name, (1, 3, 10)[i % 3]) for i, name in enumerate(METHODS)] + [
    ("implicit", 3),
    ("unrolled", 10),
]


@pytest.mark.turns
@pytest.mark.parametrize("name, steps", CASES)
def test_every_batch_is_trained_on_once_and_in_order(name, steps):
    loader, num = Numbers(), 7
    out = bx.solve_bilevel(
        tracing(inner), outer, jnp.zeros(()), jnp.zeros(()), inner_data=loader,
        algorithm=loop(METHODS[name], steps),
        num_steps=num, key=jax.random.key(0), model_state=empty(steps * num + 5), keep="last",
    )  # fmt: skip
    assert out.result is RESULTS.success
    assert seen(out.model_state) == expected(steps * num)
    assert loader.reads == steps * num  # nothing beyond what was asked for


def test_two_loaders_may_share_a_buffer():
    """As a data set does that two loaders read: each batch is looked at before the other is read."""

    def values(shared):
        buffer = np.zeros(())

        class Shared:
            def __init__(self, numbers):
                self.numbers = numbers

            def __iter__(self):
                for number in self.numbers:
                    buffer[...] = number
                    yield buffer if shared else buffer.copy()

        return bx.solve_bilevel(
            inner, lambda y, x, batch: 0.5 * (y - batch) ** 2, jnp.zeros(()), jnp.zeros(()),
            inner_data=Shared(range(9)), outer_data=Shared(range(20, 29)),
            algorithm=SINGLE["soba"], num_steps=9, key=jax.random.key(0),
        ).history["value"]  # fmt: skip

    np.testing.assert_array_equal(values(True), values(False))


SINGLE = {
    "soba": bx.algorithms.soba(0.1, 0.1),
    "f2sa": bx.algorithms.f2sa(0.1, 0.1, steps=2),
    "pzobo": bx.algorithms.pzobo(0.1, 0.1, steps=3),
}


@pytest.mark.parametrize("name", SINGLE)
def test_other_algorithms_leave_no_batch_out(name):
    algorithm, loader = SINGLE[name], Numbers()
    bx.solve_bilevel(
        inner,
        outer,
        jnp.zeros(()),
        jnp.zeros(()),
        inner_data=loader,
        algorithm=algorithm,
        num_steps=5,
        key=jax.random.key(0),
    )
    assert loader.reads == 5 * algorithm.draws.inner


def test_independent_batches_have_to_be_given():
    algorithm = bx.algorithms.stocbio(0.1, 0.1, steps=2, neumann_steps=3)
    run = lambda **data: bx.solve_bilevel(
        inner, outer, jnp.zeros(()), jnp.zeros(()), algorithm=algorithm, num_steps=4, **data
    )
    with pytest.raises(ValueError, match="hyper_data: got None with an iterable as inner_data"):
        run(inner_data=Numbers())
    train, products = Numbers(), Numbers(50)
    run(inner_data=train, hyper_data=products)
    assert (train.reads, products.reads) == (4 * 2, 4 * 4)


def test_products_are_taken_on_the_last_batch_trained_on():
    """The mixed product reads the batch: ``g = x y b`` pulled back by one step's worth gives the
    number of the step's last batch."""
    g = lambda y, x, batch: 0.5 * y**2 + x * y * batch
    loader = (np.float64(i) for i in range(100))
    out = bx.solve_bilevel(
        g,
        lambda y, x, batch: y,
        jnp.zeros(()),
        jnp.zeros(()),
        inner_data=loader,
        algorithm=loop(H.one_step(), 3),
        num_steps=5,
    )
    assert out.history["grad_norm"].tolist() == [2.0, 5.0, 8.0, 11.0, 14.0]


def test_an_iterable_of_its_own_for_products():
    g = lambda y, x, batch: 0.5 * y**2 + x * y * batch
    loader, other = (np.float64(i) for i in range(100)), (np.float64(10 * i) for i in range(100))
    out = bx.solve_bilevel(
        g, lambda y, x, batch: y, jnp.zeros(()), jnp.zeros(()), inner_data=loader, hyper_data=other,
        algorithm=loop(H.one_step(), 3), num_steps=4,
    )  # fmt: skip
    assert out.history["grad_norm"].tolist() == [0.0, 10.0, 20.0, 30.0]


# ---- levels


def chain(depth, steps, every, method):
    """`depth` levels, each but the top one with its own loader: v_0 follows x, v_k follows
    v_(k-1)."""

    def follow(name, leader):
        def fn(p, batch, trace):
            count, got = trace
            return inner(p[name], p[leader], batch), (count + 1, got.at[count].set(batch))

        return bx.objective(fn, stateful=True)

    names = [f"v{k}" for k in range(depth - 1)]
    levels = [
        bx.Level(
            name,
            follow(name, "x" if k == 0 else names[k - 1]),
            solver=bx.inner.optax(optax.sgd(0.5), steps[k]),
            hypergradient=method,
            every=every[k],
        )
        for k, name in enumerate(names)
    ]
    return [
        *levels,
        bx.Level("x", lambda p, batch: outer(p[names[-1]], None, None), solver=optax.sgd(0.01)),
    ]


LEVELS = [
    (2, (1,), (1,), "implicit"),
    (2, (10,), (2,), "one_step"),
    (2, (3,), (5,), "unrolled"),
    (3, (3, 1), (2, 1), "sama"),
    (3, (1, 3), (5, 2), "unrolled"),
    (4, (1, 3, 2), (1, 5, 2), "implicit"),
    (4, (2, 2, 1), (2, 1, 5), "finite_difference"),
]


@pytest.mark.turns
@pytest.mark.parametrize("depth, steps, every, name", LEVELS)
def test_every_level_trains_on_each_batch_once_and_stands_still_without_reading(
    depth, steps, every, name
):
    levels, num = chain(depth, steps, every, METHODS[name]), 11
    loaders = {level.name: Numbers(5 + k) for k, level in enumerate(levels[:-1])}
    start = {level.name: jnp.zeros(()) for level in levels}
    out = bx.solve_multilevel(
        levels, start, data=loaders, num_steps=num, key=jax.random.key(0), keep="last",
        model_state={name: empty(200) for name in loaders},
    )  # fmt: skip
    for k, (name, loader) in enumerate(loaders.items()):
        trained = steps[k] * -(-num // every[k])
        assert seen(out.model_state[name]) == expected(trained, loader.rows)
        assert loader.reads == trained


def test_a_standing_level_s_products_use_its_last_batch():
    g = lambda p, batch: 0.5 * p["y"] ** 2 + p["x"] * p["y"] * batch
    levels = [
        bx.Level(
            "y", g, solver=bx.inner.optax(optax.sgd(0.5), 2), hypergradient=H.one_step(), every=3
        ),
        bx.Level("x", lambda p, batch: p["y"], solver=optax.sgd(0.01)),
    ]
    loader = [np.float64(i) for i in range(20)]
    run = lambda **keywords: bx.solve_multilevel(
        levels, {"y": jnp.zeros(()), "x": jnp.zeros(())}, keep="last", **keywords
    )
    whole = run(data={"y": iter(loader)}, num_steps=8)
    assert whole.history["grad_norm"].tolist() == [1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 5.0, 5.0]

    class Again:
        def __iter__(self):  # in one buffer
            buffer = np.zeros(())
            for number in loader:
                buffer[...] = number
                yield buffer

    half = run(data={"y": Again()}, num_steps=5)  # ends where the level stands still
    rest = run(data={"y": Again()}, num_steps=3, state=half.state)
    assert rest.history["grad_norm"].tolist() == [3.0, 5.0, 5.0]
    assert float(rest.outer_params) == float(whole.outer_params)


# ---- how far ahead


class Wide:
    """Batches of `size` bytes without end, that watch how far the reader is ahead of the steps."""

    def __init__(self, size):
        self.size, self.reads, self.given = size, 0, []

    def __iter__(self):
        while True:
            self.reads += 1
            batch = np.zeros(self.size // 8)
            self.given.append(weakref.ref(batch))
            yield batch
            del batch

    @property
    def held(self):
        """Of its batches, those that somebody still holds, beside their copies."""
        return sum(batch() is not None for batch in self.given)


@pytest.mark.parametrize(
    "size, read_ahead, most",
    [(2**25, None, 4), (2**28, None, 2), (8, 3, 3), (8, 1, 1), (8, None, 32)],
)
def test_reading_ahead_is_bounded(size, read_ahead, most):
    """Two batches a step: of 32 MiB four steps fit in 256 MiB; of 256 MiB none does, and two are
    read all the same."""
    from bilevax.data.loaders import Stream
    from bilevax.run.window import Window

    loader = Wide(size)
    stream = Stream(loader)
    stream.take = 2
    window = Window((stream,), 100, read_ahead)
    start = 0
    for _ in range(2 if size > 2**20 else 5):
        _, steps = window.read(start, 100)
        window.prefetch(100, 1000)
        assert loader.reads / 2 <= start + most
        assert loader.held <= 2  # the first, which says the shapes, and the last
        window.done(steps)
        start += steps
    assert loader.reads / 2 > start or most == 1


def test_steps_that_were_not_done_are_handed_out_again():
    from bilevax.data.loaders import Stream
    from bilevax.run.window import Window

    stream = Stream(Numbers(100))
    stream.take = 2
    window = Window((stream,), 100, 8)
    got, start = [], 0
    for done in (4, 1, 0, 3, 2, 4, 4):
        (data,), steps = window.read(start, 100)
        first, rows = data
        got += [
            int(rows[2 * (start + t) + i - int(first)])
            for t in range(min(done, steps))
            for i in (0, 1)
        ]
        window.prefetch(100, 1000)
        window.done(min(done, steps))
        start += min(done, steps)
    assert got == list(range(len(got))) and len(got) > 20


@pytest.mark.parametrize("read_ahead", [1, 2, 5, None])
def test_what_is_read_ahead_changes_nothing(read_ahead):
    out = bx.solve_bilevel(
        tracing(inner), outer, jnp.zeros(()), jnp.zeros(()), inner_data=Numbers(),
        outer_data=Numbers(4),
        algorithm=loop(H.implicit(), 2), num_steps=13, read_ahead=read_ahead,
        model_state=empty(30), keep="last",
        callbacks=[bx.callbacks.every(3, lambda event: None)] if hasattr(bx.callbacks,
        "every") else [],
    )  # fmt: skip
    assert seen(out.model_state) == expected(26)


# ---- runs that go on


class Again:
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


X = np.random.default_rng(0).standard_normal((26, 3))
BATCHES = [(X[i : i + 4], X[i : i + 4, 0]) for i in range(7)]
ridge = lambda w, x, b: jnp.mean((b[0] @ w - b[1]) ** 2) + jnp.exp(x) * jnp.sum(w**2)
fit = lambda w, x, b: jnp.mean((b[0] @ w - b[1]) ** 2)


def regression(steps, data, **keywords):
    return bx.solve_bilevel(
        ridge, fit, jnp.zeros(3), jnp.zeros(()), inner_data=data, outer_data=(X, X[:, 0]),
        algorithm=loop(H.unrolled(), 2),
        num_steps=steps, keep="last", **keywords,
    )  # fmt: skip


def test_a_state_goes_on_at_the_loader_s_place(monkeypatch, caplog):
    """Long passing over says how far it has come."""
    monkeypatch.setattr("bilevax.run.window.PATIENCE", 0.0)
    whole, half = regression(8, Again(BATCHES)), regression(3, Again(BATCHES))
    assert "passed over" not in caplog.text
    rest = regression(5, Again(BATCHES), state=half.state)
    assert "inner_data: passed over 6 of 6 batches in 0 s" in caplog.text
    assert (whole.outer_params == rest.outer_params).all() and (
        whole.inner_params == rest.inner_params
    ).all()


def test_a_state_with_an_iterator_is_refused():
    half = regression(3, iter(BATCHES))
    with pytest.raises(
        ValueError, match=r"inner_data: got an iterator \(list_iterator\) with state="
    ):
        regression(2, iter(BATCHES), state=half.state)


# ---- what cannot work


def gen():
    yield from BATCHES


class Tokens(collections.UserDict):
    pass


def ragged():
    for i in range(0, 26, 8):
        yield X[i : i + 8], X[i : i + 8, 0]


REFUSED = {
    "text": (
        ({"x": X, "text": ["a", "b"]} for _ in range(9)),
        TypeError,
        r"inner_data, batch 1\['text'\]\[0\]: got str 'a'",
    ),
    "objects": (
        (np.array([None, 1]) for _ in range(9)),
        TypeError,
        "inner_data, batch 1: got a object array",
    ),
    "list": (
        [BATCHES[0]] * 6,
        TypeError,
        "inner_data: got a list of 6 containers of one structure",
    ),
    "function": (
        gen,
        TypeError,
        r"got the generator function gen, not called.*Try inner_data=gen\(\)",
    ),
    "empty": (iter([]), ValueError, "inner_data: got list_iterator, which yields no batch"),
    "empty_loader": (
        Again([]),
        ValueError,
        "inner_data: got Again, which yields no batch.*fewer examples than a batch",
    ),
    "short": (
        iter(BATCHES[:1]),
        ValueError,
        "inner_data: got an iterator that ended after 1 batches; expected at least 2",
    ),
    "ragged": (
        ragged(),
        ValueError,
        r"inner_data, batch 4\[0\]: got float64\[2, 3\] where the first batch has float64\[8, "
        r"3\].*drop_last=True",
    ),
    "dtype": (
        iter([BATCHES[0], (X[:4].astype("f"), BATCHES[0][1])]),
        ValueError,
        r"inner_data, batch 2\[0\]: got float32",
    ),
    "structure": (
        iter([BATCHES[0], [*BATCHES[0]]]),
        ValueError,
        "inner_data, batch 2: got the structure",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_loaders_that_cannot_work_are_named(name):
    data, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        regression(6, data)


def test_a_bad_batch_ends_the_run_at_its_step_and_not_before():
    with pytest.raises(ValueError, match="batch 4") as caught:
        regression(6, ragged())
    assert (
        caught.value.solution.stats["steps"] == 1
    )  # batches 1 and 2; the second step would need the fourth


def test_an_error_of_the_loader_itself_passes_with_the_run_so_far():
    def failing():
        yield from BATCHES[:5]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk") as caught:
        regression(6, failing())
    assert caught.value.solution.stats["steps"] == 2


# ---- what works


class Tensor:
    """As torch's: no array, with dlpack."""

    def __init__(self, array):
        self.array = array

    def detach(self):
        return self

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Eager:
    """As tensorflow's: no array, with ``__array__``."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


KINDS = {
    "numpy": lambda a: a,
    "jax": jnp.asarray,
    "dlpack": lambda a: Tensor(np.ascontiguousarray(a)),
    "array": Eager,
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_others_become_arrays(kind):
    make = KINDS[kind]
    out = regression(4, itertools.cycle([(make(x), make(y)) for x, y in BATCHES]))
    assert np.array_equal(out.inner_params, regression(4, Again(BATCHES)).inner_params)


def test_a_mapping_of_another_class_is_a_dict():
    g = lambda w, x, b: ridge(w, x, (b["x"], b["y"]))
    batches = (Tokens(x=x, y=y) for x, y in itertools.cycle(BATCHES))
    out = bx.solve_bilevel(g, fit, jnp.zeros(3), jnp.zeros(()), inner_data=batches, outer_data=(X,
    X[:, 0]),
                           algorithm=loop(H.unrolled(), 2), num_steps=4, keep="last")  # fmt: skip
    assert np.array_equal(out.inner_params, regression(4, Again(BATCHES)).inner_params)


def test_a_torch_loader():
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(X[:, 0]))
    out = regression(6, torch.utils.data.DataLoader(data, batch_size=4, drop_last=True))
    rows = [(X[i : i + 4], X[i : i + 4, 0]) for i in range(0, 24, 4)]
    assert np.array_equal(out.inner_params, regression(6, Again(rows)).inner_params)


GRAIN = {
    "a data set": lambda grain: (
        grain.MapDataset.source(ROWS_OF_X)
        .shuffle(seed=3)
        .batch(4, drop_remainder=True)
        .to_iter_dataset()
    ),
    "a loader": lambda grain: grain.DataLoader(
        data_source=ROWS_OF_X,
        sampler=grain.IndexSampler(
            len(ROWS_OF_X), grain.NoSharding(), shuffle=True, num_epochs=1, seed=3
        ),
        operations=[grain.Batch(4, drop_remainder=True)],
    ),
}
ROWS_OF_X = [(x, x[0]) for x in X]


@pytest.mark.parametrize("name", GRAIN)
def test_a_grain_loader_and_its_place(name):
    """As it is; and a run that goes on from a state goes on in the data, by grain's own state."""
    grain = pytest.importorskip("grain.python")
    make = lambda: GRAIN[name](grain)
    rows = [jax.tree.map(np.asarray, tuple(batch)) for batch in make()]
    assert len(rows) == len(X) // 4
    whole = regression(11, make())
    assert np.array_equal(whole.inner_params, regression(11, Again(rows)).inner_params)
    half = regression(5, make())
    assert half.state.place
    assert np.array_equal(regression(6, make(), state=half.state).inner_params, whole.inner_params)


class Placed:
    """A loader that is shuffled anew in each epoch, and whose iterator says where it stands, as
    grain's do; `reads` counts what it gave."""

    def __init__(self, form):
        self.form, self.reads = form, 0

    def __iter__(self):
        return PlacedIterator(self)


class PlacedIterator:
    def __init__(self, loader):
        self.loader, self.at = loader, 0

    def __next__(self):
        if self.at == ROWS:
            raise StopIteration
        self.at, self.loader.reads = self.at + 1, self.loader.reads + 1
        return np.int32((5 * self.at) % 7)

    def get_state(self):
        return str(self.at).encode() if self.loader.form == "bytes" else {"at": self.at}

    def set_state(self, state):
        self.at = int(state) if self.loader.form == "bytes" else state["at"]


def through(loader, num, steps=4, **keywords):
    return bx.solve_bilevel(
        tracing(inner), outer, jnp.zeros(()), jnp.zeros(()), inner_data=loader,
        algorithm=loop(METHODS["implicit"], steps),
        num_steps=num, model_state=empty(200), keep="last", **keywords,
    )  # fmt: skip


@pytest.mark.turns
@pytest.mark.parametrize("form", ["bytes", pytest.param("json", marks=pytest.mark.slow)])
def test_a_loader_that_knows_its_place_is_not_read_again(form, tmp_path):
    """By ``state=`` and by a checkpoint: the same batches, to the bit, and none before them but the
    last."""
    whole = through(Placed(form), 9)
    for keywords in (
        lambda half: {"state": half.state},
        lambda half: {"checkpoint": bx.checkpoint.every(5, tmp_path / "run")},
    ):
        first, second = Placed(form), Placed(form)
        checkpointed = "checkpoint" in keywords(whole)
        half = through(first, 5, **(keywords(whole) if checkpointed else {}))
        rest = through(second, 9 if checkpointed else 4, **keywords(half))
        assert (
            seen(rest.model_state) == seen(whole.model_state)
            and rest.outer_params == whole.outer_params
        )
        assert second.reads == 2 + 4 * 4  # the first, for its shapes, and the one before the place


# ---- sources that are no iterables


def test_a_function_that_ignores_its_key_needs_none():
    g = lambda y, x, batch: 0.5 * (y - batch) ** 2 + 0 * x * y
    run = lambda fn: bx.solve_bilevel(
        g,
        outer,
        jnp.zeros(()),
        jnp.zeros(()),
        inner_data=fn,
        algorithm=loop(H.unrolled(), 2),
        num_steps=3,
    )
    assert run(lambda key, step: step.astype(float)).result is RESULTS.success
    with pytest.raises(ValueError, match="key: got None although the data is sampled"):
        run(lambda key, step: jax.random.normal(key))


def test_inner_steps_know_their_number():
    """Per-step rates by hand: y <- y - a_t (y - x), with a_t from the number of the step."""
    rates = jnp.array([0.1, 0.2, 0.4])
    scaled = bx.objective(
        lambda y, x, batch, *, inner_step: rates[inner_step] * 0.5 * (y - x) ** 2, indexed=True
    )
    y, x = jnp.asarray(0.3), jnp.asarray(2.0)
    for rate in rates:
        y = y - rate * (y - x)
    for method in (H.unrolled(), H.unrolled(checkpoint="none"), H.forward()):
        fn = bx.value_and_hypergrad(
            scaled,
            lambda y, x, batch: y,
            solver=bx.inner.optax(optax.sgd(1.0), 3),
            hypergradient=method,
        )
        out = fn(jnp.asarray(0.3), x)
        assert abs(out.value - y) < 1e-12 and abs(out.grad - (1 - 0.9 * 0.8 * 0.6)) < 1e-12
    run = bx.solve_bilevel(
        scaled, lambda y, x, batch: y, jnp.asarray(0.3), x, algorithm=bx.algorithms.double_loop(
            bx.inner.optax(optax.sgd(1.0), 3), H.unrolled(), optax.sgd(0.0)), num_steps=2,
    )  # fmt: skip
    assert np.allclose(run.history["value"], [y, y + (x - y) * (1 - 0.9 * 0.8 * 0.6)], rtol=1e-12)


def test_levels_know_the_numbers_of_their_steps():
    rates = jnp.array([0.1, 0.2, 0.4])
    fn = lambda p, batch, *, inner_step: rates[inner_step] * 0.5 * (p["y"] - p["x"]) ** 2
    levels = [
        bx.Level(
            "y",
            bx.objective(fn, indexed=True),
            solver=bx.inner.optax(optax.sgd(1.0), 3),
            hypergradient=H.unrolled(),
        ),
        bx.Level("x", lambda p, batch: p["y"], solver=optax.sgd(0.1)),
    ]
    out = bx.value_and_multilevel_grad(levels)({"y": jnp.asarray(0.3), "x": jnp.asarray(2.0)})
    assert abs(out.grad - (1 - 0.9 * 0.8 * 0.6)) < 1e-12


def test_an_outer_objective_has_no_steps():
    numbered = bx.objective(lambda y, x, batch, *, inner_step: y, indexed=True)
    with pytest.raises(TypeError, match="outer_objective: got objective"):
        bx.solve_bilevel(inner, numbered, jnp.zeros(()), jnp.zeros(()), num_steps=1)


def test_too_few_stacked_batches_are_refused():
    fn = bx.value_and_hypergrad(
        lambda w, x, b: 0.5 * (w - x * b) ** 2, lambda w, x, b: w,
        solver=bx.inner.optax(optax.sgd(0.5), 5),
        hypergradient=H.unrolled(), inner_draw=bx.data.stacked,
    )  # fmt: skip
    with pytest.raises(ValueError, match="inner_batch: got 3 stacked batches for 5 inner steps"):
        fn(jnp.zeros(()), jnp.ones(()), jnp.array([1.0, 2.0, 3.0]))
    assert (
        float(fn(jnp.zeros(()), jnp.ones(()), jnp.array([1.0, 2.0, 3.0, 1.0, 2.0])).inner_params)
        == 1.78125
    )
