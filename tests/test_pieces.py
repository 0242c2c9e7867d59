"""Pieces of one's own, written outside the package from docs/write-your-own.md alone, in every
place where a piece is taken.

Every problem here has an exact answer: the inner Hessian is the identity where a piece says that it
is, so dy/dx = 1 and the hypergradient is x - 3.
"""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import base, tree

PAGE = Path(__file__).resolve().parents[1] / "docs" / "write-your-own.md"


def uses(statement: ast.stmt) -> bool:
    """Whether a statement of the page calls what it has defined, and defines nothing."""
    calls = isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0])
    return isinstance(statement, ast.Expr) or calls in ("fn", "estimate", "solution")


def written() -> dict:
    """What the page defines, run as its reader would."""
    names: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        module = ast.parse(code)
        module.body = [statement for statement in module.body if not uses(statement)]
        exec(compile(module, str(PAGE), "exec"), names)
    return names


OWN = written()
METHOD, SOLVER, LINEAR = (
    OWN["scaled_identity"](1.0),
    OWN["sign_descent"](0.25, 8),
    OWN["richardson"](0.5, 60),
)
DESCENT = bx.inner.optax(optax.sgd(1.0), 1)
X, Y = jnp.array([1.0, 2.0]), jnp.zeros(2)


def inner(y, x, batch):
    return 0.5 * jnp.sum((y - x) ** 2)


def outer(y, x, batch):
    return 0.5 * jnp.sum((y - 3.0) ** 2)


def from_rows(y, x, batch):
    return 0.5 * jnp.mean(jnp.sum(((y - x)[None] - batch) ** 2, axis=-1))  # batches of mean zero


def generated(key, step):
    rows = jax.random.normal(key, (8, 2))
    return rows - jnp.mean(rows, axis=0, keepdims=True)


class Loader:
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def once_drawn(feed, i):
    return base.Ctx(feed.data["rows"])


PAIRS = {
    "method": (DESCENT, METHOD),
    "solver": (SOLVER, METHOD),
    "solver, ours above": (SOLVER, bx.hypergradient.implicit()),
    "linear": (DESCENT, bx.hypergradient.implicit(LINEAR)),
}


@pytest.mark.parametrize("pair", list(PAIRS))
def test_value_and_hypergrad(pair):
    solver, method = PAIRS[pair]
    found = bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=method)(Y, X)
    np.testing.assert_allclose(found.grad, X - 3.0, atol=1e-6)
    assert not bx.RESULTS(int(found.info["code"])).failed


@pytest.mark.parametrize("pair", list(PAIRS))
def test_solve_bilevel(pair):
    algorithm = bx.algorithms.double_loop(*PAIRS[pair], optax.sgd(0.25))
    solution = bx.solve_bilevel(inner, outer, Y, X, algorithm=algorithm, num_steps=3)
    want = X
    for _ in range(3):
        want = want - 0.25 * (
            jnp.round(4 * want) / 4 - 3.0 if pair.startswith("solver") else want - 3.0
        )
    np.testing.assert_allclose(
        solution.state.algorithm.outer, want, atol=0.3 if pair.startswith("solver") else 1e-6
    )


def test_an_algorithm():
    solution = bx.solve_bilevel(
        inner, outer, Y, Y, algorithm=OWN["single_loop"](0.5, 0.1), num_steps=200
    )
    np.testing.assert_allclose(solution.outer_params, 3.0, atol=1e-4)


@pytest.mark.parametrize("data", ["function", "iterable", "source"])
def test_data(data):
    rows = [np.asarray(generated(jax.random.key(i), 0)) for i in range(12)]
    given = {"function": generated, "iterable": Loader(rows)}.get(data)
    algorithm = bx.algorithms.double_loop(DESCENT, METHOD, optax.sgd(0.5))
    if data == "source":  # a draw of one's own
        from bilevax.data.sources import Source

        given = Source(once_drawn, {"rows": jnp.asarray(rows[0])})
    solution = bx.solve_bilevel(
        from_rows,
        outer,
        Y,
        X,
        inner_data=given,
        algorithm=algorithm,
        num_steps=6,
        key=jax.random.key(0),
    )
    want = X
    for _ in range(6):
        want = want - 0.5 * (want - 3.0)
    np.testing.assert_allclose(solution.state.algorithm.outer, want, atol=1e-6)


# ---- levels: z follows y, y follows x; nested where y's objective reads z, with y = x / 2 then


def chain(z, y):
    return [
        bx.Level(
            "z", lambda p, b: 0.5 * jnp.sum((p["z"] - p["y"]) ** 2), solver=z[0], hypergradient=z[1]
        ),
        bx.Level(
            "y", lambda p, b: 0.5 * jnp.sum((p["y"] - p["x"]) ** 2), solver=y[0], hypergradient=y[1]
        ),
        bx.Level("x", lambda p, b: 0.5 * jnp.sum((p["z"] - 3.0) ** 2), solver=optax.sgd(0.1)),
    ]


def nested(z, y):
    return [
        bx.Level(
            "z", lambda p, b: 0.5 * jnp.sum((p["z"] - p["y"]) ** 2), solver=z[0], hypergradient=z[1]
        ),
        bx.Level(
            "y",
            lambda p, b: 0.5 * jnp.sum((p["y"] - p["x"]) ** 2) + 0.5 * jnp.sum(p["z"] ** 2),
            solver=y[0],
            hypergradient=y[1],
        ),
        bx.Level("x", lambda p, b: 0.5 * jnp.sum((p["y"] - 3.0) ** 2), solver=optax.sgd(0.1)),
    ]


OURS = (DESCENT, bx.hypergradient.implicit())
HALF = (bx.inner.optax(optax.sgd(0.5), 1), OWN["scaled_identity"](0.5))  # Hessian 2
HALF_LINEAR = (HALF[0], bx.hypergradient.implicit(OWN["richardson"](0.25, 80)))
PARAMS = {"z": Y, "y": Y, "x": X}
LEVELS = {
    "bottom": (chain, PAIRS["method"], OURS, X - 3.0),
    "bottom solver": (chain, PAIRS["solver"], OURS, X - 3.0),
    "bottom linear": (chain, PAIRS["linear"], OURS, X - 3.0),
    "middle": (chain, OURS, PAIRS["method"], X - 3.0),
    "middle solver": (chain, OURS, PAIRS["solver"], X - 3.0),
    "inside": (nested, PAIRS["method"], HALF, (X / 2 - 3.0) / 2),
    "inside linear": (nested, PAIRS["linear"], HALF_LINEAR, (X / 2 - 3.0) / 2),
    "inside ours": (nested, OURS, HALF, (X / 2 - 3.0) / 2),
    "inside solver": (
        nested,
        (OWN["sign_descent"](0.125, 8), bx.hypergradient.implicit()),
        HALF,
        (X / 2 - 3.0) / 2,
    ),
}


@pytest.mark.turns
@pytest.mark.parametrize("case", list(LEVELS))
def test_levels(case):
    make, z, y, want = LEVELS[case]
    found = bx.value_and_multilevel_grad(make(z, y))(PARAMS)
    np.testing.assert_allclose(found.grad, want, atol=1e-6)


@pytest.mark.parametrize("case", ["bottom", "inside"])
def test_solve_multilevel(case):
    make, z, y, want = LEVELS[case]
    solution = bx.solve_multilevel(make(z, y), PARAMS, num_steps=1)
    np.testing.assert_allclose(solution.state.algorithm.outer, X - 0.1 * want, atol=1e-6)


def test_explain_names_them():
    text = repr(bx.explain(nested((SOLVER, METHOD), HALF), PARAMS))
    assert (
        "dz/dy by scaled_identity" in text and "gradients not known" in text
    )  # it does not say what it costs


def test_what_a_piece_says_is_used():
    """Cost, form and linear solver of a method, gradients of a solver: `explain` counts them."""
    solver = SOLVER._replace(gradients=1)
    method = METHOD._replace(cost=lambda solver: {"gradients": 0, "hvps": 0, "mixed_products": 1})
    text = repr(bx.explain(chain((solver, method), OURS), PARAMS))
    assert re.search(r"z: reads y\n.*\n  a step: at most 8 gradients, at most 1 HVP", text)


# ---- the other places


def test_argmin():
    fn = bx.argmin(lambda y, x: 0.5 * jnp.sum((y - x) ** 2), SOLVER, linear_solver=LINEAR)
    np.testing.assert_allclose(fn(Y, X), X)
    np.testing.assert_allclose(jax.jacobian(lambda x: fn(Y, x))(X), np.eye(2), atol=1e-6)


@pytest.mark.turns
@pytest.mark.parametrize("pair", list(PAIRS))
def test_diagnosis(pair):
    solver, method = PAIRS[pair]
    report = bx.check_hypergradient(inner, outer, Y, X, solver=solver, hypergradient=method)
    assert report.ok and report.relative_error < 1e-6
    rows = bx.compare_hypergradients(
        inner, outer, Y, X, solver=solver, methods={"own": method}, repeats=1
    ).rows
    assert rows[0].relative_error < 1e-6
    if pair == "solver":  # the methods that are chosen for a solver that says nothing
        assert "unrolled" in [
            row.name
            for row in bx.compare_hypergradients(inner, outer, Y, X, solver=solver, repeats=1).rows
        ]


@pytest.mark.turns
@pytest.mark.parametrize("pair", list(PAIRS))
def test_tasks_on_devices(pair):
    """Eight tasks, a device each, and all tasks on one device: the same numbers."""
    batch = jnp.broadcast_to(jnp.arange(8.0)[:, None] / 4, (8, 2))

    def one(y, x, batch):
        return 0.5 * jnp.sum((y - x - batch) ** 2)

    def score(y, x, batch):
        return 0.5 * jnp.sum((y - 3.0) ** 2)

    solver, method = PAIRS[pair]
    solver = OWN["sign_descent"](0.25, 16) if pair.startswith("solver") else solver
    algorithm = bx.algorithms.double_loop(solver, method, optax.sgd(0.25))
    arguments = (bx.tasks(one, "sum"), bx.tasks(score, "mean"), jnp.zeros((8, 2)), X)
    keywords = dict(
        inner_data=bx.data.full(batch),
        outer_data=bx.data.full(batch),
        algorithm=algorithm,
        num_steps=1,
    )
    for sharding in (None, bx.sharding.tasks()):
        solution = bx.solve_bilevel(*arguments, **keywords, sharding=sharding)
        want = X - 0.25 * (X + jnp.mean(batch, axis=0) - 3.0)
        np.testing.assert_allclose(solution.state.algorithm.outer, want, atol=1e-6)


@pytest.mark.parametrize("pair", ["method", "solver", "linear"])
def test_rows_over_devices(pair):
    rows = jnp.tile(jnp.array([[0.5, -0.5], [-0.5, 0.5]]), (4, 1))
    algorithm = bx.algorithms.double_loop(*PAIRS[pair], optax.sgd(0.25))
    solution = bx.solve_bilevel(
        from_rows,
        outer,
        Y,
        X,
        inner_data=rows,
        algorithm=algorithm,
        num_steps=1,
        sharding=bx.sharding.data_parallel(),
    )
    np.testing.assert_allclose(solution.state.algorithm.outer, X - 0.25 * (X - 3.0), atol=1e-6)


# ---- a level inside another one's objective is differentiated by its own method


def first(p, b):
    return 0.5 * (p["z"] - p["y"]) ** 2


def second(p, b):
    return 0.5 * (p["y"] - p["x"]) ** 2 + 0.5 * p["z"] ** 2


@pytest.mark.turns
@pytest.mark.parametrize(
    "method, derivative",
    [
        (bx.hypergradient.unrolled(), 1 - 0.7**2),
        (bx.hypergradient.forward(), 1 - 0.7**2),
        (bx.hypergradient.one_step(0.25), 0.25),
        (OWN["scaled_identity"](0.25), 0.25),
        (OWN["scaled_identity"](0.4), 0.4),
        (bx.hypergradient.finite_difference(0.6), 0.6),
        (bx.hypergradient.implicit(damping=1.0), 0.5),
        (bx.hypergradient.implicit(LINEAR), 1.0),
    ],
    ids=repr,
)
def test_a_nested_level_keeps_its_method(method, derivative):
    """y takes one step of length 1 on ``½(y − x)² + ½z(y)²``, with z after two steps of .3 on ``½(z
    − y)²``."""
    levels = [
        bx.Level("z", first, solver=bx.inner.optax(optax.sgd(0.3), 2), hypergradient=method),
        bx.Level("y", second, solver=DESCENT, hypergradient=bx.hypergradient.one_step(1.0)),
        bx.Level("x", lambda p, b: 0.5 * (p["y"] - 1.0) ** 2, solver=optax.sgd(0.1)),
    ]
    z, y, x = 0.4, 0.8, 2.0
    solved = (1 - 0.7**2) * y + 0.7**2 * z
    found = bx.value_and_multilevel_grad(levels)(
        {"z": jnp.asarray(z), "y": jnp.asarray(y), "x": jnp.asarray(x)}
    )
    np.testing.assert_allclose(
        found.inner_params["y"], y - ((y - x) + solved * derivative), rtol=1e-6
    )


def test_a_second_derivative_of_what_says_nothing_is_refused_by_name():
    levels = [
        bx.Level("z", first, solver=DESCENT, hypergradient=METHOD),
        bx.Level("y", second, solver=DESCENT, hypergradient=bx.hypergradient.implicit()),
        bx.Level("x", lambda p, b: 0.5 * (p["y"] - 1.0) ** 2, solver=optax.sgd(0.1)),
    ]
    with pytest.raises(
        ValueError,
        match=(
            "hypergradient of level 'z': got scaled_identity.*whose derivative is right once only"
        ),
    ):
        bx.value_and_multilevel_grad(levels)(
            {"z": jnp.asarray(0.4), "y": jnp.asarray(0.8), "x": jnp.asarray(2.0)}
        )


def test_a_method_that_gives_its_linear_solver_is_exact_twice():
    """An own method of order 2 inside an implicit one: with its linear solver it is differentiated
    as ours is."""
    method = METHOD._replace(linear=base.Linear(LINEAR), order=2)
    levels = nested((DESCENT, method), (HALF[0], bx.hypergradient.implicit()))
    np.testing.assert_allclose(
        bx.value_and_multilevel_grad(levels)(PARAMS).grad, (X / 2 - 3.0) / 2, atol=1e-6
    )


def test_a_quasi_newton_solver_of_ones_own_serves_shine():
    """SHINE asks the solver for its inverse Hessian, whoever made it."""
    solver = DESCENT._replace(inverse_hessian=lambda opt, v: tree.scale(1.0, v))
    found = bx.value_and_hypergrad(
        inner, outer, solver=solver, hypergradient=bx.hypergradient.shine()
    )(Y, X)
    np.testing.assert_allclose(found.grad, X - 3.0, atol=1e-6)
    with pytest.raises(TypeError, match="keeps no inverse Hessian"):
        bx.value_and_hypergrad(
            inner, outer, solver=DESCENT, hypergradient=bx.hypergradient.shine()
        )(Y, X)
