"""What solve_bilevel costs over the same mathematics written by hand as one jitted lax.scan,
history on in both; and what callbacks cost.

python benchmarks/driver.py            what steps of 20 ms, 1.5 ms and 0.4 ms feel of the driver
"""

import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import Case, main
from sklearn.datasets import load_digits

import bilevax as bx


def mnist_linear():
    """20,000 training and 5,000 validation images, from the folder that BILEVAX_DATA names; None
    where it is not there."""
    path = os.path.join(os.environ.get("BILEVAX_DATA", ""), "mnist.npz")
    if not os.path.exists(path):
        return None
    data = np.load(path)
    x, y = (
        data["x_train"].reshape(-1, 784).astype(np.float32) / 255,
        data["y_train"].astype(np.int32),
    )
    return (x[:20000], y[:20000], np.arange(20000, dtype=np.int32)), (
        x[20000:25000],
        y[20000:25000],
    )


def digits(n):
    x, y = load_digits(return_X_y=True)
    x, y = x.astype(np.float32) / 16, y.astype(np.int32)
    return (x[:n], y[:n], np.arange(n, dtype=np.int32)), (x[600:1000], y[600:1000])


def losses(w, batch):
    return optax.softmax_cross_entropy_with_integer_labels(batch[0] @ w, batch[1])


def inner(w, logits, batch):
    return jnp.mean(jax.nn.sigmoid(logits[batch[2]]) * losses(w, batch)) + 1e-3 * jnp.sum(w**2)


def outer(w, logits, batch):
    return jnp.mean(losses(w, batch))


def by_hand(inner_opt, inner_steps, cg_steps, outer_opt, steps):
    """K inner steps, k CG iterations from the last adjoint, one Adam step: a scan of nothing
    else."""

    def cg(matvec, b, x):
        r = b - matvec(x)

        def body(carry):
            x, r, p, rr, k = carry
            ap = matvec(p)
            a = rr / jnp.sum(p * ap)
            x, r = x + a * p, r - a * ap
            new = jnp.sum(r * r)
            return x, r, r + (new / rr) * p, new, k + 1

        return jax.lax.while_loop(
            lambda c: (c[3] > 1e-12 * jnp.sum(b * b)) & (c[4] < cg_steps),
            body,
            (x, r, r, jnp.sum(r * r), 0),
        )[0]

    def step(carry, _, train, valid):
        w, inner_state, q, logits, opt = carry

        def descend(i, point):
            w, state = point
            updates, state = inner_opt.update(jax.grad(inner)(w, logits, train), state)
            return optax.apply_updates(w, updates), state

        w, inner_state = jax.lax.fori_loop(0, inner_steps, descend, (w, inner_state))
        value, b = jax.value_and_grad(outer)(w, logits, valid)
        _, products = jax.linearize(lambda w: jax.grad(inner, (0, 1))(w, logits, train), w)
        q = cg(lambda v: products(v)[0], b, q)
        grad = -products(q)[1]
        updates, opt = outer_opt.update(grad, opt)
        return (w, inner_state, q, optax.apply_updates(logits, updates), opt), (
            value,
            jnp.sqrt(jnp.sum(grad**2)),
        )

    @jax.jit
    def run(w, logits, train, valid):
        carry = (w, inner_opt.init(w), jnp.zeros_like(w), logits, outer_opt.init(logits))
        return jax.lax.scan(lambda c, i: step(c, i, train, valid), carry, length=steps)

    return run


def cases(args):
    sgd, adam = optax.sgd(0.5), optax.adam(0.01)
    problems = {
        "600 digits, 10 Adam + CG 5": (digits(600), adam, 10, 5, 256),
        "300 digits, 10 Adam + CG 5": (digits(300), adam, 10, 5, 1000),
        "600 digits, 10 SGD + CG 10": (digits(600), sgd, 10, 10, 256),
        "MNIST linear, 20000 x 784": (mnist_linear(), sgd, 5, 5, 16),
    }
    for label, (data, inner_opt, inner_steps, cg_steps, steps) in problems.items():
        if data is None or (args.quick and not label.startswith("300")):
            continue
        steps = 64 if args.quick else steps
        train, valid = jax.tree.map(jnp.asarray, data)
        w, logits = jnp.zeros((train[0].shape[1], 10)), jnp.zeros(len(train[1]))
        hand = by_hand(inner_opt, inner_steps, cg_steps, optax.adam(0.1), steps)
        algorithm = bx.algorithms.double_loop(
            bx.inner.optax(inner_opt, inner_steps),
            bx.hypergradient.implicit(bx.linear.cg(maxiter=cg_steps), max_residual=jnp.inf),
            optax.adam(0.1),
        )

        def ours(train=train, valid=valid, w=w, logits=logits, algorithm=algorithm, steps=steps):
            solution = bx.solve_bilevel(
                inner,
                outer,
                w,
                logits,
                inner_data=train,
                outer_data=valid,
                algorithm=algorithm,
                num_steps=steps,
            )
            return solution.outer_params, solution.history["value"][-1]

        def theirs(train=train, valid=valid, w=w, logits=logits, hand=hand):
            (*_, logits, _), (values, _) = hand(w, logits, train, valid)
            return logits, values[-1]

        yield Case(
            f"{label}, {steps} steps",
            {"by hand": theirs, "solve_bilevel": ours},
            "by hand",
            lambda out: {"last value": out[1]},
        )
    yield callbacks(1000 if args.quick else 40_000)


def callbacks(steps):
    """Steps of some microseconds, which feel whatever looks at them."""
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.5), 2),
        bx.hypergradient.implicit(bx.linear.cg(maxiter=2), max_residual=jnp.inf),
        optax.sgd(1e-5),
    )
    folder = tempfile.mkdtemp()

    def run(*watchers):
        solution = bx.solve_bilevel(
            small_inner,
            small_outer,
            jnp.zeros(2),
            jnp.ones(2),
            algorithm=algorithm,
            num_steps=steps,
            callbacks=[fn() for fn in watchers],
        )
        return solution.outer_params, solution.history["value"][-1]

    entries = {
        "no callback": run,
        "one that does nothing, every 10": lambda: run(
            lambda: bx.callbacks.every(10, lambda event: None)
        ),
        "early_stopping": lambda: run(lambda: bx.callbacks.early_stopping("value", patience=10**7)),
        "one that reads the history, every 100": lambda: run(
            lambda: bx.callbacks.every(100, lambda event: event.history["value"][-1] < 0)
        ),
        "one that reads the state, every 1000": lambda: run(
            lambda: bx.callbacks.every(1000, lambda event: event.state.code is None)
        ),
        "jsonl": lambda: run(lambda: bx.callbacks.jsonl(f"{folder}/log.jsonl")),
        "csv": lambda: run(lambda: bx.callbacks.csv(f"{folder}/log.csv")),
    }
    return Case(
        f"two coordinates, {steps} steps",
        entries,
        "no callback",
        lambda out: {"last value": out[1]},
    )


def small_inner(y, x, batch):
    return 0.5 * jnp.sum((y - x) ** 2)


def small_outer(y, x, batch):
    return 0.5 * jnp.sum((y - 3.0) ** 2)


if __name__ == "__main__":
    main(
        "driver",
        "solve_bilevel over the same mathematics by hand as one jitted scan, history on; callbacks "
        "over none.",
        cases,
    )
