"""Logs: what a run writes while it goes, and what a run that goes on from another does to it."""

import csv
import json
import subprocess
import sys
import threading
import time
import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax.callbacks import files
from bilevax.run import logfile


def inner(y, x, batch):
    return 0.5 * jnp.sum((y - x) ** 2)


@bx.objective
def outer(y, x, batch):
    return jnp.sum(y**2)


ALGORITHM = bx.algorithms.double_loop(
    bx.inner.optax(optax.sgd(1.0), 1), bx.hypergradient.implicit(), optax.sgd(0.25)
)


def run(callback, steps, state=None, also=(), **keywords):
    return bx.solve_bilevel(
        inner,
        outer,
        jnp.zeros(2),
        jnp.ones(2),
        algorithm=ALGORITHM,
        num_steps=steps,
        state=state,
        callbacks=[callback, *also],
        **keywords,
    )


def read_json(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("factory", "read"),
    [(bx.callbacks.jsonl, read_json), (bx.callbacks.csv, read_csv)],
    ids=["jsonl", "csv"],
)
def test_a_log_has_the_history(factory, read, tmp_path):
    path = tmp_path / "new" / "run.log"
    callback = factory(path, flush_every=3)
    first = run(callback, 7)
    rows = read(path)
    assert [int(row["step"]) for row in rows] == list(range(7))
    for name in ("value", "grad_norm", "adjoint_residual"):
        np.testing.assert_array_equal([float(row[name]) for row in rows], first.history[name])

    run(callback, 5, state=first.state)  # goes on: adds
    assert [int(row["step"]) for row in read(path)] == list(range(12))
    run(
        factory(path), 2, state=first.state
    )  # goes on from there again: replaces what it writes anew
    assert [int(row["step"]) for row in read(path)] == list(range(9))
    run(callback, 4)  # begins anew: replaces
    rows = read(path)
    assert [int(row["step"]) for row in rows] == list(range(4))
    np.testing.assert_array_equal([float(row["value"]) for row in rows], first.history["value"][:4])


def lines_of(cells):
    """A column as a log has it, a line a row."""
    count = 2 if cells.values is None else len(cells.values)
    numbered = [files.Cells("%d", list(range(count))), cells]
    text = files._lines(f"%d {cells.form}\n", numbered)
    return [line.partition(" ")[2] for line in text.splitlines()]


@pytest.mark.parametrize(
    ("factory", "read"),
    [(bx.callbacks.jsonl, read_json), (bx.callbacks.csv, read_csv)],
    ids=["jsonl", "csv"],
)
def test_numbers_are_as_long_as_they_are_and_come_back(factory, read, tmp_path):
    path = tmp_path / "run.log"
    start = jnp.asarray([1 / 3, 1e-7], jnp.float32)
    out = bx.solve_bilevel(
        inner, outer, start, start, algorithm=ALGORITHM, num_steps=9, callbacks=[factory(path)]
    )
    value = out.history["value"]
    assert value.dtype == np.float32 and len(set(value.tolist())) == 9
    np.testing.assert_array_equal(np.float32([float(row["value"]) for row in read(path)]), value)
    assert max(len(str(row["value"])) for row in read(path)) <= 15
    json_of = lambda *values: lines_of(files._json(np.asarray(values)))
    assert json_of(1.5, np.nan, -np.inf) == ["1.5", "null", "null"]
    assert json_of(np.nan, np.nan) == ["null", "null"] and json_of(True, True) == ["true", "true"]
    assert json_of([1.5, np.nan], [2.0, np.inf]) == ["[1.5, null]", "[2.0, null]"]
    assert lines_of(files._cells(np.full(3, np.nan))) == ["nan"] * 3
    assert lines_of(files._cells(np.arange(2))) == ["0", "1"]
    assert lines_of(files._cells(np.full(2, 0.1))) == ["0.1", "0.1"]  # and what never changes


def test_a_long_log_is_told_by_counting_and_added_to_as_it_lies(tmp_path):
    """As reading it row by row would tell, for every way to cut it and every step."""
    first = {logfile.JSONL: tmp_path / "run.jsonl", logfile.CSV: tmp_path / "run.csv"}
    run(bx.callbacks.jsonl(first[logfile.JSONL]), 12, also=[bx.callbacks.csv(first[logfile.CSV])])
    for form, path in first.items():
        text = path.read_bytes()
        twice = text + text.splitlines(keepends=True)[-1]
        for changed in (
            text,
            text[:-1],
            text[:-9],
            text + b"\n",
            twice,
            b"",
            text.replace(b"7", b"8"),
        ):
            path.write_bytes(changed)
            for step in (0, 1, 5, 7, 8, 11, 12, 40):
                found = logfile.kept(path, form, step)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(logfile, "_consecutive", lambda *args: None)
                    assert found == logfile.kept(path, form, step)
        path.write_bytes(text)
        before, state = path.stat().st_ino, run(lambda event: None, 12).state
        factory = bx.callbacks.csv if form is logfile.CSV else bx.callbacks.jsonl
        run(factory(path), 3, state=state)
        assert path.stat().st_ino == before and path.read_bytes().startswith(text)


def test_jsonl_holds_aux_and_no_nan(tmp_path):
    def with_aux(y, x, batch):
        return jnp.sum(y**2), {"pair": y, "bad": jnp.sum(y) * jnp.nan}

    path = tmp_path / "run.jsonl"
    log = bx.callbacks.jsonl(path)
    aux = bx.objective(with_aux, has_aux=True)
    solution = bx.solve_bilevel(
        inner, aux, jnp.zeros(2), jnp.ones(2), algorithm=ALGORITHM, num_steps=3, callbacks=[log]
    )
    rows = read_json(path)
    assert all(row["aux/bad"] is None for row in rows)
    np.testing.assert_array_equal(
        [row["aux/pair"] for row in rows], solution.history["aux"]["pair"]
    )


def test_columns_may_begin_in_a_csv(tmp_path):
    path = tmp_path / "run.csv"
    first = run(bx.callbacks.csv(path), 2)
    measured = bx.metrics(lambda inner, outer, data: {"size": jnp.sum(outer)}, None)
    more = run(bx.callbacks.csv(path), 2, state=first.state, metrics=measured)
    rows = read_csv(path)
    assert [row["size"] for row in rows[:2]] == ["", ""]
    np.testing.assert_array_equal([float(row["size"]) for row in rows[2:]], more.history["size"])
    np.testing.assert_array_equal([float(row["value"]) for row in rows[:2]], first.history["value"])
    run(bx.callbacks.csv(path), 1, state=more.state)  # and end
    assert [row["size"] == "" for row in read_csv(path)] == [True, True, False, False, True]


CUTS = {
    "in its last line": lambda text: text[:-9],
    "before its last line break": lambda text: text[:-1],
    "behind a comma": lambda text: text[: text.rindex(",") + 1],
    "by zeros": lambda text: text[:-9] + "\0" * 9,
    "with empty lines behind": lambda text: text + "\n\n",
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    ("factory", "read"),
    [(bx.callbacks.jsonl, read_json), (bx.callbacks.csv, read_csv)],
    ids=["jsonl", "csv"],
)
def test_a_log_that_was_cut_off(factory, read, cut, tmp_path):
    """The half row goes, with a word, and every other stays as it was; a plot of it shows whole
    rows alone."""
    path = tmp_path / ("run.csv" if factory is bx.callbacks.csv else "run.jsonl")
    first = run(factory(path), 7)
    text = path.read_text()
    path.write_text(CUTS[cut](text))
    whole = cut == "with empty lines behind" or (
        factory is bx.callbacks.jsonl and cut == "before its last line break"
    )
    drawn = bx.plots.history(path)["value"]
    np.testing.assert_array_equal(drawn, first.history["value"][: 7 if whole else 6].astype(float))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run(factory(path), 3, state=first.state)
    assert [("cut off" in str(w.message), w.category) for w in seen] == (
        [] if whole else [(True, RuntimeWarning)]
    )
    rows = read(path)
    assert [int(row["step"]) for row in rows] == [*range(7 if whole else 6), 7, 8, 9]
    assert path.read_text().startswith("".join(text.splitlines(keepends=True)[:6]))
    assert not list(tmp_path.glob(".*"))  # nothing left beside it


def test_a_header_that_was_cut_off(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("step,val")
    with pytest.warns(RuntimeWarning, match="cut off"):
        run(bx.callbacks.csv(path), 2)
    assert len(read_csv(path)) == 2


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        (bx.callbacks.jsonl, "x,y\n1.5,2\n"),
        (bx.callbacks.jsonl, '{"step": 0}\n{"ste\n{"step": 1}\n'),
        (bx.callbacks.jsonl, "[1, 2]\n"),
        (bx.callbacks.csv, "x,y\n1.5,2\n"),
        (bx.callbacks.csv, "step,y\n1.5,2\n2,3\n"),
    ],
)
def test_a_file_that_is_no_log_is_left_alone(factory, text, tmp_path):
    path = tmp_path / "precious"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"path: got '.*precious', whose line \d .* is no row of a log"
    ):
        run(factory(path), 2)
    assert path.read_text() == text


FILES = [(bx.callbacks.jsonl, read_json), (bx.callbacks.csv, read_csv)]


@pytest.mark.parametrize(("factory", "read"), FILES, ids=["jsonl", "csv"])
def test_a_file_has_one_log_and_a_log_one_run(factory, read, tmp_path):
    path = tmp_path / "run.log"
    callback = factory(path, flush_every=3)
    said = []

    def another(event):
        for log, where in ((callback, "callbacks"), (factory(path), "path")):
            with pytest.raises(RuntimeError, match=f"{where}: .*expected .* own|{where}.* alone"):
                run(log, 2)
            said.append(where)

    run(callback, 9, also=[bx.callbacks.every(6, another)])
    assert said == ["callbacks", "path"] * 2
    assert [int(row["step"]) for row in read(path)] == list(range(9))
    run(factory(path), 4)  # both are free again
    assert len(read(path)) == 4


def test_of_two_threads_that_want_a_file_one_has_it(tmp_path, monkeypatch):
    path, said = tmp_path / "run.jsonl", []
    path.write_text("")
    opened = logfile.append
    monkeypatch.setattr(logfile, "append", lambda path: time.sleep(0.05) or opened(path))

    def claim():
        try:
            said.append(logfile.claim(path))
        except RuntimeError:
            said.append(None)

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (free,) = [end for end in said if end is not None]
    free()
    logfile.claim(path)()


def test_a_file_that_another_process_writes_to(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("")
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); "
            "print('has it', flush=True); input()",
            str(path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout.readline() == b"has it\n"
    with pytest.raises(RuntimeError, match="path: .*run.jsonl' is written to by another log"):
        run(bx.callbacks.jsonl(path), 2)
    other.communicate(b"\n")
    run(bx.callbacks.jsonl(path), 2)
    assert len(read_json(path)) == 2


@pytest.mark.parametrize(("factory", "read"), FILES, ids=["jsonl", "csv"])
def test_a_log_that_somebody_takes_away_is_written_anew(factory, read, tmp_path, monkeypatch):
    """And stays where it was asked for, whatever becomes of the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "run.log"

    def take(event):
        monkeypatch.chdir(tmp_path / "elsewhere")
        if event.step == 6:
            path.rename(tmp_path / "moved")

    with pytest.warns(RuntimeWarning, match="moved or deleted while the run wrote"):
        run(factory("run.log", flush_every=1), 300, also=[bx.callbacks.every(6, take)])
    assert [int(row["step"]) for row in read(path)] == list(range(300))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_rows_of_a_failed_run_have_their_steps(tmp_path):
    below = lambda y, x, batch: inner(y, x["x"], batch)
    bad = lambda y, x, batch: jnp.sum(y**2) * jnp.where(batch >= x["fail"], jnp.nan, 1.0)
    for fail in (0, 10, 50):
        path = tmp_path / f"{fail}.jsonl"
        out = bx.solve_bilevel(
            below, bad, jnp.zeros(2), {"x": jnp.ones(2), "fail": jnp.int32(fail)},
            outer_data=lambda key, step: step, algorithm=ALGORITHM,
            num_steps=60, throw=False, callbacks=[bx.callbacks.jsonl(path, flush_every=7)],
        )  # fmt: skip
        rows = read_json(path)
        assert out.result.failed and rows[-1]["code"] == int(out.result)
        assert [row["step"] for row in rows] == list(range(fail + 1)) and len(rows) == len(
            out.history["value"]
        )


SOMETIMES = bx.metrics(lambda inner, outer, data: {"size": jnp.sum(outer)}, None, every=3)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    run(bx.callbacks.tensorboard(tmp_path), 4, metrics=SOMETIMES)  # a NaN would warn
    (file,) = tmp_path.glob("events.out.*")
    assert b"adjoint_residual" in file.read_bytes() and file.read_bytes().count(b"size") == 2


class Writer:
    def __init__(self):
        self.rows, self.flushed = [], 0

    def write_scalars(self, step, scalars):
        self.rows.append({"step": step, **scalars})

    def flush(self):
        self.flushed += 1


def test_any_writer_of_scalars(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    writer = Writer()
    keywords = dict(metrics=SOMETIMES, checkpoint=bx.checkpoint.every(2, tmp_path))
    run(bx.callbacks.scalars(writer), 4, **keywords)
    out = run(
        bx.callbacks.scalars(writer), 7, **keywords
    )  # what was written before is not written again
    assert [row["step"] for row in writer.rows] == list(range(7)) and writer.flushed == 2
    assert [row["value"] for row in writer.rows] == out.history["value"].tolist()
    assert [row["step"] for row in writer.rows if "size" in row] == [0, 3, 6]
    with pytest.raises(TypeError, match="writer: got"):
        bx.callbacks.scalars(Writer)


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = bx.callbacks.wandb(mode="offline", dir=str(tmp_path), project="p")
    run(log, 3)
    assert wandb.run is None  # it was finished
    (file,) = tmp_path.rglob("*.wandb")
    limit = time.monotonic() + 60
    while b"adjoint_residual" not in file.read_bytes() and time.monotonic() < limit:
        time.sleep(0.05)  # a process of its own writes it
    assert b"adjoint_residual" in file.read_bytes()


def test_mlflow_in_a_local_store(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    for _ in range(2):
        out = run(bx.callbacks.mlflow(run_name="small"), 3)
    runs = mlflow.MlflowClient().search_runs(["0"])
    assert len(runs) == 2 and {r.info.status for r in runs} == {"FINISHED"}
    found = mlflow.MlflowClient().get_metric_history(runs[0].info.run_id, "value")
    assert [m.step for m in found] == [0, 1, 2]
    np.testing.assert_array_equal([m.value for m in found], out.history["value"])


def test_early_stopping_looks_at_each_row_once():
    """It stops where looking at the whole column would, and a run of ten times the length takes ten
    times as long, not a hundred."""
    rng = np.random.default_rng(0)
    column = rng.standard_normal(400).cumsum()
    column[rng.random(400) < 0.3] = np.nan
    for mode, sign in (("min", 1), ("max", -1)):
        stop = bx.callbacks.early_stopping("value", patience=40, mode=mode, min_delta=0.5)

        def slow(n, sign=sign):
            best, best_row = np.inf, -1
            for row in np.flatnonzero(~np.isnan(column[:n])):
                if sign * column[row] < best - 0.5:
                    best, best_row = sign * column[row], row
            return n - 1 - best_row >= 40

        for _ in range(2):  # again, as by another run
            looks = [
                stop.fn(bx.callbacks.Event(n, n, 400, {"value": column[:n]}, None))
                for n in range(10, 401, 10)
            ]
            assert looks == [slow(n) for n in range(10, 401, 10)]
            stop.close()

    class Counted(np.ndarray):
        read = 0

        def __getitem__(self, index):
            out = super().__getitem__(index)
            Counted.read += np.size(out)
            return out

    stop, values = (
        bx.callbacks.early_stopping("value", patience=10**6),
        np.zeros(2000).view(Counted),
    )
    for n in range(10, 2001, 10):
        stop.fn(
            bx.callbacks.Event(n, n, 2000, {"value": np.asarray(values)[:n].view(Counted)}, None)
        )
    assert Counted.read == 2000


@pytest.mark.parametrize(
    "factory", [bx.callbacks.jsonl, bx.callbacks.csv, bx.callbacks.tensorboard]
)
def test_refusals(factory, tmp_path):
    with pytest.raises(TypeError, match="(path|directory): got int 3"):
        factory(3)
    with pytest.raises(ValueError, match="flush_every"):
        factory(tmp_path / "run", flush_every=0)


@pytest.mark.parametrize(
    "factory", [bx.callbacks.jsonl, bx.callbacks.csv, bx.callbacks.tensorboard]
)
@pytest.mark.parametrize("path", ["", "gs://bucket/log", "a\0b"])
def test_places_that_no_log_can_be_in(factory, path):
    with pytest.raises(
        ValueError, match=r"(path|directory): got .*; expected a name on this machine"
    ):
        factory(path)
    with pytest.raises(IsADirectoryError, match="path: got"):
        bx.callbacks.jsonl("/")
