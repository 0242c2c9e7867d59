"""The registry of problems whose answers are known without automatic differentiation.

`PROBLEMS` maps a name to a `ClosedForm`: both objectives in jax, small seeded data, and the best
response, outer value and hypergradient in numpy float64. `MULTILEVEL` does the same for three
levels, and `unrolled_quadratic` and its like give the answers of *approximate* methods on the
quadratics; these are defined in files of their own, and all is imported from here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from tests.closed_form import (
    ROWS,
    ClosedForm,
    Quadratic,
    Reference,
    Spectrum,
    flatten,
    make,
    unflatten,
)
from tests.multilevel_problems import MULTILEVEL, MultilevelForm
from tests.quadratic_answers import (
    Unrolled,
    adjoint_quadratic,
    neumann_quadratic,
    one_step_quadratic,
    outer_gradients,
    unrolled_quadratic,
)

__all__ = [
    "MULTILEVEL", "PROBLEMS", "QUADRATICS", "ROWS", "TEXTBOOK", "ClosedForm", "MultilevelForm",
    "Quadratic", "Spectrum", "Unrolled",
    "adjoint_quadratic", "flatten", "neumann_quadratic", "one_step_quadratic", "outer_gradients",
    "unflatten", "unrolled_quadratic",
]  # fmt: skip


def _data(seed, features=5, scale=1.0):
    rng = np.random.default_rng(seed)
    train, held_out = (scale * rng.standard_normal((ROWS, features)) for _ in range(2))
    return rng, train, held_out, rng.standard_normal(features)


def _decay(outer_params):
    """Keeps the best penalty finite; `make(decay=0.01)` adds it to the reference."""
    return 0.005 * sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(outer_params))


def _sigmoid(z):
    return 1 / (1 + np.exp(-z))


# ---- quadratics


def _spd(rng, eigenvalues):
    basis = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))[0]
    return (basis * eigenvalues) @ basis.T


def _quadratic(
    name, seed, inner_params, outer_params, eigenvalues, coupled_through_hessian=False
) -> ClosedForm:
    """The rows of the batches carry the linear terms, so that a minibatch gradient has noise and
    the full one is exact."""
    rng, n, m = (
        np.random.default_rng(seed),
        len(eigenvalues),
        sum(np.size(leaf) for leaf in jax.tree.leaves(outer_params)),
    )
    A, B, F, H = (
        _spd(rng, eigenvalues),
        _spd(rng, np.linspace(1, 2, m)),
        _spd(rng, np.linspace(0.5, 1, n)),
        _spd(rng, np.linspace(1, 2, m)),
    )
    C, K = rng.standard_normal((m, n)), 0.1 * rng.standard_normal((m, n))
    rows_a, rows_h, rows_k = (rng.standard_normal((ROWS, size)) for size in (n, m, n))
    if (
        coupled_through_hessian
    ):  # the lower level is ill-conditioned, its solution and the outer problem are not
        C, rows_a = C @ A, rows_a @ A
    a, h, k = (rows.mean(axis=0) for rows in (rows_a, rows_h, rows_k))

    def form(left, matrix, right):
        return jnp.sum(left * (jnp.asarray(matrix, right.dtype) @ right))

    def inner(inner_params, outer_params, batch):
        y, x = ravel_pytree(inner_params)[0], ravel_pytree(outer_params)[0]
        return (
            form(y, A, y) / 2
            + form(x, B, x) / 2
            + form(x, C, y)
            + jnp.sum(jnp.mean(batch["a"], axis=0) * y)
        )

    def outer(inner_params, outer_params, batch):
        y, x = ravel_pytree(inner_params)[0], ravel_pytree(outer_params)[0]
        linear = jnp.sum(jnp.mean(batch["h"], axis=0) * x) + jnp.sum(
            jnp.mean(batch["k"], axis=0) * y
        )
        return form(y, F, y) / 2 + form(x, H, x) / 2 + form(x, K, y) + linear

    def value(y, x):
        x = flatten(x)
        return y @ F @ y / 2 + x @ H @ x / 2 + x @ K @ y + h @ x + k @ y

    reference = Reference(
        gradient=lambda y, x: A @ y + C.T @ flatten(x) + a,
        hessian=lambda y, x: A,
        cross=lambda y, x, q: unflatten(x, C @ q),
        value=value,
        value_y=lambda y, x: F @ y + K.T @ flatten(x) + k,
        value_x=lambda y, x: unflatten(x, H @ flatten(x) + K @ y + h),
    )
    params, batches = (inner_params, outer_params), ({"a": rows_a}, {"h": rows_h, "k": rows_k})
    coefficients = Quadratic(A, B, C, a, F, H, K, h, k)
    return make(
        name,
        inner,
        outer,
        params,
        batches,
        reference,
        linear=True,
        sampled=True,
        coefficients=coefficients,
    )


# ---- least squares


def _squared(w, batch, weights=1.0):
    residual = batch["X"] @ w - batch["y"]
    return jnp.mean(weights * residual * residual) / 2


def _squared_outer(w, outer_params, batch):
    return _squared(w, batch)


def _squared_outer_decayed(w, outer_params, batch):
    return _squared(w, batch) + _decay(outer_params)


def _ridge_inner(w, log_penalty, batch):
    return _squared(w, batch) + jnp.sum(jnp.exp(log_penalty) * w * w) / 2


def _ridge() -> ClosedForm:
    rng, X, V, true = _data(1)
    y, t = X @ true + rng.standard_normal(ROWS), V @ true + 0.1 * rng.standard_normal(ROWS)
    reference = Reference(
        gradient=lambda w, x: X.T @ (X @ w - y) / ROWS + np.exp(x) * w,
        hessian=lambda w, x: X.T @ X / ROWS + np.diag(np.exp(x)),
        cross=lambda w, x, q: np.exp(x) * w * q,
        value=lambda w, x: np.mean((V @ w - t) ** 2) / 2,
        value_y=lambda w, x: V.T @ (V @ w - t) / ROWS,
    )
    params, batches = (
        (0.1 * rng.standard_normal(5), np.linspace(-2, 0, 5)),
        ({"X": X, "y": y}, {"X": V, "y": t}),
    )
    return make(
        "ridge",
        _ridge_inner,
        _squared_outer_decayed,
        params,
        batches,
        reference,
        linear=True,
        sampled=True,
        decay=0.01,
    )


def _weighted_inner(w, logits, batch):
    return _squared(w, batch, jax.nn.sigmoid(logits[batch["index"]])) + 0.05 * jnp.sum(w * w)


def _weighted() -> ClosedForm:
    rng, X, V, true = _data(2)
    y, t = X @ true + rng.standard_normal(ROWS), V @ true + 0.1 * rng.standard_normal(ROWS)

    def cross(w, x, q):
        s = _sigmoid(x)
        return s * (1 - s) * (X @ w - y) * (X @ q) / ROWS

    reference = Reference(
        gradient=lambda w, x: X.T @ (_sigmoid(x) * (X @ w - y)) / ROWS + 0.1 * w,
        hessian=lambda w, x: (X.T * _sigmoid(x)) @ X / ROWS + 0.1 * np.eye(5),
        cross=cross,
        value=lambda w, x: np.mean((V @ w - t) ** 2) / 2,
        value_y=lambda w, x: V.T @ (V @ w - t) / ROWS,
    )
    params = (0.1 * rng.standard_normal(5), 0.5 * rng.standard_normal(ROWS))
    batches = ({"X": X, "y": y, "index": np.arange(ROWS, dtype=np.int32)}, {"X": V, "y": t})
    return make(
        "weighted_least_squares",
        _weighted_inner,
        _squared_outer,
        params,
        batches,
        reference,
        linear=True,
        sampled=True,
    )


def _distillation_inner(w, synthetic, batch):
    residual = synthetic["inputs"] @ w - synthetic["targets"]
    return jnp.mean(residual * residual) / 2 + 0.05 * jnp.sum(w * w)


def _distillation() -> ClosedForm:
    rng, _, V, true = _data(3)
    t, k = V @ true, 4

    def cross(w, x, q):
        S, r = x["inputs"], x["inputs"] @ w - x["targets"]
        return {"inputs": (np.outer(S @ q, w) + np.outer(r, q)) / k, "targets": -S @ q / k}

    reference = Reference(
        gradient=lambda w, x: x["inputs"].T @ (x["inputs"] @ w - x["targets"]) / k + 0.1 * w,
        hessian=lambda w, x: x["inputs"].T @ x["inputs"] / k + 0.1 * np.eye(5),
        cross=cross,
        value=lambda w, x: np.mean((V @ w - t) ** 2) / 2,
        value_y=lambda w, x: V.T @ (V @ w - t) / ROWS,
    )
    params = (
        0.1 * rng.standard_normal(5),
        {"inputs": rng.standard_normal((k, 5)), "targets": rng.standard_normal(k)},
    )
    batches = (None, {"X": V, "y": t})
    return make(
        "distillation",
        _distillation_inner,
        _squared_outer,
        params,
        batches,
        reference,
        linear=True,
        sampled=True,
    )


# squared distances from differences: exact zeros on the diagonal
def _kernel(log_width, left, right):
    gap = left[:, None, :] - right[None, :, :]
    return jnp.exp(-jnp.exp(-2 * log_width) * jnp.sum(gap * gap, axis=-1) / 2)


def _kernel_inner(dual, outer_params, batch):
    smoothed = _kernel(outer_params["log_width"], batch["X"], batch["X"]) @ dual
    return jnp.sum(
        dual * (smoothed / 2 + jnp.exp(outer_params["log_penalty"]) * dual / 2 - batch["y"])
    )


def _kernel_outer(dual, outer_params, batch):
    residual = _kernel(outer_params["log_width"], batch["V"], batch["X"]) @ dual - batch["y"]
    return jnp.mean(residual * residual) / 2


def _kernel_ridge() -> ClosedForm:
    rng, X, V, _ = _data(4, features=2)
    y, t = (
        np.sin(2 * data[:, 0]) + data[:, 1] + noise * rng.standard_normal(ROWS)
        for data, noise in ((X, 0.3), (V, 0.05))
    )
    squares_X, squares_V = (np.sum((left[:, None] - X[None]) ** 2, axis=-1) for left in (X, V))

    def gram(squares, x):
        return np.exp(-squares * np.exp(-2 * x["log_width"]) / 2)

    def gram_width(squares, x):  # derivative of `gram` in the logarithm of the width
        return gram(squares, x) * squares * np.exp(-2 * x["log_width"])

    def hessian(d, x):
        return gram(squares_X, x) + np.exp(x["log_penalty"]) * np.eye(ROWS)

    def residual(d, x):
        return gram(squares_V, x) @ d - t

    reference = Reference(
        gradient=lambda d, x: hessian(d, x) @ d - y,
        hessian=hessian,
        cross=lambda d, x, q: {
            "log_penalty": np.exp(x["log_penalty"]) * (d @ q),
            "log_width": q @ gram_width(squares_X, x) @ d,
        },
        value=lambda d, x: np.mean(residual(d, x) ** 2) / 2,
        value_y=lambda d, x: gram(squares_V, x).T @ residual(d, x) / ROWS,
        value_x=lambda d, x: {
            "log_penalty": np.zeros(()),
            "log_width": residual(d, x) @ gram_width(squares_V, x) @ d / ROWS,
        },
    )
    params = (np.zeros(ROWS), {"log_penalty": np.log(0.1), "log_width": np.log(0.5)})
    batches = ({"X": X, "y": y}, {"X": X, "V": V, "y": t})
    return make(
        "kernel_ridge",
        _kernel_inner,
        _kernel_outer,
        params,
        batches,
        reference,
        linear=True,
        sampled=False,
    )


# ---- generalised linear models; labels of the logistic ones are -1 and 1


def _logistic_loss(w, batch, weights=1.0):
    return jnp.mean(weights * jax.nn.softplus(-batch["y"] * (batch["X"] @ w)))


def _logistic_outer(w, outer_params, batch):
    return _logistic_loss(w, batch) + _decay(outer_params)


def _logistic_penalty_inner(w, log_penalty, batch):
    return _logistic_loss(w, batch) + jnp.sum(jnp.exp(log_penalty) * w * w) / 2


def _logistic_weights_inner(w, logits, batch):
    return _logistic_loss(w, batch, jax.nn.sigmoid(logits[batch["index"]])) + 0.05 * jnp.sum(w * w)


def _logistic_proximal_inner(w, anchor, batch):
    return _logistic_loss(w, batch) + jnp.sum((w - anchor) * (w - anchor)) / 4


def _logistic_parts(X, y):
    """Loss, gradient and Hessian of `mean_i s_i log(1 + exp(−y_i x_i'w))`, and each row's
    derivative of its loss in its margin `x_i'w`."""

    def loss(w):
        return np.mean(np.logaddexp(0, -y * (X @ w)))

    def slopes(w):
        return -y * _sigmoid(-y * (X @ w))

    def gradient(w, s=1.0):
        return X.T @ (s * slopes(w)) / ROWS

    def hessian(w, s=1.0):
        p = _sigmoid(X @ w)
        return (X.T * (s * p * (1 - p))) @ X / ROWS

    return loss, slopes, gradient, hessian


def _logistic(kind, seed, outer_start) -> ClosedForm:
    rng, X, V, true = _data(seed)
    y, t = (
        np.sign(data @ true + noise * rng.standard_normal(ROWS))
        for data, noise in ((X, 2.0), (V, 0.5))
    )
    _, slopes, gradient, hessian = _logistic_parts(X, y)
    loss, _, loss_gradient, _ = _logistic_parts(V, t)
    batches = ({"X": X, "y": y}, {"X": V, "y": t})
    if kind == "logistic_penalties":
        inner = _logistic_penalty_inner
        parts = (
            lambda w, x: gradient(w) + np.exp(x) * w,
            lambda w, x: hessian(w) + np.diag(np.exp(x)),
            lambda w, x, q: np.exp(x) * w * q,
        )
    elif kind == "logistic_data_weights":
        inner = _logistic_weights_inner
        batches[0]["index"] = np.arange(ROWS, dtype=np.int32)
        parts = (
            lambda w, x: gradient(w, _sigmoid(x)) + 0.1 * w,
            lambda w, x: hessian(w, _sigmoid(x)) + 0.1 * np.eye(5),
            lambda w, x, q: _sigmoid(x) * _sigmoid(-x) * slopes(w) * (X @ q) / ROWS,
        )
    else:
        inner = _logistic_proximal_inner
        parts = (
            lambda w, x: gradient(w) + (w - x) / 2,
            lambda w, x: hessian(w) + np.eye(5) / 2,
            lambda w, x, q: -q / 2,
        )
    reference = Reference(*parts, value=lambda w, x: loss(w), value_y=lambda w, x: loss_gradient(w))
    params = (0.1 * rng.standard_normal(5), outer_start)
    return make(
        kind,
        inner,
        _logistic_outer,
        params,
        batches,
        reference,
        linear=False,
        sampled=True,
        decay=0.01,
    )


def _multinomial_loss(W, batch):
    logits = batch["X"] @ W
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.sum(logits * batch["y"], axis=1))


def _multinomial_inner(W, log_penalty, batch):
    return _multinomial_loss(W, batch) + jnp.exp(log_penalty) * jnp.sum(W * W) / 2


def _multinomial_outer(W, log_penalty, batch):
    return _multinomial_loss(W, batch) + _decay(log_penalty)


def _multinomial() -> ClosedForm:
    rng, X, V, _ = _data(8, features=4)
    true = rng.standard_normal((4, 3))
    Y, T = (
        np.eye(3)[np.argmax(data @ true + noise * rng.standard_normal((ROWS, 3)), axis=1)]
        for data, noise in ((X, 1.5), (V, 0.5))
    )

    def probabilities(w, data):
        p = np.exp(data @ w.reshape(4, 3))
        return p / p.sum(axis=1, keepdims=True)

    def hessian(w, x):
        p = probabilities(w, X)
        blocks = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]
        return np.einsum("ij,il,icd->jcld", X, X, blocks).reshape(12, 12) / ROWS + np.exp(
            x
        ) * np.eye(12)

    reference = Reference(
        gradient=lambda w, x: (X.T @ (probabilities(w, X) - Y)).ravel() / ROWS + np.exp(x) * w,
        hessian=hessian,
        cross=lambda w, x, q: np.exp(x) * (w @ q),
        value=lambda w, x: -np.mean(np.log(np.sum(probabilities(w, V) * T, axis=1))),
        value_y=lambda w, x: (V.T @ (probabilities(w, V) - T)).ravel() / ROWS,
    )
    params, batches = (0.1 * rng.standard_normal((4, 3)), 0.0), ({"X": X, "y": Y}, {"X": V, "y": T})
    return make(
        "multinomial",
        _multinomial_inner,
        _multinomial_outer,
        params,
        batches,
        reference,
        linear=False,
        sampled=True,
        decay=0.01,
    )


def _poisson_loss(params, batch):
    log_rate = batch["X"] @ params["weights"] + params["bias"]
    return jnp.mean(jnp.exp(log_rate) - batch["y"] * log_rate)


def _poisson_inner(params, log_penalty, batch):
    return (
        _poisson_loss(params, batch)
        + 0.05 * params["bias"] ** 2
        + jnp.exp(log_penalty) * jnp.sum(params["weights"] ** 2) / 2
    )


def _poisson_outer(params, log_penalty, batch):
    return _poisson_loss(params, batch) + _decay(log_penalty)


def _poisson() -> ClosedForm:
    rng, X, V, true = _data(9, features=4, scale=0.5)
    y, t = (rng.poisson(np.exp(data @ true + 0.5)).astype(np.float64) for data in (X, V))
    Z, U = (
        np.column_stack([np.ones(ROWS), data]) for data in (X, V)
    )  # "bias" comes before "weights"
    penalised = np.array([0.0, 1, 1, 1, 1])

    def penalty(x):
        return np.exp(x) * penalised + 0.1 * (1 - penalised)

    reference = Reference(
        gradient=lambda w, x: Z.T @ (np.exp(Z @ w) - y) / ROWS + penalty(x) * w,
        hessian=lambda w, x: (Z.T * np.exp(Z @ w)) @ Z / ROWS + np.diag(penalty(x)),
        cross=lambda w, x, q: np.exp(x) * np.sum(penalised * w * q),
        value=lambda w, x: np.mean(np.exp(U @ w) - t * (U @ w)),
        value_y=lambda w, x: U.T @ (np.exp(U @ w) - t) / ROWS,
    )
    params, batches = (
        ({"bias": 0.1, "weights": 0.1 * rng.standard_normal(4)}, np.log(0.5)),
        ({"X": X, "y": y}, {"X": V, "y": t}),
    )
    return make(
        "poisson",
        _poisson_inner,
        _poisson_outer,
        params,
        batches,
        reference,
        linear=False,
        sampled=True,
        decay=0.01,
    )


def _huber_inner(w, log_penalty, batch):
    residual = batch["X"] @ w - batch["y"]
    smooth_l1 = jnp.sum(jnp.sqrt(w * w + 0.01))
    loss = jnp.mean(jnp.sqrt(1 + residual * residual) - 1)
    return (
        loss
        + jnp.exp(log_penalty["l1"]) * smooth_l1
        + jnp.exp(log_penalty["l2"]) * jnp.sum(w * w) / 2
    )


def _huber() -> ClosedForm:
    rng, X, V, true = _data(10)
    true = true * np.array([1, 0, 1, 0, 1])
    y, t = X @ true + rng.standard_t(2, ROWS), V @ true + 0.1 * rng.standard_normal(ROWS)

    def gradient(w, x):
        r = X @ w - y
        return (
            X.T @ (r / np.sqrt(1 + r**2)) / ROWS
            + np.exp(x["l1"]) * w / np.sqrt(w**2 + 0.01)
            + np.exp(x["l2"]) * w
        )

    def hessian(w, x):
        curvature = (1 + (X @ w - y) ** 2) ** -1.5
        return (X.T * curvature) @ X / ROWS + np.diag(
            np.exp(x["l1"]) * 0.01 * (w**2 + 0.01) ** -1.5 + np.exp(x["l2"])
        )

    reference = Reference(
        gradient=gradient,
        hessian=hessian,
        cross=lambda w, x, q: {
            "l1": np.exp(x["l1"]) * np.sum(q * w / np.sqrt(w**2 + 0.01)),
            "l2": np.exp(x["l2"]) * (w @ q),
        },
        value=lambda w, x: np.mean((V @ w - t) ** 2) / 2,
        value_y=lambda w, x: V.T @ (V @ w - t) / ROWS,
    )
    params, batches = (
        (0.1 * rng.standard_normal(5), {"l1": np.log(0.05), "l2": np.log(0.05)}),
        ({"X": X, "y": y}, {"X": V, "y": t}),
    )
    return make(
        "huber_elastic",
        _huber_inner,
        _squared_outer_decayed,
        params,
        batches,
        reference,
        linear=False,
        sampled=True,
        decay=0.01,
    )


# ---- a nonlinear one without data


def _cosh_inner(y, x, batch):
    return jnp.cosh(y[0] - x[0]) + jnp.cosh(y[1] - x[0] * x[1]) + (y[0] + y[1] - x[1]) ** 2 / 2


def _cosh_outer(y, x, batch):
    return jnp.cosh(y[0] - 1) + (y[1] + 0.5) ** 2 / 2 + 0.05 * jnp.sum(x * x)


def _cosh() -> ClosedForm:
    def gaps(y, x):
        return np.array([y[0] - x[0], y[1] - x[0] * x[1]])

    def cross(y, x, q):
        c = np.cosh(gaps(y, x)) * q
        return np.array([-c[0] - x[1] * c[1], -x[0] * c[1] - q[0] - q[1]])

    reference = Reference(
        gradient=lambda y, x: np.sinh(gaps(y, x)) + (y[0] + y[1] - x[1]),
        hessian=lambda y, x: np.diag(np.cosh(gaps(y, x))) + 1,
        cross=cross,
        value=lambda y, x: np.cosh(y[0] - 1) + (y[1] + 0.5) ** 2 / 2 + 0.05 * (x @ x),
        value_y=lambda y, x: np.array([np.sinh(y[0] - 1), y[1] + 0.5]),
        value_x=lambda y, x: 0.1 * x,
    )
    params = (np.array([0.3, -0.2]), np.array([0.5, -0.3]))
    return make(
        "cosh",
        _cosh_inner,
        _cosh_outer,
        params,
        (None, None),
        reference,
        linear=False,
        sampled=True,
    )


_TREES = (
    {"gain": 0.2, "rows": np.full((1, 3), -0.1), "shift": np.array([0.3, 0.1])},
    {"bias": 0.5, "matrix": np.array([[0.2, -0.4, 0.1]])},
)
_FORMS = (
    _quadratic(
        "quadratic", 0, np.linspace(-0.5, 0.5, 6), np.linspace(1, -1, 4), np.linspace(0.5, 2, 6)
    ),
    _quadratic("quadratic_tree", 11, *_TREES, np.linspace(0.5, 2, 6)),
    _ridge(),
    _weighted(),
    _distillation(),
    _logistic("logistic_penalties", 5, np.linspace(-3, -1, 5)),
    _logistic("logistic_data_weights", 6, np.linspace(-1, 1, ROWS)),
    _logistic("logistic_proximal", 7, np.linspace(0.5, -0.5, 5)),
    _multinomial(),
    _kernel_ridge(),
    _poisson(),
    _huber(),
    _quadratic(
        "quadratic_ill",
        12,
        np.linspace(-0.5, 0.5, 6),
        np.linspace(1, -1, 4),
        np.logspace(-4, 0, 6),
        coupled_through_hessian=True,
    ),
    _cosh(),
)

PROBLEMS = {
    form.name: form for form in _FORMS
}  # all smooth, deterministic and strongly convex below
QUADRATICS = tuple(form.name for form in _FORMS if form.coefficients)
TEXTBOOK = (
    "quadratic",
    "quadratic_tree",
    "ridge",
    "weighted_least_squares",
    "distillation",
    "logistic_penalties",
)  # the five textbook forms
