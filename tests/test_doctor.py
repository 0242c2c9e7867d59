"""``python -m bilevax doctor`` prints all of its report."""

import os

import jax

from bilevax.__main__ import main


def test_doctor_prints_versions_settings_and_a_right_hypergradient(capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "JAX_DEBUG_NANS", "somehow")
    with jax.default_matmul_precision("highest"):
        assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"jax {jax.__version__}\n" in printed
    assert f"jax_enable_x64: {jax.config.jax_enable_x64}\n" in printed
    assert "jax_default_matmul_precision: highest\n" in printed
    assert "JAX_DEBUG_NANS=somehow\n" in printed
    assert "as it should be" in printed and "WRONG" not in printed
