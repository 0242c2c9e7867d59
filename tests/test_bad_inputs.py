"""Every wrong call is refused before anything is compiled, and its message names the argument, what
came and what was expected."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx


def inner(y, x, batch):
    return jnp.sum((y - x) ** 2)


def outer(y, x, batch):
    return jnp.sum(y**2)


@functools.cache
def algorithm():
    return bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.1), 2), bx.hypergradient.implicit(), optax.sgd(0.1)
    )


GOOD = dict(
    inner_objective=inner,
    outer_objective=outer,
    inner_params=jnp.zeros(2),
    outer_params=jnp.ones(2),
    num_steps=2,
)
KEY = jax.random.key(0)
SOLVER, METHOD = bx.inner.optax(optax.sgd(0.1), 2), bx.hypergradient.implicit()
ESTIMATE = bx.value_and_hypergrad(inner, outer, solver=SOLVER, hypergradient=METHOD)

# what is wrong, the changed arguments, the error, and what its message must say: the argument, what
# came, what was expected
TABLE = [
    (
        "inner objective is no function",
        dict(inner_objective=3),
        TypeError,
        "inner_objective: got int 3; expected a function",
    ),
    (
        "outer objective is no function",
        dict(outer_objective="f"),
        TypeError,
        "outer_objective: got str 'f'; expected a function",
    ),
    (
        "too few arguments",
        dict(inner_objective=lambda y, x: 0.0),
        TypeError,
        "inner_objective.*got a function of .y, x.; expected one of .inner_params",
    ),
    (
        "too few arguments of project",
        dict(project=lambda: 0.0),
        TypeError,
        "project: got a function of ..; expected one of .outer_params.",
    ),
    (
        "swapped arguments of data",
        dict(inner_data=lambda key: 0.0),
        TypeError,
        "inner_data: got a function of .key.; expected one of .key, step.",
    ),
    (
        "metrics of two",
        dict(metrics=bx.metrics(lambda y, x: {"a": 0.0})),
        TypeError,
        "metrics .*: got a function of .y, x.; expected one of .inner_params, outer_params, data.",
    ),
    (
        "data that was not given",
        dict(
            inner_objective=lambda y, x, b: jnp.sum((y - b["t"]) ** 2) + jnp.sum(x * y),
            inner_data=None,
        ),
        TypeError,
        r"inner_objective .*: raised this when called as .inner_params, outer_params, batch. with "
        r"inner_params=float64\[2\].*No data was given",
    ),
    (
        "vector value",
        dict(inner_objective=lambda y, x, b: y - x),
        ValueError,
        r"inner_objective.*returned float64\[2\]; expected a scalar",
    ),
    (
        "vector outer value",
        dict(outer_objective=lambda y, x, b: y),
        ValueError,
        r"outer_objective.*returned float64\[2\]; expected a scalar",
    ),
    (
        "undeclared aux",
        dict(inner_objective=lambda y, x, b: (jnp.sum(y), y)),
        TypeError,
        r"inner_objective.*returned .*float64\[2\].*expected a scalar.*has_aux",
    ),
    (
        "declared aux is missing",
        dict(outer_objective=bx.objective(lambda y, x, b: jnp.sum(y), has_aux=True)),
        TypeError,
        r"outer_objective.*returned float64\[\]; expected \(value, aux\)",
    ),
    (
        "integer value",
        dict(outer_objective=lambda y, x, b: jnp.sum(y > 0)),
        TypeError,
        "outer_objective.*returned int64; expected a real floating",
    ),
    (
        "complex value",
        dict(outer_objective=lambda y, x, b: jnp.sum(y).astype(complex)),
        TypeError,
        "outer_objective.*returned complex128; expected a real floating",
    ),
    (
        "None value",
        dict(outer_objective=lambda y, x, b: None),
        TypeError,
        "outer_objective.*returned .*expected a scalar",
    ),
    (
        "empty inner params",
        dict(inner_params={}),
        ValueError,
        "inner_params: got .*no leaf; expected a pytree of arrays",
    ),
    (
        "None as outer params",
        dict(outer_params=None),
        ValueError,
        "outer_params: got None.*no leaf; expected a pytree",
    ),
    (
        "integer outer params",
        dict(outer_params=jnp.arange(2)),
        TypeError,
        "outer_params: got leaves of int64 only; expected at least one floating",
    ),
    (
        "integer scalar outer params",
        dict(outer_params=3),
        TypeError,
        "outer_params: got leaves of int64 only; expected at least one floating",
    ),
    (
        "boolean inner params",
        dict(inner_params=jnp.array([True])),
        TypeError,
        "inner_params: got leaves of bool only; expected at least one floating",
    ),
    (
        "complex params",
        dict(inner_params={"w": jnp.zeros(2, complex)}),
        TypeError,
        r"inner_params\['w'\]: got complex128\[2\]; expected real numbers",
    ),
    (
        "string leaf",
        dict(outer_params={"name": "lam"}),
        TypeError,
        r"outer_params\['name'\]: got str 'lam'; expected an array or a number",
    ),
    (
        "function leaf",
        dict(inner_params=[jnp.zeros(2), jnp.tanh]),
        TypeError,
        r"inner_params\[1\]: got .*expected an array or a number",
    ),
    (
        "NaN at the start",
        dict(inner_params=jnp.array([1.0, jnp.nan])),
        ValueError,
        "inner_params: got 1 non-finite of 2 values.*expected finite",
    ),
    (
        "infinite outer params",
        dict(outer_params={"a": jnp.full(2, jnp.inf)}),
        ValueError,
        r"outer_params\['a'\]: got 2 non-finite of 2.*expected finite",
    ),
    (
        "no steps",
        dict(num_steps=0),
        ValueError,
        "num_steps: got 0; expected an integer of at least 1",
    ),
    ("fractional steps", dict(num_steps=2.5), TypeError, "num_steps: got 2.5; expected an integer"),
    ("steps as True", dict(num_steps=True), TypeError, "num_steps: got True; expected an integer"),
    (
        "batch axes differ",
        dict(inner_data=(np.zeros((4, 2)), np.zeros(5))),
        ValueError,
        r"inner_data: got leading axes .*inner_data\[0\]': 4.*inner_data\[1\]': 5.*expected one "
        r"common leading axis",
    ),
    (
        "scalar in data",
        dict(outer_data={"x": np.zeros((4, 2)), "c": np.float64(1)}),
        TypeError,
        r"outer_data\['c'\]: got float64.*expected a numpy or jax",
    ),
    (
        "zero-rank array in data",
        dict(outer_data={"c": np.zeros(())}),
        ValueError,
        r"outer_data\['c'\]: got a scalar; expected an array whose leading",
    ),
    ("empty data", dict(inner_data={}), ValueError, "inner_data: got .*no array; expected arrays"),
    (
        "data of length 0",
        dict(hyper_data=np.zeros((0, 2))),
        ValueError,
        "hyper_data: got arrays of length 0; expected at least one example",
    ),
    (
        "strings as data",
        dict(inner_data="train.csv"),
        TypeError,
        "inner_data: got str.*expected a numpy or jax array",
    ),
    (
        "sampled data without a key",
        dict(inner_data=bx.data.minibatches(np.zeros((4, 2)), 2)),
        ValueError,
        "key: got None.*sampled; expected a PRNG key",
    ),
    (
        "keyed objective without a key",
        dict(inner_objective=bx.objective(lambda y, x, b, *, key: jnp.sum(y), keyed=True)),
        ValueError,
        "key: got None although inner_objective takes a key; expected a PRNG key",
    ),
    (
        "keyed objectives without a key",
        dict(
            inner_objective=bx.objective(lambda y, x, b, *, key: jnp.sum(y * x), keyed=True),
            outer_objective=bx.objective(lambda y, x, b, *, key: jnp.sum(y), keyed=True),
        ),
        ValueError,
        "key: got None although inner_objective and outer_objective take a key",
    ),
    (
        "integer key",
        dict(key=3),
        TypeError,
        r"key: got 3; expected a PRNG key. Try jax.random.key\(3\)",
    ),
    (
        "optimizer as algorithm",
        dict(algorithm=optax.sgd(0.1)),
        TypeError,
        "algorithm: got Gradient.*expected an Algorithm.*double_loop",
    ),
    (
        "method as algorithm",
        dict(algorithm=bx.hypergradient.implicit()),
        TypeError,
        "algorithm: got Hypergradient.*expected an Algorithm.*double_loop",
    ),
    (
        "factory as algorithm",
        dict(algorithm=bx.algorithms.double_loop),
        TypeError,
        "algorithm: got function.*expected an Algorithm.*Call the factory",
    ),
    (
        "unknown keep",
        dict(keep="first"),
        ValueError,
        "keep: got 'first'; expected 'best' or 'last'",
    ),
    (
        "negative tol",
        dict(tol=-1.0),
        ValueError,
        "tol: got -1.0; expected a positive, finite number",
    ),
    (
        "tol as a string",
        dict(tol="1e-3"),
        TypeError,
        "tol: got '1e-3'; expected a positive, finite number",
    ),
    (
        "one callback, no list",
        dict(callbacks=print),
        TypeError,
        "callbacks: got builtin.*expected a sequence",
    ),
    (
        "a number as callback",
        dict(callbacks=[3]),
        TypeError,
        r"callbacks\[0\]: got int 3; expected a function",
    ),
    (
        "progress as a number",
        dict(progress=1),
        TypeError,
        "progress: got 1; expected True or False",
    ),
    (
        "project changes shapes",
        dict(project=lambda x: x[:1]),
        ValueError,
        r"project: got float64\[1\]; expected float64\[2\], as in outer_params",
    ),
    (
        "project changes structure",
        dict(project=lambda x: {"x": x}),
        ValueError,
        "project: got structure .*expected that of outer_params",
    ),
    (
        "model state nobody takes",
        dict(model_state={"mean": jnp.zeros(2)}),
        ValueError,
        "model_state: got .*neither objective takes it; expected None",
    ),
    (
        "missing model state",
        dict(inner_objective=bx.objective(lambda y, x, b, m: (jnp.sum(y), m), stateful=True)),
        ValueError,
        "model_state: got None although inner_objective.*stateful; expected its initial",
    ),
    (
        "model state changes shape",
        dict(
            inner_objective=bx.objective(lambda y, x, b, m: (jnp.sum(y), m[:1]), stateful=True),
            model_state=jnp.zeros(2),
        ),
        ValueError,
        r"model_state: got float64\[1\]; expected float64\[2\]",
    ),
    (
        "metrics is no function",
        dict(metrics=3),
        TypeError,
        "metrics: got int 3; expected a function",
    ),
    (
        "metrics without names",
        dict(metrics=lambda y, x, d: jnp.sum(y)),
        TypeError,
        "metrics .*returned .*expected a dict of scalars",
    ),
    (
        "vector metric",
        dict(metrics=lambda y, x, d: {"m": y}),
        TypeError,
        r"metrics .*\['m'\]: got float64\[2\]; expected a floating-point scalar",
    ),
    (
        "metric named as a column",
        dict(metrics=lambda y, x, d: {"value": jnp.sum(y)}),
        ValueError,
        "got the name 'value'.*expected another one",
    ),
    (
        "state of another kind",
        dict(state={"step": 3}),
        TypeError,
        "state: got dict.*expected solution.state",
    ),
]


@pytest.mark.parametrize(
    "change, error, message", [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_refused_before_compiling(change, error, message, monkeypatch):
    def compiled(*args, **kwargs):
        raise AssertionError("reached the compiled part")

    monkeypatch.setattr("bilevax.run.chunk.run_chunk", compiled)
    arguments = {**GOOD, "algorithm": algorithm(), **change}
    with pytest.raises(error, match=f"(?s){message}"):
        bx.solve_bilevel(**arguments)


FACTORIES = [
    (
        "steps below 1",
        lambda: bx.inner.optax(optax.sgd(0.1), 0),
        ValueError,
        "steps: got 0; expected",
    ),
    (
        "factory in place of optimizer",
        lambda: bx.inner.optax(optax.sgd, 3),
        TypeError,
        r"opt: got the function sgd; expected what it returns. Try optax.sgd\(",
    ),
    (
        "batch larger than the data",
        lambda: bx.data.minibatches(np.zeros((4, 2)), 5),
        ValueError,
        "batch_size: got 5; expected an integer from 1 to 4",
    ),
    (
        "negative damping",
        lambda: bx.hypergradient.implicit(damping=-1.0),
        ValueError,
        "damping: got -1.0; expected",
    ),
    (
        "linear solver is a number",
        lambda: bx.hypergradient.implicit(3),
        TypeError,
        "linear: got 3; expected a solver",
    ),
    (
        "zero unrolled steps",
        lambda: bx.hypergradient.unrolled(0),
        ValueError,
        "last: got 0; expected",
    ),
    (
        "optimizer in place of solver",
        lambda: bx.algorithms.double_loop(optax.sgd(0.1), METHOD, optax.sgd(0.1)),
        TypeError,
        "inner_solver: got .*expected an InnerSolver. Try inner.optax",
    ),
    (
        "uncalled method",
        lambda: bx.algorithms.double_loop(SOLVER, bx.hypergradient.unrolled, optax.sgd(0.1)),
        TypeError,
        r"hypergradient: got function.*Hypergradient. Call the factory: hypergradient.unrolled\(\)",
    ),
    (
        "learning rate as optimizer",
        lambda: bx.algorithms.double_loop(SOLVER, METHOD, 0.1),
        TypeError,
        "outer_optimizer: got float 0.1; expected an optax",
    ),
    (
        "function among the parameters of an estimate",
        lambda: ESTIMATE({"w": jnp.zeros(2), "activation": jnp.tanh}, jnp.ones(2)),
        TypeError,
        r"inner_params\['activation'\]: got .*expected an array or a number",
    ),
    (
        "text in the batch of an estimate",
        lambda: ESTIMATE(jnp.zeros(2), jnp.ones(2), {"x": jnp.ones(2), "split": "train"}),
        TypeError,
        r"inner_batch\['split'\]: got str 'train'; expected an array or a number",
    ),
    (
        "text in the batch of a level",
        lambda: bx.value_and_multilevel_grad(
            [
                bx.Level(
                    "y", lambda p, b: inner(p["y"], p["x"], b), solver=SOLVER, hypergradient=METHOD
                ),
                bx.Level("x", lambda p, b: outer(p["y"], p["x"], b), solver=optax.sgd(0.1)),
            ]
        )({"y": jnp.zeros(2), "x": jnp.ones(2)}, {"y": {"split": "train"}}),
        TypeError,
        r"batches\['y'\]\['split'\]: got str 'train'; expected an array or a number",
    ),
    (
        "objective of a number",
        lambda: bx.objective(3),
        TypeError,
        "fn: got int 3; expected a function",
    ),
    (
        "flags on a wrapped objective",
        lambda: bx.objective(bx.objective(inner), has_aux=True),
        TypeError,
        "fn: got objective.*expected a plain function",
    ),
    (
        "more unrolled steps than there are",
        lambda: bx.value_and_hypergrad(
            inner, outer, solver=SOLVER, hypergradient=bx.hypergradient.unrolled(9)
        )(jnp.zeros(2), jnp.ones(2)),
        ValueError,
        "last: got 9; expected at most the solver's 2 steps",
    ),
    (
        "unrolling a loop to a tolerance",
        lambda: bx.value_and_hypergrad(
            inner, outer, solver=bx.inner.lbfgs(), hypergradient=bx.hypergradient.unrolled()
        )(jnp.zeros(2), jnp.ones(2)),
        ValueError,
        "solver: got lbfgs.*expected a fixed number of steps",
    ),
]


@pytest.mark.parametrize(
    "call, error, message", [row[1:] for row in FACTORIES], ids=[row[0] for row in FACTORIES]
)
def test_factories_refuse(call, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


def test_state_of_another_problem_is_refused_with_the_differing_paths():
    first = bx.solve_bilevel(**GOOD, algorithm=algorithm())
    with pytest.raises(ValueError, match=r"(?s)state.*inner.*\['w'\]"):
        bx.solve_bilevel(
            lambda y, x, b: jnp.sum((y["w"] - x) ** 2),
            lambda y, x, b: jnp.sum(y["w"]),
            {"w": jnp.zeros(2)},
            jnp.ones(2),
            algorithm=algorithm(),
            state=first.state,
        )


def test_the_users_own_error_passes_with_its_frame():
    def broken(y, x, batch):
        return jnp.sum(y @ jnp.ones((3, 3)))

    with pytest.raises(TypeError) as caught:
        bx.solve_bilevel(broken, outer, jnp.zeros(2), jnp.ones(2), algorithm=algorithm())
    assert any(entry.name == "broken" for entry in caught.traceback)


def test_errors_under_jit_come_at_the_trace_too():
    fn = bx.value_and_hypergrad(inner, lambda y, x, b: y, solver=SOLVER, hypergradient=METHOD)
    with pytest.raises(ValueError, match="outer_objective"):
        jax.jit(fn)(jnp.zeros(2), jnp.ones(2))


def test_a_plain_key_of_another_implementation_is_a_key():
    from bilevax._core import numbers

    with jax.default_prng_impl("rbg"):
        key = jax.random.PRNGKey(0)
    assert key.shape == (4,) and numbers.key(key) is key
