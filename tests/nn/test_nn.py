"""bx.nn: objectives from models. Statistics, modes, streams, what is learned where, both styles,
traces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import bilevax as bx
from bilevax import base, nn, tree
from bilevax.run.chunk import run_chunk
from tests.nn.nn_models import (
    NnxNet,
    batches,
    call,
    leaves,
    linen_net,
    linen_variables,
    losses,
    nnx_net,
    plain,
    same_bits,
    weighted,
)

TRAIN, VALID = batches()
SCORES = jnp.linspace(-1.0, 1.0, len(TRAIN[1]))
SOLVER = bx.inner.optax(bx.tunable(optax.sgd, learning_rate=0.3, momentum=0.5), 3)
UNROLLED = bx.hypergradient.unrolled()


def both_styles(**settings):
    model = nnx_net(**settings)
    return {"nnx": nn.from_nnx(model), "linen": linen_net(model)}


def estimate(problem, method, solver=SOLVER, key=None, train=TRAIN):
    fn = bx.value_and_hypergrad(
        problem.inner_objective, problem.outer_objective, solver=solver, hypergradient=method
    )
    state = fn.init(problem.inner_params, model_state=problem.model_state)
    return jax.jit(fn)(
        problem.inner_params, problem.outer_params, train, VALID, state=state, key=key
    )


# ---- model state


METHODS = {
    "implicit": bx.hypergradient.implicit(bx.linear.cg(maxiter=3), max_residual=jnp.inf),
    "unrolled": UNROLLED,
    "sama": bx.hypergradient.sama(),
    "finite difference": bx.hypergradient.finite_difference(),
    "zeroth order": bx.hypergradient.zeroth_order(),
}


@pytest.mark.turns
@pytest.mark.parametrize(
    "style, name",
    [*(("nnx", name) for name in METHODS), ("linen", "implicit"), ("linen", "unrolled")],
)
def test_statistics_are_those_of_the_inner_steps_alone(style, name):
    """BatchNorm and Dropout, K inner steps and 1 outer: bit-equal to K steps of the solver with
    nothing after them."""
    model = nnx_net(rate=0.5)
    net = nn.from_nnx(model) if style == "nnx" else linen_net(model, rate=0.5, rngs=("dropout",))
    problem = nn.bilevel(weighted, plain, net, SCORES)
    algorithm = bx.algorithms.double_loop(SOLVER, METHODS[name], optax.adam(0.1))
    arguments = dict(
        inner_data=TRAIN, outer_data=VALID, algorithm=algorithm, num_steps=1, key=jax.random.key(3)
    )
    after = bx.solve_bilevel(**problem.arguments, **arguments).state.algorithm.inner
    lower = base.Lower(problem.inner_objective, SOLVER, bx.data.same)
    start = base.InnerState(
        problem.inner_params, SOLVER.init(problem.inner_params), problem.model_state
    )
    alone, _ = jax.jit(lambda start, scores, feed: lower.run(start, scores, feed))(
        start, SCORES, base.Feed(TRAIN, jax.random.fold_in(jax.random.key(3), 0), jnp.int32(0))
    )
    assert same_bits(after.model, alone.model)
    for got, want in zip(leaves(after.params), leaves(alone.params), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-16)
    assert not same_bits(after.model, problem.model_state)


def test_statistics_follow_a_training_loop_of_nnx():
    """Against K steps of ``nnx.value_and_grad`` and ``nnx.Optimizer``, which know nothing of this
    library."""
    problem = nn.bilevel(weighted, plain, nnx_net(), SCORES)
    out = estimate(problem, UNROLLED)
    model = nnx_net()
    optimizer = nnx.Optimizer(model, optax.sgd(0.3, momentum=0.5), wrt=nnx.Param)
    model.train()
    for _ in range(3):
        optimizer.update(model, nnx.grad(weighted)(model, SCORES, TRAIN))
    trained, _ = problem.merge(base_solution(out, problem))
    for got, want in zip(leaves(nnx.state(trained)), leaves(nnx.state(model)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
    model.eval()
    np.testing.assert_allclose(out.value, plain(model, SCORES, VALID), rtol=1e-12)


def base_solution(out, problem):
    return bx.Solution(
        out.inner_params, problem.outer_params, out.state.model, bx.RESULTS.success, {}, None, {}
    )


def test_statistics_are_kept_with_the_best_iterate_and_resumed():
    problem = nn.bilevel(weighted, plain, nnx_net(rate=0.5), SCORES)
    algorithm = bx.algorithms.double_loop(SOLVER, UNROLLED, optax.adam(0.1))
    run = functools.partial(
        bx.solve_bilevel,
        **problem.arguments,
        inner_data=TRAIN,
        outer_data=VALID,
        algorithm=algorithm,
        key=jax.random.key(0),
        keep="last",
    )
    whole, half = run(num_steps=6), run(num_steps=3)
    again = run(num_steps=3, state=half.state)
    assert same_bits(
        (whole.inner_params, whole.model_state, whole.outer_params),
        (again.inner_params, again.model_state, again.outer_params),
    )


def test_the_user_s_model_is_not_touched():
    model = nnx_net(rate=0.5)
    model.eval()
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Not(nnx.RngKey)))
    problem = nn.bilevel(weighted, plain, model, SCORES)
    out = estimate(problem, UNROLLED, key=jax.random.key(0))
    assert same_bits(before, nnx.state(model, nnx.Not(nnx.RngKey)))
    assert model.norm.use_running_average and model.drop.deterministic
    trained, _ = problem.merge(base_solution(out, problem))
    assert (
        trained.norm.use_running_average and trained.drop.deterministic
    )  # a merged model is in the mode that the user left
    nnx.update(model, out.inner_params)
    assert same_bits(nnx.state(model, nnx.Param), nnx.state(trained, nnx.Param))


@pytest.mark.turns
@pytest.mark.parametrize("style", ["nnx", "linen"])
def test_modes_by_level(style):
    """An evaluated level normalises by the running statistics, a trained one by the batch's."""
    net = both_styles()[style]
    shown = bx.objective(
        lambda model, scores, batch: (plain(model, scores, batch), call(model, batch[0])),
        has_aux=True,
    )
    problems = {
        mode: nn.bilevel(weighted, shown, net, SCORES, train=(True, mode)) for mode in (True, False)
    }
    out = {
        mode: estimate(problem, METHODS["finite difference"] if mode else UNROLLED).aux
        for mode, problem in problems.items()
    }
    assert float(jnp.abs(out[True] - out[False]).max()) > 1e-3


# ---- random streams


@pytest.mark.parametrize("style", ["nnx", "linen"])
def test_streams_are_a_function_of_the_key(style):
    model = nnx_net(rate=0.5)
    net = nn.from_nnx(model) if style == "nnx" else linen_net(model, rate=0.5, rngs=("dropout",))
    obj = nn.objective(weighted, inner=net)
    assert obj.keyed and obj.stateful

    @jax.jit
    def value(key):
        return obj(net.params, SCORES, base.Ctx(TRAIN, key, {"inner": net.state}))[0]

    one, other = jax.random.split(jax.random.key(0))
    assert value(one) == value(one) != value(other)


def test_layers_and_calls_draw_masks_of_their_own():
    class Two(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.scale, self.a, self.b = (
                nnx.Param(jnp.ones(())),
                nnx.Dropout(0.5, rngs=rngs),
                nnx.Dropout(0.5, rngs=rngs),
            )

        def __call__(self, x):
            return self.scale * x, self.a(x), self.b(x), self.a(x)

    net = nn.from_nnx(Two())
    fn = bx.objective(
        lambda model, x, batch: (jnp.sum(model(batch)[0]), model(batch)), has_aux=True
    )
    obj = nn.objective(fn, inner=net)
    _, (_, (_, a, b, again)) = jax.jit(
        lambda key: obj(net.params, 0.0, base.Ctx(jnp.ones(64), key))
    )(jax.random.key(0))
    assert (
        not (np.asarray(a) == np.asarray(b)).all()
        and not (np.asarray(a) == np.asarray(again)).all()
    )


@pytest.mark.turns
@pytest.mark.parametrize("style", ["nnx", "linen"])
def test_differenced_evaluations_share_their_masks(style):
    """Two gradients at y ± εw with different masks would be off by their difference over 2ε, a
    hundred times the answer."""
    model = nnx_net(rate=0.5)
    net = nn.from_nnx(model) if style == "nnx" else linen_net(model, rate=0.5, rngs=("dropout",))
    problem = nn.bilevel(weighted, plain, net, SCORES)
    by_difference = estimate(
        problem, bx.hypergradient.finite_difference(radius=1e-5), key=jax.random.key(1)
    ).grad
    exact = estimate(problem, bx.hypergradient.one_step(), key=jax.random.key(1)).grad
    np.testing.assert_allclose(by_difference, exact, rtol=1e-6, atol=1e-11)


def test_a_loss_that_draws_gets_its_key():
    noisy = bx.objective(
        lambda model, scores, batch, *, key: (
            weighted(model, scores, batch) + jax.random.normal(key, (), jnp.float64)
        ),
        keyed=True,
    )
    obj = nn.objective(noisy, inner=nnx_net(norm=False))
    net = nn.from_nnx(nnx_net(norm=False))
    assert obj.keyed and not obj.stateful
    values = [
        obj(net.params, SCORES, base.Ctx(TRAIN, key))[0]
        for key in jax.random.split(jax.random.key(0))
    ]
    assert values[0] != values[1]


# ---- both styles, and what is exact


def penalised(model, scores, batch):
    """Strongly convex enough for a Newton solve: a sum of squares over what the model is called on,
    which needs no access to its leaves."""
    return weighted(model, scores, batch) + 0.05 * jnp.mean(
        jnp.sum(call(model, jnp.eye(3)) ** 2, -1)
    )


@pytest.mark.turns
@pytest.mark.parametrize("norm", [False, True], ids=["", "batchnorm"])
@pytest.mark.parametrize("name", ["implicit", "unrolled", "sama"])
def test_nnx_and_linen_give_the_same_hypergradient(name, norm):
    grads = {}
    for style, net in both_styles(norm=norm).items():
        grads[style] = estimate(nn.bilevel(weighted, plain, net, SCORES), METHODS[name])
    np.testing.assert_allclose(grads["nnx"].value, grads["linen"].value, rtol=1e-12)
    assert float(tree.norm(grads["nnx"].grad)) > 1e-4
    np.testing.assert_allclose(grads["nnx"].grad, grads["linen"].grad, rtol=1e-6, atol=1e-12)


@pytest.mark.turns
@pytest.mark.parametrize("style", ["nnx", "linen"])
def test_against_a_dense_solve(style):
    """Learn the head (10 numbers) with its penalty: solved to the end by Newton, differentiated by
    the dense formula on the raw matrices."""
    model = nnx_net(norm=False)
    head = nn.paths("head")
    net = nn.from_nnx(model, head) if style == "nnx" else linen_net(model, head)
    fixed = linen_variables(model)["params"]["body"]

    def inner_dense(flat, scores):
        hidden = jnp.tanh(TRAIN[0] @ fixed["kernel"] + fixed["bias"][None])
        kernel, bias = flat[:8].reshape(4, 2), flat[8:]
        values = optax.softmax_cross_entropy_with_integer_labels(
            hidden @ kernel + bias[None], TRAIN[1]
        )
        probe = jnp.tanh(jnp.eye(3) @ fixed["kernel"] + fixed["bias"][None]) @ kernel + bias[None]
        return (
            jnp.mean(jax.nn.sigmoid(scores) * values)
            + 0.05 * jnp.mean(jnp.sum(probe**2, -1))
            + 0.01 * jnp.sum(flat**2)
        )

    def outer_dense(flat):
        hidden = jnp.tanh(VALID[0] @ fixed["kernel"] + fixed["bias"][None])
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(
                hidden @ flat[:8].reshape(4, 2) + flat[None, 8:], VALID[1]
            )
        )

    @jax.jit
    def dense(scores):
        flat = jnp.zeros(10)
        for _ in range(12):
            flat = flat - jnp.linalg.solve(
                jax.hessian(inner_dense)(flat, scores), jax.grad(inner_dense)(flat, scores)
            )
        cross = jax.jacobian(jax.grad(inner_dense), argnums=1)(flat, scores)
        return -cross.T @ jnp.linalg.solve(
            jax.hessian(inner_dense)(flat, scores), jax.grad(outer_dense)(flat)
        ), flat

    def inner(
        model,
        given,
        batch,
        # the raw parameters come as part of the outer ones' pytree: a penalty of leaves, in either
        # style
    ):
        return penalised(model, given, batch)

    def regularised(params, scores, batch):
        return objective.fn(params, scores, batch) + 0.01 * sum(
            jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)
        )

    objective = nn.objective(inner, inner=net)
    outer = nn.objective(plain, inner=net, train=False)
    solver = bx.inner.lbfgs(maxiter=200, tol=1e-13)
    method = bx.hypergradient.implicit(bx.linear.cg(maxiter=100, tol=1e-13))
    out = jax.jit(bx.value_and_hypergrad(regularised, outer, solver=solver, hypergradient=method))(
        net.params, SCORES, TRAIN, VALID
    )
    want, flat = dense(SCORES)
    np.testing.assert_allclose(np.sort(ravel_pytree(out.inner_params)[0]), np.sort(flat), atol=1e-8)
    np.testing.assert_allclose(out.grad, want, rtol=1e-6, atol=1e-10)


# ---- what is learned, and at which level


@pytest.mark.parametrize("style", ["nnx", "linen"])
def test_what_no_filter_takes_is_frozen(style):
    model = nnx_net()
    net = (
        nn.from_nnx(model, nn.paths("head"))
        if style == "nnx"
        else linen_net(model, nn.paths("head"))
    )
    assert tree.size(net.params) == 10
    problem = nn.bilevel(weighted, plain, net, SCORES)
    out = estimate(problem, UNROLLED)
    merged, _ = problem.merge(base_solution(out, problem))
    params = linen_variables(merged)["params"] if style == "nnx" else merged["params"]
    before = linen_variables(model)["params"]
    assert same_bits(params["body"], before["body"]) and same_bits(params["norm"], before["norm"])
    assert not same_bits(params["head"], before["head"])
    assert not same_bits(
        out.state.model, problem.model_state
    )  # the statistics of a frozen layer still move


@pytest.mark.parametrize("style", ["nnx", "linen"])
def test_one_model_divided_between_the_levels(style):
    """The head is trained, the body is its hyperparameter: against autodiff through the steps
    written out on the raw matrices."""
    model = nnx_net(norm=False)
    wrt = (nn.paths("head"), nn.paths("body"))
    net = nn.from_nnx(model, wrt) if style == "nnx" else linen_net(model, wrt)
    problem = nn.bilevel(
        lambda m, batch: jnp.mean(losses(m, batch)),
        lambda m, batch: jnp.mean(losses(m, batch)),
        model=net,
    )
    out = estimate(problem, UNROLLED, bx.inner.optax(optax.sgd(0.3), 3))
    start = linen_variables(model)["params"]

    def value(body):
        head = start["head"]

        def loss(head, batch):
            logits = (
                jnp.tanh(batch[0] @ body["kernel"] + body["bias"][None]) @ head["kernel"]
                + head["bias"][None]
            )
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

        for _ in range(3):
            head = jax.tree.map(lambda p, g: p - 0.3 * g, head, jax.grad(loss)(head, TRAIN))
        return loss(head, VALID)

    for got, want in zip(
        leaves(out.grad), leaves(jax.jit(jax.grad(value))(start["body"])), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-13)


@pytest.mark.turns
def test_several_models_at_one_level_and_a_model_at_each():
    """Teacher and student in a dict below, a weighting network above; nnx above linen as well."""
    pair = {"student": nnx_net(1, norm=False), "teacher": nnx_net(2)}
    weigher = nnx.Linear(1, 1, rngs=nnx.Rngs(0), dtype=jnp.float64, param_dtype=jnp.float64)

    def inner(models, weigher, batch):
        values = losses(models["student"], batch)
        far = jnp.mean((call(models["student"], batch[0]) - call(models["teacher"], batch[0])) ** 2)
        return jnp.mean(jax.nn.sigmoid(weigher(values[:, None])[:, 0]) * values) + far

    problem = nn.bilevel(
        inner,
        lambda models, weigher, batch: jnp.mean(losses(models["student"], batch)),
        pair,
        weigher,
    )
    assert set(problem.model_state) == {"inner"}
    out = estimate(problem, UNROLLED)
    assert float(tree.norm(out.grad)) > 0
    models, merged = problem.merge(base_solution(out, problem))
    assert isinstance(models["student"], NnxNet) and isinstance(merged, nnx.Linear)
    mixed = nn.bilevel(
        lambda model, weigher, batch: jnp.mean(
            jax.nn.sigmoid(weigher(losses(model, batch)[:, None])[:, 0]) * losses(model, batch)
        ),
        lambda model, weigher, batch: jnp.mean(losses(model, batch)),
        linen_net(nnx_net(1)),
        weigher,
    )
    assert float(tree.norm(estimate(mixed, UNROLLED).grad)) > 0


def test_levels_of_one_model_and_of_several():
    """A multilevel problem of two levels, by `model=` and by `levels=`, is the bilevel one."""
    model = nnx_net(norm=False)
    head, body = nn.paths("head"), nnx.Not(nn.paths("head"))
    divided = nn.from_nnx(model, (head, body))
    pair = nn.bilevel(
        lambda m, batch: jnp.mean(losses(m, batch)),
        lambda m, batch: jnp.mean(losses(m, batch)),
        model=divided,
    )
    solver = bx.inner.optax(optax.sgd(0.3), 2)
    want = estimate(pair, UNROLLED, solver).grad

    def graded(objectives, params):
        levels = [
            bx.Level("head", objectives[0], solver=solver, hypergradient=UNROLLED),
            bx.Level("body", objectives[1], solver=optax.sgd(0.1)),
        ]
        return jax.jit(bx.value_and_multilevel_grad(levels))(
            params, {"head": TRAIN, "body": VALID}
        ).grad

    net = nn.from_nnx(model, {"head": head, "body": body})
    one = [
        nn.objective(lambda m, batch: jnp.mean(losses(m, batch)), model=net, train=train)
        for train in (True, False)
    ]
    np.testing.assert_allclose(
        ravel_pytree(graded(one, net.params))[0], ravel_pytree(want)[0], rtol=1e-9, atol=1e-14
    )

    def stacked(models, batch):
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(
                models["head"](jnp.tanh(models["body"](batch[0]))), batch[1]
            )
        )

    nets = {name: nn.from_nnx(getattr(model, name)) for name in ("head", "body")}
    two = [nn.objective(stacked, levels=nets, train=train) for train in (True, False)]
    got = graded(two, {name: net.params for name, net in nets.items()})
    np.testing.assert_allclose(ravel_pytree(got)[0], ravel_pytree(want)[0], rtol=1e-9, atol=1e-14)


# ---- traces


@pytest.mark.turns
def test_nothing_is_traced_beyond_hand_split_functions():
    def count(make):
        seen = []

        def loss(model, scores, batch):
            seen.append(1)
            return weighted(model, scores, batch)

        arguments = make(loss)
        before = run_chunk._cache_size()
        run = functools.partial(
            bx.solve_bilevel, inner_data=TRAIN, outer_data=VALID, algorithm=ALGORITHM, num_steps=3
        )
        run(**arguments())
        first, compiled = len(seen), run_chunk._cache_size() - before
        run(**arguments())
        return first, compiled, len(seen) - first, run_chunk._cache_size() - before

    def by_nn(loss):
        problem = nn.bilevel(loss, plain, nnx_net(5), SCORES)
        return lambda: problem.arguments

    def by_hand(loss):
        graphdef, params, stats = nnx.split(nnx_net(5), nnx.Param, ...)

        def inner(params, scores, batch, stats):
            model = nnx.merge(graphdef, params, stats, copy=True)
            model.train()
            return loss(model, scores, batch), nnx.state(model, nnx.BatchStat)

        def outer(params, scores, batch, stats):
            model = nnx.merge(graphdef, params, stats, copy=True)
            model.eval()
            return plain(model, scores, batch), stats

        objectives = [bx.objective(fn, stateful=True) for fn in (inner, outer)]
        return lambda: dict(
            inner_objective=objectives[0],
            outer_objective=objectives[1],
            inner_params=params,
            outer_params=SCORES,
            model_state=stats,
        )

    ours, theirs = count(by_nn), count(by_hand)
    assert ours[0] <= theirs[0] and ours[1:] == theirs[1:] == (1, 0, 1), (ours, theirs)


@pytest.mark.turns
@pytest.mark.parametrize("style", ["nnx", "linen"])
def test_another_model_of_the_same_architecture_compiles_nothing(style):
    def solve(seed):
        net = nn.from_nnx(nnx_net(seed)) if style == "nnx" else linen_net(nnx_net(seed))
        problem = nn.bilevel(weighted, plain, net, SCORES)
        return bx.solve_bilevel(
            **problem.arguments,
            inner_data=TRAIN,
            outer_data=VALID,
            algorithm=ALGORITHM,
            num_steps=3,
        )

    first = solve(1)
    before = run_chunk._cache_size()
    assert not same_bits(solve(2).inner_params, first.inner_params)
    assert run_chunk._cache_size() == before


ALGORITHM = bx.algorithms.double_loop(
    SOLVER,
    bx.hypergradient.implicit(bx.linear.cg(maxiter=2), max_residual=jnp.inf),
    optax.adam(0.1),
)


@pytest.mark.turns
@pytest.mark.parametrize("style", ["nnx", "linen"])
def test_metrics_see_models_in_evaluation_mode(style):
    problem = nn.bilevel(weighted, plain, both_styles()[style], SCORES)
    metrics = problem.metrics(
        lambda model, scores, batch: {"held_out": plain(model, scores, batch)}, VALID
    )
    arguments = dict(
        inner_data=TRAIN, outer_data=VALID, algorithm=ALGORITHM, num_steps=3, metrics=metrics
    )
    history = bx.solve_bilevel(**problem.arguments, **arguments).history
    np.testing.assert_allclose(
        history["held_out"], history["value"], rtol=1e-12
    )  # the outer value is the same measure, at the same point
