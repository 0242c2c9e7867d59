"""Nothing that is finished is lost: signals, full disks, folders that vanish, errors of whoever
watches."""

import contextlib
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import bilevax as bx
from bilevax import RESULTS
from bilevax.run import store

ROOT = pathlib.Path(__file__).parent.parent.parent
SOLVER = bx.inner.optax(optax.sgd(0.5), 2)
ALGORITHM = bx.algorithms.double_loop(SOLVER, bx.hypergradient.implicit(), optax.sgd(0.01))


def inner(y, x, batch):
    return 0.5 * jnp.sum((y - x) ** 2)


def outer(y, x, batch):
    return 0.5 * jnp.sum((y - 3.0) ** 2)


def run(steps, start=None, **keywords):
    start = jnp.ones(2) if start is None else start
    keywords = {"algorithm": ALGORITHM, **keywords}
    return bx.solve_bilevel(inner, outer, start, start, num_steps=steps, **keywords)


def raise_at(step, error):
    def fn(event):
        if event.step >= step:
            raise error

    return bx.callbacks.every(step, fn)


def send(number, step, times=1):
    def fn(event):
        if event.step == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return bx.callbacks.every(step, fn)


# ---- signals


def test_an_interrupt_ends_the_chunk_saves_and_keeps_all(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    saved = bx.checkpoint.every(1000, tmp_path)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(90, checkpoint=saved, callbacks=[send(signal.SIGINT, 40)])
    solution = caught.value.solution
    assert (
        solution.result is RESULTS.interrupted
        and solution.stats["steps"] == len(solution.history["value"]) == 40
    )
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000040"]
    assert signal.getsignal(signal.SIGINT) is before
    rest, whole = run(90, checkpoint=saved), run(90)
    assert rest.stats["resumed_from"] == 40 and np.array_equal(
        rest.outer_params, whole.outer_params
    )
    again = run(50, state=solution.state)
    assert np.array_equal(again.outer_params, whole.outer_params)


def test_an_interrupt_without_throw_is_a_result():
    out = run(90, throw=False, callbacks=[send(signal.SIGINT, 40)])
    assert out.result is RESULTS.interrupted and not out.result.failed and out.stats["steps"] == 40


def test_a_second_interrupt_raises_at_once():
    seen = []

    def twice(event):
        seen.append(event.step)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        seen.append("not reached")

    with pytest.raises(KeyboardInterrupt) as caught:
        run(90, callbacks=[bx.callbacks.every(40, twice)])
    assert seen == [40] and caught.value.solution.stats["steps"] == 40


def test_a_signal_at_the_very_end_is_heard_too(tmp_path):
    """Where nothing is left to cut short: whoever makes many runs must not go on with the next."""
    with pytest.raises(KeyboardInterrupt) as caught:
        run(40, callbacks=[send(signal.SIGINT, 40)])
    assert caught.value.solution.result is RESULTS.success
    assert caught.value.solution.stats["steps"] == 40
    out = run(40, throw=False, callbacks=[send(signal.SIGINT, 40)])
    assert out.result is RESULTS.interrupted and out.stats["steps"] == 40
    saved = bx.checkpoint.every(100, tmp_path)
    out = run(40, checkpoint=saved, callbacks=[send(signal.SIGTERM, 40)])
    assert out.result is RESULTS.preempted and out.stats["steps"] == 40
    assert run(40, checkpoint=saved).result is RESULTS.success

    closing = bx.callbacks.Callback(
        lambda event: None, 40, close=lambda: os.kill(os.getpid(), signal.SIGINT)
    )
    with pytest.raises(KeyboardInterrupt) as caught:
        run(40, callbacks=[closing])
    assert caught.value.solution.stats["steps"] == 40


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_handler_of_somebody_else_is_called_after_ours(number, tmp_path):
    heard = []
    before = signal.signal(number, lambda *_: heard.append(number))
    try:
        out = run(
            90,
            throw=False,
            checkpoint=bx.checkpoint.every(1000, tmp_path),
            callbacks=[send(number, 40)],
        )
        assert heard == [number] and out.stats["steps"] == 40
        os.kill(os.getpid(), number)
        assert heard == [number] * 2  # it is back
        signal.signal(number, signal.SIG_IGN)
        assert (
            run(
                90,
                throw=False,
                checkpoint=bx.checkpoint.every(1000, tmp_path / "b"),
                callbacks=[send(number, 40)],
            ).stats["steps"]
            == 90
        )
    finally:
        signal.signal(number, before)


def test_a_run_in_a_thread_sets_no_handler():
    before, found = signal.getsignal(signal.SIGINT), []
    look = bx.callbacks.every(
        3, lambda event: found.append(signal.getsignal(signal.SIGINT) is before)
    )
    thread = threading.Thread(target=lambda: run(6, callbacks=[look]))
    thread.start()
    thread.join()
    assert found == [True, True]


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(0.001, marks=pytest.mark.slow), 0.1, pytest.param(5.0, marks=pytest.mark.slow)],
)
def test_a_signal_is_heard_within_seconds(seconds, tmp_path):
    """However long a step takes, and however rarely the run is saved."""

    def slow(grads, state, params=None):
        def wait(g):
            if not begun:  # compiled
                begun.append(threading.Timer(2.0 + 2 * seconds, interrupt))
                begun[0].start()
            time.sleep(seconds)
            return np.asarray(g)

        return jax.tree.map(
            lambda g: jax.pure_callback(wait, g, -0.01 * g, vmap_method="sequential"), grads
        ), state

    algorithm = bx.algorithms.double_loop(
        SOLVER, bx.hypergradient.implicit(), optax.GradientTransformation(lambda p: (), slow)
    )
    sent, begun = [], []

    def interrupt():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    out = run(10**6, algorithm=algorithm, checkpoint=bx.checkpoint.every(10**6, tmp_path))
    assert time.monotonic() - sent[0] < 10
    assert out.result is RESULTS.preempted and 0 < out.stats["steps"] == len(out.history["value"])
    assert [p.name for p in tmp_path.iterdir()] == [f"step_{out.stats['steps']:09d}"]


@pytest.mark.slow
def test_an_interrupt_while_it_compiles():
    """Is heard when that is done, after one step."""
    sent = []

    def interrupting(y, x, batch):
        if signal.getsignal(signal.SIGINT) is not before and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return inner(y, x, batch)

    before = signal.getsignal(signal.SIGINT)
    start = jnp.ones(2)
    with pytest.raises(KeyboardInterrupt) as caught:
        bx.solve_bilevel(interrupting, outer, start, start, algorithm=ALGORITHM, num_steps=10**6)
    assert sent and caught.value.solution.stats["steps"] == 1


CELL = """
import jax.numpy as jnp, optax, bilevax as bx
inner = lambda y, x, b: 0.5 * jnp.sum((y - x) ** 2)
outer = lambda y, x, b: 0.5 * jnp.sum((y - 3.0) ** 2)
algorithm = bx.algorithms.double_loop(bx.inner.optax(optax.sgd(0.5), 2), bx.hypergradient.implicit(), optax.sgd(1e-6))
go = lambda n, **k: bx.solve_bilevel(inner, outer, jnp.zeros(2), jnp.ones(2), algorithm=algorithm, num_steps=n, **k)
say = bx.callbacks.every(256, lambda event: print("step", flush=True) if event.step == 256 else None)
try:
    go(10**9, callbacks=[say])
except KeyboardInterrupt as error:
    print("kept", error.solution.stats["steps"] == len(error.solution.history["value"]) > 0)
"""


def test_the_stop_button_of_a_notebook():
    manager = pytest.importorskip("jupyter_client").manager
    pytest.importorskip("ipykernel")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    kernel = manager.KernelManager(kernel_name="python3")
    kernel.start_kernel(env=environment, cwd=str(ROOT))
    client = kernel.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        out = {"text": ""}

        def heard(message):
            out["text"] += message["content"].get("text", "")
            if message["content"].get("text", "").startswith("step"):
                kernel.interrupt_kernel()

        reply = client.execute_interactive(CELL, timeout=120, output_hook=heard)
        assert reply["content"]["status"] == "ok" and out["text"].split() == [
            "step",
            "kept",
            "True",
        ]
        after = client.execute_interactive(
            "import signal; print(signal.getsignal(signal.SIGINT).__name__)",
            timeout=30,
            output_hook=heard,
        )
        assert after["content"]["status"] == "ok" and "default_int_handler" in out["text"]
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


# ---- errors from outside


@pytest.mark.parametrize(
    "error", [ValueError("mine"), SystemExit(3), KeyboardInterrupt(), MemoryError()]
)
def test_any_error_of_a_callback_carries_the_run(error):
    with pytest.raises(type(error)) as caught:
        run(90, callbacks=[raise_at(40, error)])
    assert caught.value is error and caught.value.solution.stats["steps"] == 40
    assert np.array_equal(caught.value.solution.outer_params, run(40).outer_params)
    assert any(".solution" in note for note in caught.value.__notes__)


def test_an_error_in_closing_does_not_take_the_first_ones_place():
    closed = []

    def close(name):
        def fn():
            closed.append(name)
            raise OSError(f"closing {name}")

        return fn

    watchers = [bx.callbacks.Callback(lambda event: None, 10, close(name)) for name in "ab"]
    with pytest.raises(ValueError, match="mine") as caught:
        run(90, callbacks=[*watchers, raise_at(40, ValueError("mine"))])
    assert closed == ["a", "b"] and [
        f"OSError: closing {n}" in " ".join(caught.value.__notes__) for n in "ab"
    ] == [True, True]
    with pytest.raises(OSError, match="closing a") as caught:  # alone, it is an error all the same
        run(20, callbacks=watchers)
    assert (
        caught.value.solution.stats["steps"] == 20
        and caught.value.solution.result is RESULTS.success
    )


LIMITED = """
import resource, signal, sys, time, jax, jax.numpy as jnp, optax, bilevax as bx
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
inner = lambda y, x, b: 0.5 * jnp.sum((y - x) ** 2)
outer = lambda y, x, b: 0.5 * jnp.sum((y - 3.0) ** 2)
alg = bx.algorithms.double_loop(bx.inner.optax(optax.sgd(0.5), 2), bx.hypergradient.implicit(), optax.sgd(0.3))
start = jax.random.normal(jax.random.key(0), (20000,))
full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
def before_the_last(event):  # the save before is whole by then
    if full_at == 40 and event.step == 30:
        time.sleep(2.0)
        full()
for full_at in (40, 10):
    if full_at == 10:
        full()
    keywords = dict(algorithm=alg, checkpoint=bx.checkpoint.every(10, f"{sys.argv[1]}/{full_at}"), callbacks=[bx.callbacks.every(10, before_the_last)])
    try:
        bx.solve_bilevel(inner, outer, start, start, num_steps=40, **keywords)
        print("no error")
    except Exception as error:
        print(error.solution.stats["steps"], error.solution.result.name, "File too large" in str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    print(bx.solve_bilevel(inner, outer, start, start, num_steps=40, **{**keywords, "callbacks": ()}).stats["resumed_from"])
"""


@pytest.mark.turns
def test_a_full_disk(tmp_path):
    """At the last save, and at the first: what was saved before is sound, and the run is in the
    error."""
    command = [sys.executable, "-W", "ignore", "-c", LIMITED, str(tmp_path)]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": ""}
    out = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment
    )
    at_last, then, at_first, anew = out.stdout.split("\n")[:4]
    assert at_last == "40 success True" and int(then) in (20, 30), out.stderr[-3000:]
    assert at_first == "20 stopped True" and anew == "0", out.stderr[-3000:]


def test_half_a_lock_keeps_nobody_out(tmp_path, monkeypatch):
    """A disk that is full at the start."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", full)
        with pytest.raises(OSError, match=r"checkpoint: got the directory .*No space left"):
            run(4, checkpoint=bx.checkpoint.every(2, tmp_path))
    assert not list(tmp_path.iterdir())
    assert run(4, checkpoint=bx.checkpoint.every(2, tmp_path)).stats["steps"] == 4


def test_a_folder_that_cannot_be_opened_is_let_go(tmp_path, monkeypatch):
    """And may be tried again in the same process."""
    (tmp_path / "step_000000002.orbax-checkpoint-tmp").mkdir()

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(store.os.path, "islink", denied)
        with pytest.raises(PermissionError, match=r"checkpoint: got the directory .*written to"):
            run(4, checkpoint=bx.checkpoint.every(2, tmp_path))
    assert run(4, checkpoint=bx.checkpoint.every(2, tmp_path)).stats["steps"] == 4


def test_a_folder_that_vanishes(tmp_path):
    folder = tmp_path / "run"

    def vanish(event):
        if event.step == 40:
            folder.rename(tmp_path / "elsewhere")  # at once, while the save of this step is written
            folder.write_text("a file stands there now")

    with pytest.raises((OSError, ValueError)) as caught:
        run(
            90,
            checkpoint=bx.checkpoint.every(20, folder),
            callbacks=[bx.callbacks.every(20, vanish)],
        )
    assert "run" in str(caught.value)
    assert caught.value.solution.stats["steps"] >= 40
    moved = bx.checkpoint.every(20, tmp_path / "elsewhere")  # which the run has let go
    assert run(90, checkpoint=moved).stats["steps"] == 90


def test_a_writer_that_cannot_be_closed_lets_the_folder_go(tmp_path, monkeypatch):
    def broken(self):
        raise OSError("nothing is closed")

    checkpoint = bx.checkpoint.every(20, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(ocp.StandardCheckpointer, "close", broken)
        with pytest.raises(OSError, match="nothing is closed") as caught:
            run(40, checkpoint=checkpoint)
    assert caught.value.solution.stats["steps"] == 40
    assert run(60, checkpoint=checkpoint).stats["resumed_from"] == 40


def test_runs_in_threads_save_beside_each_other(tmp_path):
    whole, out = run(40), {}

    def one(i):
        out[i] = run(40, checkpoint=bx.checkpoint.every(4, tmp_path / str(i)))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [np.array_equal(out[i].outer_params, whole.outer_params) for i in range(3)] == [True] * 3


def test_a_log_on_a_full_disk(tmp_path):
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        run(90, callbacks=[bx.callbacks.jsonl(full), bx.callbacks.jsonl(tmp_path / "good.jsonl")])
    steps = caught.value.solution.stats["steps"]
    assert 0 < steps == len(caught.value.solution.history["value"])
    assert pathlib.Path("/dev/full").is_char_device()  # written to, and not replaced


@pytest.mark.parametrize("end", ["stop", "interrupt", "error before", "error after"])
def test_a_log_has_every_row_of_a_run_that_ends_early(end, tmp_path):
    log = bx.callbacks.jsonl(tmp_path / "log.jsonl")
    ends = {
        "stop": bx.callbacks.every(10, lambda event: event.step == 50),
        "interrupt": send(signal.SIGINT, 50),
        "error before": raise_at(50, ZeroDivisionError()), "error after": raise_at(50,
        ZeroDivisionError()),
    }  # fmt: skip
    with pytest.raises(ZeroDivisionError) if "error" in end else contextlib.nullcontext():
        run(
            90,
            throw=False,
            callbacks=[ends[end], log] if end == "error before" else [log, ends[end]],
        )
    rows = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == list(range(50))


# ---- what a checkpoint brings back


def go(folder, n, **keywords):
    return run(n, checkpoint=bx.checkpoint.every(10, folder, keep=1), **keywords)


@pytest.mark.parametrize("text", ["", '{"_META', "[1]", None])
def test_a_half_written_listing_condemns_nothing(text, tmp_path):
    go(tmp_path, 20)
    listing = tmp_path / "step_000000020" / "bilevax_files.json"
    if text is None:
        listing.rename(listing.with_name("bilevax_files.json.tmp"))
    else:
        listing.write_text(text)
    assert go(tmp_path, 30).stats["resumed_from"] == 20


def test_a_renamed_checkpoint_is_found(tmp_path):
    go(tmp_path, 20)
    (tmp_path / "step_000000020").rename(tmp_path / "step_20")
    assert go(tmp_path, 30).stats["resumed_from"] == 20


def test_links_are_not_followed(tmp_path):
    mine, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    go(elsewhere, 20)
    mine.mkdir()
    (mine / "step_000000020").symlink_to(elsewhere / "step_000000020")
    (mine / "x.orbax-checkpoint-tmp").symlink_to(elsewhere)
    assert (
        go(mine, 10).stats["resumed_from"] == 0
    )  # a link is no checkpoint of this run, and nothing behind it is deleted
    assert (elsewhere / "step_000000020" / "_METADATA").exists()


def test_fewer_steps_than_are_saved_are_refused(tmp_path):
    go(tmp_path, 20)
    with pytest.raises(
        ValueError, match=r"num_steps: got 5, fewer than the 20 steps that .* has of this run"
    ):
        go(tmp_path, 5)
    assert go(tmp_path, 20).stats["resumed_from"] == 20


def test_a_run_that_converged_goes_on_to_a_smaller_tolerance(tmp_path):
    saved, whole, rows = bx.checkpoint.every(100, tmp_path), run(90).history["value"], []
    for tol in (0.8, 0.8, 0.9, 0.6, None):
        out = run(90, tol=tol, checkpoint=saved)
        value = out.history["value"]  # of another program, whose rounding is its own
        np.testing.assert_allclose(value, whole[: len(value)], rtol=1e-12)
        assert out.result is (RESULTS.success if tol is None else RESULTS.converged)
        rows.append(len(out.history["value"]))
    assert rows[0] == rows[1] == rows[2] < rows[3] < rows[4] == 90
    apart = [len(run(90, tol=tol).history["value"]) for tol in (0.8, 0.6)]
    assert apart == [rows[0], rows[3]]


def test_metrics_may_begin_and_end(tmp_path, caplog):
    measure = lambda name: bx.metrics(lambda y, x, d: {name: jnp.sum(y)})
    aux = bx.objective(lambda y, x, b: (outer(y, x, b), {"a": y, "n": jnp.int32(3)}), has_aux=True)
    go(tmp_path, 10)
    odd = "it's ['m']"  # a name is any text
    out = go(tmp_path, 20, metrics=measure(odd))
    assert out.stats["columns"] == {"begun": [odd], "ended": []}
    assert np.isnan(out.history[odd][:10]).all() and np.isfinite(out.history[odd][10:]).all()
    out = go(tmp_path, 30, metrics=measure("k"))
    assert out.stats["columns"] == {"begun": ["k"], "ended": [odd]}
    assert f"columns ['k'] begin at row 20, and {[odd]} end there" in caplog.text
    assert np.isnan(out.history[odd][20:]).all() and np.isfinite(out.history[odd][10:20]).all()
    assert np.isnan(out.history["k"][:20]).all() and np.isfinite(out.history["k"][20:]).all()
    assert [len(column) for column in out.history.values()] == [30] * len(out.history)
    keywords = dict(
        algorithm=ALGORITHM, checkpoint=bx.checkpoint.every(10, tmp_path / "b", resume="continue")
    )
    for objective, n in ((outer, 10), (aux, 20)):
        out = bx.solve_bilevel(inner, objective, jnp.ones(2), jnp.ones(2), num_steps=n, **keywords)
    assert out.history["aux"]["a"].shape == (20, 2) and np.isnan(out.history["aux"]["n"][:10]).all()
    assert out.history["aux"]["n"][10:].tolist() == [3.0] * 10


@pytest.mark.turns
@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize(
    "kill", [64, pytest.param(31, marks=pytest.mark.slow), pytest.param(75, marks=pytest.mark.slow)]
)
def test_what_a_failure_goes_back_to_is_saved(policy, kill, tmp_path):
    """A run that was killed before, between and after its failures ends with the bits of the one
    that was not."""
    data = lambda key, step: jnp.where((step == 50) | (step == 70) | (step == 71), jnp.nan, 1.0)
    scaled = lambda y, x, b: outer(y, x, b) * b
    keywords = dict(
        outer_data=data,
        key=jax.random.key(0),
        algorithm=ALGORITHM,
        keep="last",
        on_failure=policy,
        throw=False,
    )

    def solve(n, **more):
        return bx.solve_bilevel(
            inner, scaled, jnp.zeros(2), jnp.ones(2), num_steps=n, **keywords, **more
        )

    whole = solve(120)
    with pytest.raises(ZeroDivisionError):
        solve(
            120,
            checkpoint=bx.checkpoint.every(15, tmp_path),
            callbacks=[raise_at(kill, ZeroDivisionError())],
        )
    again = solve(120, checkpoint=bx.checkpoint.every(15, tmp_path))
    assert (
        again.stats["failed_steps"] == whole.stats["failed_steps"] == 3
        and 0 < again.stats["resumed_from"] < 90
    )
    chex.assert_trees_all_equal(
        (whole.outer_params, whole.history), (again.outer_params, again.history)
    )
    # Another policy later: what the first one kept is passed over.
    other = solve(130, checkpoint=bx.checkpoint.every(15, tmp_path)) if policy == "skip" else None
    assert other is None or other.stats["resumed_from"] == 120
