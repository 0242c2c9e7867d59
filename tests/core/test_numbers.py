"""Arguments that are numbers, flags and keys: what passes, what is refused, and that every public
factory asks."""

import inspect
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax._core import numbers

HG, AL, IN, LI = bx.hypergradient, bx.algorithms, bx.inner, bx.linear
SOLVER = IN.optax(optax.sgd(0.1), 2)
DATA = (np.zeros((8, 2)), np.zeros(8))
REQUIRED = {
    "inner_step": 0.1, "outer_step": 0.1, "period": 4, "probability": 0.5, "inner_solver": SOLVER,
    "outer_optimizer": optax.sgd(0.1),
    "hypergradient": HG.implicit(), "minimizer": lambda costs: costs, "mapping": lambda y, x,
    batch: y, "constraint": lambda y, x, batch: y,
    "opt": optax.sgd(0.1), "steps": 3, "smooth": lambda y, x, batch: y, "prox": lambda y, x,
    step: y, "step": 0.1, "fn": lambda event: None, "n": 3,
    "name": "value", "patience": 3, "arrays": DATA, "batch_size": 4, "directory": "somewhere",
    "path": "somewhere.csv", "num_tasks": 3,
    "writer": SimpleNamespace(write_scalars=lambda step, scalars: None), "microbatches": 2,
    "loss": lambda model, batch: 0.0, "objective": lambda y, x, batch: 0.0, "solver": SOLVER,
    "params": DATA, "network": lambda y, x, batch: y, "linear": LI.cg(),
}  # fmt: skip
OTHER = {
    "lineax",
    "jaxopt",
    "optimistix",
}  # they take another library's objects, and are tested where those are
NOT_NUMBERS = {"mode", "checkpoint", "product", "axis", "reduce", "title", "column", "log"}


def factories():
    for space in (
        "hypergradient",
        "linear",
        "inner",
        "algorithms",
        "data",
        "callbacks",
        "checkpoint",
    ):
        module = getattr(bx, space)
        for name in module.__all__:
            value = getattr(module, name)
            if (
                inspect.isfunction(value)
                and name not in OTHER
                and f"{space}.{name}" != "inner.tunable"
            ):
                yield f"{space}.{name}", value
    yield "task_copies", bx.task_copies
    yield "argmin", bx.argmin
    yield "metrics", bx.metrics
    yield "sharding.fsdp", bx.sharding.fsdp
    yield "sharding.data_parallel", bx.sharding.data_parallel
    yield "sharding.accumulate", bx.sharding.accumulate


def cases():
    """Every argument whose default is a number or a flag, with values that cannot be meant."""
    for name, factory in factories():
        signature = inspect.signature(factory)
        for argument, parameter in signature.parameters.items():
            default, given = parameter.default, REQUIRED.get(argument)
            like = default if default is not parameter.empty else given
            if argument in NOT_NUMBERS or isinstance(like, str):
                continue
            annotation = str(parameter.annotation)
            if isinstance(like, bool):
                wrong = ("a", 3, None)
            elif isinstance(like, (int, float)) or (
                default is None
                and ("int" in annotation or "float" in annotation)
                and "Inner" not in annotation
            ):
                wrong = ("a", True, [1], np.nan, -1)
            else:
                continue
            for value in wrong:
                yield pytest.param(factory, argument, value, id=f"{name}-{argument}-{value}")


@pytest.mark.parametrize("factory, argument, value", list(cases()))
def test_every_factory_names_its_argument(factory, argument, value):
    required = {
        name: REQUIRED[name]
        for name, parameter in inspect.signature(factory).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_KEYWORD
        and name in REQUIRED
    }
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}: got .*; expected"):
        factory(**{**required, argument: value})


def test_the_walk_finds_them():
    found = [param.id for param in cases()]
    assert len(found) > 300
    for wanted in (
        "hypergradient.implicit-damping-a",
        "hypergradient.shine-tol-a",
        "hypergradient.zeroth_order-scale-[1]",
        "algorithms.persistent_es-scale-a",
    ):
        assert wanted in found


@pytest.mark.parametrize(
    "call, argument",
    [
        (lambda: HG.implicit(damping="a"), "damping"),
        (lambda: HG.shine(tol=None), "tol"),
        (lambda: HG.zeroth_order(scale=[1]), "scale"),
        (lambda: HG.black_box(lambda c: c, "a"), "interpolation"),
        (lambda: AL.persistent_es(SOLVER, optax.sgd(0.1), scale="a"), "scale"),
        (
            lambda: bx.diagnostics.estimate_constants(
                *[lambda y, x, b: 0.0] * 2, jnp.ones(2), jnp.ones(2), radius="a"
            ),
            "radius",
        ),
        (
            lambda: bx.diagnostics.estimate_constants(
                *[lambda y, x, b: 0.0] * 2, jnp.ones(2), jnp.ones(2), key=3
            ),
            "key",
        ),
        (lambda: HG.implicit(warm_start=3), "warm_start"),
        (lambda: HG.implicit(low_memory="a"), "low_memory"),
        (lambda: HG.implicit(damping=True), "damping"),
        (lambda: HG.implicit(follow=True), "follow"),
        (lambda: HG.implicit(refresh=1.0), "refresh"),
        (lambda: HG.implicit(max_residual="a"), "max_residual"),
        (lambda: LI.nystrom(key="k"), "key"),
    ],
)
def test_what_was_a_bare_error_or_passed(call, argument):
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}: got .*; expected"):
        call()


def test_numbers_of_numpy_and_arrays_without_axes_are_numbers():
    for value in (1e-3, np.float32(1e-3), np.float64(1e-3), jnp.float32(1e-3), np.asarray(1e-3)):
        assert numbers.positive(value, "tol") == pytest.approx(1e-3, rel=1e-6)
        assert type(numbers.positive(value, "tol")) is float
    assert (
        type(numbers.positive(1, "tol")) is float
        and type(numbers.positive(np.int64(2), "tol")) is float
    )
    assert type(numbers.count(np.int32(3), "n")) is int
    assert type(numbers.flag(np.bool_(True), "f")) is bool


def test_traced_numbers_pass_and_traced_vectors_do_not():
    assert (
        jax.jit(lambda a: numbers.positive(a, "tol") * 2)(-1.0) == -2.0
    )  # its value is not known when it is asked for
    with pytest.raises(TypeError, match="tol: got float"):
        jax.jit(lambda a: numbers.positive(a, "tol"))(jnp.ones(2))
    with pytest.raises(TypeError, match="tol: got bool"):
        jax.jit(lambda a: numbers.positive(a, "tol"))(True)


def test_a_tolerance_may_be_a_numpy_scalar():
    inner, outer = lambda y, x, b: 0.5 * (y - x) ** 2, lambda y, x, b: 0.5 * (y - 1.0) ** 2
    algorithm = AL.double_loop(IN.optax(optax.sgd(1.0), 1), HG.implicit(), optax.sgd(0.5))
    solution = bx.solve_bilevel(
        inner, outer, 0.0, 0.0, algorithm=algorithm, num_steps=50, tol=np.float32(1e-3)
    )
    assert solution.result is bx.RESULTS.converged
    assert float(abs(solution.outer_params - 1.0)) < 2e-3


@pytest.mark.parametrize(
    "value, settings, message",
    [
        (0, {}, "a: got 0.0; expected a positive, finite number. Try a=0.1."),
        (np.inf, {}, "a: got inf; expected a positive, finite number. Try a=0.1."),
        (
            np.nan,
            {"infinite": True},
            "a: got nan; expected a positive number; jnp.inf accepts any. Try a=0.1.",
        ),
        (-1, {"zero": True}, "a: got -1.0; expected a finite number of at least 0. Try a=0.1."),
        (2, {"upper": 1}, "a: got 2.0; expected a positive, finite number, at most 1. Try a=0.1."),
    ],
)
def test_messages(value, settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        numbers.positive(value, "a", **settings)
    assert numbers.positive(1, "a", upper=1) == 1.0 and numbers.positive(0, "a", zero=True) == 0.0
    assert numbers.positive(np.inf, "a", infinite=True) == np.inf


def test_rounding_unit():
    assert (
        numbers.rounding_unit({"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.bfloat16)})
        == 2.0**-7
    )
    assert (
        numbers.rounding_unit(jnp.dtype(jnp.float32)) == 2.0**-23
        and numbers.rounding_unit(()) == 0.0
    )
