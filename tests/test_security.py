"""What is read from files is data: nothing in it runs, nothing in it decides how much memory is
taken."""

import ast
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.run.test_fingerprint import altered

PACKAGE = pathlib.Path(bx.__file__).parent
BANNED = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "subprocess", "yaml"}


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_no_module_runs_what_it_reads(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = (
                node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            )
            plain = isinstance(node.func, ast.Name) and name in BANNED
            assert not plain, f"{path.name}:{node.lineno} calls {name}"
            if (
                name == "load"
                and isinstance(node.func, ast.Attribute)
                and getattr(node.func.value, "id", "") == "np"
            ):
                given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert given.get("allow_pickle", False) is False, (
                    f"{path.name}:{node.lineno} reads pickles"
                )
            assert not (
                name == "system" and getattr(getattr(node.func, "value", None), "id", "") == "os"
            )
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            assert not MODULES & {name.split(".")[0] for name in names}, (
                f"{path.name}:{node.lineno} imports {names}"
            )


def run(folder, n):
    inner = lambda y, x, b: 0.5 * jnp.sum((y - x) ** 2)
    outer = lambda y, x, b: 0.5 * jnp.sum((y - 3.0) ** 2)
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.5), 2), bx.hypergradient.implicit(), optax.sgd(0.3)
    )
    return bx.solve_bilevel(
        inner,
        outer,
        jnp.zeros(2),
        jnp.ones(2),
        algorithm=algorithm,
        num_steps=n,
        checkpoint=bx.checkpoint.every(5, folder),
    )


@pytest.mark.turns
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_shape_that_a_file_claims_takes_no_memory(tmp_path):
    """A manifest with a column of a terabyte, its digest right, is damaged and no attempt at a
    terabyte."""
    run(tmp_path, 5)
    run(tmp_path, 10)

    def claim(manifest):
        manifest["history"]["['value']"] = "float32[5, 50000000000]"

    altered(tmp_path, 10, claim)
    with pytest.warns(RuntimeWarning, match="step_000000010 is damaged .*claims"):
        assert run(tmp_path, 15).stats["resumed_from"] == 5


def test_a_log_is_text(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"step": 0, "value": "__import__('os').abort()"}) + "\n")
    with pytest.raises((TypeError, ValueError)):
        bx.plots.history(path)
    assert re.search("no pickle", (PACKAGE.parent / "SECURITY.md").read_text())
    np.save(tmp_path / "a.npy", np.asarray([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "a.npy", allow_pickle=False)
