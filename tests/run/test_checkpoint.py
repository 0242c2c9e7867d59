"""Checkpoints: the same bits after any interruption, damage noticed, foreign checkpoints
refused."""

import gc
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import RESULTS
from tests.run.checkpoint_problem import EVERY, STEPS, VALID, bits, solve

ROOT = pathlib.Path(__file__).parents[2]

# The reader abandons its other reads when one fails, and Python says so when it collects them.
abandoned = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def whole():
    return bits(solve())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a
    )


def every(folder, n=20, keep=3):
    return bx.checkpoint.every(n, folder, keep=keep)


def found(folder):
    return sorted(p.name for p in pathlib.Path(folder).iterdir())


@pytest.mark.turns
def test_a_run_in_pieces_is_the_run(whole, tmp_path):
    plain = solve(checkpoint=every(tmp_path / "plain"))
    assert same(bits(plain), whole) and plain.stats["resumed_from"] == 0
    for steps, begin in (
        (30, 0),
        (70, 30),
        (STEPS, 70),
        (STEPS, STEPS),
    ):  # the last call finds the run finished
        part = solve(steps, checkpoint=every(tmp_path / "pieces"))
        assert part.stats["resumed_from"] == begin and part.stats["steps"] == steps == len(
            part.history["value"]
        )
    assert same(bits(part), whole)
    assert found(tmp_path / "pieces") == ["step_000000120", "step_000000140", "step_000000150"]


def test_nothing_is_compiled_again_for_a_resumed_run(tmp_path):
    from bilevax.run.chunk import run_chunk

    solve(20, checkpoint=every(tmp_path))
    before = run_chunk._cache_size()
    solve(40, checkpoint=every(tmp_path))
    assert run_chunk._cache_size() == before


def test_iterables_resume_at_their_batch(tmp_path):
    def loader(seed=5):
        rng = np.random.default_rng(seed)
        while True:
            yield {
                "x": rng.standard_normal((8, 4)).astype(np.float32),
                "y": rng.standard_normal(8).astype(np.float32),
            }

    undisturbed = solve(50, inner_data=loader())
    solve(21, inner_data=loader(), checkpoint=every(tmp_path, 7))
    assert same(
        bits(solve(50, inner_data=loader(), checkpoint=every(tmp_path, 7))), bits(undisturbed)
    )
    with pytest.warns(RuntimeWarning, match="inner_data: gives other batches than when .* 50 "):
        solve(60, inner_data=loader(6), checkpoint=every(tmp_path, 7))  # shuffled without a seed


@pytest.mark.turns
def test_aux_keys_and_empty_leaves_come_back(tmp_path):
    aux = bx.objective(
        lambda y, x, b: (jnp.sum((y["w"] - 1.0) ** 2), {"a": [y["w"][0], (jnp.ones(2) * x,)]}),
        has_aux=True,
    )
    inner = lambda y, x, b: jnp.sum((y["w"] - x) ** 2) + jnp.sum(y["none"])
    start = {"w": jnp.zeros(3), "none": jnp.zeros((0, 2)), "key": jax.random.key(1), "n": 3}
    loop = bx.algorithms.double_loop(
        bx.inner.optax(optax.adam(0.1), 2), bx.hypergradient.one_step(), optax.adam(0.1)
    )
    run = lambda n, **keywords: bx.solve_bilevel(
        inner, aux, start, jnp.asarray(0.0), algorithm=loop, num_steps=n, **keywords
    )
    plain = run(9)
    run(4, checkpoint=every(tmp_path, 4))
    again = run(9, checkpoint=every(tmp_path, 4))
    for a, b in zip(
        *(
            jax.tree.leaves((s.history, s.state, s.outer_params, s.inner_params["w"]))
            for s in (plain, again)
        ),
        strict=True,
    ):
        assert np.array_equal(a, b)
    assert jax.tree.structure(plain.history) == jax.tree.structure(again.history)
    finished = run(9, checkpoint=every(tmp_path, 4)).history
    assert finished.keys() == plain.history.keys() and np.array_equal(
        finished["value"], plain.history["value"]
    )


def test_complex_data_and_states_come_back(tmp_path):
    def inner(y, x, b, model_state):
        return jnp.mean((b.real * y - x * b.imag) ** 2), {"turned": model_state["turned"] * 1j}

    def run(steps, **keywords):
        return bx.solve_bilevel(
            bx.objective(inner, stateful=True),
            lambda y, x, b: (y - 1.0) ** 2,
            jnp.zeros(()),
            jnp.zeros(()),
            inner_data=jnp.asarray([1 + 1j, 2 - 1j]),
            model_state={"turned": jnp.asarray(1 + 2j)},
            algorithm=bx.algorithms.double_loop(
                bx.inner.optax(optax.sgd(0.1), 1), bx.hypergradient.implicit(), optax.sgd(0.1)
            ),
            num_steps=steps,
            keep="last",
            **keywords,
        )

    run(3, checkpoint=every(tmp_path))
    resumed = run(7, checkpoint=every(tmp_path))
    assert resumed.stats["resumed_from"] == 3
    jax.tree.map(np.testing.assert_array_equal, resumed.state, run(7).state)


def test_multilevel_runs_are_saved_too(tmp_path):
    levels = [
        bx.Level(
            "y",
            lambda p, b: jnp.sum((p["y"] - p["x"]) ** 2),
            solver=optax.sgd(0.3),
            hypergradient=bx.hypergradient.one_step(),
        ),
        bx.Level("x", lambda p, b: jnp.sum((p["y"] - 1.0) ** 2), solver=optax.sgd(0.1)),
    ]
    start = {"y": jnp.zeros(2), "x": jnp.zeros(2)}
    plain = bx.solve_multilevel(levels, start, num_steps=12)
    bx.solve_multilevel(levels, start, num_steps=5, checkpoint=every(tmp_path, 5))
    again = bx.solve_multilevel(levels, start, num_steps=12, checkpoint=every(tmp_path, 5))
    assert again.stats["resumed_from"] == 5
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(plain.state), jax.tree.leaves(again.state), strict=True)
    )


# ---- other devices


@pytest.mark.turns
@pytest.mark.parametrize("devices", [4, 1])
def test_another_number_of_devices(whole, tmp_path, devices):
    """Saved on eight devices, gone on with on fewer: equal to rounding."""
    solve(60, sharding=bx.sharding.fsdp(min_size=1), checkpoint=every(tmp_path))
    fewer = bx.sharding.fsdp(jax.devices()[:devices], min_size=1)
    out = solve(STEPS, sharding=fewer, checkpoint=every(tmp_path))
    assert out.stats["resumed_from"] == 60
    assert len(out.state.algorithm.inner.params["w"].sharding.device_set) == devices
    assert np.allclose(out.history["value"], whole["historyvalue"], rtol=1e-4)
    assert np.allclose(out.outer_params, whole["outer"], rtol=1e-4)


# ---- interruptions


def test_sigterm_saves_and_stops(whole, tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def terminate(event):
        if event.step == 45:
            os.kill(os.getpid(), signal.SIGTERM)

    out = solve(checkpoint=every(tmp_path, 1000), callbacks=[bx.callbacks.every(15, terminate)])
    assert out.result is RESULTS.preempted and out.stats["steps"] == 45 and not out.result.failed
    assert signal.getsignal(signal.SIGTERM) is before
    rest = solve(checkpoint=every(tmp_path, 1000))
    assert rest.stats["resumed_from"] == 45 and same(bits(rest), whole)


def test_an_error_keeps_what_was_saved(whole, tmp_path):
    def broken(event):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        solve(checkpoint=every(tmp_path, 10), callbacks=[bx.callbacks.every(35, broken)])
    assert same(bits(solve(checkpoint=every(tmp_path, 10))), whole)


class Forks:
    """Processes that run the problem, forked from one that has imported everything."""

    def __init__(self, folder):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "JAX_ENABLE_X64": "1",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        }
        command = [sys.executable, "-W", "ignore", "-m", "tests.run.checkpoint_problem"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.folder = folder
        assert self.line() == "ready"

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def start(self, name: str) -> int:
        self.process.stdin.write(
            f"{self.folder / name} {self.folder / name}.npz {self.folder / name}.log\n"
        )
        self.process.stdin.flush()
        return int(self.line())

    def log(self, name: str) -> list[str]:
        path = self.folder / f"{name}.log"
        return path.read_text().split() if path.exists() else []

    def result(self, name: str) -> dict:
        with np.load(self.folder / f"{name}.npz") as file:
            return dict(file)


@pytest.mark.turns
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_at_random_moments(tmp_path, kills):
    """SIGKILL again and again while one run is going on; the end is that of an undisturbed one, to
    the bit."""
    forks, rng, done = Forks(tmp_path), random.Random(kills), 0
    try:
        begin = time.perf_counter()
        forks.start("undisturbed")
        assert forks.line() == "0"
        length = time.perf_counter() - begin
        name, last, rounds = "killed0", 0, 0
        while done < kills:
            pid = forks.start(name)
            # A moment anywhere in the run, with a random distance to a save, once it has something
            # to lose.
            target = min(last + rng.randrange(0, 3 * max(1, STEPS // kills), 1), STEPS - EVERY)
            limit = time.perf_counter() + 20 * length + 60
            while time.perf_counter() < limit and not any(
                int(s) >= target for s in forks.log(name)[-1:] if s != "begun"
            ):
                time.sleep(0.001)
            time.sleep(rng.random() * 0.06)
            os.kill(pid, signal.SIGKILL)
            status = forks.line()
            if status == "0":  # it was faster: another run
                assert same(ends(forks, name), ends(forks, "undisturbed"))
                rounds, last = rounds + 1, 0
                name = f"killed{rounds}"
                continue
            assert status == "-9"
            done += 1
            last = max([int(s) for s in forks.log(name) if s != "begun"], default=0)
        forks.start(name)
        assert forks.line() == "0"
        assert same(ends(forks, name), ends(forks, "undisturbed"))
        # Lost at most: the save in flight and the work since.
        assert int(forks.result(name)["resumed"]) >= last - 2 * EVERY
        assert not any("damaged" in entry for entry in found(tmp_path / name))
    finally:
        forks.process.kill()
        forks.process.wait()
        forks.process.stdin.close()
        forks.process.stdout.close()


def ends(forks, name):
    out = forks.result(name)
    del out["resumed"]
    return out


# ---- damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    solve(60, checkpoint=every(folder))
    return folder


def files(folder, kind):
    """The largest files first."""
    chosen = {
        "data": lambda p: p.parent.name == "d" and "ocdbt." not in str(p.parent.parent.name),
        "any": lambda p: True,
    }.get(kind, lambda p: p.name == kind)
    return sorted(
        (p for p in folder.rglob("*") if p.is_file() and chosen(p)), key=lambda p: -p.stat().st_size
    )


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def cut(path, part=0.5):
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def other_manifest(folder):
    path = folder / "_CHECKPOINT_METADATA"
    text = path.read_text()
    assert '\\"start\\": 0' in text
    path.write_text(text.replace('\\"start\\": 0', '\\"start\\": 1'))


DAMAGE = {
    "data cut off": lambda f: cut(files(f, "data")[0]),
    "data emptied": lambda f: cut(files(f, "data")[0], 0),
    "data zeroed": lambda f: zeros(files(f, "data")[0]),
    "data removed": lambda f: files(f, "data")[0].unlink(),
    "a bit of the data flipped": lambda f: flip(files(f, "data")[0], 0.3),
    "index removed": lambda f: (f / "manifest.ocdbt").unlink(),
    "index cut off": lambda f: cut(f / "manifest.ocdbt"),
    "structure removed": lambda f: (f / "_METADATA").unlink(),
    "structure zeroed": lambda f: zeros(f / "_METADATA"),
    "manifest removed": lambda f: (f / "_CHECKPOINT_METADATA").unlink(),
    "manifest cut off": lambda f: cut(f / "_CHECKPOINT_METADATA"),
    "manifest altered": other_manifest,
    "a side file removed": lambda f: (f / "_sharding").unlink(),
    "all files removed": lambda f: [p.unlink() for p in files(f, "any")],
    "half of the files removed": lambda f: [
        p.unlink() for p in files(f, "any")[::2] if p.name != "bilevax_files.json"
    ],
}


def reported(folder, **keywords):
    """The solution, and what was said of damage. Other warnings are the reader's own, of what it
    leaves behind when it fails."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = solve(checkpoint=every(folder), **keywords)
        gc.collect()
    return out, [str(w.message) for w in seen if "is damaged" in str(w.message)]


@pytest.mark.turns
@abandoned
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed_and_the_one_before_used(saved, whole, tmp_path, kind):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    DAMAGE[kind](folder / "step_000000060")
    out, words = reported(folder)
    assert (
        len(words) == 1
        and "step_000000060 is damaged (" in words[0]
        and "the one before it" in words[0]
    )
    assert out.stats["resumed_from"] == 40 and same(bits(out), whole)
    assert "damaged_step_000000060" in found(folder)


@pytest.mark.slow
@abandoned
def test_no_bit_anywhere_changes_the_run(saved, whole, tmp_path):
    """Every file in turn, a bit flipped at random places: noticed, or of no consequence."""
    rng, noticed, total = random.Random(0), 0, 0
    for path in files(saved / "step_000000060", "any"):
        for _ in range(1):
            folder = tmp_path / "run"
            shutil.copytree(saved, folder)
            flip(folder / path.relative_to(saved), rng.random())
            out, words = reported(folder, num_steps=61)
            noticed, total = noticed + (out.stats["resumed_from"] == 40), total + 1
            assert out.stats["resumed_from"] == (40 if words else 60)
            assert out.history["value"].tobytes() == whole["historyvalue"][:61].tobytes()
            shutil.rmtree(folder)
    assert noticed >= total // 4


@abandoned
def test_all_damaged_is_an_error(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    for step in (20, 40, 60):
        flip(files(folder / f"step_{step:09d}", "data")[0], 0.3)
    with pytest.raises(RuntimeError, match=r"all of .*step_000000020.* are damaged"):
        reported(folder)
    gc.collect()


# ---- refusals


def refused(folder, match, **keywords):
    with pytest.raises(ValueError, match=match):
        solve(checkpoint=every(folder), **keywords)


def test_a_checkpoint_of_another_problem_is_refused(saved):
    names = found(saved)
    other = bx.algorithms.ma_soba(0.1, 0.1)
    refused(
        saved,
        r"step_000000060 belongs to another problem.*Differing paths: \.algorithm",
        algorithm=other,
    )
    refused(saved, r"another problem.*What differs: key \(there", key=8)
    refused(saved, "started at step 0, and this one starts at 5", state=solve(5).state)
    assert found(saved) == names  # nothing was touched


def test_a_save_over_an_existing_step_is_an_error(tmp_path):
    def meddle(event):
        if event.step == 20:
            (tmp_path / "step_000000040").mkdir()

    with pytest.raises(FileExistsError, match="step_000000040 exists already"):
        solve(checkpoint=every(tmp_path), callbacks=[bx.callbacks.every(20, meddle)])


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda p: bx.checkpoint.every(0, p), ValueError, "n: got 0"),
        (lambda p: bx.checkpoint.every(5, 3), TypeError, "directory: got int 3"),
        (lambda p: bx.checkpoint.every(5, p, keep=0), ValueError, "keep: got 0"),
        (lambda p: solve(checkpoint=str(p)), TypeError, r"checkpoint: got str.*checkpoint\.every"),
        (lambda p: solve(checkpoint=every(ROOT / "README.md")), NotADirectoryError, "is a file"),
    ],
)
def test_bad_arguments(make, error, match, tmp_path):
    with pytest.raises(error, match=match):
        make(tmp_path)


def test_a_half_written_save_is_cleaned_up(whole, tmp_path):
    solve(20, checkpoint=every(tmp_path))
    (tmp_path / "step_000000040.orbax-checkpoint-tmp-123" / "d").mkdir(parents=True)
    out = solve(checkpoint=every(tmp_path))
    assert same(bits(out), whole) and not any("tmp" in name for name in found(tmp_path))


def test_the_digest_tells_places_apart():
    from bilevax.run import digest

    a = jnp.arange(6.0).reshape(2, 3)
    assert (
        digest.of_arrays([a])
        == digest.of_arrays([jax.device_put(a, jax.devices()[3])])
        != digest.of_arrays([a[::-1]])
    )
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    for kind in (jnp.uint8, jnp.bfloat16):  # packed, also across the borders of devices
        b = jnp.arange(32).astype(kind).reshape(2, 16)
        split = jax.device_put(
            b, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "i"))
        )
        assert digest.of_arrays([b]) == digest.of_arrays([split]) != digest.of_arrays([b[:, ::-1]])
        assert (
            digest.of_arrays([b])
            != digest.of_arrays([b], packed=False)
            == digest.of_arrays([split], packed=False)
        )
    for kind in (jnp.bfloat16, jnp.float32, jnp.int8, jnp.bool_, jnp.uint32, jnp.int64):
        one = jnp.zeros(4, kind)
        assert (
            len(
                {
                    tuple(digest.of_arrays([x]))
                    for x in (
                        one,
                        one.at[0].set(jnp.ones((), kind)),
                        one.at[1].set(jnp.ones((), kind)),
                    )
                }
            )
            == 3
        )
    assert VALID["x"].dtype == np.float32
