"""bx.nn among what training scripts have: TrainState, nnx.Optimizer, and optax's wrappers, each
against the plain training loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import bilevax as bx
from bilevax import base, nn, tree
from tests.nn.nn_models import (
    MODES,
    LinenNet,
    batches,
    leaves,
    linen_variables,
    nnx_net,
    plain,
    weighted,
)

TRAIN, VALID = batches()
SCORES = jnp.linspace(-1.0, 1.0, len(TRAIN[1]))
STILL = optax.set_to_zero()  # of the outer level: the inner one then trains as if it were alone
ADAM = optax.adam(
    0.05, eps=1e-3
)  # a bias before BatchNorm has a gradient of rounding noise, which a tiny eps would blow up


class State(TrainState):
    batch_stats: Any


def close(a, b):
    for got, want in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)


def run(problem, opt, steps=2, outer_steps=2, outer=STILL, **settings):
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(opt, steps), bx.hypergradient.one_step(), outer
    )
    return bx.solve_bilevel(
        **problem.arguments,
        inner_data=TRAIN,
        outer_data=VALID,
        algorithm=algorithm,
        num_steps=outer_steps,
        **settings,
    )


def test_a_train_state_is_taken_over_and_handed_back():
    module, variables = LinenNet(), linen_variables(nnx_net())
    state = State.create(
        apply_fn=module.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=ADAM,
    )

    @jax.jit
    def train(state):
        def loss(params):
            def model(x):
                return state.apply_fn(
                    {"params": params, "batch_stats": state.batch_stats},
                    x,
                    train=True,
                    mutable=["batch_stats"],
                )

            with jax.numpy_dtype_promotion("standard"):
                logits, moved = model(TRAIN[0])
            values = optax.softmax_cross_entropy_with_integer_labels(logits, TRAIN[1])
            return jnp.mean(jax.nn.sigmoid(SCORES) * values), moved["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(state.params)
        with jax.numpy_dtype_promotion("standard"):
            return state.apply_gradients(grads=grads, batch_stats=stats)

    alone = state
    for _ in range(3 + 4 + 2):
        alone = train(alone)
    for _ in range(3):
        state = train(state)
    net = nn.from_linen(
        state.apply_fn, {"params": state.params, "batch_stats": state.batch_stats}, **MODES
    )
    problem = nn.bilevel(weighted, plain, net, SCORES)
    state = nn.hand_back(state, run(problem, nn.going_on(state)), inner_steps=2)
    assert int(state.step) == 7
    for _ in range(2):
        state = train(state)
    close(
        (state.params, state.batch_stats, state.opt_state),
        (alone.params, alone.batch_stats, alone.opt_state),
    )


def test_an_nnx_optimizer_is_taken_over_and_handed_back():
    def trained(model, optimizer, steps):
        model.train()
        for _ in range(steps):
            grads = nnx.grad(weighted)(model, SCORES, TRAIN)
            with jax.numpy_dtype_promotion("standard"):
                optimizer.update(model, grads)

    def make():
        model = nnx_net()
        return model, nnx.Optimizer(model, ADAM, wrt=nnx.Param)

    alone, other = make()
    trained(alone, other, 6)
    model, optimizer = make()
    trained(model, optimizer, 1)
    solution = run(nn.bilevel(weighted, plain, model, SCORES), nn.going_on(optimizer))
    assert nn.hand_back(optimizer, solution, inner_steps=2, model=model) is optimizer
    assert int(optimizer.step[...]) == 5
    trained(model, optimizer, 1)
    close(nnx.state(model), nnx.state(alone))
    close(optimizer.opt_state, other.opt_state)


def test_hand_over_refuses_what_does_not_fit():
    model = nnx_net()
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    with pytest.raises(TypeError, match="training: got"):
        nn.going_on(ADAM)
    problem = nn.bilevel(weighted, plain, nn.from_nnx(model, nn.paths("head")), SCORES)
    with pytest.raises(
        ValueError, match="opt_state: got 13 arrays, where the learned parameters make 5"
    ):
        run(problem, nn.going_on(optimizer))
    solution = run(nn.bilevel(weighted, plain, model, SCORES), nn.going_on(optimizer))
    with pytest.raises(TypeError, match="model: got None"):
        nn.hand_back(optimizer, solution, inner_steps=2)
    with pytest.raises(ValueError, match="inner_steps"):
        nn.hand_back(optimizer, solution, inner_steps=0)


# ---- optax's wrappers, over nnx.State and over linen's dicts


def head_labels(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "head" if "head" in jax.tree_util.keystr(path) else "body", params
    )


def head_mask(params):
    return jax.tree.map(lambda label: label == "head", head_labels(params))


WRAPPERS = {
    "mask": optax.chain(optax.masked(optax.add_decayed_weights(0.1), head_mask), optax.sgd(0.1)),
    "multi_transform": optax.multi_transform(
        {"head": optax.adam(0.05), "body": optax.sgd(0.1, momentum=0.9)}, head_labels
    ),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.piecewise_constant_schedule(0.125, {2: 0.5})
    ),
    "schedule and clipping": optax.chain(
        optax.clip_by_global_norm(0.05),
        optax.sgd(optax.cosine_decay_schedule(0.5, 4), momentum=0.9),
    ),
    "ema": optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "accumulation": optax.MultiSteps(optax.adam(0.05), 2).gradient_transformation(),
}


@pytest.mark.turns
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_train_as_they_do_alone(name):
    opt, net = WRAPPERS[name], nn.from_nnx(nnx_net(norm=False))
    solution = run(nn.bilevel(weighted, plain, net, SCORES), opt)
    objective = nn.objective(weighted, inner=net)

    @jax.jit
    def alone(params):
        with jax.numpy_dtype_promotion("standard"):
            opt_state = opt.init(params)
        for _ in range(4):
            grads = jax.grad(lambda params: objective(params, SCORES, base.Ctx(TRAIN))[0])(params)
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = opt.update(grads, opt_state, params)
            params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
        return params

    close(solution.state.algorithm.inner.params, alone(net.params))


def test_an_average_of_the_parameters_rides_in_the_optimizer_s_state():
    """EMA of parameters, as training scripts keep it: a transformation that changes no update."""

    def averaging(decay):
        def update(updates, mean, params):
            return updates, jax.tree.map(
                lambda m, p, u: decay * m + (1 - decay) * (p + u), mean, params, updates
            )

        return optax.GradientTransformation(lambda params: params, update)

    net = nn.from_linen(LinenNet(), linen_variables(nnx_net()), **MODES)
    solution = run(
        nn.bilevel(weighted, plain, net, SCORES),
        optax.chain(optax.sgd(0.1), averaging(0.5)),
        outer_steps=3,
    )
    params, mean = solution.state.algorithm.inner.params, solution.state.algorithm.inner.opt[-1]
    assert jax.tree.structure(mean) == jax.tree.structure(params)
    far, near = (float(tree.norm(tree.sub(a, params))) for a in (net.params, mean))
    assert 0 < near < far
    merged = net.merge(mean, solution.model_state["inner"])  # the averaged model
    assert set(merged) == {"params", "batch_stats"}


# ---- dtypes


@pytest.mark.turns
@pytest.mark.parametrize("style", ["nnx", "linen"])
@pytest.mark.parametrize(
    "policy",
    [(jnp.bfloat16, jnp.float32), (jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.float32)],
    ids=["mixed", "half", "single"],
)
def test_dtype_policies_are_the_model_s_own(style, policy):
    """Flax's `dtype` and `param_dtype` pass through: parameters keep theirs, statistics stay
    float32, the hypergradient has the outer one's."""
    dtypes = dict(dtype=policy[0], param_dtype=policy[1])
    model = nnx_net(dtypes=dtypes)
    module = LinenNet(dtypes=tuple(dtypes.items()))
    net = (
        nn.from_nnx(model)
        if style == "nnx"
        else nn.from_linen(module, linen_variables(model), **MODES)
    )
    train, valid = (
        jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.float64 else a, part)
        for part in (TRAIN, VALID)
    )
    problem = nn.bilevel(as_float32(weighted), as_float32(plain), net, SCORES.astype(jnp.float32))
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.1), 2), bx.hypergradient.unrolled(), optax.adam(0.1)
    )
    solution = bx.solve_bilevel(
        **problem.arguments, inner_data=train, outer_data=valid, algorithm=algorithm, num_steps=3
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(solution.inner_params)} == {jnp.dtype(policy[1])}
    assert {leaf.dtype for leaf in jax.tree.leaves(solution.model_state)} == {
        jnp.dtype(jnp.float32)
    }
    assert (
        solution.outer_params.dtype == jnp.float32
        and np.isfinite(solution.history["grad_norm"]).all()
    )
    assert (solution.history["grad_norm"] > 0).all()


def as_float32(loss):
    """The usual end of a mixed-precision loss: logits in float32."""
    return lambda model, scores, batch: loss(lambda x: model(x).astype(jnp.float32), scores, batch)


# ---- refusals


def script(model, loss=weighted, metric=None):
    """What a script does with a model."""
    problem = nn.bilevel(loss, plain, model, SCORES)
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(ADAM, 1), bx.hypergradient.unrolled(), STILL
    )
    measured = None if metric is None else problem.metrics(metric, VALID)
    return bx.solve_bilevel(
        **problem.arguments, inner_data=TRAIN, outer_data=VALID, algorithm=algorithm,
        metrics=measured, num_steps=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: nn.from_nnx({"w": jnp.ones(2)}),
            TypeError,
            "model: got dict.*expected an nnx.Module",
        ),
        (
            lambda: nn.from_nnx(nnx_net(), nn.paths("nowhere")),
            ValueError,
            r"wrt: got Paths.*takes no floating-point parameter.*head/kernel",
        ),
        (
            lambda: nn.from_nnx(nnx_net(), (nnx.Param, nn.paths("head"))),
            ValueError,
            "takes no floating-point parameter after those before",
        ),
        (lambda: nn.from_nnx(nnx_net(), (nnx.Param,)), ValueError, "a tuple of at least two"),
        (lambda: nn.from_nnx(nnx_net(), {0: nnx.Param}), TypeError, "level names as keys"),
        (lambda: nn.paths(3), TypeError, "patterns: got"),
        (lambda: nn.from_linen(3, {"params": {}}), TypeError, "module: got int 3"),
        (
            lambda: nn.from_linen(LinenNet(), {"w": {}}),
            ValueError,
            r"variables: got \['w'\].*with 'params'",
        ),
        (
            lambda: nn.from_linen(LinenNet(), linen_variables(nnx_net()), nnx.Param),
            TypeError,
            "wrt: got",
        ),
        (
            lambda: nn.from_linen(LinenNet(), linen_variables(nnx_net()), rngs="dropout"),
            TypeError,
            r"Try rngs=\('dropout',\)",
        ),
        (
            lambda: nn.from_linen(LinenNet(), linen_variables(nnx_net()), train=True),
            TypeError,
            r"train: got bool True; expected the arguments.*Try train=\{'train': True\}",
        ),
        (
            lambda: script(nn.from_linen(LinenNet(), linen_variables(nnx_net()))),
            TypeError,
            r"from_linen: raised this in training mode.*train=\{'train': True\}",
        ),
        (
            lambda: script(nnx_net(), loss=lambda m, s, b: (weighted(m, s, b), {"a": 1.0})),
            TypeError,
            r"expected a scalar array. Wrap it: objective\(fn, has_aux=True\)",
        ),
        (
            lambda: script(nnx_net(), metric=lambda model, data: {"m": jnp.sum(data[0])}),
            TypeError,
            r"fn: got a function of \(model, data\); expected one of \(inner, outer, data\)",
        ),
        (
            lambda: script(nnx_net(), metric=lambda model, scores, data: jnp.sum(data[0])),
            TypeError,
            r"metrics \(<lambda>\): returned .*; expected a dict of scalars by name",
        ),
        (
            lambda: nn.objective(weighted, inner=LinenNet()),
            TypeError,
            r"Try nn.from_linen\(module, variables\)",
        ),
        (
            lambda: nn.objective(weighted),
            TypeError,
            "expected inner or outer or both, or model alone",
        ),
        (lambda: nn.objective(weighted, inner=nnx_net(), train=1), TypeError, "train: got 1"),
        (
            lambda: nn.objective(bx.objective(weighted, stateful=True), inner=nnx_net()),
            TypeError,
            "not stateful",
        ),
        (
            lambda: nn.objective(bx.objective(weighted, trajectory=True), inner=nnx_net()),
            TypeError,
            "parameters after every step are no model.*net.merge",
        ),
        (
            lambda: nn.objective(weighted, model=nnx_net()),
            ValueError,
            r"not divided; expected wrt=\(inner filter, outer filter\)",
        ),
        (
            lambda: nn.objective(
                weighted, inner=nn.from_nnx(nnx_net(), (nn.paths("head"), nn.paths("body")))
            ),
            ValueError,
            "expected it as model=",
        ),
        (lambda: nn.bilevel(weighted, plain, nnx_net()), TypeError, "outer: got None"),
        (lambda: nn.bilevel(weighted, plain, LinenNet(), SCORES), TypeError, "from_linen"),
        (
            lambda: nn.bilevel(weighted, plain, SCORES, SCORES),
            TypeError,
            "no model at either level",
        ),
        (
            lambda: nn.bilevel(weighted, plain, nnx_net(), SCORES, model=nnx_net()),
            TypeError,
            "beside inner or outer",
        ),
        (
            lambda: nn.bilevel(weighted, plain, nnx_net(), SCORES, train=True),
            TypeError,
            "a pair of booleans",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_problem_prints_in_a_line():
    problem = nn.bilevel(weighted, plain, nnx_net(), SCORES)
    assert repr(problem) == "Bilevel(weighted, plain, inner=Net(34 learned numbers, with state))"


def test_flax_is_imported_on_use_only():
    import subprocess
    import sys

    code = (
        "import sys, warnings, jax, optax; warnings.simplefilter('error'); before = "
        "set(sys.modules); import bilevax; "
        "assert 'flax' not in set(sys.modules) - before; bilevax.nn; assert 'flax.nnx' in "
        "sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
