"""What solve_bilevel costs over the same mathematics written by hand as one jitted lax.scan, history on in both.

python benchmarks/driver.py
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import Case, main
from sklearn.datasets import load_digits

import bilevax as bx


def mnist_linear():
    """20,000 training and 5,000 validation images, from the folder that BILEVAX_DATA names; None where it is not there."""
    path = os.path.join(os.environ.get("BILEVAX_DATA", ""), "mnist.npz")
    if not os.path.exists(path):
        return None
    data = np.load(path)
    x, y = data["x_train"].reshape(-1, 784).astype(np.float32) / 255, data["y_train"].astype(np.int32)
    return (x[:20000], y[:20000], np.arange(20000, dtype=np.int32)), (x[20000:25000], y[20000:25000])


def digits():
    x, y = load_digits(return_X_y=True)
    x, y = x.astype(np.float32) / 16, y.astype(np.int32)
    return (x[:600], y[:600], np.arange(600, dtype=np.int32)), (x[600:1000], y[600:1000])


def losses(w, batch):
    return optax.softmax_cross_entropy_with_integer_labels(batch[0] @ w, batch[1])


def inner(w, logits, batch):
    return jnp.mean(jax.nn.sigmoid(logits[batch[2]]) * losses(w, batch)) + 1e-3 * jnp.sum(w**2)


def outer(w, logits, batch):
    return jnp.mean(losses(w, batch))


def by_hand(rate, inner_steps, cg_steps, outer_opt, steps):
    """K gradient steps, k CG iterations from the last adjoint, one Adam step: a scan of nothing else."""

    def cg(matvec, b, x):
        r = b - matvec(x)

        def body(carry):
            x, r, p, rr, k = carry
            ap = matvec(p)
            a = rr / jnp.sum(p * ap)
            x, r = x + a * p, r - a * ap
            new = jnp.sum(r * r)
            return x, r, r + (new / rr) * p, new, k + 1

        return jax.lax.while_loop(lambda c: (c[3] > 1e-12 * jnp.sum(b * b)) & (c[4] < cg_steps), body, (x, r, r, jnp.sum(r * r), 0))[0]

    def step(carry, _, train, valid):
        w, q, logits, opt = carry
        w = jax.lax.fori_loop(0, inner_steps, lambda i, w: w - rate * jax.grad(inner)(w, logits, train), w)
        value, b = jax.value_and_grad(outer)(w, logits, valid)
        _, products = jax.linearize(lambda w: jax.grad(inner, (0, 1))(w, logits, train), w)
        q = cg(lambda v: products(v)[0], b, q)
        grad = -products(q)[1]
        updates, opt = outer_opt.update(grad, opt)
        return (w, q, optax.apply_updates(logits, updates), opt), (value, jnp.sqrt(jnp.sum(grad**2)))

    @jax.jit
    def run(w, logits, train, valid):
        carry = (w, jnp.zeros_like(w), logits, outer_opt.init(logits))
        return jax.lax.scan(lambda c, i: step(c, i, train, valid), carry, length=steps)

    return run


def cases(args):
    problems = {"digits, 600 x 64": (digits(), 10, 10, 256), "MNIST linear, 20000 x 784": (mnist_linear(), 5, 5, 16)}
    for label, (data, inner_steps, cg_steps, steps) in problems.items():
        if data is None or (args.quick and label.startswith("MNIST")):
            continue
        train, valid = jax.tree.map(jnp.asarray, data)
        w, logits = jnp.zeros((train[0].shape[1], 10)), jnp.zeros(len(train[1]))
        rate = 0.5
        hand = by_hand(rate, inner_steps, cg_steps, optax.adam(0.1), steps)
        algorithm = bx.algorithms.double_loop(
            bx.inner.optax(optax.sgd(rate), inner_steps),
            bx.hypergradient.implicit(bx.linear.cg(maxiter=cg_steps), max_residual=jnp.inf),
            optax.adam(0.1),
        )

        def ours(train=train, valid=valid, w=w, logits=logits, algorithm=algorithm, steps=steps):
            solution = bx.solve_bilevel(inner, outer, w, logits, inner_data=train, outer_data=valid, algorithm=algorithm, num_steps=steps)
            return solution.outer_params, solution.history["value"][-1]

        def theirs(train=train, valid=valid, w=w, logits=logits, hand=hand):
            (_, _, logits, _), (values, _) = hand(w, logits, train, valid)
            return logits, values[-1]

        yield Case(f"{label}, {steps} steps", {"by hand": theirs, "solve_bilevel": ours}, "by hand", lambda out: {"last value": out[1]})


if __name__ == "__main__":
    main("driver", "solve_bilevel over the same mathematics by hand as one jitted scan, history on.", cases)
