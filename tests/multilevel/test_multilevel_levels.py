"""What a level can be told, what the driver does with it, what `explain` says, and what is
refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import RESULTS
from tests.multilevel.multilevel_cases import CASES

H, L = bx.hypergradient, bx.linear
SGD = bx.tunable(optax.sgd, learning_rate=0.25)
EXACT = H.implicit(L.cg(tol=1e-12))
PARAMS = {"z": jnp.asarray(0.0), "y": jnp.asarray(0.0), "x": jnp.asarray(4.0)}


def lower(p, batch):
    return 0.5 * (p["z"] - p["y"]) ** 2


def middle(p, batch):
    return 0.5 * (p["y"] - p["x"]) ** 2


def upper(p, batch):
    return 0.5 * (p["z"] - 1.0) ** 2


def three(z=None, y=None, x=None):
    """A chain x -> y -> z; keywords of each level in place of the defaults."""
    common = {"solver": bx.inner.optax(SGD, 3), "hypergradient": EXACT}
    return [
        bx.Level("z", **{"objective": lower, **common, **(z or {})}),
        bx.Level("y", **{"objective": middle, **common, **(y or {})}),
        bx.Level("x", **{"objective": upper, "solver": SGD, **(x or {})}),
    ]


def moves(levels, num_steps=4, **kwargs):
    """Where the levels stand after each of so many steps."""
    run = functools.partial(bx.solve_multilevel, levels, PARAMS, num_steps=1, keep="last", **kwargs)
    out, state = [], None
    for _ in range(num_steps):
        solution = run(state=state)
        state = solution.state
        out.append({**solution.inner_params, "x": solution.outer_params})
    return out


def plain(
    levels=(0.0, 0.0, 4.0),
    rates=(0.25, 0.25, 0.25),
    steps=(3, 3),
    num_steps=4,
    solve=lambda t, name: True,
):
    """The same by hand: every best response of this chain has the derivative 1."""
    z, y, x = levels
    out = []
    for t in range(num_steps):
        for _ in range(steps[1] if solve(t, "y") else 0):
            y -= rates[1] * (y - x)
        for _ in range(steps[0] if solve(t, "z") else 0):
            z -= rates[0] * (z - y)
        x -= rates[2] * (z - 1.0)
        out.append({"z": z, "y": y, "x": x})
    return out


def agree(a, b, tol=1e-12):
    return all(
        abs(float(u[name]) - float(v[name])) < tol for u, v in zip(a, b, strict=True) for name in v
    )


# ---- a level's own settings


def test_steps_and_solvers_of_each_level():
    assert agree(moves(three()), plain())
    assert agree(
        moves(three(z={"solver": bx.inner.optax(SGD, 5)}, y={"solver": SGD})), plain(steps=(5, 1))
    )
    other = bx.tunable(optax.sgd, learning_rate=0.5)
    assert agree(
        moves(three(z={"solver": bx.inner.optax(other, 3)}, x={"solver": other})),
        plain(rates=(0.5, 0.25, 0.5)),
    )


def test_frequency():
    assert agree(
        moves(three(z={"every": 2}), 5),
        plain(num_steps=5, solve=lambda t, name: name != "z" or t % 2 == 0),
    )


@pytest.mark.turns
def test_frequency_of_a_level_inside_another():
    """A nested level counts its own solves: those that its reader asks for."""
    nest = {"objective": lambda p, batch: middle(p, batch) + 0.1 * p["z"] ** 2}
    often, rarely = moves(three(y=nest), 1)[0], moves(three(y=nest, z={"every": 3}), 1)[0]
    assert float(often["y"]) != float(rarely["y"]) and np.isfinite(float(rarely["z"]))


def test_warm_up_steps():
    """The top level waits for the others, by a schedule that is zero at first."""
    schedule = optax.join_schedules(
        [optax.constant_schedule(0.0), optax.constant_schedule(0.25)], [2]
    )
    assert agree(moves(three(x={"solver": optax.sgd(schedule)})), plain_with_warm_up(2))


def plain_with_warm_up(n):
    waited = plain(rates=(0.25, 0.25, 0.0), num_steps=n)
    last = waited[-1]
    return waited + plain((last["z"], last["y"], last["x"]), num_steps=4 - n)


def test_gradient_clipping():
    """Each level's gradient is that of its total objective, and its optimizer clips it."""
    clipped = optax.chain(optax.clip(0.1), SGD)
    (after,) = moves(three(y={"solver": bx.inner.optax(clipped, 2)}, x={"solver": clipped}), 1)
    assert abs(float(after["y"]) - 2 * 0.25 * 0.1) < 1e-12
    assert abs(float(after["x"]) - (4.0 + 0.25 * 0.1)) < 1e-12


def test_accumulation():
    """Two microbatches make one step of each level; their mean is the big batch's gradient."""
    data = {"y": lambda key, step: jnp.where(step % 4 < 2, 1.0, 3.0)}

    def noisy(p, batch):
        return 0.5 * (p["y"] - batch * p["x"]) ** 2

    method = H.implicit(L.cg(tol=1e-12))
    accumulated = three(
        y={
            "objective": noisy,
            "solver": bx.inner.optax(optax.MultiSteps(SGD, 4).gradient_transformation(), 4),
            "hypergradient": method,
        }
    )
    one = bx.solve_multilevel(
        accumulated, PARAMS, data=data, num_steps=1, keep="last", key=jax.random.key(0)
    )
    assert (
        abs(float(one.inner_params["y"]) - 0.25 * 2.0 * 4.0) < 1e-6
    )  # optax keeps the count of its running mean in float32
    top = bx.solve_multilevel(
        three(x={"solver": optax.MultiSteps(SGD, 2).gradient_transformation()}),
        PARAMS,
        num_steps=2,
        keep="last",
    )
    grads = [float(v["z"]) - 1.0 for v in plain(rates=(0.25, 0.25, 0.0), num_steps=2)]
    assert abs(float(top.outer_params) - (4.0 - 0.25 * np.mean(grads))) < 1e-6


def test_a_frozen_level_is_a_constant():
    frozen = moves(
        three(
            z={"freeze": True, "hypergradient": None},
            x={"objective": lambda p, batch: upper(p, batch) + 0.5 * p["y"] ** 2},
        )
    )
    assert all(float(v["z"]) == 0.0 for v in frozen)
    fn = bx.value_and_multilevel_grad(
        three(z={"freeze": True}, x={"objective": lambda p, batch: p["z"] ** 2 + p["y"] * p["z"]})
    )
    estimate = fn({**PARAMS, "z": jnp.asarray(5.0)})
    assert (
        float(estimate.grad) == 5.0 and float(estimate.inner_params["z"]) == 5.0
    )  # through y only


def test_roll_back():
    """The gradient is taken K steps ahead; the level keeps the first of them."""
    whole, back = (
        bx.solve_multilevel(three(z={"look_ahead": flag}), PARAMS, num_steps=1, keep="last")
        for flag in (False, True)
    )
    y = 4.0 * (1 - 0.75**3)
    assert abs(float(whole.inner_params["z"]) - y * (1 - 0.75**3)) < 1e-12
    assert abs(float(back.inner_params["z"]) - y * 0.25) < 1e-12
    assert float(back.outer_params) == float(whole.outer_params)


def test_reads_declares_the_rest_a_constant():
    """y's objective holds z, and the user says that it is not to be looked through."""
    nest = {"objective": lambda p, batch: middle(p, batch) + 0.5 * p["z"] ** 2}
    found, declared = (
        bx.value_and_multilevel_grad(three(y=nest)),
        bx.value_and_multilevel_grad(three(y={**nest, "reads": ("x",)})),
    )
    assert bx.explain(found.levels, PARAMS).nested["y"] == ("z",)
    assert bx.explain(declared.levels, PARAMS).nested["y"] == ()
    assert (
        abs(float(found(PARAMS).inner_params["y"]) - float(declared(PARAMS).inner_params["y"]))
        > 0.1
    )


# ---- the driver


def test_own_data_and_steps_and_warm_states_over_a_thousand_steps_in_one_trace():
    """Noisy targets at two levels, a momentum and a warm adjoint in each: one trace, resumed to the
    bit, at the answer within the noise."""
    traces = []

    def fit(p, batch):
        traces.append("z")
        return jnp.mean((batch - p["z"] + p["y"]) ** 2)

    def pull(p, batch):
        traces.append("y")
        return 0.5 * (p["y"] - p["x"]) ** 2 + 0.1 * jnp.mean(batch) * p["y"]

    momentum = optax.sgd(0.1, momentum=0.5)
    built = [
        bx.Level("z", fit, solver=bx.inner.optax(momentum, 2), hypergradient=EXACT),
        bx.Level(
            "y",
            pull,
            solver=bx.inner.optax(momentum, 3),
            hypergradient=H.implicit(L.minres(tol=1e-12)),
        ),
        bx.Level("x", upper, solver=optax.sgd(0.02)),
    ]
    noise = np.random.default_rng(0).standard_normal(64) * 0.1
    data = {
        "z": bx.data.minibatches(jnp.asarray(2.0 + noise), 8),
        "y": lambda key, step: jax.random.normal(key, (4,)),
    }
    run = functools.partial(
        bx.solve_multilevel, built, PARAMS, data=data, key=jax.random.key(1), keep="last"
    )
    whole = run(num_steps=1000)
    count = len(traces)
    halves = run(num_steps=500)
    again = run(num_steps=500, state=halves.state)
    # checking the input evaluates shapes, three times for each of the two later calls; nothing is
    # compiled
    looked = 12
    assert len(traces) - count <= looked * 2
    assert whole.result is RESULTS.success and len(whole.history["value"]) == 1000
    assert float(again.outer_params) == float(whole.outer_params)
    # z = y + mean(batch), y = x - 0.1 mean(noise); so x settles where z = 1
    assert abs(float(np.mean(whole.history["value"][-200:]))) < 0.01
    assert abs(float(whole.outer_params) - (1.0 - 2.0 - noise.mean())) < 0.1
    assert {"z/adjoint_residual", "y/adjoint_residual", "z/inner_value"} <= set(whole.history)


def test_warm_states_make_later_steps_better():
    """With one step a level, the levels follow a standing top level only because they go on from
    where they stood."""
    still = optax.set_to_zero()
    path = moves(three(z={"solver": SGD}, y={"solver": SGD}, x={"solver": still}), 40)
    assert abs(float(path[-1]["z"]) - 4.0) < 0.01


def test_streams_project_metrics_tol_and_callbacks():
    seen = []
    batches = (np.asarray(float(i % 2)) for i in range(12))

    def held_out(inner, outer, batch):
        return {"distance": jnp.abs(inner["z"] - 1.0)}

    top = {"objective": lambda p, batch: 0.5 * (p["z"] - batch) ** 2}
    solution = bx.solve_multilevel(
        three(x=top), PARAMS, data={"x": batches}, num_steps=12, project=lambda x: jnp.clip(x, 3.5,
        10.0),
        metrics=bx.metrics(held_out, None, select="distance"),
        callbacks=[lambda event: seen.append(event.step)],
    )  # fmt: skip
    assert float(solution.outer_params) >= 3.5 and seen
    assert (
        solution.history["distance"].min()
        == solution.history["distance"][solution.stats["best_step"]]
    )


def test_model_states_keys_and_aux():
    """A stateful lower level counts its real steps, a keyed one gets keys, and the top level's aux
    is in the history."""
    counted = bx.objective(
        lambda p, batch, count, key: (lower(p, batch) + 0.0 * jax.random.normal(key), count + 1.0),
        stateful=True,
        keyed=True,
    )
    top = bx.objective(lambda p, batch: (upper(p, batch), {"z": p["z"]}), has_aux=True)
    nest = {"objective": lambda p, batch: middle(p, batch) + 0.1 * p["z"] ** 2}
    solution = bx.solve_multilevel(
        three(z={"objective": counted}, x={"objective": top}),
        PARAMS,
        num_steps=5,
        key=jax.random.key(0),
        model_state={"z": jnp.asarray(0.0)},
        keep="last",
    )
    assert float(solution.model_state["z"]) == 15.0
    assert solution.history["aux"]["z"].shape == (5,)
    nested = bx.solve_multilevel(
        three(z={"objective": counted}, y=nest, x={"objective": top}), PARAMS, num_steps=5,
        key=jax.random.key(0),
        model_state={"z": jnp.asarray(0.0)}, keep="last",
    )  # fmt: skip
    assert float(nested.model_state["z"]) == 5 * (
        3 * 3 + 3
    )  # three steps in each of y's three, and three at y's solution


def test_vmap_over_a_whole_run():
    xs = jnp.asarray([4.0, 2.0, -1.0])
    many = jax.vmap(
        lambda x: bx.solve_multilevel(three(), {**PARAMS, "x": x}, num_steps=20).outer_params
    )(xs)
    for x, end in zip(xs, many, strict=True):
        assert (
            abs(
                float(
                    bx.solve_multilevel(three(), {**PARAMS, "x": x}, num_steps=20).outer_params
                    - end
                )
            )
            < 1e-12
        )


def test_a_failing_level_is_told_by_its_code():
    wild = {
        "objective": lambda p, batch: -((p["z"] - p["y"]) ** 4),
        "solver": bx.inner.optax(optax.sgd(1e10), 50),
    }
    failed = bx.solve_multilevel(three(z=wild), PARAMS, num_steps=2, throw=False)
    assert failed.result is RESULTS.inner_nonfinite and np.isfinite(float(failed.outer_params))


# ---- explain


def test_explain_names_edges_methods_nests_and_costs():
    case = CASES["nested3"]
    descent = bx.inner.optax(SGD, 10)
    method = H.implicit(L.cg(maxiter=5))
    built = [
        bx.Level(n, o, solver=descent, hypergradient=method)
        for n, o in list(case.objectives.items())[:-1]
    ]
    built.append(bx.Level("x", case.objectives["x"], solver=SGD))
    found = bx.explain(built, case.params())
    assert found.order == ("l2", "l1") and found.nested["l2"] == ("l1",)
    assert {(e.level, e.reads, e.inside) for e in found.edges if e.method} == {
        ("l2", "x", None),
        ("l1", "l2", None),
        ("l1", "l2", "l2"),
    }
    # l2 is solved in 10 gradients, pulled in one more and 5 + 1 products
    assert found.gradients["l2"] == 11 and found.hvps["l2"] == 6
    # l1 in each of those 11 gradients: 10 of its own and one derivative of 1 gradient and 6
    # products; two derivatives in each of 6 products; and once more for the top level
    assert (
        found.gradients["l1"] == 11 * (10 + 1) + 12 * 1 + 11
        and found.hvps["l1"] == (11 + 12 + 1) * 6
    )
    text = str(found)
    assert "nested in its objective: l1" in text and "dl1/dl2 by implicit(cg), inside l2" in text


def test_explain_counts_first_order_methods_and_admits_what_it_does_not_know():
    found = bx.explain(
        three(z={"hypergradient": H.finite_difference()}, y={"hypergradient": H.unrolled()}), PARAMS
    )
    assert found.gradients == {"z": 5, "y": 3, "x": 1} and found.hvps == {"z": 0, "y": 6, "x": 0}
    unknown = bx.explain(three(z={"hypergradient": H.zeroth_order(samples=2)}), PARAMS)
    assert unknown.gradients["z"] is None and "not known" in str(unknown)


def test_explain_takes_the_data_of_a_run():
    rows = jnp.arange(6.0)
    built = three(z={"objective": lambda p, batch: 0.5 * jnp.mean((p["z"] - p["y"] - batch) ** 2)})
    expected = bx.explain(built, PARAMS, {"z": rows[:2]})
    sampled = bx.data.minibatches(rows, 2)
    for data in (sampled, bx.data.episodes(sampled).map(jnp.sin), lambda key, step: rows[:2]):
        assert bx.explain(built, PARAMS, {"z": data}) == expected
    with pytest.raises(TypeError, match=r"batches\['z'\]: got episodes of an iterable; expected"):
        bx.explain(built, PARAMS, {"z": bx.data.episodes(iter([rows]))})


def test_explain_draws():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    ax = bx.explain(three(), PARAMS).draw()
    assert {"x", "y", "z"} <= {text.get_text() for text in ax.texts}
    plt.close(ax.figure)


# ---- what is refused


@pytest.mark.parametrize(
    "change, error, text",
    [
        (
            lambda: three(
                y={"objective": lambda p, b: p["y"] ** 2}, x={"objective": lambda p, b: p["z"]}
            ),
            ValueError,
            r"'x'.*does not depend",
        ),
        (
            lambda: three(x={"objective": lambda p, b: (p["y"] - 1.0) ** 2}),
            ValueError,
            r"Level 'z': nobody reads it",
        ),
        (
            lambda: three(z={"reads": ("z",)}),
            ValueError,
            r"'z', reads: got a cycle, 'z' reading itself",
        ),
        (lambda: three(z={"reads": ("w",)}), ValueError, r"'z', reads: got 'w', which is no level"),
        (
            lambda: three(z={"reads": ("x",)}),
            ValueError,
            r"'z', reads: got 'x', which its objective does not read",
        ),
        (lambda: three(z={"reads": "y"}), TypeError, r"reads=\('y',\)"),
        (lambda: [*three(), three()[0]], ValueError, r"name 'z' 2 times"),
        (lambda: three()[2:], ValueError, "two or more"),
        (lambda: three()[0], TypeError, "sequence of Level"),
        (lambda: three(y={"hypergradient": None}), ValueError, r"'y', hypergradient: got None"),
        (lambda: three(x={"hypergradient": EXACT}), ValueError, r"'x', hypergradient"),
        (lambda: three(y={"hypergradient": H.implicit}), TypeError, r"'y', hypergradient.*factory"),
        (lambda: three(x={"solver": bx.inner.optax(SGD, 3)}), TypeError, r"'x', solver"),
        (lambda: three(y={"solver": 0.1}), TypeError, r"'y', solver"),
        (lambda: three(x={"every": 2}), ValueError, r"'x'.*top level"),
        (lambda: three(x={"freeze": True}), ValueError, r"'x'.*top level"),
        (lambda: three(y={"every": 0}), ValueError, r"'y', every"),
        (lambda: three(y={"look_ahead": 1}), TypeError, r"'y', look_ahead"),
        (lambda: three(y={"freeze": "yes"}), TypeError, r"'y', freeze"),
        (lambda: three(y={"objective": 3}), TypeError, r"'y', objective"),
        (lambda: three(y={"objective": lambda p, b: p["w"]}), KeyError, "w"),
        (
            lambda: three(y={"objective": lambda p, b: jnp.ones(2) * p["y"]}),
            ValueError,
            r"'y', objective",
        ),
    ],
)
def test_levels_that_cannot_work_are_refused_by_name(change, error, text):
    with pytest.raises(error, match=text):
        bx.explain(change(), PARAMS)


@pytest.mark.parametrize(
    "kwargs, error, text",
    [
        (
            {"params": {"z": 0.0, "y": 0.0}},
            ValueError,
            r"params: got.*\['y', 'z'\].*expected.*\['z', 'y', 'x'\]",
        ),
        ({"params": {**PARAMS, "y": 1}}, TypeError, r"params\['y'\]"),
        ({"params": {**PARAMS, "y": jnp.nan}}, ValueError, r"params\['y'\]"),
        ({"data": {"w": jnp.ones(3)}}, ValueError, r"data: got the key 'w'"),
        ({"data": jnp.ones(3)}, TypeError, "data"),
        (
            {"data": {"z": bx.data.minibatches(jnp.ones(4), 2)}},
            ValueError,
            r"key: got None although the data of level 'z'",
        ),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"state": 3}, TypeError, "state"),
        ({"project": 3}, TypeError, "project"),
    ],
)
def test_arguments_of_the_driver_are_refused_by_name(kwargs, error, text):
    with pytest.raises(error, match=text):
        bx.solve_multilevel(three(), **{"params": PARAMS, **kwargs})


def test_an_iterable_for_a_level_inside_another_is_refused():
    nest = {"objective": lambda p, batch: middle(p, batch) + 0.1 * p["z"] ** 2}
    with pytest.raises(ValueError, match=r"data\['z'\]: got an iterable"):
        bx.solve_multilevel(three(y=nest), PARAMS, data={"z": iter([np.ones(1)] * 3)}, num_steps=2)
