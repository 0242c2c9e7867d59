"""``python -m bilevax doctor``: what to put into a bug report."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import time

PACKAGES = (
    "bilevax",
    "jax",
    "jaxlib",
    "numpy",
    "optax",
    "flax",
    "chex",
    "jaxopt",
    "orbax-checkpoint",
    "lineax",
    "optimistix",
    "matplotlib",
)


def doctor() -> int:
    """Print versions, devices and settings, and check one small hypergradient against a dense
    solve; returns the exit status.
    """
    print(f"python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores")
    for name in PACKAGES:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        print(f"{name} {found}")
    import jax

    devices = jax.devices()
    print(
        f"devices: {len(devices)} of {devices[0].device_kind} ({jax.default_backend()}), "
        f"{jax.process_count()} process(es)"
    )
    for setting in ("jax_enable_x64", "jax_default_matmul_precision"):
        print(f"{setting}: {getattr(jax.config, setting)}")
    for name in (
        "XLA_FLAGS",
        "JAX_PLATFORMS",
        "JAX_COMPILATION_CACHE_DIR",
        "JAX_DISABLE_JIT",
        "JAX_DEBUG_NANS",
    ):
        if name in os.environ:
            print(f"{name}={os.environ[name]}")
    return _hypergradient()


def _hypergradient() -> int:
    import jax
    import jax.numpy as jnp

    import bilevax as bx

    keys = jax.random.split(jax.random.key(0), 4)
    x, x_val = jax.random.normal(keys[0], (200, 20)), jax.random.normal(keys[1], (100, 20))
    truth = jax.random.normal(keys[2], (20,))
    train, validation = (x, x @ truth + jax.random.normal(keys[3], (200,))), (x_val, x_val @ truth)

    def inner(w, penalty, batch):
        return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2) + 0.5 * jnp.sum(
            jnp.exp(penalty) * w**2
        )

    def outer(w, penalty, batch):
        return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)

    penalty = jnp.full(20, -2.0)
    # Ridge with a penalty a feature: w = G⁻¹ X'y/n, q = G⁻¹ X_v'(X_v w − y_v)/m, ∇ = −e^λ ∘ w ∘ q.
    gram = x.T @ x / len(x) + jnp.diag(jnp.exp(penalty))
    w = jnp.linalg.solve(gram, x.T @ train[1] / len(x))
    q = jnp.linalg.solve(gram, x_val.T @ (x_val @ w - validation[1]) / len(x_val))
    exact = -jnp.exp(penalty) * w * q
    fn = jax.jit(
        bx.value_and_hypergrad(
            inner, outer, solver=bx.inner.lbfgs(tol=1e-5), hypergradient=bx.hypergradient.implicit()
        )
    )
    start = time.perf_counter()
    estimate = jax.block_until_ready(fn(jnp.zeros(20), penalty, train, validation))
    first = time.perf_counter() - start
    start = time.perf_counter()
    estimate = jax.block_until_ready(fn(jnp.zeros(20), penalty, train, validation))
    again = time.perf_counter() - start
    error = float(jnp.linalg.norm(estimate.grad - exact) / jnp.linalg.norm(exact))
    good = error < 1e-3
    print(
        f"a hypergradient (ridge, 20 penalties): relative error {error:.1e}, "
        f"{'as it should be' if good else 'WRONG'}"
    )
    print(f"first call {first:.2f} s with compilation, then {1e3 * again:.2f} ms")
    return 0 if good else 1


def problem(where: str) -> int:
    """Print what a look at a problem of one's own finds; returns the exit status."""
    from bilevax.diagnostics.problem import load, report

    sys.path.insert(0, os.getcwd())
    try:
        made = load(where)
    except (ImportError, AttributeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    for line in report(made):
        print(line)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bilevax", description="Bilevel and multilevel optimization in JAX."
    )
    parser.add_argument(
        "command",
        choices=["doctor"],
        help=(
            "doctor: versions, devices, settings and a small checked hypergradient, for bug reports"
        ),
    )
    parser.add_argument(
        "--problem",
        metavar="MODULE:FUNCTION",
        help="look at a problem of your own instead: the function returns a dict with "
        "inner_objective, outer_objective, inner_params, outer_params, inner_data and outer_data "
        "(batches)",
    )
    arguments = parser.parse_args(argv)
    return doctor() if arguments.problem is None else problem(arguments.problem)


if __name__ == "__main__":
    sys.exit(main())
