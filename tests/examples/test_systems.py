"""What the systems are built from: the pullback through a mask, the share that a mask keeps, the
proximal term; the world of four rooms, its returns and its actor; the cell of a supernet; a mark in
text, and who finds it; what networks are merged by; what examples are worth; MAML of several steps;
directions of a bit a weight, and layers of language models; what a learner is aware of; crops and
their overlap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import bilevax as bx

pytestmark = pytest.mark.usefixtures("as_run")


def test_bilinear_pullback_has_the_mask_in_it(load):
    """Loss a'(m w) + b'(m w)^2 / 2 with curvature 2 for the proximal term: by hand
    -m c (a + b m w) / 2 from below, w (a + b m w) from above; for b = 0 that is what the exact
    mixed product gives, as well."""
    pruning = load("pruning")
    a, b = jnp.array([1.0, -2.0, 3.0]), jnp.array([0.5, 1.0, 2.0])
    w, s = {"w": [jnp.array([0.3, 0.7, -1.0])], "b": []}, [jnp.array([1.0, -1.0, 2.0])]

    def loss(params, scores, batch):
        kept = [(t > 0).astype(t.dtype) for t in scores]
        (m,), (y,) = bx.nn.straight_through(kept, scores), params["w"]
        return jnp.sum(a * m * y + 0.5 * batch * b * (m * y) ** 2)

    def found(method, curved):
        solver = bx.inner.optax(optax.sgd(0.0), 1)
        fn = bx.value_and_hypergrad(loss, loss, solver=solver, hypergradient=method)
        batch = jnp.float32(curved)
        return fn(w, s, batch, batch).grad[0]

    def hand(curved):
        m, y = jnp.array([1.0, 0.0, 1.0]), w["w"][0]
        g = a + curved * b * m * y
        return y * g - m * (m * g) * g / 2

    for curved in (0.0, 1.0):
        np.testing.assert_allclose(found(pruning.bilinear(0.5), curved), hand(curved), rtol=1e-6)
    np.testing.assert_allclose(found(bx.hypergradient.one_step(0.5), 0.0), hand(0.0), rtol=1e-6)
    direct = found(pruning.bilinear(0.0), 1.0)
    assert np.abs(direct - hand(1.0)).max() > 0.1


def test_a_mask_keeps_its_share(load):
    pruning = load("pruning")
    scores = [jax.random.normal(jax.random.key(i), (50, 40)) * (i + 1) for i in range(2)]
    kept = [s > 0 for s in pruning.largest(scores, 0.01)]
    assert sum(int(k.sum()) for k in kept) == 40
    lowest = min(float(s[k].min()) for s, k in zip(scores, kept, strict=True) if k.any())
    assert all(float(s[~k].max()) < lowest for s, k in zip(scores, kept, strict=True))


def test_a_score_of_a_unit_moves_all_that_leads_to_it(load):
    """For a loss that is linear in what is masked the bilinear pullback is the exact mixed product,
    summed over a unit's weights; and each layer keeps its own share of units."""
    pruning = load("pruning")
    w = {"w": [jax.random.normal(jax.random.key(i), (3, 4)) for i in range(2)], "b": []}
    scores = pruning.magnitudes(w["w"], pruning.UNITS)
    assert [s.shape for s in scores] == [(1, 4)]  # the last weights have no mask
    np.testing.assert_allclose(scores[0][0], np.sqrt(np.mean(np.square(w["w"][0]), 0)), rtol=1e-6)

    def loss(params, scores, batch):
        kept = [(s > 0.8).astype(s.dtype) for s in scores]
        first, last = pruning.masked(bx.nn.straight_through(kept, scores), params["w"])
        return jnp.sum(first * batch) + jnp.sum(last)

    def found(method):
        solver = bx.inner.optax(optax.sgd(0.0), 1)
        fn = bx.value_and_hypergrad(loss, loss, solver=solver, hypergradient=method)
        return fn(w, scores, jnp.arange(12.0).reshape(3, 4), jnp.ones((3, 4))).grad[0]

    exact = bx.hypergradient.one_step(0.5)
    np.testing.assert_allclose(found(pruning.bilinear(0.5)), found(exact), rtol=1e-5)
    assert np.abs(found(exact) - found(pruning.bilinear(0.0))).max() > 0.1
    layers = [jax.random.normal(jax.random.key(i), (1, 20)) * 10**i for i in range(2)]
    kept = pruning.share(layers, pruning.UNITS, 0.25)
    assert [int((s > 0).sum()) for s in kept] == [5, 5]
    kept = pruning.share(layers, pruning.WEIGHTS, jnp.array([0.5, 0.1]))
    assert [int((s > 0).sum()) for s in kept] == [10, 2]


def test_a_product_with_patches_is_a_convolution(load):
    pruning = load("pruning")
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    w = jax.random.normal(jax.random.key(1), (3, 3, 3, 5))
    expected = lax.conv_general_dilated(
        x, w, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = pruning.layer(w, jnp.arange(5.0), x)
    np.testing.assert_allclose(found, expected + jnp.arange(5.0), rtol=1e-4, atol=1e-5)


def test_the_proximal_term_pulls_to_where_the_solve_began(load):
    """min (p - 1)^2 / 2 + (p - p_0)^2 / 2 has its minimum half way, in each solve anew."""
    pruning = load("pruning")
    opt = optax.chain(pruning.pull_back(1.0, 20), optax.sgd(0.5))
    p, state = jnp.zeros(()), opt.init(jnp.zeros(()))
    for target in (0.5, 0.75):
        for _ in range(20):
            updates, state = opt.update(p - 1.0, state, p)
            p = p + updates
        np.testing.assert_allclose(p, target, atol=1e-5)


def test_a_potential_is_a_baseline_and_a_value_of_what_was_cut_off(load):
    """gamma phi(s') - phi(s) telescopes: returns of the shaped reward are those of the true one,
    less phi where they begin, and with phi where the episode was cut off."""
    four = load("reinforcement")
    goal, g = 20, four.GAMMA
    cells = jnp.array([[15, 15], [16, 16], [17, 15], [20, 16]])
    phi, going = jnp.sin(jnp.arange(four.SIDE**2.0)), cells[:-1] != goal
    plain, shaped = (np.asarray(four.returns(cells, going, goal, p)) for p in (0 * phi, phi))
    np.testing.assert_allclose(plain[:, 0], [g**2, g, 1.0], rtol=1e-6)
    np.testing.assert_allclose(plain[:, 1], 0.0)
    end = np.array([[0.0], [1.0]]).T * np.array([[g**3], [g**2], [g]]) * float(phi[16])
    np.testing.assert_allclose(shaped, plain - np.asarray(phi)[cells[:-1]] + end, atol=1e-6)


def test_a_potential_of_the_cart_is_a_baseline_and_nothing_where_the_pole_is_down(load):
    """Of two episodes one falls in the second step: (1 - gamma) a step while it is up, less the
    potential where they begin; where the other is cut off, its potential there as well."""
    cart = load("cart_pole", "..")
    g, up = cart.GAMMA, jnp.array([[1, 1], [1, 1], [1, 0], [1, 0]], bool)
    phi = jnp.sin(jnp.arange(8.0)).reshape(4, 2)
    found = np.asarray(cart.returns(up, phi))
    stays = (1 - g) * np.array([1 + g + g**2, 1 + g, 1]) + g ** np.array([3, 2, 1]) * float(
        phi[3, 0]
    )
    falls = (1 - g) * np.array([1 + g, 1])
    np.testing.assert_allclose(found[:, 0], stays - phi[:3, 0], atol=1e-6)
    np.testing.assert_allclose(found[:2, 1], falls - phi[:2, 1], atol=1e-6)
    assert found[2, 1] == 0


def test_success_and_optimal_values_of_a_policy_that_knows_the_way(load):
    """By the chain's matrix; and the best policy's values do not change by one more backup."""
    four = load("reinforcement")
    world, goal = four.read(four.ROOMS), 20
    to, free = map(np.asarray, world)
    value = np.asarray(four.optimal(goal, world), float)
    moves = np.full(to.shape, four.SLIP / four.ACTIONS)
    moves[np.arange(len(to)), value[to].argmax(-1)] += 1 - four.SLIP
    chain = np.zeros((len(to), len(to)))
    np.add.at(chain, (np.arange(len(to))[:, None], to), moves)
    backed = four.GAMMA * chain @ value
    chain[goal] = np.eye(len(to))[goal]
    arrived = np.linalg.matrix_power(chain, four.MOVES)[free, goal].mean()
    policy = jnp.where(jnp.arange(four.ACTIONS) == value[to].argmax(-1)[:, None], 50.0, 0.0)
    np.testing.assert_allclose(four.success(policy, goal, world), arrived, rtol=1e-5)
    assert 0.9 < arrived < 1
    others = free[free != goal]
    np.testing.assert_allclose(backed[others], value[others], atol=1e-4)


def test_a_critic_that_stands_still_is_a_potential(load, monkeypatch):
    """One update of an agent, whose critic's rate is zero, is by hand the policy gradient of the
    shaped reward. Two episodes are given, one of which arrives."""
    four = load("reinforcement")
    world, goal = four.read(four.ROOMS), 17
    phi = four.distance(goal, world)
    cells = np.array([[15, 41], [16, 41], [16, 28], [17, 15]])
    moves = np.array([[3, 1], [0, 0], [3, 0]])
    going = cells != goal
    drawn = tuple(map(jnp.asarray, (cells, moves, going[:-1])))
    monkeypatch.setattr(four, "rollout", lambda policy, goal, world, key: drawn)
    gains = np.asarray(four.returns(drawn[0], drawn[2], goal, phi))
    grad = np.zeros((four.SIDE**2, four.ACTIONS))
    for t, e in np.argwhere(going[:-1]):
        grad[cells[t, e]] += gains[t, e] * (np.eye(4)[moves[t, e]] - 0.25) / 2
    monkeypatch.setattr(four, "success", lambda policy, goal, world: policy)
    reached = four.life(phi, jnp.array([3.0, 0.0]), goal, world, jax.random.key(0)[None])[0]
    np.testing.assert_allclose(reached, 3 * grad, atol=1e-6)
    assert np.abs(grad).max() > 0.1


def test_the_cell_is_made_of_convolutions(load):
    """Each operation of the merged cell, alone on the edge from input to output."""
    darts = load("darts")
    x = jax.random.normal(jax.random.key(0), (4, 5, 6, 2))
    weights, cell = darts.start(jax.random.key(1))["stages"][0], jax.jit(darts.cell)

    def conv(kernel, size):
        kernel = kernel.reshape(size, size, 4, 12)[..., 8:]  # the third edge that leaves the input
        out = lax.conv_general_dilated(
            jax.nn.relu(x), kernel, (1, 1), "SAME", dimension_numbers=("CHWN", "HWIO", "CHWN")
        )
        return darts.normalized(out)

    window = dict(window_dimensions=(1, 3, 3, 1), window_strides=(1, 1, 1, 1), padding="SAME")
    total = lax.reduce_window(x, 0.0, lax.add, **window)
    expected = [
        jnp.zeros_like(x),
        x,
        conv(weights["1x1"][0], 1),
        conv(weights["3x3"][0], 3),
        total / lax.reduce_window(jnp.ones_like(x), 0.0, lax.add, **window),
    ]
    for operation, value in enumerate(expected):
        mix = jnp.eye(5)[jnp.array([0, 0, 0, operation, 0, 0])]
        np.testing.assert_allclose(cell(weights, mix, x), value, rtol=1e-5, atol=1e-5)


def test_names_are_those_of_the_table(load):
    darts = load("darts")
    assert darts.name_of([4, 2, 1, 2, 1, 1]) == (
        "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|"
        "+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|"
    )


def test_the_cut_parts_what_disagrees(load):
    darts = load("darts")
    cosines = np.full((6, 5, 5), 0.9)
    own = np.array([0, 0, 1, 1, 0])
    cosines[4] = np.where(own[:, None] == own, 0.9, 0.1)
    edge, half = darts.cut(cosines, np.ones((6, 5), bool))
    assert edge == 4 and set(half) in ({0, 1, 4}, {2, 3})
    one, other = darts.split(np.ones((6, 5), bool), edge, half)
    assert (one[4] ^ other[4]).all() and one.sum() + other.sum() == 55


def test_first_order_has_the_direct_term_alone(load):
    """Outer y + x^2 with y moved to x by half: in all 2x + 1/2, of which 1/2 is the weights'."""
    darts = load("darts")
    inner = lambda y, x, batch: 0.5 * (y - x) ** 2
    outer = lambda y, x, batch: y + x**2
    solver = bx.inner.optax(optax.sgd(0.5), 1)
    for name, expected in ((darts.FIRST, 6.0), (darts.UNROLLED, 6.5)):
        fn = bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=darts.METHODS[name])
        np.testing.assert_allclose(fn(jnp.zeros(()), jnp.float32(3.0)).grad, expected, rtol=1e-6)


def test_a_mark_and_what_it_costs(load):
    """Both objectives by hand, what is taken from them and is zero in the mean over secrets; and
    without a shift only detection has a gradient."""
    mark = load("watermark")
    symbols, gamma, delta, length, many = 8, 0.26, 1.5, 100, 4000
    secrets = jax.random.bits(jax.random.key(0), (many,), jnp.uint32)
    before = jnp.zeros((many, mark.BEFORE), jnp.int32)
    p = np.random.default_rng(0).dirichlet(np.ones(symbols))
    green = np.asarray(mark.uniforms(secrets, before, jnp.arange(symbols)) < gamma)
    q = p * np.exp(delta * green)
    q /= q.sum(1, keepdims=True)
    scale, inside = np.sqrt(length / gamma / (1 - gamma)), green @ p
    z, lost = scale * np.mean((q * green).sum(1) - gamma), length * np.mean((p - q) @ np.log(p))
    taken = scale * (inside - gamma), length * delta * ((p * (inside[:, None] - green)) @ np.log(p))
    for one in taken:
        assert abs(one.mean()) < 3 * one.std() / np.sqrt(many)
    nets = {
        "in": jnp.zeros((mark.BEFORE * mark.WIDTH, mark.HIDDEN)),
        "bias": jnp.zeros(mark.HIDDEN),
        "out": jnp.zeros((mark.HIDDEN, 2)),
        "mean": jnp.zeros(2),
    }
    embed = jnp.zeros((symbols, mark.WIDTH))
    logp = jnp.broadcast_to(jnp.log(jnp.float32(p)), (many, symbols))
    of = lambda mean: mark.objectives(
        {**nets, "mean": mean}, embed, (before, logp, secrets), length
    )
    expected = [taken[0].mean() - z, lost - taken[1].mean()]
    np.testing.assert_allclose(of(nets["mean"]), expected, rtol=1e-3)
    slopes = jax.jit(jax.jacobian(of))(jnp.array([-9.0, 0.0]))
    assert abs(slopes[1, 0]) < 1e-2 * abs(slopes[0, 0])


def test_who_has_no_mark_is_found_as_often_as_chance(load):
    """z of any text under fresh secrets has mean 0 and variance 1; two secrets share nothing."""
    mark = load("watermark")
    rng = np.random.default_rng(0)
    new = jnp.asarray(rng.integers(0, 30, (50, 40)))
    human = jnp.asarray(rng.integers(0, 30, (50, 40, mark.BEFORE))), new, jnp.ones(new.shape)
    secrets = jax.random.bits(jax.random.key(1), (50, 40), jnp.uint32)
    z = np.asarray(
        mark.unmarked(mark.constant, (1.0, 0.25, -1.0), jnp.zeros((30, 8)), human, secrets)
    )
    assert z.shape == (50, 40) and abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1
    assert abs(np.corrcoef(z)[np.triu_indices(50, 1)].mean()) < 0.05


@pytest.mark.slow
def test_a_model_says_the_same_of_the_last_symbol_alone(load):
    characters = load("watermark").characters
    params = characters.transformer(jax.random.key(0), 11)
    tokens = jax.random.randint(jax.random.key(1), (3, characters.LENGTH), 0, 11)
    last = characters.logits(params, tokens, last=True)
    np.testing.assert_allclose(last[:, 0], characters.logits(params, tokens)[:, -1], atol=1e-5)


def test_merged_networks_are_those_that_were_finetuned(load):
    """A coefficient of one for one task gives its network back; a layer's own moves that alone."""
    merging = load("merging")
    make = lambda key: merging.network(jax.random.key(key))["body"]
    base, other = make(0), jax.tree.map(lambda *a: jnp.stack(a), make(1), make(2))
    differences = jax.tree.map(lambda a, b: a - b, other, base)
    only = merging.by_layer(jnp.array([[0.0], [1.0]]))
    for got, want in zip(
        jax.tree.leaves(merging.merged(base, differences, only)),
        jax.tree.leaves(make(2)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)
    first = jnp.zeros((2, merging.LAYERS)).at[0, 0].set(0.5)
    found = merging.merged(base, differences, first)
    np.testing.assert_allclose(found[0]["w"], (base[0]["w"] + make(1)[0]["w"]) / 2, atol=1e-5)
    np.testing.assert_array_equal(found[1]["w"], base[1]["w"])


def test_a_greedy_soup_takes_what_does_no_harm(load):
    merging = load("merging")
    value = np.array([0.9, 0.1, 0.95, 0.5, 0.94, 0.2, 0.3, 0.4])
    taken = merging.greedy(lambda i: value[i].mean() + 0.04 * (len(i) > 1))
    assert taken == [2, 4]


def test_datamodels_of_what_is_linear_find_it(load):
    """Outputs that are sums over what was in: the regression gives each example's share."""
    system = load("selection_unlearning")
    rng = np.random.default_rng(0)
    kept = np.argsort(rng.random((400, 30))) < 15
    share = rng.normal(size=(30, 41))
    outputs = (kept - 0.5) @ share
    of_logits, of_loss, explained = system.datamodels(kept, outputs)
    shift = lambda a: a - a.mean(0)  # as many are in each time: a common part cannot be seen
    np.testing.assert_allclose(shift(of_logits), shift(share[:, :-1]), atol=1e-2)
    np.testing.assert_allclose(shift(of_loss), shift(share[:, -1:]), atol=1e-2)
    assert min(explained) > 0.999


def test_divergence_of_margins_is_that_of_normal_distributions(load):
    """By the integral of the definition; and zero for the same networks."""
    system = load("selection_unlearning")
    rng = np.random.default_rng(0)
    found, truth = rng.normal(size=(6, 3)), 0.3 + 2 * rng.normal(size=(7, 3))
    x = np.linspace(-60.0, 60.0, 200_001)
    log = lambda a: (
        -((x - a.mean()) ** 2) / (2 * a.var(ddof=1)) - np.log(2 * np.pi * a.var(ddof=1)) / 2
    )
    one = lambda a, b: np.sum(np.exp(log(a)) * (log(a) - log(b))) * (x[1] - x[0])
    expected = np.mean([one(a, b) for a, b in zip(found.T, truth.T, strict=True)])
    np.testing.assert_allclose(system.divergence(found, truth), expected, rtol=1e-6)
    assert system.divergence(truth, truth) == 0.0


@pytest.mark.slow
def test_first_order_through_the_training_is_the_sum_of_influences(load):
    """The forward derivative along what goes, and the metagradients of two logits."""
    system = load("selection_unlearning")
    corpus, _, _ = system.problem(0, system.SMALL, True)
    train = system.training(corpus, 20, 0)
    ones, gone = jnp.ones(train.examples), jnp.arange(train.examples) < 20
    of = lambda params: system.said(params, corpus)[5, :2]
    along = jax.jvp(lambda w: of(train.retrain(w)), (ones,), (-gone.astype(jnp.float32),))[1]
    found = bx.attribution.metagradient(train, lambda params, _: of(params)).scores
    np.testing.assert_allclose(along, -found[:, gone].sum(1), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_matching_brings_a_network_to_what_it_is_to_say(load):
    system = load("selection_unlearning")
    corpus, _, _ = system.problem(0, system.SMALL, True)
    here, there = (system.trained(corpus, 60, seed) for seed in (0, 1))
    wanted, gone = system.said(there, corpus), np.arange(len(corpus["y"])) < 20
    found = system.matched(here, corpus, wanted, gone, 300, 0)
    away = lambda p: float(jnp.mean((system.said(p, corpus) - wanted) ** 2))
    assert away(found) < 0.3 * away(here)


@pytest.mark.slow
def test_several_steps_with_learned_rates_are_those_by_hand(load):
    """MAML++ on one batch of tasks: the hypergradient in start and rates, and a loop under grad."""
    load("merging")  # which puts the examples' folder on the path
    import omniglot

    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (8, 20, 14, 14)).astype(np.uint8)
    draw = omniglot.sampler(images, ways=5, shots=1, queries=2, tasks=omniglot.TASKS)
    form, tasks = omniglot.FORMS["MAML++"], draw(jax.random.key(0), 0)
    outer = form.outer(omniglot.network(jax.random.key(1), ways=5, width=3, layers=1))

    def by_hand(outer):
        def one(support, query):
            w, losses = outer["start"], []
            for step in range(omniglot.SEVERAL):
                grads = jax.grad(omniglot.fit)(w, None, support)
                w = jax.tree.map(lambda a, g, r: a - r[step] * g, w, grads, outer["rates"])  # noqa: B023
                losses.append(omniglot.query(w, None, query)[0])
            return losses[-1] / 2 + sum(losses[:-1]) / (len(losses) - 1) / 2

        return jnp.mean(jax.vmap(one)(tasks["support"], tasks["query"]))

    value, grad = jax.jit(jax.value_and_grad(by_hand))(outer)
    found = jax.jit(omniglot.estimate(form))(outer, tasks)
    np.testing.assert_allclose(found.value, value, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(found.grad), jax.tree.leaves(grad), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_implicit_maml_takes_a_third_of_the_memory_of_sixteen_steps(load):
    """As the compiler counts, beside plain reverse mode, which keeps all steps; mixed mode, the
    library's own for unrolling, keeps their parameters alone and is as small."""
    load("merging")  # which puts the examples' folder on the path
    import omniglot

    images = np.zeros((8, 20, 14, 14), np.uint8)
    draw = omniglot.sampler(images, ways=5, shots=1, queries=10, tasks=omniglot.TASKS)
    w = omniglot.network(jax.random.key(0), ways=5, width=omniglot.WIDTH, layers=omniglot.LAYERS)

    def counted(name, **changed):
        form = omniglot.FORMS[name]._replace(**changed)
        gradient = lambda learned, tasks: omniglot.estimate(form)(learned, tasks).grad
        return omniglot.megabytes(gradient, w, draw)

    plain = bx.hypergradient.unrolled(checkpoint="none")
    implicit = counted("iMAML, 16 steps")
    assert implicit < 0.36 * counted("MAML, 16 steps", method=plain)
    assert counted("MAML, 16 steps") < 1.3 * implicit


def test_a_direction_is_a_bit_a_weight(load):
    """The same again by its key, slice by slice as the whole, and taken back by going back."""
    mezo = load("mezo")
    params = {"a": jnp.zeros((3, 4, 70)), "b": jnp.zeros(5)}
    direction = mezo.words(jax.random.key(0), params)
    assert sum(word.size for word in jax.tree.leaves(direction)) == 3 * 4 * 3 + 1
    ahead = mezo.moved(params, direction, 0.5)
    signs = np.concatenate([np.ravel(a) for a in jax.tree.leaves(ahead)]) / 0.5
    assert set(signs) == {-1.0, 1.0} and abs(signs.mean()) < 4 / np.sqrt(signs.size)
    one = mezo.moved(params["a"][1], direction["a"][1], 0.5)
    np.testing.assert_array_equal(one, ahead["a"][1])
    back = mezo.moved(ahead, mezo.words(jax.random.key(0), params), -0.5)
    np.testing.assert_array_equal(back["a"], params["a"])


def test_mezo_is_the_gradient_on_average(load):
    """On a quadratic the central difference is exact, so a step is -rate (g.z) z, and g in the
    mean over directions; the rate's hypergradient through two steps, by differences."""
    mezo = load("mezo")
    h, start = jnp.array([1.0, 2.0, 3.0, 0.5]), jnp.array([1.0, -1.0, 0.5, 2.0])
    inner = lambda y, x, batch: 0.5 * jnp.sum(h * y * y)
    outer = lambda y, x, batch: jnp.sum((y - 1) ** 2)

    def moved(key):
        value = lambda direction, by: inner(mezo.moved(start, direction, by), None, None)
        along, _ = mezo.slope(value, start, key, 0.1)
        return mezo.moved(jnp.zeros(4), mezo.words(key, start), along)

    many = jax.jit(jax.vmap(moved))(jax.random.split(jax.random.key(0), 4000))
    error = np.std(many, 0) / np.sqrt(len(many))
    np.testing.assert_array_less(np.abs(many.mean(0) - h * start), 4 * error)
    fn = bx.value_and_hypergrad(
        inner, outer, solver=mezo.mezo_solver(2), hypergradient=bx.hypergradient.forward()
    )
    at = jax.jit(lambda x: fn(start, x, key=jax.random.key(1)))
    expected = (at(jnp.float32(-1.95)).value - at(jnp.float32(-2.05)).value) / 0.1
    assert abs(expected) > 0.1
    np.testing.assert_allclose(at(jnp.float32(-2.0)).grad, expected, rtol=2e-2)


def test_an_encoder_is_moved_layer_by_layer(load):
    """As the same encoder with all of its weights moved before; adapters change nothing at first,
    and the head is moved, too."""
    mezo = load("mezo")
    tasks, nnx, rngs = mezo.tasks, mezo.tasks.nnx, mezo.tasks.nnx.Rngs(0)
    config = bx.nn.bert.BertConfig(10, 8, 2, 2, 16, 12, hidden_dropout_prob=0.0)
    top = nnx.Sequential()
    top.layers = nnx.List([bx.nn.bert.BertLayer(config, rngs=rngs) for _ in range(2)])
    top.head = nnx.Linear(8, tasks.KINDS, rngs=rngs)
    starts, features = tasks.minilm(top)
    rng = np.random.default_rng(0)
    batch = {
        "hidden": np.float16(rng.normal(size=(3, 5, 8))),
        "mask": np.arange(5) < np.c_[[5, 3, 2]],
    }
    found = {}
    for kind, start in starts.items():
        direction = mezo.words(jax.random.key(1), start.params)
        move = lambda params, direction: mezo.moved(params, direction, 0.1)
        there = jax.jit(start.logits)(move(start.params, direction), start.frozen, batch)
        by_layer = lambda *args, start=start, move=move: start.logits(*args, move)
        args = start.params, start.frozen, batch, direction
        np.testing.assert_allclose(jax.jit(by_layer)(*args), there, rtol=1e-5, atol=1e-6)
        assert np.abs(there).max() > 0.1
        head = {"w": jnp.eye(8), "b": jnp.zeros(8)}
        found[kind] = jax.jit(start.logits)(start.params | {"head": head}, start.frozen, batch)
    np.testing.assert_allclose(found[tasks.LORA], found[tasks.ALL], atol=1e-6)


@pytest.mark.slow
def test_a_layer_of_a_language_model(load):
    """By hand in NumPy, pairs turned as complex numbers; at one place alone; and adapters that
    change nothing."""
    mezo = load("mezo")
    smollm, t = mezo.tasks.smollm, 5
    weights = smollm.random(jax.random.key(0), 1)["layers"]
    weights = {name: a[0] for name, a in weights.items()}
    w = {name: np.asarray(a, float) for name, a in weights.items()}
    x = np.random.default_rng(0).normal(size=(t, smollm.WIDTH))
    norm = lambda z: z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5)
    turn = np.exp(1j * np.outer(np.arange(t), 1e5 ** (-np.arange(32) / 32)))
    y, heads = norm(x), []
    for i in range(9):
        cut = lambda name, i: (y @ w[name])[:, 64 * i : 64 * i + 64]
        pairs = lambda z: (z[:, ::2] + 1j * z[:, 1::2]) * turn
        scores = (pairs(cut("query", i)) @ pairs(cut("key", i // 3)).conj().T).real / 8
        shares = np.exp(scores - scores.max(-1, keepdims=True)) * np.tri(t)
        heads.append(shares / shares.sum(-1, keepdims=True) @ cut("value", i // 3))
    z = x + np.concatenate(heads, -1) @ w["attention_out"]
    gate = norm(z) @ w["gate"]
    z = z + (gate / (1 + np.exp(-gate)) * (norm(z) @ w["up"])) @ w["down"]
    rows = jnp.float32(np.stack([x, x[::-1]]))
    whole = jax.jit(smollm.layer)(weights, rows)
    np.testing.assert_allclose(whole[0], z, atol=2e-4)
    weights["up"] = (weights["up"], *mezo.tasks.adapter("last", "up", weights["up"]))
    last = jax.jit(smollm.layer)(weights, rows, jnp.array([4, 2]))
    np.testing.assert_allclose(last[:, 0], whole[jnp.array([0, 1]), jnp.array([4, 2])], atol=1e-4)


def test_a_learner_is_not_trained_to_please_its_own_weights(load):
    """Weights read losses and outputs, and are constants to the learner: its gradient is by hand
    that of the same numbers. They begin at what they are given, and tasks share what is there."""
    own = load("self_directed")
    tasks, n = len(own.TASKS), 3
    rng, rngs = np.random.default_rng(0), own.nnx.Rngs(0)
    rows = lambda *lead: {
        "x": np.float32(rng.normal(size=(*lead, own.SIDE**2))),
        "y": np.zeros(lead, np.int32),
    }
    batch = {**rows(tasks, n), "target": rows(4), "begin": np.full(tasks, 0.7, np.float32)}
    aware = own.nnx.split(bx.nn.WeightNet(3 + tasks, own.AWARE, rngs=rngs))[1]
    upper = {"tasks": jnp.zeros(tasks), "net": aware}
    moved = jax.tree.map(lambda a: a + np.float32(0.2 * rng.normal(size=a.shape)), upper)
    moved["tasks"] = jnp.arange(tasks) / 4.0

    @jax.jit
    def found(batch, upper, moved):
        net, memory = own.learner(jax.random.key(0)), own.fresh_memory()

        def by(upper, net):
            logp = own.task_logp(net, batch)
            losses = own.losses_of(logp, batch)
            return losses, own.weights(upper, logp, losses, memory, batch["begin"])

        numbers = by(moved, net)[1]
        hand = lambda net: (
            own.target_loss(net, batch["target"]) + jnp.mean(numbers * by(upper, net)[0])
        )
        got = jax.grad(lambda net: own.weighted_loss(net, moved, batch, memory)[0])(net)
        alone = by({"tasks": moved["tasks"]}, net)[1]
        return got, jax.grad(hand)(net), by(upper, net)[1], numbers, alone

    got, want, first, numbers, alone = found(batch, upper, moved)
    np.testing.assert_allclose(first, 0.7, rtol=1e-6)
    np.testing.assert_allclose(alone[:, 0].mean(), 0.7, rtol=1e-6)
    assert numbers.std() > 0.1
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_crops_are_of_one_place_and_from_the_labelled_part(load):
    """Each place is given its number; what is cut from features at two sizes and from the mask has
    the same numbers, and none from outside the middle."""
    prompts = load("prompts")
    half, size = 64, prompts.CROP
    number = jnp.arange(half * half, dtype=jnp.float32).reshape(1, half, half)
    images = {
        "y": jnp.concatenate([number, -number]),
        "fine": jnp.concatenate([number, -number])[..., None],
        "coarse": jnp.concatenate([number, -number])[:, ::2, ::2, None],
    }
    cut = jax.jit(prompts.crops)
    for extent in (half, size + 8):
        out = cut(images, jnp.array([0]), extent, jax.random.key(1))
        np.testing.assert_array_equal(out["fine"][..., 0], out["y"])
        np.testing.assert_array_equal(out["coarse"][..., 0], out["y"][:, ::2, ::2])
        rows = np.asarray(out["y"]) // half
        low = (half - extent) // 2
        assert rows.min() >= low and rows.max() < half - low
        assert len(np.unique(rows[:, 0, 0])) > 1


def test_overlap_of_what_is_drawn(load, monkeypatch):
    """Two of three places right, one too much: Dice 4/6, intersection over union 2/4; means over
    images, of which the other is empty."""
    prompts = load("prompts")
    said = jnp.array([[1.0, 1.0], [1.0, -1.0]]), jnp.full((2, 2), -1.0)
    mask = jnp.array([[1.0, 1.0], [0.0, 1.0]]), jnp.ones((2, 2))
    part = {"said": jnp.stack(said), "y": jnp.stack(mask)}
    monkeypatch.setattr(prompts, "logits", lambda weights, prompt, part: part["said"])
    dice, union = prompts.overlap(None, None, part)
    np.testing.assert_allclose((dice, union), (4 / 6 / 2, 2 / 4 / 2), rtol=1e-6)


def test_a_convolution_by_one_product(load):
    prompts = load("prompts")
    keys = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(keys[0], (2, 6, 5, 3)), jax.random.normal(keys[1], (3, 3, 3, 4))
    expected = lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(prompts.conv(x, w), expected, atol=1e-5)


@pytest.mark.turns
def test_pairs_by_an_assignment(load):
    """The loss's hypergradient is the change of the assignment under dearer wrong pairs, through
    the similarities; nothing where the right pairs win by the margin."""
    matching = load("matching")
    x = jax.random.normal(jax.random.key(0), (2, 5, 8, 8, 2))
    w = jax.random.normal(jax.random.key(1), (3, 3, 2, 4))
    want = lax.conv_general_dilated(
        x[0], w, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(matching.convolved(x[0], w, 2), want, atol=1e-4)
    params = matching.network(jax.random.key(2))
    params = {name: params[name] for name in ("convolutions", "projection")}
    views, amount = (x[0, ..., :1], x[1, ..., :1]), 0.2
    found = matching.similarities(params, views)
    costs = amount * np.eye(5) - np.asarray(found)
    first = matching.assigned(costs)
    change = matching.assigned(costs + amount * (1 - np.eye(5))) - first
    assert np.abs(change).sum() > 0
    slope = lambda p: -jnp.sum(change * matching.similarities(p, views)) / amount / 5
    cost, loss = matching.levels(0.0, 1.0, amount)
    gradient = lambda views, margin: bx.value_and_hypergrad(
        matching.levels(0.0, 1.0, margin)[0],
        loss,
        solver=bx.inner.black_box(matching.assigned, host=True),
        hypergradient=bx.hypergradient.black_box(matching.assigned, 5 * amount, host=True),
    )(jnp.zeros((5, 5)), params, views, views)
    out = gradient(views, amount)
    assert float(out.value) == 1 - np.trace(first) / 5
    for got, want in zip(
        jax.tree.leaves(out.grad), jax.tree.leaves(jax.grad(slope)(params)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)
    right = gradient((views[0], views[0]), 0.0)
    assert float(right.value) == 0 and not any(map(np.any, jax.tree.leaves(right.grad)))


def test_evolution_changes_one_operation_and_finds_the_better(load):
    """Children differ in one edge from one of the last five; the best ever seen is returned."""
    darts = load("darts")
    seen = []

    def evaluate(cell, number):
        assert number == len(seen)
        seen.append(cell)
        return sum(o == darts.CONVOLUTION for o in cell)

    best = darts.evolution(evaluate, 60, np.random.default_rng(0))
    worth = [sum(o == darts.CONVOLUTION for o in cell) for cell in seen]
    assert len(seen) == 60 and best == seen[int(np.argmax(worth))] and max(worth) >= 5
    for place in range(darts.POPULATION, 60):
        alive = seen[place - darts.POPULATION : place]
        assert 1 in [sum(a != b for a, b in zip(seen[place], c, strict=True)) for c in alive]


def test_merging_by_what_accuracy_sees(load):
    """Ten times as large logits change neither the entropy without its scale nor, where the best
    temperature is within the grid, the loss; the plain ones they do. The temperature is the best of
    those by hand; the search of accuracy finds a maximum along each coefficient."""
    merging, rng = load("merging"), np.random.default_rng(0)
    body = [{"w": jnp.eye(10), "b": jnp.zeros(10)}]
    head, x = jnp.float32(rng.normal(size=(10, 10))), jnp.float32(rng.uniform(size=(40, 10)))
    batch = {"x": x, "y": jnp.argmax(x @ head + rng.normal(size=(40, 10)), 1)}
    for objective, same in (
        (merging.entropy, False),
        (merging.entropy_unscaled, True),
        (merging.loss, False),
    ):
        values = [float(objective(body, by * head, batch)) for by in (1.0, 10.0)]
        assert np.isclose(*values, rtol=1e-5) == same, objective
    values = [float(merging.loss(body, t * head, batch)) for t in merging.TEMPERATURES]
    at_best = float(merging.loss_at_best_temperature(body, head, batch))
    np.testing.assert_allclose(at_best, min(values), rtol=1e-6)
    twice = float(merging.loss_at_best_temperature(body, 2 * head, batch))
    assert np.argmin(values) in (1, 2, 3), values
    np.testing.assert_allclose(twice, at_best, rtol=1e-6)
    goal = np.round(rng.uniform(0, 0.4, (len(merging.TASKS), merging.LAYERS)) / 0.05) * 0.05
    found = merging.searched(lambda tried: -np.abs(tried - goal).sum((1, 2)), 0.2)
    np.testing.assert_allclose(found, goal, atol=1e-6)


def test_first_order_maml_is_the_gradient_where_a_task_has_come_to(load):
    """After five steps of its own rate, by a loop."""
    omniglot = load("omniglot", "..")
    images = np.random.default_rng(0).integers(0, 255, (8, 20, 14, 14)).astype(np.uint8)
    draw = omniglot.sampler(images, ways=5, shots=1, queries=2, tasks=omniglot.TASKS)
    form, tasks = omniglot.FORMS["first-order MAML"], draw(jax.random.key(0), 0)
    start = omniglot.network(jax.random.key(1), ways=5, width=3, layers=1)

    def one(task):
        w = start
        for _ in range(omniglot.FIRST):
            grads = jax.grad(omniglot.fit)(w, None, task["support"])
            w = jax.tree.map(lambda a, g: a - omniglot.FIRST_RATE * g, w, grads)
        return jax.grad(lambda w: omniglot.query(w, None, task["query"])[0])(w)

    want = jax.tree.map(lambda g: g.mean(0), jax.jit(jax.vmap(one))(tasks))
    found = jax.jit(omniglot.estimate(form))(start, tasks).grad
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, want)
