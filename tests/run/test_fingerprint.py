"""A checkpoint is of one problem, and a folder of one writer."""

import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax.run import fingerprint, lock
from tests.run import checkpoint_problem

METHOD = bx.hypergradient.implicit()
DATA = {"x": np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(6, 2)}


def inner(y, x, batch):
    return 0.5 * jnp.sum((y - x) ** 2)


def outer_to(target):
    return lambda y, x, batch: (
        0.5 * jnp.sum((y - target) ** 2)
        + (0.0 if batch is None else jnp.mean(batch["x"]).astype(y.dtype) ** 2)
    )


def algorithm(rate=0.3, inner_rate=0.5, method=METHOD, make=lambda rate: optax.sgd(rate)):
    return bx.algorithms.double_loop(bx.inner.optax(optax.sgd(inner_rate), 20), method, make(rate))


def tuned(rate):
    return bx.tunable(optax.sgd, learning_rate=rate)


GIVEN = dict(
    inner=inner, outer=outer_to(3.0), start=1.0, algorithm=algorithm(), key=None, kind=None,
    project=None, outer_data=None, keep="best", metrics=None,
    num_steps=20,
)  # fmt: skip


def solve(folder, resume="refuse", **changes):
    given = {**GIVEN, **changes}
    start = jnp.full(2, given["start"])
    return bx.solve_bilevel(
        given["inner"], given["outer"], jnp.zeros(2), start, algorithm=given["algorithm"],
        num_steps=given["num_steps"], keep=given["keep"],
        key=None if given["key"] is None else jax.random.key(given["key"], impl=given["kind"]),
        project=given["project"], outer_data=given["outer_data"],
        metrics=given["metrics"], checkpoint=bx.checkpoint.every(10, folder, resume=resume),
    )  # fmt: skip


OTHERS = {
    "the outer objective's constant": (dict(outer=outer_to(-7.0)), "outer_objective"),
    "the outer objective's array": (
        dict(outer=outer_to(np.asarray([3.0, 2.0]))),
        "outer_objective",
    ),
    "the inner objective": (dict(inner=lambda y, x, b: jnp.sum((y - x) ** 2)), "inner_objective"),
    "the outer step size": (dict(algorithm=algorithm(rate=1e-6)), "algorithm"),
    "the inner step size": (dict(algorithm=algorithm(inner_rate=0.4)), "algorithm"),
    "the method's setting": (
        dict(algorithm=algorithm(method=bx.hypergradient.implicit(damping=0.1))),
        "algorithm",
    ),
    "the start": (dict(start=100.0), "start"),
    "the key": (dict(key=1), "key"),
    "the projection": (dict(project=lambda x: jnp.clip(x, 0.0, 2.0)), "project"),
}


@pytest.mark.turns
@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_problem_is_refused_by_name(what, tmp_path):
    changes, part = OTHERS[what]
    solve(tmp_path, num_steps=10)
    with pytest.raises(
        ValueError, match=rf"step_000000010 belongs to another problem.*What differs:.* ?{part}"
    ):
        solve(tmp_path, **changes)
    assert solve(tmp_path).stats["resumed_from"] == 10  # and still there for its own


@pytest.mark.turns
def test_a_key_of_another_kind_is_named_and_not_what_draws_by_it(tmp_path):
    """`rbg` and `unsafe_rbg` have keys of the same bits, of which other numbers come."""
    draws = dict(
        inner=bx.objective(
            lambda y, x, b, key: jnp.sum((y - x) ** 2) + 0.0 * jax.random.normal(key), keyed=True
        )
    )
    solve(tmp_path, num_steps=10, key=0, kind="unsafe_rbg", **draws)
    what = r"What differs: key \(there unsafe_rbg \w{8}, here rbg \w{8}\)\. Give"
    with pytest.raises(ValueError, match=what):
        solve(tmp_path, key=0, kind="rbg", **draws)


@pytest.mark.turns
def test_a_number_that_is_a_leaf_and_data_that_is_held_are_told_too(tmp_path):
    here = dict(algorithm=algorithm(make=tuned), outer_data=DATA)
    solve(tmp_path, num_steps=10, **here)
    with pytest.raises(ValueError, match=r"What differs: numbers of the algorithm"):
        solve(tmp_path, **{**here, "algorithm": algorithm(rate=0.2, make=tuned)})
    other = {"x": DATA["x"] + np.float32(1e-6)}
    with pytest.raises(ValueError, match=r"What differs: outer_data\."):
        solve(tmp_path, **{**here, "outer_data": other})
    assert solve(tmp_path, **here).stats["resumed_from"] == 10


@pytest.mark.turns
def test_what_may_change(tmp_path):
    """How a run is watched, kept and laid out is no part of its problem, nor is who built its
    pieces."""
    solve(tmp_path, num_steps=10)
    rebuilt = dict(
        algorithm=algorithm(),
        inner=lambda y, x, b: 0.5 * jnp.sum((y - x) ** 2),
        outer=outer_to(3.0),
    )
    assert solve(tmp_path, num_steps=20, keep="last", **rebuilt).stats["resumed_from"] == 10
    measured = bx.metrics(lambda y, x, d: {"m": jnp.sum(y)}, select="m")
    out = solve(tmp_path, num_steps=30, metrics=measured)
    assert out.stats["resumed_from"] == 20 and out.stats["best_step"] >= 20


@pytest.mark.turns
def test_iterates_that_were_kept_by_another_score_are_forgotten(tmp_path):
    """The distance to 1, where the run starts, is never smaller again; that to 3 is at the end."""
    by = lambda target, **keywords: bx.metrics(
        lambda y, x, d: {"far": jnp.sum((x - target) ** 2)}, select="far", **keywords
    )
    assert solve(tmp_path, metrics=by(1.0)).stats["best_step"] == 0
    assert solve(tmp_path, num_steps=30, metrics=by(1.0, every=2)).stats["best_step"] == 0
    with pytest.warns(RuntimeWarning, match="kept its iterate by another score"):
        out = solve(tmp_path, num_steps=40, metrics=by(3.0))
    assert out.stats["best_step"] >= 30 and jnp.allclose(out.outer_params, 3.0, atol=1e-3)


def test_a_run_goes_on_from_the_parameters_of_another(tmp_path):
    first = solve(tmp_path, num_steps=10)
    out = solve(tmp_path, resume="continue", outer=outer_to(-7.0), num_steps=40)
    assert out.stats["resumed_from"] == 10 and len(out.history["value"]) == 40
    told = out.stats["continued"]
    assert (
        told["differs"] == ["outer_objective"]
        and ".best" in told["begun anew"]
        and ".algorithm.inner.params" in told["taken"]
    )
    alone = bx.solve_bilevel(
        inner,
        outer_to(-7.0),
        first.state.algorithm.inner.params,
        first.state.algorithm.outer,
        algorithm=algorithm(),
        num_steps=30,
    )
    np.testing.assert_allclose(out.outer_params, alone.outer_params, atol=1e-5)
    assert np.allclose(out.outer_params, -7.0, atol=1e-2)
    assert (
        "continued"
        not in solve(tmp_path, resume="continue", outer=outer_to(-7.0), num_steps=50).stats
    )  # now it is that problem's


def test_another_optimizer_begins_anew(tmp_path):
    solve(tmp_path, num_steps=10)
    adam = algorithm(make=lambda rate: optax.adam(0.1))
    with pytest.raises(ValueError, match=r"Differing paths: \.algorithm\.outer_opt"):
        solve(tmp_path, algorithm=adam)
    told = solve(tmp_path, algorithm=adam, resume="continue").stats["continued"]
    assert ".algorithm.outer_opt" in told["begun anew"] and ".algorithm.outer" in told["taken"]


def test_other_shapes_have_nothing_to_go_on_from(tmp_path):
    solve(tmp_path, num_steps=10)
    with pytest.raises(
        ValueError, match=r"the parameters .*\.algorithm\.outer.* nothing to go on from"
    ):
        bx.solve_bilevel(
            inner,
            outer_to(3.0),
            jnp.zeros(3),
            jnp.ones(3),
            algorithm=algorithm(),
            checkpoint=bx.checkpoint.every(10, tmp_path, resume="continue"),
        )


def test_levels_are_told_apart(tmp_path):
    def run(weight, n):
        levels = [
            bx.Level(
                "y",
                lambda p, b: jnp.sum((p["y"] - weight * p["x"]) ** 2),
                solver=bx.inner.optax(optax.sgd(0.3), 2),
                hypergradient=METHOD,
            ),
            bx.Level("x", lambda p, b: jnp.sum((p["y"] - 1.0) ** 2), solver=optax.sgd(0.1)),
        ]
        start = {"y": jnp.zeros(2), "x": jnp.zeros(2)}
        return bx.solve_multilevel(
            levels, start, num_steps=n, checkpoint=bx.checkpoint.every(10, tmp_path)
        )

    run(1.0, 10)
    assert run(1.0, 20).stats["resumed_from"] == 10
    with pytest.raises(ValueError, match="What differs: objective of level 'y'"):
        run(2.0, 30)


def altered(folder, step, change):
    """Rewrite a checkpoint's manifest as another version of the library would have."""
    import hashlib

    path = folder / f"step_{step:09d}" / "_CHECKPOINT_METADATA"
    whole = json.loads(path.read_text())
    manifest = json.loads(whole["custom_metadata"]["manifest"])
    change(manifest)
    text = json.dumps(manifest)
    whole["custom_metadata"] = {
        "manifest": text,
        "digest": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
    }
    path.write_text(json.dumps(whole))
    (path.parent / "bilevax_files.json").unlink(missing_ok=True)


def test_checkpoints_of_other_versions(tmp_path):
    solve(tmp_path, num_steps=10)
    altered(tmp_path, 10, lambda m: m["fingerprint"]["versions"].update(jax="0.0.1"))
    with pytest.warns(RuntimeWarning, match="written by other versions .*0.0.1"):
        assert solve(tmp_path, num_steps=20, outer=outer_to(3.5)).stats["resumed_from"] == 10
    altered(tmp_path, 20, lambda m: m["fingerprint"]["versions"].update(jax="0.0.1"))
    with (
        pytest.raises(ValueError, match="What differs: start"),
        pytest.warns(RuntimeWarning, match="other versions"),
    ):
        solve(tmp_path, outer=outer_to(3.5), start=2.0)
    altered(tmp_path, 20, lambda m: (m.pop("fingerprint"), m.update(format=1)))
    with pytest.warns(RuntimeWarning, match="kept no fingerprint"):
        assert solve(tmp_path, num_steps=30).stats["resumed_from"] == 20
    altered(tmp_path, 30, lambda m: m.update(format=4))
    with pytest.raises(ValueError, match="written by a later version of bilevax, in format 4"):
        solve(tmp_path)


@pytest.mark.turns
def test_another_process_finds_the_same_digests():
    """Nothing of a process is in them: no addresses, no order of a set, no counter of
    compilations."""
    code = (
        "import jax; jax.config.update('jax_enable_x64', True); from tests.run.test_fingerprint "
        "import digests; import json; print(json.dumps(digests()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5", "XLA_FLAGS": ""}
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=True,
    )
    jnp.sin(jnp.ones(7)).block_until_ready()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert json.loads(out.stdout) == digests()


def digests():
    network = lambda y, x, b: (
        jnp.sum(jax.nn.gelu(jax.jit(lambda a: a @ jnp.ones((2, 3)))(y)) ** 2)
        + jax.nn.logsumexp(x) * jnp.sum(y)
    )
    scanned = lambda y: jax.lax.scan(lambda c, a: (c + a, c), y, jnp.arange(3, dtype=jnp.float32))[
        0
    ]
    return [
        fingerprint.of_function(network, jnp.ones(2), jnp.ones(2), None),
        fingerprint.of_function(jax.grad(lambda y: jnp.sum(scanned(y) ** 2)), jnp.float32(1.0)),
        fingerprint.of_values(checkpoint_problem.TRAIN),
        fingerprint.of_settings(checkpoint_problem.ALGORITHM),
    ]


# ---- one writer


HOLD = """
import sys, time
from bilevax.run.lock import Lock
held = Lock(sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
"""


def test_a_second_writer_is_refused_and_a_dead_ones_lock_taken(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            RuntimeError,
            match=(
                rf"is written to by process {holder.pid} on .*expected one that no other run "
                rf"writes to"
            ),
        ) as caught:
            solve(tmp_path)
        assert caught.value.solution.stats["steps"] == 0
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    assert solve(tmp_path).stats["steps"] == 20  # without a word: it died here
    assert not (tmp_path / lock.NAME).exists()


def test_a_writer_elsewhere_counts_for_a_minute(tmp_path):
    place = tmp_path / lock.NAME
    place.write_text(json.dumps({"host": "another", "pid": 7, "token": "x"}))
    with pytest.raises(RuntimeError, match="written to by process 7 on 'another'"):
        lock.Lock(tmp_path)
    old = time.time() - lock.STALE - 5
    os.utime(place, (old, old))
    with pytest.warns(
        RuntimeWarning, match="process 7 on 'another' has not written .* counts as gone"
    ):
        mine = lock.Lock(tmp_path)
    mine.check()
    place.write_text(json.dumps({"host": "another", "pid": 7, "token": "y"}))
    with pytest.raises(RuntimeError, match="taken over by process 7 on 'another'"):
        mine.check()
    mine.release()
    assert place.exists()  # it is the other's now


def test_a_writer_that_lost_its_lock_stops_before_it_writes(tmp_path):
    def take(event):
        if event.step == 20:
            (tmp_path / lock.NAME).write_text(
                json.dumps({"host": "another", "pid": 7, "token": "y"})
            )

    with pytest.raises(RuntimeError, match="taken over by process 7") as caught:
        bx.solve_bilevel(
            inner, outer_to(3.0), jnp.zeros(2), jnp.ones(2), algorithm=algorithm(), num_steps=40,
            checkpoint=bx.checkpoint.every(10, tmp_path), callbacks=[bx.callbacks.every(10, take)],
        )  # fmt: skip
    assert caught.value.solution.stats["steps"] == 20
    assert [p.name for p in sorted(tmp_path.glob("step*"))] == ["step_000000010"]


def test_a_process_number_that_was_given_again(tmp_path):
    """A lock of this very process number, but of one that began at another time, is a dead
    one's."""
    mine = lock.Lock(tmp_path)
    place = tmp_path / lock.NAME
    place.write_text(json.dumps({**mine.me, "began": "1"}))
    lock.Lock(tmp_path).release()
    assert not place.exists()
