"""Three real problems with nothing set by hand: ``solve_bilevel(inner, outer, y, x, inner_data=...,
outer_data=...)`` and no other argument.

    python examples/no_tuning.py

1. Digits, softmax regression with a penalty a weight: 640 penalties, judged on held-out examples
   and pulled weakly to their start.
2. Digits, 40 % of the labels wrong: a weight for each of 400 training examples, judged on a small
   clean set.
3. Denoising natural images by total variation: its weight and its smoothing, judged by the error to
   the clean images.

No step size, no tolerance, no number of inner steps, no algorithm. Beside each: Adam outside and 20
steps of gradient descent inside at the better of three pairs of step sizes. Every point is judged
apart from its run, by a hypergradient whose inner and adjoint systems are solved to 1e-10 in
float64; what counts is its norm relative to the one at the start.

What came out: all three converge, to 9.9e-6 of the first gradient or below in 100 steps at most;
the tuned runs of 100 steps end at 7e-3 to 6e-2.
"""

from __future__ import annotations

import time

import data
import denoising
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report

import bilevax as bx

NONE, TUNED = "algorithm=None", "Adam on gradient descent, best of 3"
TARGET = 1e-3
PENALTY = -5.0  # log, at the start


def losses(w, batch):
    return optax.softmax_cross_entropy_with_integer_labels(batch["x"] @ w, batch["y"])


def loss(w, x, batch):
    return jnp.mean(losses(w, batch))


def anchored(w, penalty, batch):
    """With a weak pull to the start, without which some of 640 penalties run to infinity, and no
    point is a solution."""
    return loss(w, penalty, batch) + 0.5e-3 * jnp.sum((penalty - PENALTY) ** 2)


def penalised(w, penalty, batch):
    return jnp.mean(losses(w, batch)) + 0.5 * jnp.sum(jnp.exp(penalty) * w**2)


def weighted(w, scores, batch):
    return jnp.mean(jax.nn.sigmoid(scores) * losses(w, batch)) + 0.005 * jnp.sum(w**2)


def tv_lower(y, theta, noisy):
    return denoising.lower(denoising.total_variation, y, theta, noisy)


def problems(rng, small):
    """Name -> inner and outer objective, data of both, start of both, and three pairs of step sizes
    to choose from."""
    x, y = data.digits()
    order = rng.permutation(len(x))
    n = 100 if small else 400
    train, held = (dict(x=x[i].astype(np.float64), y=y[i]) for i in (order[:n], order[n : 2 * n]))
    noisy, _ = data.confuse_labels(rng, train["y"], 0.4, 10)
    clean = {key: value[: n // 4] for key, value in held.items()}
    images, _ = data.natural_images()
    crops = denoising.crops(rng, images, 2, 12 if small else 32)
    crops = {key: jnp.asarray(value, jnp.float64) for key, value in crops.items()}
    w = jnp.zeros((64, 10))
    pairs = ((0.5, 0.1), (0.5, 0.3), (0.1, 0.1))
    out = {
        "penalty a weight": (
            penalised,
            anchored,
            train,
            held,
            w,
            jnp.full((64, 10), PENALTY),
            pairs,
        ),
        "weight an example": (weighted, loss, dict(train, y=noisy), clean, w, jnp.zeros(n), pairs),
        "total variation": (
            tv_lower,
            denoising.upper,
            crops["noisy"],
            crops["clean"],
            crops["noisy"],
            denoising.START.astype(jnp.float64),
            pairs,
        ),
    }
    return {name: out[name] for name in list(out)[: 1 if small else 3]}


def solve(problem, **arguments):
    inner, outer, inner_data, outer_data, y, x, _ = problem
    return bx.solve_bilevel(
        inner, outer, y, x, inner_data=inner_data, outer_data=outer_data, **arguments
    )


def judge(problem):
    """``x -> (outer value, norm of the hypergradient)``, solved apart from any run."""
    inner, outer, inner_data, outer_data, y, x, _ = problem
    method = bx.hypergradient.implicit(bx.linear.cg(maxiter=5000, tol=1e-10), max_residual=jnp.inf)
    fn = jax.jit(
        bx.value_and_hypergrad(
            inner, outer, solver=bx.inner.lbfgs(maxiter=5000, tol=1e-10), hypergradient=method
        )
    )

    def at(x):
        estimate = fn(y, x, inner_data, outer_data)
        return float(estimate.value), float(estimate.info["grad_norm"])

    return at


def main(argv=None):
    args = report.parse(
        report.parser(__doc__, full=dict(seeds=1, steps=100), small=dict(seeds=1, steps=30)), argv
    )
    begin = time.perf_counter()
    rows: dict[str, dict[str, list]] = {}
    histories = {}
    with jax.enable_x64(True):
        for seed in range(args.seeds):
            for name, problem in problems(np.random.default_rng(seed), args.small).items():
                at = judge(problem)
                first = at(problem[5])
                runs = {NONE: solve(problem)}
                tried = [
                    solve(
                        problem,
                        algorithm=bx.algorithms.double_loop(
                            bx.inner.optax(bx.tunable(optax.sgd, learning_rate=a), 20),
                            bx.hypergradient.implicit(
                                bx.linear.cg(maxiter=20), max_residual=jnp.inf
                            ),
                            bx.tunable(optax.adam, learning_rate=b),
                        ),
                        num_steps=args.steps,
                        throw=False,
                    )
                    for a, b in problem[6]
                ]
                runs[TUNED] = min(tried, key=lambda run: at(run.outer_params))
                for label, run in runs.items():
                    value, norm = at(run.outer_params)
                    row = rows.setdefault(f"{name}: {label}", {"value": [], "relative": []})
                    row["value"].append(value)
                    row["relative"].append(norm / first[1])
                    print(
                        f"{name}, {label}: value {first[0]:.4g} -> {value:.4g}, relative gradient "
                        f"{norm / first[1]:.1e}",
                        flush=True,
                    )
                histories[name] = runs[NONE].history
    seconds = time.perf_counter() - begin
    print(report.table(rows, {"value": "outer value", "relative": "relative gradient"}, digits=5))
    print(f"Converged is {TARGET:g} and below. {seconds:.1f} s in all.")

    with report.figure(args.out / "no_tuning.svg", len(histories), squeeze=False) as (_, axes):
        for ax, (name, history) in zip(axes[0], histories.items(), strict=True):
            work = np.cumsum(history["lower_steps"] + history["adjoint_steps"])
            ax.loglog(
                work,
                history["grad_norm"] / history["grad_norm"][0],
                color=report.BLUE,
                label="hypergradient",
            )
            ax.axhline(TARGET, color=report.GREY, linewidth=0.8)
            ax.set(xlabel="inner gradients and products", title=name)
        axes[0][0].set_ylabel("relative to the first")
        axes[0][0].legend()
    report.save(args.out / "no_tuning.json", vars(args), rows, seconds)
    return rows


if __name__ == "__main__":
    report.run(main)
