"""Logs: what a run writes while it goes, and what a run that goes on from another does to it."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx


def inner(y, x, batch):
    return 0.5 * jnp.sum((y - x) ** 2)


@bx.objective
def outer(y, x, batch):
    return jnp.sum(y**2)


ALGORITHM = bx.algorithms.double_loop(bx.inner.optax(optax.sgd(1.0), 1), bx.hypergradient.implicit(), optax.sgd(0.25))


def run(callback, steps, state=None, **keywords):
    return bx.solve_bilevel(
        inner, outer, jnp.zeros(2), jnp.ones(2), algorithm=ALGORITHM, num_steps=steps, state=state, callbacks=[callback], **keywords
    )


def read_json(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("factory", "read"), [(bx.callbacks.jsonl, read_json), (bx.callbacks.csv, read_csv)], ids=["jsonl", "csv"])
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
    run(factory(path), 2, state=first.state)  # goes on from there again: replaces what it writes anew
    assert [int(row["step"]) for row in read(path)] == list(range(9))
    run(callback, 4)  # begins anew: replaces
    rows = read(path)
    assert [int(row["step"]) for row in rows] == list(range(4))
    np.testing.assert_array_equal([float(row["value"]) for row in rows], first.history["value"][:4])


def test_jsonl_holds_aux_and_no_nan(tmp_path):
    def with_aux(y, x, batch):
        return jnp.sum(y**2), {"pair": y, "bad": jnp.sum(y) * jnp.nan}

    path = tmp_path / "run.jsonl"
    log = bx.callbacks.jsonl(path)
    aux = bx.objective(with_aux, has_aux=True)
    solution = bx.solve_bilevel(inner, aux, jnp.zeros(2), jnp.ones(2), algorithm=ALGORITHM, num_steps=3, callbacks=[log])
    rows = read_json(path)
    assert all(row["aux/bad"] is None for row in rows)
    np.testing.assert_array_equal([row["aux/pair"] for row in rows], solution.history["aux"]["pair"])


def test_csv_refuses_another_header(tmp_path):
    path = tmp_path / "run.csv"
    first = run(bx.callbacks.csv(path), 2)
    measured = bx.metrics(lambda inner, outer, data: {"size": jnp.sum(outer)}, None)
    with pytest.raises(ValueError, match="columns"):
        run(bx.callbacks.csv(path), 2, state=first.state, metrics=measured)


def test_a_failed_run_is_logged(tmp_path):
    def bad(y, x, batch):
        return jnp.sum(jnp.log(y - 0.5))

    path = tmp_path / "run.jsonl"
    solution = bx.solve_bilevel(
        inner, bad, jnp.zeros(2), jnp.ones(2), algorithm=ALGORITHM, num_steps=9, callbacks=[bx.callbacks.jsonl(path)], throw=False
    )
    rows = read_json(path)
    assert solution.result.failed and len(rows) == len(solution.history["value"])
    assert rows[-1]["code"] == int(solution.result)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    run(bx.callbacks.tensorboard(tmp_path), 4)
    (file,) = tmp_path.glob("events.out.*")
    assert b"adjoint_residual" in file.read_bytes()


@pytest.mark.parametrize("factory", [bx.callbacks.jsonl, bx.callbacks.csv, bx.callbacks.tensorboard])
def test_refusals(factory, tmp_path):
    with pytest.raises(TypeError, match="path"):
        factory(3)
    with pytest.raises(ValueError, match="flush_every"):
        factory(tmp_path / "run", flush_every=0)
