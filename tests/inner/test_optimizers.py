"""Every transformation that optax exports, as inner and as outer optimizer, against its own plain
loop."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import bilevax as bx
from bilevax import hypergradient as H

C = optax.contrib
sgd = functools.partial(optax.chain, optax.scale(-0.1))

REGISTRY = {
    "adabelief": lambda: optax.adabelief(0.1),
    "adadelta": lambda: optax.adadelta(0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "adagrad": lambda: optax.adagrad(0.1),
    "adam": lambda: optax.adam(0.1, eps_root=1e-8),
    "adamax": lambda: optax.adamax(0.1),
    "adamaxw": lambda: optax.adamaxw(0.1),
    "adamw": lambda: optax.adamw(0.1, eps_root=1e-8),
    "adan": lambda: optax.adan(0.1),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "add_decayed_weights": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    "add_noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(0.1)),
    "amsgrad": lambda: optax.amsgrad(0.1, eps_root=1e-8),
    "apply_every": lambda: optax.chain(optax.sgd(0.1), optax.apply_every(2)),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(0.1), 3),
    "centralize": lambda: optax.chain(optax.centralize(), optax.sgd(0.1)),
    "chain": lambda: optax.chain(optax.clip(0.5), optax.sgd(0.1)),
    "clip": lambda: optax.chain(optax.clip(0.5), optax.sgd(0.1)),
    "clip_by_block_rms": lambda: optax.chain(optax.clip_by_block_rms(0.5), optax.sgd(0.1)),
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
    "conditionally_mask": lambda: optax.chain(
        optax.conditionally_mask(optax.sgd(0.1), lambda step: step % 2 == 0), optax.scale(0.5)
    ),
    "conditionally_transform": lambda: optax.chain(
        optax.conditionally_transform(optax.scale(2.0), lambda step: step < 1), optax.sgd(0.1)
    ),
    "ema": lambda: optax.chain(optax.ema(0.5), optax.sgd(0.1)),
    "flatten": lambda: optax.flatten(optax.sgd(0.1)),
    "freeze": lambda: optax.chain(optax.sgd(0.1), optax.freeze({"m": False, "b": True})),
    "fromage": lambda: optax.fromage(0.1),
    "identity": lambda: optax.chain(optax.identity(), optax.sgd(0.1)),
    # a schedule in float64, as all the rest is: optax's own count in float32, whose last bit is not
    # the same in two programs
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.sgd, hyperparam_dtype=jnp.float64)(
        learning_rate=lambda count: 0.1 / (1.0 + count.astype(jnp.float64))
    ),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.sgd)(
        learning_rate=0.1
    ),
    "keep_params_nonnegative": lambda: optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative()),
    "lamb": lambda: optax.lamb(0.1, eps_root=1e-8),
    "lars": lambda: optax.lars(0.1),
    "lbfgs": lambda: optax.lbfgs(0.1, linesearch=None),
    "lion": lambda: optax.lion(0.1),
    "masked": lambda: optax.chain(
        optax.masked(optax.scale(0.5), {"m": True, "b": False}), optax.sgd(0.1)
    ),
    "multi_transform": lambda: optax.multi_transform(
        {"a": optax.sgd(0.1), "b": optax.sgd(0.2)}, {"m": "a", "b": "b"}
    ),
    "nadam": lambda: optax.nadam(0.1, eps_root=1e-8),
    "nadamw": lambda: optax.nadamw(0.1, eps_root=1e-8),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(0.5)), ("sgd", optax.sgd(0.1))),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=0),
    "normalize_by_update_norm": lambda: optax.chain(
        optax.normalize_by_update_norm(), optax.sgd(0.1)
    ),
    "novograd": lambda: optax.novograd(0.1),
    "optimistic_adam": lambda: optax.optimistic_adam(0.1, eps_root=1e-8),
    "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(0.1, eps_root=1e-8),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(0.1),
    "partition": lambda: optax.partition(
        {"a": optax.sgd(0.1), "b": optax.sgd(0.2)}, {"m": "a", "b": "b"}
    ),
    "polyak_sgd": lambda: optax.polyak_sgd(1.0, f_min=-1.0),
    "radam": lambda: optax.radam(0.1, eps_root=1e-8),
    "rmsprop": lambda: optax.rmsprop(0.1),
    "rprop": lambda: optax.rprop(0.1),
    "selective_transform": lambda: optax.chain(
        optax.selective_transform(optax.scale(0.5), freeze_mask={"m": False, "b": True}),
        optax.sgd(0.1),
    ),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "sign_sgd": lambda: optax.sign_sgd(0.1),
    "signum": lambda: optax.signum(0.1),
    "sm3": lambda: optax.sm3(0.1),
    "snapshot": lambda: optax.chain(
        optax.snapshot("before", lambda updates: updates), optax.sgd(0.1)
    ),
    "stateless": lambda: optax.chain(
        optax.stateless(lambda g, p: jax.tree.map(lambda a: 2 * a, g)), optax.sgd(0.1)
    ),
    "stateless_with_tree_map": lambda: optax.chain(
        optax.stateless_with_tree_map(lambda g, p: g + 0.1 * p), optax.sgd(0.1)
    ),
    "trace": lambda: optax.chain(optax.trace(0.9), optax.scale(-0.1)),
    "with_extra_args_support": lambda: optax.with_extra_args_support(optax.sgd(0.1)),
    "yogi": lambda: optax.yogi(0.1),
    "zero_nans": lambda: optax.chain(optax.zero_nans(), optax.sgd(0.1)),
    "MultiSteps": lambda: optax.MultiSteps(optax.sgd(0.1), 2),
    "contrib.acprop": lambda: C.acprop(0.1),
    "contrib.ademamix": lambda: C.ademamix(0.1, eps_root=1e-8),
    "contrib.adopt": lambda: C.adopt(0.1),
    "contrib.cocob": lambda: C.cocob(),
    "contrib.dadapt_adamw": lambda: C.dadapt_adamw(1.0),
    "contrib.galore": lambda: C.galore(0.1, rank=2),
    "contrib.madgrad": lambda: C.madgrad(0.1),
    "contrib.mechanize": lambda: C.mechanize(optax.sgd(0.1)),
    "contrib.momo": lambda: C.momo(0.1),
    "contrib.momo_adam": lambda: C.momo_adam(0.1),
    "contrib.muon": lambda: C.muon(0.1),
    "contrib.normalize": lambda: optax.chain(C.normalize(), optax.sgd(0.1)),
    "contrib.prodigy": lambda: C.prodigy(0.5),
    "contrib.reduce_on_plateau": lambda: optax.chain(
        optax.sgd(0.1), C.reduce_on_plateau(patience=1)
    ),
    "contrib.sam": lambda: C.sam(
        optax.sgd(0.1), optax.chain(C.normalize(), optax.sgd(0.05)), sync_period=2
    ),
    "contrib.schedule_free": lambda: C.schedule_free(optax.sgd(0.1), 0.1),
    "contrib.schedule_free_adamw": lambda: C.schedule_free_adamw(0.1),
    "contrib.schedule_free_sgd": lambda: C.schedule_free_sgd(0.1),
    "contrib.simplified_ademamix": lambda: C.simplified_ademamix(0.1),
    "contrib.split_real_and_imaginary": lambda: C.split_real_and_imaginary(optax.sgd(0.1)),
}

# Transformations that no loop of gradients alone can run, or not in this form.
NOT = {
    "lookahead": "trains a pair of fast and slow parameters, which only its own loop keeps",
    "measure_with_ema": (
        "hands on the measurement in place of the update; its place is inside monitor"
    ),
    "monitor": "its state gains entries at the first update, which no compiled loop can carry",
    "scale_by_backtracking_linesearch": (
        "searches in a loop, which has no reverse mode: part of a chain, tested as lbfgs is"
    ),
    "scale_by_zoom_linesearch": (
        "searches in a loop, which has no reverse mode: part of a chain, tested as lbfgs is"
    ),
    "set_to_zero": "moves nothing",
    "contrib.differentially_private_aggregate": "wants one gradient an example, with a batch axis",
    "contrib.dpsgd": "wants one gradient an example, with a batch axis",
    "contrib.sophia": "wants the objective of a classifier's logits, to sample labels from",
}

# Tested on every change; the others by the slow tests. One of each kind: plain, with values, with
# keys, in groups, averaged, accumulated.
QUICK = ("sgd", "adam", "adamw", "rmsprop", "adagrad", "lion", "lamb", "polyak_sgd", "noisy_sgd",
"multi_transform", "inject_hyperparams",
         "MultiSteps", "contrib.muon", "contrib.sam", "contrib.schedule_free")  # fmt: skip
QUICK_OUTSIDE = (
    "sgd",
    "adam",
    "polyak_sgd",
    "multi_transform",
    "MultiSteps",
    "contrib.schedule_free",
)


def names(quick, without=()):
    """All of the registry, with those that are not `quick` marked slow."""
    return [
        name if name in quick else pytest.param(name, marks=pytest.mark.slow)
        for name in REGISTRY
        if name not in without
    ]


def exported():
    """Names of all functions of optax that say they return a transformation."""
    for module, prefix in ((optax, ""), (C, "contrib.")):
        for name in dir(module):
            fn = getattr(module, name)
            if (
                name.startswith("_")
                or not callable(fn)
                or inspect.isclass(fn)
                or name in ("sign_sgd_", "scale")
            ):
                continue
            try:
                returned = str(inspect.signature(fn).return_annotation)
            except (TypeError, ValueError):
                continue
            if "GradientTransformation" in returned and not name.startswith("scale_by_"):
                yield prefix + name


def test_all_that_is_exported_is_known():
    """The parts named ``scale_by_*`` are those of the aliases."""
    assert set(exported()) - {"contrib.scale"} <= set(REGISTRY) | set(NOT)


KEYS = jax.random.split(jax.random.key(0), 5)
X, Y = jax.random.normal(KEYS[0], (9, 4)), jax.random.normal(KEYS[1], (9, 3))
START = {"m": 0.5 * jax.random.normal(KEYS[2], (4, 3)), "b": 0.1 + jnp.arange(3.0)}
WEIGHTS = 0.3 * jax.random.normal(KEYS[3], (9,))
STEPS = 3


def inner(w, s, batch):
    error = jnp.tanh(X @ w["m"] + w["b"][None]) - Y
    return jnp.mean(jax.nn.sigmoid(s)[:, None] * error**2)


def outer(w, s, batch):
    return jnp.mean((jnp.tanh(X @ w["m"] + w["b"][None]) - Y - 1) ** 2)


def lenient(fn):
    """Optax's own code, as it is written."""

    @functools.wraps(fn)
    def wrapped(**arguments):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return fn(**arguments)

    return wrapped


def plain(opt, fn, params, steps, **extra):
    """A training loop as optax's documentation writes it."""
    state = opt.init(params)
    for _ in range(steps):
        value, grads = jax.value_and_grad(fn)(params)
        given = {"value": value, "grad": grads, "value_fn": fn}
        accepted = inspect.signature(opt.update).parameters
        takes = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        given = {k: v for k, v in given.items() if takes or k in accepted}
        updates, state = opt.update(grads, state, params, **given)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.turns
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", names(QUICK))
@lenient
def test_as_inner_optimizer(name):
    """Value and unrolled hypergradient of three steps."""
    opt = REGISTRY[name]()
    hand = jax.jit(
        jax.value_and_grad(
            lambda s: outer(plain(opt, lambda w: inner(w, s, None), START, STEPS), s, None)
        )
    )
    fn = bx.value_and_hypergrad(
        inner, outer, solver=bx.inner.optax(opt, STEPS), hypergradient=H.unrolled()
    )
    out, (value, grad) = jax.jit(fn)(START, WEIGHTS), hand(WEIGHTS)
    assert np.allclose(out.value, value, rtol=1e-8)
    if bool(jnp.all(jnp.isfinite(grad))):
        assert np.allclose(out.grad, grad, rtol=1e-8, atol=1e-10)
    else:
        assert out.info["code"] == bx.RESULTS.hypergradient_nonfinite


def tracked(w, x, batch):
    return 0.5 * sum(
        jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(w), jax.tree.leaves(x), strict=True)
    )


def best_response(x):
    return outer(x, None, None)


@pytest.mark.turns
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", names(QUICK_OUTSIDE, without=("contrib.sam",)))
@lenient
def test_as_outer_optimizer(name):
    """The inner level lands on its solution, which is x itself: the outer run is the plain loop."""
    opt = REGISTRY[name]()
    loop = bx.algorithms.double_loop(bx.inner.optax(optax.sgd(1.0), 1), H.one_step(), opt)
    out = bx.solve_bilevel(
        tracked, outer, START, START, algorithm=loop, num_steps=STEPS, keep="last"
    )
    want = jax.jit(lambda x: plain(opt, best_response, x, STEPS))(START)
    chex.assert_trees_all_close(out.outer_params, want, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@lenient
def test_lbfgs_with_its_line_search_at_both_levels():
    opt = optax.lbfgs()
    loop = bx.algorithms.double_loop(bx.inner.optax(optax.sgd(1.0), 1), H.one_step(), opt)
    out = bx.solve_bilevel(
        tracked, outer, START, START, algorithm=loop, num_steps=STEPS, keep="last"
    )
    want = jax.jit(lambda x: plain(opt, best_response, x, STEPS))(START)
    assert all(
        np.allclose(a, b, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(out.outer_params), jax.tree.leaves(want), strict=True)
    )
    fn = bx.value_and_hypergrad(
        inner, outer, solver=bx.inner.optax(opt, STEPS), hypergradient=H.one_step()
    )
    value = outer(
        jax.jit(lambda s: plain(opt, lambda w: inner(w, s, None), START, STEPS))(WEIGHTS),
        WEIGHTS,
        None,
    )
    assert np.allclose(jax.jit(fn)(START, WEIGHTS).value, value, rtol=1e-8)


@pytest.mark.slow
@lenient
def test_opaque_sam_is_given_the_gradient():
    adversary = optax.chain(C.normalize(), optax.sgd(0.05))
    opt = C.sam(optax.sgd(0.1), adversary, sync_period=2, opaque_mode=True)

    def by_hand(s):
        w, state, fn = START, opt.init(START), lambda w: inner(w, s, None)
        for _ in range(2):
            updates, state = opt.update(
                jax.grad(fn)(w), state, w, grad_fn=lambda w, i: jax.grad(fn)(w)
            )
            w = optax.apply_updates(w, updates)
        return outer(w, s, None)

    value, grad = jax.value_and_grad(by_hand)(WEIGHTS)
    out = bx.value_and_hypergrad(
        inner, outer, solver=bx.inner.optax(opt, 2), hypergradient=H.unrolled()
    )(START, WEIGHTS)
    assert np.allclose(out.value, value, rtol=1e-10) and np.allclose(
        out.grad, grad, rtol=1e-8, atol=1e-12
    )


# ---- SAMA over accumulation


def task(w, s, b):
    return jnp.mean(jax.nn.sigmoid(s) * (b[0] @ w - b[1]) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["object", "transformation"])
@pytest.mark.parametrize("steps", [2, 4, 3])
@lenient
def test_sama_differentiates_what_accumulation_leads_to(form, steps):
    """K microsteps of n are K / n updates: the pair equals an objective that accumulates inside;
    and any K runs."""
    many = optax.MultiSteps(optax.adam(0.1), 2)
    many = many if form == "object" else many.gradient_transformation()
    rows, late = (X, Y[:, 0]), lambda w, s, b: jnp.mean((b[0] @ w - b[1] - 1) ** 2)

    def run(inner, opt, steps):
        loop = bx.algorithms.double_loop(bx.inner.optax(opt, steps), H.sama(), optax.adam(0.1))
        return bx.solve_bilevel(
            inner,
            late,
            jnp.ones(4),
            jnp.zeros(()),
            inner_data=rows,
            outer_data=rows,
            algorithm=loop,
            num_steps=3,
        ).history["grad_norm"]

    found = run(task, many, steps)
    assert (found > 0).all()
    if steps % 2 == 0:
        assert np.allclose(found, run(task, optax.adam(0.1), steps // 2), rtol=1e-8)


@pytest.mark.slow
def test_adam_at_a_zero_gradient_says_eps_root():
    dead = lambda w, x, b: 0.5 * (w[0] - x) ** 2 + x * w[1] ** 2  # its second gradient is zero at 0
    fn = bx.value_and_hypergrad(
        dead,
        lambda w, x, b: jnp.sum(w),
        solver=bx.inner.optax(optax.adam(0.1), 2),
        hypergradient=H.unrolled(),
    )
    out = fn(jnp.zeros(2), jnp.ones(()))
    assert out.info["code"] == bx.RESULTS.hypergradient_nonfinite
    cured = bx.inner.optax(optax.adam(0.1, eps_root=1e-12), 2)
    fn = bx.value_and_hypergrad(
        dead, lambda w, x, b: jnp.sum(w), solver=cured, hypergradient=H.unrolled()
    )
    assert jnp.isfinite(fn(jnp.zeros(2), jnp.ones(())).grad)
    message = bx.RESULTS.hypergradient_nonfinite.message
    assert 0 < message.index("eps_root=1e-12") < message.index("Try smooth forms")
