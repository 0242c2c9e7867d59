"""What curvature made of layers is worth: as an inverse by itself, and as a preconditioner, in
counted products.

    python benchmarks/curvature.py

Three small networks at the end of their training: a perceptron and a convolutional network on
digits, a character transformer on text. The Gauss-Newton matrix is written out, so that what each
approximation answers can be held against the exact damped inverse: the cosine of the two for the
gradient of a validation loss. Then CG with each as preconditioner: products with the matrix until
the residual is a hundredth and a millionth. Those of a Nyström sketch are counted apart, since a
kept one need not be made each time. Nothing here is timed.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

import bilevax as bx
from bilevax.linear.preconditioner import Point, Preconditioner, at

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import data

SHARES, RANK, TOLS = (1e-3, 1e-2), 20, (1e-2, 1e-6)


def normal(seed, *shape, fan=None):
    return jax.random.normal(jax.random.key(seed), shape) * (fan or shape[0]) ** -0.5


def nll(out, rows):
    return optax.softmax_cross_entropy_with_integer_labels(out, rows["y"])


# ---- the networks


def split_digits(count):
    x, y = data.digits()
    order = np.random.default_rng(0).permutation(len(x))
    x, y = jnp.asarray(x[order], jnp.float64), jnp.asarray(y[order])
    return {"x": x[:count], "y": y[:count]}, {
        "x": x[count : count + 400],
        "y": y[count : count + 400],
    }


def perceptron(p, rows):
    h = jnp.tanh(rows["x"] @ p["w0"] + p["b0"])
    h = jnp.tanh(h @ p["w1"] + p["b1"])
    return h @ p["w2"] + p["b2"]


def mlp():
    p = {"w0": normal(0, 64, 20), "w1": normal(1, 20, 20), "w2": normal(2, 20, 10)}
    return (
        perceptron,
        {**p, "b0": jnp.zeros(20), "b1": jnp.zeros(20), "b2": jnp.zeros(10)},
        *split_digits(600),
        1500,
    )


def convolutional(p, rows):
    h = rows["x"].reshape(-1, 8, 8, 1)
    for w, b in ((p["w0"], p["b0"]), (p["w1"], p["b1"])):
        h = jax.nn.gelu(
            lax.conv_general_dilated(
                h, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            + b
        )
    h = jnp.tanh(h.reshape(h.shape[0], -1) @ p["w2"] + p["b2"])
    return h @ p["w3"] + p["b3"]


def cnn():
    p = {
        "w0": normal(0, 3, 3, 1, 6, fan=9),
        "w1": normal(1, 3, 3, 6, 12, fan=54),
        "w2": normal(2, 48, 16),
        "w3": normal(3, 16, 10),
    }
    biases = {f"b{i}": jnp.zeros(n) for i, n in enumerate((6, 12, 16, 10))}
    return convolutional, {**p, **biases}, *split_digits(600), 1500


LENGTH, WIDTH, SYMBOLS = 16, 8, 28


def attention(p, rows):
    norm = lambda x, scale: x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale
    h = p["embed"][rows["x"]] + p["place"]
    parts = (norm(h, p["s0"]) @ p["qkv"]).reshape(*h.shape[:2], 3, 2, WIDTH // 2)
    query, key, value = (parts[:, :, i] for i in range(3))
    weights = jnp.einsum("bihd,bjhd->bhij", query, key) * (WIDTH // 2) ** -0.5
    weights = jax.nn.softmax(
        jnp.where(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), weights, -1e9), -1
    )
    h = h + jnp.einsum("bhij,bjhd->bihd", weights, value).reshape(h.shape) @ p["out"]
    h = h + jax.nn.gelu(norm(h, p["s1"]) @ p["up"]) @ p["down"]
    return norm(h, p["s2"]) @ p["head"]


def transformer():
    text = data.text_domains()["plays"][:60_000].lower()
    common = {c: i for i, c in enumerate(sorted(sorted(set(text)), key=text.count)[-SYMBOLS + 1 :])}
    codes = np.array([common.get(c, SYMBOLS - 1) for c in text])
    pieces = jnp.asarray(
        np.stack([codes[i * LENGTH : i * LENGTH + LENGTH + 1] for i in range(700)])
    )
    rows = lambda a: {"x": a[:, :-1], "y": a[:, 1:]}
    p = {
        "embed": normal(0, SYMBOLS, WIDTH, fan=4),
        "place": normal(1, LENGTH, WIDTH),
        "head": normal(2, WIDTH, SYMBOLS),
    }
    p |= {
        "qkv": normal(3, WIDTH, 3 * WIDTH),
        "out": normal(4, WIDTH, WIDTH),
        "up": normal(5, WIDTH, 4 * WIDTH),
        "down": normal(6, 4 * WIDTH, WIDTH),
    }
    return (
        attention,
        p | {f"s{i}": jnp.ones(WIDTH) for i in range(3)},
        rows(pieces[:96]),
        rows(pieces[400:]),
        300,
    )


NETWORKS = {"perceptron": mlp, "convolutional": cnn, "transformer": transformer}


# ---- what is measured


def trained(network, params, train, steps):
    objective = lambda p: (
        jnp.mean(nll(network(p, train), train))
        + 0.5e-3 * sum(jnp.vdot(a, a) for a in jax.tree.leaves(p))
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    @jax.jit
    def run(params):
        def body(carry, _):
            p, state = carry
            updates, state = optimizer.update(jax.grad(objective)(p), state)
            return (optax.apply_updates(p, updates), state), None

        return lax.scan(body, (params, optimizer.init(params)), length=steps)[0][0]

    return run(params)


def gauss_newton(network, params, rows):
    """The matrix itself, an example at a time."""
    flat, back = ravel_pytree(params)
    positions = network(params, rows)[..., 0].size

    @jax.jit
    def summed(flat, rows):
        def add(total, row):
            one = jax.tree.map(lambda a: a[None], row)
            outputs = lambda v: network(back(v), one).reshape(-1, network(params, one).shape[-1])
            jacobian, chance = jax.jacrev(outputs)(flat), jax.nn.softmax(outputs(flat))
            curve = jax.vmap(jnp.diag)(chance) - chance[:, :, None] * chance[:, None, :]
            return total + jnp.einsum("nci,ncd,ndj->ij", jacobian, curve, jacobian), None

        return lax.scan(add, jnp.zeros((flat.size, flat.size)), rows)[0]

    return summed(flat, rows) / positions


def solvers(network):
    pair = (network, nll)
    make = bx.linear
    return {
        "none": None,
        "diagonal": make.diagonal(pair, draws="all"),
        "Nyström 20": make.nystrom_preconditioner(RANK, rho=1e-6),
        "K-FAC": make.kfac(pair, draws="all"),
        "EK-FAC": make.ekfac(pair, draws="all"),
        "EK-FAC, 4 draws": make.ekfac(pair, draws=4),
        "EK-FAC, empirical": make.ekfac(),
    }


def one(network, params, train, valid, steps):
    params = trained(network, params, train, steps)
    b = jax.jit(jax.grad(lambda p: jnp.mean(nll(network(p, valid), valid))))(params)
    flat, back = ravel_pytree(params)
    vector = ravel_pytree(b)[0]
    matrix = gauss_newton(network, params, train)
    largest = float(jnp.linalg.eigvalsh(matrix)[-1])
    call = lambda fn, first, rows, **keywords: fn(first, rows, **keywords)
    value = lambda p, rows: jnp.mean(nll(network(p, rows), rows))
    found = {"parameters": int(flat.size), "rows": {}}
    for name, solver in solvers(network).items():

        @jax.jit
        def answer(b, matrix, params, damping, solver=solver):
            matvec = lambda v: back(matrix @ ravel_pytree(v)[0] + damping * ravel_pytree(v)[0])
            held = solver
            if isinstance(solver, bx.base.Linear):
                held = at(solver, Point(value, params, train, call, damping)).preconditioner
            elif isinstance(solver, Preconditioner):
                held = bx.linear.nystrom_preconditioner(RANK, rho=damping)
            inverse = lambda v: v
            if held is not None:
                state = held.refresh(matvec, held.init(b))
                inverse = lambda v: held.apply(state, v)
            counts = [
                bx.linear.cg(3000, tol, preconditioner=inverse)(matvec, b, None)[1].iterations
                for tol in TOLS
            ]
            return ravel_pytree(inverse(b))[0], counts

        for share in SHARES:
            damping = share * largest
            exact = jnp.linalg.solve(matrix + damping * jnp.eye(flat.size), vector)
            x, counts = answer(b, matrix, params, damping)
            cosine = float(jnp.vdot(x, exact) / jnp.linalg.norm(x) / jnp.linalg.norm(exact))
            length = float(jnp.linalg.norm(x) / jnp.linalg.norm(exact))
            row = {"cosine": cosine, "length": length, "products": [int(c) for c in counts]}
            found["rows"].setdefault(name, {})[f"{share:g}"] = row
    return found


def table(results):
    head = [
        f"{share:g}: {what}"
        for share in SHARES
        for what in ("cosine", *(f"products to {tol:g}" for tol in TOLS))
    ]
    lines = [["network", "curvature", *head]]
    for network, found in results.items():
        for name, shares in found["rows"].items():
            cells = [
                c
                for row in shares.values()
                for c in (f"{row['cosine']:.3f}", *map(str, row["products"]))
            ]
            lines.append([f"{network} ({found['parameters']:,})", name, *cells])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "curvature.json"
    )
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.networks:
        results[name] = one(*NETWORKS[name]())
        print(table({name: results[name]}), flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
