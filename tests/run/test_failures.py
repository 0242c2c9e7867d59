"""What a failed step does: stop, skip, roll back; counted in the history."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax import RESULTS

ALGORITHM = bx.algorithms.soba(0.1, 0.1)


def inner(y, x, batch):
    return 0.5 * jnp.mean((y - x - batch) ** 2)


def outer(y, x, batch):
    return 0.5 * jnp.sum((y - 1.0) ** 2)


def loader(bad=(), length=200):
    """Numbered batches, some of which are NaN; `soba` draws one a step for the inner level."""
    return (np.full(2, np.nan if i in bad else 0.1 * np.sin(i)) for i in range(length))


def run(bad=(), num_steps=60, data=None, **keywords):
    data = loader(bad) if data is None else data
    return bx.solve_bilevel(
        inner,
        outer,
        jnp.zeros(2),
        jnp.zeros(()),
        inner_data=data,
        hyper_data=None,
        algorithm=ALGORITHM,
        num_steps=num_steps,
        **keywords,
    )


def test_skip_passes_over_bad_batches_and_counts_them():
    bad = (5, 16, 17, 40)
    out = run(bad, on_failure="skip", keep="last")
    assert (
        out.result is RESULTS.success
        and out.stats["failed_steps"] == 4
        and out.stats["steps"] == 60
    )
    assert np.flatnonzero(out.history["code"] >= 10).tolist() == list(bad)
    assert (out.history["code"][list(bad)] == RESULTS.nonfinite_batch).all()
    # The run is that of the good batches alone.
    good = (b for b in loader(bad) if np.isfinite(b).all())
    alone = run(data=good, num_steps=56, keep="last")
    assert np.array_equal(out.outer_params, alone.outer_params) and np.array_equal(
        out.inner_params, alone.inner_params
    )
    assert np.array_equal(np.delete(out.history["value"], bad), alone.history["value"])


def test_stop_is_the_default():
    out = run((5,), throw=False)
    assert (
        out.result is RESULTS.nonfinite_batch
        and out.stats["steps"] == 5
        and out.stats["failed_steps"] == 1
    )
    with pytest.raises(bx.SolveError, match="nonfinite_batch at step 5"):
        run((5,))


def test_ten_failures_in_a_row_end_the_run():
    out = run(range(20, 60), on_failure="skip", throw=False)
    assert (
        out.result is RESULTS.nonfinite_batch
        and out.stats["failed_steps"] == 10
        and len(out.history["code"]) == 30
    )
    nine = run(range(20, 29), on_failure="skip")
    assert nine.result is RESULTS.success and nine.stats["failed_steps"] == 9


def test_the_first_step_may_fail():
    out = run((0,), num_steps=200, data=loader((0,), 300), on_failure="skip", tol=1e3)
    assert out.result is RESULTS.converged and out.stats["steps"] == 2


def test_rollback_goes_back_a_chunk_and_on():
    out = run((100,), num_steps=150, data=loader((100,)), on_failure="rollback", keep="last")
    assert (
        out.result is RESULTS.success
        and out.stats["failed_steps"] == 1
        and out.stats["steps"] == 150
    )
    # States are kept every 32 steps: the failure goes back to the last but one, that of 64, and on
    # with batch 101.
    batches = [b for i, b in enumerate(loader()) if i < 64 or 100 < i < 150]
    alone = run(data=iter(batches), num_steps=113, keep="last")
    assert np.array_equal(out.outer_params, alone.outer_params)
    assert np.array_equal(out.history["value"][101:], alone.history["value"][64:])


def test_rollback_of_a_run_that_diverges_ends():
    wild = bx.algorithms.soba(1e3, 0.1)
    keywords = dict(inner_data=bx.data.full(jnp.zeros(2)), algorithm=wild, num_steps=2000)
    out = bx.solve_bilevel(
        inner, outer, jnp.ones(2), jnp.zeros(()), on_failure="rollback", throw=False, **keywords
    )
    assert out.result.failed and out.stats["failed_steps"] == 10
    assert np.isfinite(np.asarray(out.inner_params)).all()


def test_skipping_resumes_to_the_same_bits(tmp_path):
    whole = run((7, 33), on_failure="skip", keep="last")
    run(
        (7, 33),
        num_steps=20,
        on_failure="skip",
        keep="last",
        checkpoint=bx.checkpoint.every(10, tmp_path),
    )
    rest = run(
        (7, 33), on_failure="skip", keep="last", checkpoint=bx.checkpoint.every(10, tmp_path)
    )
    assert rest.stats["resumed_from"] == 20 and rest.stats["failed_steps"] == 2
    assert all(
        np.array_equal(a, b, equal_nan=True)
        for a, b in zip(
            *(jax.tree.leaves((s.outer_params, s.history)) for s in (whole, rest)), strict=True
        )
    )


def test_an_unknown_policy_is_refused():
    with pytest.raises(
        ValueError, match="on_failure: got 'ignore'; expected 'stop', 'skip' or 'rollback'"
    ):
        run(on_failure="ignore")
