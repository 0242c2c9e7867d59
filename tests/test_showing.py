"""What is shown of values is a screenful, and help tells types by their names."""

import pydoc

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevax as bx
from bilevax._core.showing import screenful
from tests.test_docstrings import public

CLASSES = {
    name: value
    for name, value in public().items()
    if isinstance(value, type) and issubclass(value, tuple)
}


def _solution():
    inner = lambda y, x, batch: 0.5 * sum(jnp.sum((a - x["a"]) ** 2) for a in y.values())
    outer = lambda y, x, batch: 0.5 * sum(jnp.sum(a**2) for a in y.values())
    one = bx.inner.optax(optax.sgd(0.1), 1)
    algorithm = bx.algorithms.double_loop(
        one, bx.hypergradient.implicit(bx.linear.cg(maxiter=1, tol=0.5)), optax.adam(0.5)
    )
    start = {f"layer{i}": jnp.ones((20, 30)) for i in range(3)}
    return bx.solve_bilevel(
        inner, outer, start, {"a": jnp.ones(())}, algorithm=algorithm, num_steps=3
    )


@pytest.fixture(scope="module")
def solution():
    return _solution()


def test_a_run_and_its_state_are_a_screenful(solution):
    for value in (solution, solution.state):
        assert len(repr(value)) < 1500 and repr(value).count("\n") < 20
    assert "leaves" in repr(solution.state) and "step=3" in repr(solution.state)


def test_the_summary_reads_in_order(solution):
    lines = solution.summary().splitlines()
    starts = ["result", "value", "hypergradient", "inner gradient", "adjoint residual"]
    assert [line[:20].strip() for line in lines[:5]] == starts
    assert f"{solution.history['grad_norm'][0]:.3g}" in lines[2]
    failed = solution._replace(result=bx.RESULTS.inner_nonfinite)
    assert "smaller inner step" in failed.summary()
    with pytest.raises(TypeError, match="solution: got"):
        solution._replace(result=jnp.zeros(2, jnp.int32)).summary()


def test_warnings_are_counted_in_the_summary(solution):
    rough = {**solution.history, "warnings": solution.history["warnings"] * 0 + 1}
    (code,) = solution._replace(history=rough).warnings
    assert f"{code.name} in 3 of 3 steps" in solution._replace(history=rough).summary()


def test_an_estimate_is_a_screenful():
    inner = lambda y, x, batch: 0.5 * sum(jnp.sum((a - x) ** 2) for a in y.values())
    outer = lambda y, x, batch: 0.5 * sum(jnp.sum(a**2) for a in y.values())
    solver = bx.inner.optax(optax.adam(0.1), 1)
    fn = bx.value_and_hypergrad(
        inner, outer, solver=solver, hypergradient=bx.hypergradient.one_step()
    )
    estimate = fn({f"layer{i}": jnp.ones((20, 30)) for i in range(9)}, jnp.ones(()))
    assert len(repr(estimate)) < 1500 and "leaves" in repr(estimate)
    assert f"value={float(estimate.value):.6g}" in repr(estimate)


def test_sources_do_not_print_their_data():
    source = bx.data.minibatches({"x": jnp.ones((500, 200)), "y": jnp.ones(500)}, 10)
    for value in (source, bx.data.episodes(source)):
        assert len(repr(value)) < 300 and "[500, 200]" in repr(value)


def test_values_under_a_transformation_show_their_shapes():
    shown = []

    @jax.jit
    def traced(x):
        shown.append(screenful(bx.data.full({"x": x, "k": jax.random.key(0)})))
        return x

    traced(jnp.ones(3))
    assert "[3]" in shown[0]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_help_has_no_references(name):
    assert "ForwardRef" not in pydoc.render_doc(CLASSES[name], renderer=pydoc.plaintext)


def test_a_result_is_true_unless_it_failed():
    assert bx.RESULTS.success and bx.RESULTS.converged and bx.RESULTS.stopped
    assert not bx.RESULTS.inner_nonfinite
    assert all(bool(code) is not code.failed for code in bx.RESULTS)
