"""Gradients of three levels and more: exact, and where they would not be, refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import RESULTS
from tests.multilevel.multilevel_cases import CASES, Case, follow, reference, top
from tests.multilevel_problems import MULTILEVEL
from tests.selection import quick

H, L = bx.hypergradient, bx.linear
EXACT = H.implicit(L.cg(maxiter=50, tol=1e-14))
TOP = bx.tunable(optax.sgd, learning_rate=0.1)


def descent(step_size=0.4, steps=60):
    return bx.inner.optax(bx.tunable(optax.sgd, learning_rate=step_size), steps)


def levels(objectives, method=EXACT, solver=None, methods=None, **options):
    """All levels alike, but for `methods` and keywords by level name."""
    solver, methods = solver or descent(), methods or {}
    *lower, upper = objectives
    below = [
        bx.Level(
            n,
            objectives[n],
            solver=solver,
            hypergradient=methods.get(n, method),
            **options.get(n, {}),
        )
        for n in lower
    ]
    return [*below, bx.Level(upper, objectives[upper], solver=TOP)]


def of_case(case: Case, method=EXACT, methods=None):
    return levels(case.objectives, method, descent(case.step_size, case.steps), methods)


@functools.cache
def expected(name):
    return jax.jit(reference(CASES[name]))(CASES[name].params())


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


def gradient(case, *args, params=None, **kwargs):
    return jax.jit(bx.value_and_multilevel_grad(of_case(case, *args, **kwargs)))(
        params or case.params()
    )


# ---- right


def some_slow(names, slow):
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names]
    )


@pytest.mark.turns
@some_slow(CASES, {"nested4", "shared_child"})
def test_exact_against_unrolled_descent_differentiated_as_it_stands(name):
    estimate = gradient(CASES[name])
    value, grad = expected(name)
    assert abs(float(estimate.value - value)) < 1e-9
    assert relative(estimate.grad, grad) < 1e-8
    assert int(estimate.info["code"]) == RESULTS.success


@pytest.mark.turns
@pytest.mark.parametrize("name", MULTILEVEL)
def test_exact_against_closed_forms(name):
    form = MULTILEVEL[name]
    fn = jax.jit(bx.value_and_multilevel_grad(levels(form.objectives, solver=descent(0.3, 150))))
    upper = list(form.objectives)[-1]
    for x in (0.8, -1.3):
        estimate = fn({**form.params, upper: jnp.asarray(x)})
        answer = form.solution(x)
        assert abs(float(estimate.grad) / form.gradient(x) - 1) < 1e-8
        assert abs(float(estimate.value) / form.value(x) - 1) < 1e-8
        for level, y in estimate.inner_params.items():
            assert abs(float(y) - float(answer[level])) < 1e-9


@pytest.mark.turns
def test_four_nested_levels_against_the_rule_of_the_chain():
    """``l_{k-1} = r_k l_k`` for quadratic followers: rates by recursion, the gradient their
    product."""
    names, weight = ["a", "b", "c", "x"], 0.6

    def objective(name, above, below):
        def fn(p, batch):
            own = 0.5 * jnp.sum((p[name] - p[above]) ** 2)
            return own + (0.5 * weight * jnp.sum(p[below] ** 2) if below else 0.0)

        return fn

    problem = {
        n: objective(n, names[i + 1], names[i - 1] if i else None) for i, n in enumerate(names[:-1])
    }
    problem["x"] = lambda p, batch: 0.5 * jnp.sum((p["a"] - 1.0) ** 2) + 0.5 * jnp.sum(p["c"] ** 2)
    x = jnp.asarray([0.7, -0.4])
    rate_a = 1.0
    rate_b = 1 / (1 + weight * rate_a**2)
    rate_c = 1 / (1 + weight * rate_b**2)
    a = rate_a * rate_b * rate_c
    estimate = jax.jit(bx.value_and_multilevel_grad(levels(problem, solver=descent(0.5, 40))))(
        {n: jnp.zeros(2) for n in names[:-1]} | {"x": x}
    )
    assert relative(estimate.grad, (a * x - 1) * a + rate_c**2 * x) < 1e-8


EXACT_METHODS = {
    "implicit_low_memory": H.implicit(L.cg(tol=1e-13), low_memory=True),
    "implicit_minres": H.implicit(L.minres(tol=1e-13)),
    "implicit_gmres": H.implicit(L.gmres(tol=1e-13)),
    "implicit_bicgstab": H.implicit(L.bicgstab(tol=1e-13)),
    "implicit_cholesky": H.implicit(L.cholesky()),
    "implicit_neumann": H.implicit(L.neumann(200, step=0.4)),
    "implicit_nystrom_cg": H.implicit(L.cg(tol=1e-13, preconditioner=L.nystrom_preconditioner(1))),
    "unrolled": H.unrolled(),
    "unrolled_sqrt": H.unrolled(checkpoint="sqrt"),
    "unrolled_step": H.unrolled(checkpoint="step"),
    "unrolled_none": H.unrolled(checkpoint="none"),
    "forward": H.forward(),
}


@pytest.mark.parametrize(
    "name", quick(EXACT_METHODS, ["implicit_gmres", "implicit_nystrom_cg", "unrolled", "forward"])
)
def test_every_exact_method_in_the_middle_of_a_chain(name):
    assert (
        relative(
            gradient(CASES["chain3"], methods={"l2": EXACT_METHODS[name]}).grad,
            expected("chain3")[1],
        )
        < 1e-8
    )


@pytest.mark.turns
@some_slow(EXACT_METHODS, set(EXACT_METHODS) - {"implicit_cholesky", "unrolled"})
def test_every_exact_method_in_the_middle_of_a_nest(name):
    assert (
        relative(
            gradient(CASES["nested3"], methods={"l2": EXACT_METHODS[name]}).grad,
            expected("nested3")[1],
        )
        < 1e-8
    )


MIXED = {
    f"{above} over {below}": (above, below)
    for above in ("implicit_cholesky", "unrolled")
    for below in ("implicit_minres", "unrolled", "forward")
}


@pytest.mark.turns
@some_slow(MIXED, set(MIXED) - {"implicit_cholesky over unrolled", "unrolled over implicit_minres"})
def test_mixed_methods_across_nested_levels(name):
    above, below = MIXED[name]
    methods = {"l1": EXACT_METHODS[below], "l2": EXACT_METHODS[above]}
    assert relative(gradient(CASES["nested3"], methods=methods).grad, expected("nested3")[1]) < 1e-8


def test_mixed_methods_across_a_diamond():
    methods = {
        "base": H.unrolled(),
        "left": H.forward(),
        "right": H.implicit(L.minres(tol=1e-13)),
        "joint": H.implicit(L.cholesky()),
    }
    assert relative(gradient(CASES["diamond"], methods=methods).grad, expected("diamond")[1]) < 1e-8


def test_a_chain_of_exact_first_order_pullbacks():
    """`fixed_point` and `shine` are right once; a chain asks for no more."""

    def step(y, x, batch):
        return jax.tree.map(
            lambda p, g: p - 0.4 * g,
            y,
            jax.grad(lambda y: CASES["chain3"].objectives["l2"]({**x, "l2": y}, None))(y),
        )

    estimate = gradient(
        CASES["chain3"],
        methods={"l2": H.fixed_point(lambda y, x, batch: step(y, x, batch), L.gmres(tol=1e-13))},
    )
    assert relative(estimate.grad, expected("chain3")[1]) < 1e-8


def test_jit_vmap_and_scan():
    case = CASES["chain3"]
    fn = bx.value_and_multilevel_grad(of_case(case))
    params = case.params()
    many = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a, a + 0.1]), params)
    batched = jax.jit(jax.vmap(fn))(many).grad
    one = jax.jit(fn)
    for i in range(3):
        assert relative(batched[i], one(jax.tree.map(lambda a, i=i: a[i], many)).grad) < 1e-12


def test_pytrees_and_leaves_that_are_not_numbers_to_learn():
    def lower(p, batch):  # x reaches one leaf of it only
        return (
            jnp.sum(jnp.cosh(p["z"]["a"] - p["y"]["w"]))
            + jnp.sum((p["z"]["b"] - 0.3) ** 2)
            + 0.1 * p["z"]["a"][0] * p["z"]["a"][1]
        )

    def middle(p, batch):
        return (
            jnp.sum((p["y"]["w"] - p["x"]["s"]) ** 2)
            + 0.3 * jnp.sum(p["z"]["a"] ** 2)
            + jnp.sum(p["z"]["b"] * p["y"]["bias"])
            + p["y"]["bias"] ** 2
        )

    def upper(p, batch):
        assert p["x"]["count"].dtype == jnp.int32
        return (
            jnp.sum((p["y"]["w"] - p["x"]["count"].astype(p["y"]["w"].dtype)) ** 2)
            + p["y"]["bias"]
            + jnp.sum(p["x"]["s"] ** 2) / 9
        )

    params = {
        "z": {"a": jnp.zeros(2), "b": jnp.zeros(())},
        "y": {"w": jnp.zeros(2), "bias": jnp.zeros(())},
        "x": {"s": jnp.asarray([0.4, -0.2]), "count": jnp.asarray(3, jnp.int32)},
    }
    built = levels({"z": lower, "y": middle, "x": upper}, solver=descent(0.3, 120))
    estimate = jax.jit(bx.value_and_multilevel_grad(built))(params)
    assert estimate.grad["count"] is None

    z = bx.argmin(lambda z, y: lower({"z": z, "y": y}, None), descent(0.3, 120))
    y = bx.argmin(
        lambda y, x: middle({"z": z(params["z"], y), "y": y, "x": x}, None), descent(0.3, 120)
    )
    count = params["x"]["count"]
    answer = jax.jit(
        jax.grad(
            lambda s: upper({"y": y(params["y"], {"s": s}), "x": {"s": s, "count": count}}, None)
        )
    )(params["x"]["s"])
    assert relative(estimate.grad["s"], answer) < 1e-8


def test_float32_stays_float32():
    case = CASES["nested3"]
    params = {name: value.astype(np.float32) for name, value in case.params().items()}
    estimate = gradient(case, H.implicit(), params=params)
    assert all(
        leaf.dtype == jnp.float32
        for leaf in jax.tree.leaves((estimate.grad, estimate.inner_params))
    )
    assert relative(estimate.grad, expected("nested3")[1]) < 1e-4


# ---- the four wrong ways, none of which can be written


@pytest.mark.turns
def test_wrong_way_1_pulling_from_the_top_down():
    """Which level is pulled first follows from who reads whom: the order in which levels are listed
    does not matter."""
    case = CASES["diamond"]
    ours = of_case(case)
    solved = jax.jit(bx.value_and_multilevel_grad([*ours[-2::-1], ours[-1]]))(case.params())
    assert relative(solved.grad, expected("diamond")[1]) < 1e-8

    # The sweep in the other order: "joint" is pulled last, when "left" and "right" have been passed
    # by with nothing to pull.
    env = {**{n: jnp.asarray(v) for n, v in case.params().items()}, **solved.inner_params}

    def pulled(name, cotangent):
        hessian = jax.hessian(lambda y: case.objectives[name]({**env, name: y}, None))(env[name])
        return -jax.vjp(
            lambda env: jax.grad(lambda y: case.objectives[name]({**env, name: y}, None))(
                env[name]
            ),
            env,
        )[1](jnp.linalg.solve(hessian, cotangent))[0]["x"]

    direct = jax.grad(lambda env: case.objectives["x"](env, None))(env)
    wrong = direct["x"] + sum(pulled(n, direct[n]) for n in ("base", "left", "right", "joint"))
    assert relative(wrong, expected("diamond")[1]) > 0.1


def test_wrong_way_2_the_hessian_of_a_nested_level_s_direct_objective():
    """A level that reacts to another is found out and solved inside it; what its direct objective's
    Hessian would give is far off."""
    case = CASES["nested3"]
    solved = gradient(case)
    env = {**{n: jnp.asarray(v) for n, v in case.params().items()}, **solved.inner_params}

    def wrong_pull(name, cotangent):
        def grad(env):
            return jax.grad(lambda y: case.objectives[name]({**env, name: y}, None))(env[name])

        hessian = jax.jacobian(lambda y: grad({**env, name: y}))(env[name])
        return jax.vjp(grad, env)[1](-jnp.linalg.solve(hessian, cotangent))[0]

    direct = jax.grad(lambda env: case.objectives["x"](env, None))(env)
    wrong = direct["x"] + wrong_pull("l2", direct["l2"] + wrong_pull("l1", direct["l1"])["l2"])["x"]
    assert relative(wrong, expected("nested3")[1]) > 0.05
    assert relative(solved.grad, expected("nested3")[1]) < 1e-8


FIRST_ORDER = {
    "finite_difference": H.finite_difference(),
    "one_step": H.one_step(),
    "sama": H.sama(),
    "truncated": H.unrolled(last=5),
    "zeroth_order": H.zeroth_order(samples=2),
}


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_wrong_way_3_a_first_order_pullback_below_an_implicit_level(name):
    case = CASES["nested3"]
    with pytest.raises(
        ValueError, match=r"level 'l1'.*right once only.*level 'l2'.*second derivative"
    ):
        jax.eval_shape(
            lambda p: bx.value_and_multilevel_grad(
                of_case(case, methods={"l1": FIRST_ORDER[name]})
            )(p, key=jax.random.key(0)),
            case.params(),
        )


def _custom(order):
    """A method of a user's own: exact once, by a dense solve inside a custom_vjp."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def respond(static, dynamic, y, given, ctx):
        return y

    def forward(static, dynamic, y, given, ctx):
        return y, (dynamic, y, given, ctx)

    def backward(static, residuals, w):
        dynamic, y, given, ctx = residuals
        value = jax.grad(lambda y, given: bx.base.join(static, dynamic)(y, given, ctx)[0])
        q = jnp.linalg.solve(jax.jacobian(value)(y, given), w)
        return None, None, jax.vjp(lambda given: value(y, given), given)[1](-q)[0], None

    respond.defvjp(forward, backward)

    def vjp(side, inner_state, outer, feed, ctx, state):
        solution, _ = side.run(*jax.lax.stop_gradient((inner_state, outer, feed)))
        ctx = ctx._replace(model=solution.model)
        static, dynamic = bx.base.split(side.objective)
        _, pull = jax.vjp(
            lambda given: respond(static, dynamic, solution.params, given, ctx), outer
        )
        info = {"inner_value": jnp.zeros(()), "code": jnp.int32(0)}
        return jax.lax.stop_gradient(solution), lambda w: (pull(w)[0], None, state, info)

    # Exact any number of times it is by the implicit function theorem, for which it names a linear
    # solver.
    return bx.base.Hypergradient(
        lambda inner: (), vjp, order=order, linear=bx.linear.cg(tol=1e-14) if order > 1 else None
    )


def test_wrong_way_4_a_custom_vjp_below_an_unrolled_level():
    case = CASES["nested3"]
    once, unrolled = _custom(order=1), H.unrolled()
    # on top of a chain it is as good as any
    assert (
        relative(gradient(CASES["chain3"], methods={"l2": once}).grad, expected("chain3")[1]) < 1e-8
    )
    with pytest.raises(
        ValueError, match=r"level 'l1'.*right once only.*level 'l2' is differentiated by unrolled"
    ):
        jax.eval_shape(
            bx.value_and_multilevel_grad(of_case(case, methods={"l1": once, "l2": unrolled})),
            case.params(),
        )
    # claimed to be exact, with a linear solver, it is not differentiated at all: an exact best
    # response has only one derivative
    estimate = gradient(case, methods={"l1": _custom(order=2), "l2": unrolled})
    assert relative(estimate.grad, expected("nested3")[1]) < 1e-8


# ---- first-order methods


def crossed():
    """The gradient of "y" in x reads z, so that a mixed product of "y" differentiates z's
    response."""

    def lower(p, batch):
        return 0.5 * jnp.sum((p["z"] - jnp.sin(p["y"])) ** 2)

    def middle(p, batch):
        return (
            0.5 * jnp.sum((p["y"] - p["x"]) ** 2)
            + 0.2 * jnp.sum(p["x"] * p["z"] ** 2)
            + 0.1 * jnp.sum(p["z"] ** 2)
        )

    objectives = {"z": lower, "y": middle, "x": top("x", ("y", "z"))}
    return objectives, {n: jnp.asarray([0.3, -0.2]) for n in objectives}


def test_first_order_methods_over_a_first_order_level():
    """SAMA and one-step take differences there by themselves; a method that cannot is refused."""
    objectives, params = crossed()

    def grad(method):
        methods = {"z": H.finite_difference(radius=1e-4), "y": method}
        return jax.jit(bx.value_and_multilevel_grad(levels(objectives, methods=methods)))(
            params
        ).grad

    assert (
        relative(grad(H.sama(radius=1e-4)), grad(H.sama(product="difference", radius=1e-4))) < 1e-12
    )
    assert relative(grad(H.one_step()), grad(H.finite_difference())) < 1e-12
    with pytest.raises(ValueError, match="right once only"):
        grad(H.implicit())


def test_a_first_order_level_in_a_nest_is_solved_along_its_own_pullback():
    """z's Hessian is the identity, so that one step is exact: all of it must agree with the exact
    methods to the differences' precision."""
    objectives, params = crossed()
    exact = jax.jit(bx.value_and_multilevel_grad(levels(objectives)))(params)
    methods = {"z": H.finite_difference(radius=1e-4), "y": H.finite_difference(radius=1e-4)}
    rough = jax.jit(bx.value_and_multilevel_grad(levels(objectives, methods=methods)))(params)
    assert relative(rough.inner_params["y"], exact.inner_params["y"]) < 1e-6


# ---- a ladder of diamonds


def ladder(rungs):
    """2^rungs paths from the top to the first level: ``n_i`` reads ``a_i`` and ``b_i``, which both
    read ``n_{i-1}``."""
    objectives, below = {}, "x"
    for i in range(rungs):
        objectives[f"a{i}"] = follow(f"a{i}", (below,))
        objectives[f"b{i}"] = follow(f"b{i}", (below,))
        objectives[f"n{i}"] = follow(f"n{i}", (f"a{i}", f"b{i}"))
        below = f"n{i}"
    objectives["x"] = top("x", (below,))
    return objectives


def ladder_flops(rungs):
    objectives = ladder(rungs)
    fn = bx.value_and_multilevel_grad(
        levels(objectives, H.implicit(L.cg(maxiter=3)), descent(0.4, 1))
    )
    compiled = jax.jit(lambda p: fn(p).grad).lower({n: jnp.ones(2) for n in objectives}).compile()
    return compiled.cost_analysis()["flops"]


@pytest.mark.turns
def test_a_ladder_of_diamonds_costs_as_much_as_its_edges():
    two, four = ladder_flops(2), ladder_flops(4)
    assert four / two < 2.2


@pytest.mark.slow
def test_ten_diamonds_cost_twice_as_much_as_five():
    assert ladder_flops(10) / ladder_flops(5) < 2.2
