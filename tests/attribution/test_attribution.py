"""Influence against retraining, closed forms and ``jax.grad`` of the whole training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax.attribution.score import rank_correlation

ROWS, STEPS, BATCH = 30, 60, 10


def losses(params, rows):
    return 0.5 * (rows["x"] @ params - rows["y"]) ** 2


def measure(params, batch):
    return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)


def queries(params, batch):
    return (batch["x"] @ params - batch["y"]) ** 2


def penalty(params):
    return 0.05 * jnp.sum(params**2)


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (ROWS, 4))
    data = {
        "x": x,
        "y": x @ jnp.array([1.0, -1.0, 0.5, 0.0]) + 0.5 * jax.random.normal(keys[1], (ROWS,)),
    }
    held = {"x": jax.random.normal(keys[2], (8, 4)), "y": jax.random.normal(keys[3], (8,))}
    order = jax.random.randint(keys[4], (STEPS, BATCH), 0, ROWS)
    train = bx.attribution.training(
        losses, optax.adam(0.05, eps_root=1e-8), jnp.zeros(4), data, order, regularizer=penalty
    )
    return train, data, held


def close(a, b, tolerance):
    assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= tolerance * np.linalg.norm(
        np.asarray(b)
    )


# ---- each method


@pytest.mark.turns
@pytest.mark.parametrize("what", [measure, queries])
def test_metagradient_is_the_derivative_of_the_training(problem, what):
    train, _, held = problem
    found = bx.attribution.metagradient(train, what, held)
    exact = jax.jacobian(lambda weights: what(train.retrain(weights), held))(jnp.ones(ROWS))
    close(found.scores, exact, 1e-12)
    close(found.value, what(train.retrain(jnp.ones(ROWS)), held), 1e-13)


def test_metagradient_of_tokens(problem):
    """A weight a token: their mean is what the example's weight has."""
    _, data, held = problem
    words = jax.random.normal(jax.random.key(8), (ROWS, 3))
    per_token = lambda params, rows: losses(params, rows)[:, None] * jnp.tanh(rows["words"]) ** 2
    order = jax.random.randint(jax.random.key(9), (20, BATCH), 0, ROWS)
    train = bx.attribution.training(
        per_token, optax.sgd(0.05, momentum=0.9), jnp.zeros(4), data | {"words": words}, order
    )
    tokens = bx.attribution.metagradient(train, measure, held, tokens=True)
    examples = bx.attribution.metagradient(train, measure, held)
    assert tokens.scores.shape == (ROWS, 3)
    close(tokens.scores.sum(-1), examples.scores, 1e-12)


def test_metagradient_takes_the_settings_of_a_replay(problem, tmp_path):
    train, _, held = problem
    found = bx.attribution.metagradient(
        train,
        measure,
        held,
        schedule=bx.replay.tree(4),
        checkpoint=bx.checkpoint.every(20, tmp_path),
    )
    assert found.info["held"] == 4
    close(found.scores, bx.attribution.metagradient(train, measure, held).scores, 1e-13)


def solved(data, rho=0.0):
    """The solution of the whole problem, its Hessian."""
    hessian = data["x"].T @ data["x"] / ROWS + 0.1 * jnp.eye(4)
    return jnp.linalg.solve(hessian, data["x"].T @ data["y"] / ROWS), hessian + rho * jnp.eye(4)


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_implicit_is_the_closed_form(problem, rho):
    _, data, held = problem
    params, hessian = solved(data, rho)
    error = held["x"] @ params - held["y"]
    residual = (data["x"] @ params - data["y"])[:, None] * data["x"]
    linear = bx.linear.cg(tol=1e-12, maxiter=50)
    found = bx.attribution.implicit(
        losses, measure, params, data, held, linear=linear, damping=rho, regularizer=penalty
    )
    close(
        found.scores,
        -residual @ jnp.linalg.solve(hessian, 2 * held["x"].T @ error / 8) / ROWS,
        1e-9,
    )
    assert found.info["residual"] < 1e-10
    many = bx.attribution.implicit(
        losses, queries, params, data, held, linear=linear, damping=rho, regularizer=penalty
    )
    close(
        many.scores,
        -jnp.linalg.solve(hessian, (2 * error[:, None] * held["x"]).T).T @ residual.T / ROWS,
        1e-9,
    )
    close(many.scores.mean(0), found.scores, 1e-9)


def test_implicit_is_where_a_long_training_goes(problem):
    """At a solution by whole batches, the metagradient and the implicit influence are one."""
    _, data, held = problem
    order = np.tile(np.arange(ROWS), (400, 1))
    train = bx.attribution.training(
        losses, optax.sgd(0.3), jnp.zeros(4), data, order, regularizer=penalty
    )
    params = train.retrain(jnp.ones(ROWS))
    linear = bx.linear.cg(tol=1e-12, maxiter=50)
    implicit = bx.attribution.implicit(
        losses, measure, params, data, held, linear=linear, regularizer=penalty
    )
    close(bx.attribution.metagradient(train, measure, held).scores, implicit.scores, 1e-6)


def test_checkpoints_of_a_training(problem):
    train, data, _ = problem
    short = bx.attribution.training(
        losses, train.optimizer, jnp.zeros(4), data, train.order[:25], regularizer=penalty
    )
    weights = jnp.stack([jnp.ones(ROWS), jnp.linspace(0.5, 1.5, ROWS)])
    for given in (weights[0], weights):
        middle, end = train.retrain(given, checkpoints=(25, STEPS))
        close(middle, short.retrain(given), 1e-14)
        close(end, train.retrain(given), 1e-14)


def test_tracin_and_similarity(problem):
    train, data, held = problem
    points = [jnp.zeros(4), train.retrain(jnp.ones(ROWS))]
    gradients = [(data["x"] @ p - data["y"])[:, None] * data["x"] for p in points]
    measured = [jax.grad(measure)(p, held) for p in points]
    found = bx.attribution.tracin(losses, measure, points, data, held, step_sizes=[0.1, 0.2])
    close(
        found.scores, -(0.1 * gradients[0] @ measured[0] + 0.2 * gradients[1] @ measured[1]), 1e-12
    )
    norms = jnp.linalg.norm(gradients[1], axis=1) * jnp.linalg.norm(measured[1])
    for size in (7, 32):  # one that does not divide the examples
        found = bx.attribution.similarity(losses, measure, points[1], data, held, batch_size=size)
        close(found.scores, -gradients[1] @ measured[1] / norms, 1e-12)
    many = bx.attribution.similarity(losses, queries, points[1], data, held)
    assert many.scores.shape == (8, ROWS)


def test_similarity_of_an_example_without_a_gradient():
    data = jnp.array([2.0, 3.0])
    found = bx.attribution.similarity(
        lambda w, rows: (w - rows) ** 2, lambda w, _: w, jnp.asarray(2.0), data
    )
    assert found.scores.tolist() == [0.0, 1.0]


@pytest.mark.turns
def test_tokens_of_every_method(problem):
    """A score a token, in each method's scale: their sums are the examples' scores."""
    _, data, held = problem
    rows = data | {"words": jax.random.normal(jax.random.key(8), (ROWS, 3))}
    per_token = lambda params, rows: losses(params, rows)[:, None] * jnp.tanh(rows["words"]) ** 2
    params = jnp.array([0.3, -0.2, 0.1, 0.4])
    for method, keywords, many in (
        (bx.attribution.implicit, {"damping": 1.0}, 1),
        (bx.attribution.tracin, {}, 3),  # of a mean over three tokens
    ):
        at = [params] if method is bx.attribution.tracin else params
        call = lambda measure, tokens, at=at, method=method, keywords=keywords: (
            method(per_token, measure, at, rows, held, tokens=tokens, **keywords).scores
        )
        tokens = call(measure, True)
        assert tokens.shape == (ROWS, 3)
        close(tokens.sum(-1), many * call(measure, False), 1e-10)
        assert call(queries, True).shape == (8, ROWS, 3)


def test_groups(problem):
    """A weight that a group shares: the derivative of the training in it."""
    train, _, held = problem
    groups = jnp.arange(ROWS) % 3
    scores = bx.attribution.metagradient(train, measure, held).scores
    exact = jax.grad(lambda shared: measure(train.retrain(shared[groups]), held))(jnp.ones(3))
    close(bx.attribution.grouped(scores, groups), exact, 1e-12)
    assert bx.attribution.grouped(scores[None], groups, 5).shape == (1, 5)


def test_float32(problem):
    train, data, held = problem
    single = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    small = bx.attribution.training(
        losses,
        optax.adam(0.05, eps_root=1e-8),
        jnp.zeros(4, jnp.float32),
        single(data),
        train.order,
        regularizer=penalty,
    )
    found = bx.attribution.metagradient(small, measure, single(held))
    assert found.scores.dtype == jnp.float32
    close(found.scores, bx.attribution.metagradient(train, measure, held).scores, 1e-4)


@pytest.mark.turns
@pytest.mark.parametrize("sharding", [bx.sharding.data_parallel, bx.sharding.fsdp])
def test_eight_devices(problem, sharding):
    _, data, held = problem
    order = jax.random.randint(jax.random.key(3), (12, 16), 0, ROWS)
    train = bx.attribution.training(losses, optax.sgd(0.1), jnp.zeros(4), data, order)
    alone = bx.attribution.metagradient(train, measure, held)
    close(
        bx.attribution.metagradient(train, measure, held, sharding=sharding()).scores,
        alone.scores,
        1e-12,
    )


# ---- the score


@pytest.fixture(scope="module")
def smooth(problem):
    """The same by plain gradient descent. (Adam's first steps are nearly signs, of which a
    derivative says little.)"""
    train, data, held = problem
    return (
        bx.attribution.training(
            losses, optax.sgd(0.1), jnp.zeros(4), data, train.order, regularizer=penalty
        ),
        data,
        held,
    )


def test_datamodeling_score(smooth):
    train, data, held = smooth
    retrain = jax.jit(lambda weights: jax.vmap(lambda p: measure(p, held))(train.retrain(weights)))
    params = train.retrain(jnp.ones(ROWS))
    scores = {
        "metagradient": bx.attribution.metagradient(train, measure, held),
        "implicit": bx.attribution.implicit(
            losses, measure, params, data, held, regularizer=penalty
        ),
        "nothing": jax.random.normal(jax.random.key(5), (ROWS,)),
    }
    calls = []

    def counted(weights):
        calls.append(weights)
        return retrain(weights)

    judged = bx.attribution.linear_datamodeling_score(
        scores, counted, jax.random.key(1), subsets=40, fraction=0.04
    )
    assert len(calls) == 1  # all share the retrainings
    assert (np.asarray(calls[0]) == 0).sum(1).tolist() == [1] * 40
    assert judged["metagradient"].correlation > 0.95
    assert judged["implicit"].correlation > 0.7
    assert abs(judged["nothing"].correlation) < 3 * judged["nothing"].standard_error
    assert 0 < judged["metagradient"].standard_error < judged["nothing"].standard_error < 0.25
    # The prediction itself, and not only its order: a first-order one of a small removal.
    one = judged["metagradient"]
    predicted = one.predicted + float(scores["metagradient"].value)
    assert np.corrcoef(predicted, one.retrained)[0, 1] > 0.95


def test_datamodeling_score_of_queries(smooth):
    train, _, held = smooth
    retrain = lambda weights: jax.vmap(lambda p: queries(p, held))(train.retrain(weights))
    found = bx.attribution.metagradient(train, queries, held)
    judged = bx.attribution.linear_datamodeling_score(
        found, retrain, jax.random.key(1), subsets=20, fraction=0.04
    )
    assert judged.predicted.shape == judged.retrained.shape == (20, 8) and judged.correlation > 0.9


def test_rank_correlation_with_ties():
    """Against the textbook's: averaged ranks, then Pearson's."""
    stats = pytest.importorskip("scipy.stats")
    a, b = np.array([1.0, 2.0, 2.0, 5.0, 0.0]), np.array([3.0, 3.0, 1.0, 9.0, -1.0])
    assert abs(rank_correlation(a, b) - stats.spearmanr(a, b).statistic) < 1e-12
    assert rank_correlation(a, np.ones(5)) == 0


# ---- smoothness


def test_metasmoothness():
    """One for an affine map, its own sum for a map that turns back."""
    affine = bx.attribution.metasmoothness(
        lambda z: {"w": 3.0 * z}, jnp.ones(4), jnp.array([1.0, -1.0, 0.0, 2.0])
    )
    assert affine.score == pytest.approx(1.0) and affine.finite and affine.advice == ()
    rough = lambda z: jnp.stack([z, jnp.cos(40.0 * z) + 0.1 * z])
    found = bx.attribution.metasmoothness(
        rough, jnp.asarray(1.0), jnp.asarray(1.0), variants={"the smooth part": lambda z: z[None]}
    )
    points = [np.asarray(rough(jnp.asarray(z))) for z in (1.0, 1.1, 1.2)]
    weights = np.abs(points[2] - points[0])
    signs = np.sign(points[1] - points[0]) * np.sign(points[2] - points[1])
    assert (
        found.score == pytest.approx((weights * signs).sum() / weights.sum()) and found.score < 0.9
    )
    assert found.variants["the smooth part"].score == pytest.approx(1.0)
    assert found.best == "the smooth part" and found.advice[0].startswith(
        "the smooth part: a score"
    )
    assert affine.best is None  # nothing was tried
    lines = found.table().splitlines()
    assert [line.split("|")[1].strip() for line in lines] == [
        "training", "-" * 15, "as it is", "the smooth part",
    ]  # fmt: skip
    worse = bx.attribution.metasmoothness(
        lambda z: z[None],
        jnp.asarray(1.0),
        jnp.asarray(1.0),
        variants={"rough": rough, "broken": lambda z: z / 0.0},
    )
    assert worse.best is None and worse.advice == ()  # of what is worse, or not finite
    assert any("eps_root" in line for line in found.advice)


@pytest.mark.turns
def test_knobs_turned_in_turn(problem):
    """Trainings that differ in one knob, parameters of another structure among them: the table has
    a row each, with the score that the definition gives."""
    _, data, _ = problem
    order = jax.random.randint(jax.random.key(2), (20, BATCH), 0, ROWS)

    def made(width=3, batch=BATCH, eps_root=0.0):
        keys = jax.random.split(jax.random.key(3))
        params = (jax.random.normal(keys[0], (4, width)), jax.random.normal(keys[1], (width,)))
        plain = lambda p, rows: (jnp.tanh(rows["x"] @ p[0]) @ p[1] - rows["y"]) ** 2
        optimizer = optax.adam(0.1, eps_root=eps_root)
        return bx.attribution.training(plain, optimizer, params, data, order[:, :batch]).retrain

    direction = jax.random.normal(jax.random.key(4), (ROWS,))
    knobs = {"batch": made(batch=2), "width": made(width=6), "eps_root": made(eps_root=1e-2)}
    found = bx.attribution.metasmoothness(made(), jnp.ones(ROWS), direction, variants=knobs)
    assert list(found.variants) == list(knobs) and len(found.table().splitlines()) == 6
    for name, train in ({"as it is": made()} | knobs).items():
        a, b, c = (
            np.concatenate([np.ravel(leaf) for leaf in train(1.0 + 0.1 * k * direction)])
            for k in range(3)
        )
        score = (np.abs(c - a) * np.sign(b - a) * np.sign(c - b)).sum() / np.abs(c - a).sum()
        one = found if name == "as it is" else found.variants[name]
        assert one.score == pytest.approx(score, abs=1e-12)
    scores = {name: one.score for name, one in found.variants.items()}
    best = max(scores, key=scores.get)
    assert found.best == (best if scores[best] > found.score else None)
    assert scores["eps_root"] > found.score  # the knob that is named first


def test_what_is_smooth_need_not_be_finite():
    """Adam without eps_root at a unit without gradients: smooth trainings, and a metagradient that
    is NaN and says so."""
    data = jnp.array([[1.0, 0.0], [2.0, 0.0]])
    plain = lambda params, rows: (rows @ params - 1.0) ** 2
    make = lambda **k: bx.attribution.training(
        plain, optax.adam(0.1, **k), jnp.zeros(2), data, [[0, 1]] * 10
    )
    assert bx.attribution.metasmoothness(make().retrain, jnp.ones(2), jnp.ones(2)).score > 0.9
    with pytest.raises(bx.SolveError, match="hypergradient_nonfinite"):
        bx.attribution.metagradient(make(), lambda w, _: jnp.sum(w))
    assert jnp.isfinite(
        bx.attribution.metagradient(make(eps_root=1e-8), lambda w, _: jnp.sum(w)).scores
    ).all()
    broken = bx.attribution.metasmoothness(lambda z: z / 0.0, jnp.ones(2), jnp.ones(2))
    assert not broken.finite and broken.score == 0


# ---- refusals


def test_refusals(problem):
    train, data, held = problem
    a = bx.attribution
    for call, match in (
        (lambda: a.training(3, optax.sgd(0.1), jnp.zeros(4), data, [[0]]), "losses: got int"),
        (lambda: a.training(losses, 3, jnp.zeros(4), data, [[0]]), "optimizer: got"),
        (lambda: a.training(losses, optax.sgd(0.1), jnp.zeros(4), data, [0, 1]), "order: got"),
        (
            lambda: a.training(losses, optax.sgd(0.1), jnp.zeros(4), data, [[0, ROWS]]),
            "order: got rows 0 to 30",
        ),
        (
            lambda: a.training(measure, optax.sgd(0.1), jnp.zeros(4), data, [[0, 1]]),
            "losses: returned",
        ),
        (lambda: a.metagradient(None, measure, held), "train: got None"),
        (lambda: a.metagradient(train, measure, held, tokens=True), "tokens: got True"),
        (
            lambda: a.implicit(losses, measure, jnp.zeros(4), data, held, damping=-1.0),
            "damping: got",
        ),
        (lambda: a.tracin(losses, measure, [], data, held), "checkpoints: got 0"),
        (
            lambda: a.similarity(losses, measure, jnp.zeros(4), data, held, batch_size=0),
            "batch_size: got 0",
        ),
        (lambda: a.grouped(jnp.zeros(3), jnp.zeros(3)), "groups: got"),
        (
            lambda: a.linear_datamodeling_score(jnp.zeros(3), None, jax.random.key(0)),
            "retrain: got None",
        ),
        (
            lambda: a.linear_datamodeling_score(jnp.zeros(3), len, jax.random.key(0), subsets=2),
            "subsets: got 2",
        ),
        (lambda: a.metasmoothness(None, jnp.ones(2), jnp.ones(2)), "train: got None"),
        (lambda: a.metasmoothness(lambda z: z, jnp.ones(2), jnp.ones(3)), "direction"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            call()
