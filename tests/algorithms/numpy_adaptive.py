"""MAID and HOAG in plain numpy, on the quadratics of `numpy_algorithms.Sum`, full batch: gradient descent inside, conjugate gradients for the adjoint."""

from __future__ import annotations

import numpy as np

norm = np.linalg.norm
UNIT = np.finfo(np.float64).eps


def descend_to(p, y, x, size, target, scale):
    """Fixed steps until the gradient is small; the tolerance is relative to the larger of `scale` and the first gradient."""
    d = p.g_y(y, x, None)
    bar = target / scale * max(scale, norm(d))
    while norm(d) > bar:
        y = y - size * d
        d = p.g_y(y, x, None)
    return y, norm(d)


def conjugate(A, b, q, residual):
    r = b - A @ q
    d, rr = r.copy(), r @ r
    while np.sqrt(rr) > residual:
        Ad = A @ d
        step = rr / (d @ Ad)
        q, r = q + step * d, r - step * Ad
        rr, old = r @ r, rr
        d = r + rr / old * d
    return q, norm(b - A @ q)


def maid(p, y, x, T, size, k, *, epsilon, delta, max_error, decrease, shrink, tighten, loosen, step):
    """With gradient directions. `k` holds μ, ‖B‖, L_f and L_fx; the other constants of a quadratic are 0."""
    mu, cross, smooth, outer_cross = k
    A, q, scale = p.mean(0, "A", None), 0 * y, 0.0
    f = lambda y, x: sum([y @ p.mean(1, "F", None) @ y / 2, x @ p.mean(1, "H", None) @ x / 2, x @ p.mean(1, "K", None) @ y]) + linear(y, x)
    linear = lambda y, x: p.mean(1, "h", None) @ x + p.mean(1, "k", None) @ y
    slack = lambda y, x, error: norm(p.f_y(y, x, None)) * error + smooth * error**2 / 2
    for _ in range(T):
        scale = max(scale, norm(p.g_y(y, x, None)))
        accepted, begun = False, step
        for j in range(3):
            if j:
                epsilon, delta = epsilon * tighten, delta * tighten
            while True:
                target = max(epsilon * mu, 10 * UNIT * scale)
                y, left = descend_to(p, y, x, size, target, scale)
                f_y = p.f_y(y, x, None)
                q, residual = conjugate(A, f_y, q, max(delta, 10 * UNIT * norm(f_y)))
                z = p.f_x(y, x, None) - p.cross(q, None)
                error = left / mu
                slope, weight = outer_cross + cross * smooth / mu, cross / mu
                if weight * residual + slope * error <= max_error * norm(z):
                    break
                wanted = 0.25 * max_error * norm(z)
                epsilon = np.clip(wanted / slope, epsilon * tighten**5, epsilon * tighten)
                delta = np.clip(wanted / weight, delta * tighten**5, delta * tighten)
            trial_size = begun
            for _ in range(10 + j):
                trial = x - trial_size * z
                y_trial, left = descend_to(p, y, trial, size, max(epsilon * mu, 10 * UNIT * scale), scale)
                change = f(y_trial, trial) - f(y, x)
                if change + slack(y_trial, trial, left / mu) + slack(y, x, error) <= -decrease * (z @ (x - trial)):
                    accepted = True
                    break
                trial_size *= shrink
            if accepted:
                break
        if accepted:
            x, y, step, epsilon, delta = trial, y_trial, trial_size * 10 / 9, epsilon * loosen, delta * loosen
        else:
            step = begun * shrink
    return y, x


def hoag(p, y, x, T, size, epsilon, rate):
    A, q, scale, lipschitz, last = p.mean(0, "A", None), 0 * y, 0.0, None, None
    linear = lambda y, x: p.mean(1, "h", None) @ x + p.mean(1, "k", None) @ y
    f = lambda y, x: sum([y @ p.mean(1, "F", None) @ y / 2, x @ p.mean(1, "H", None) @ x / 2, x @ p.mean(1, "K", None) @ y]) + linear(y, x)
    for t in range(T):
        scale = max(scale, norm(p.g_y(y, x, None)))
        accuracy = epsilon * rate**t
        y, _ = descend_to(p, y, x, size, accuracy * scale, scale)
        f_y = p.f_y(y, x, None)
        q, _ = conjugate(A, f_y, q, accuracy * norm(f_y))
        z, value = p.f_x(y, x, None) - p.cross(q, None), f(y, x)
        lipschitz = norm(z) if lipschitz is None else lipschitz
        if last is not None:
            x_last, value_last, accuracy_last = last
            length = norm(x - x_last)
            slack = 0.25 * accuracy + accuracy_last * 1.25 * length
            if value - value_last > 0.2 * abs(value_last):
                lipschitz, x, last = 2 * lipschitz, x_last, None
                continue
            if lipschitz * length**2 > slack:
                lipschitz *= 0.95 if value <= value_last + slack - lipschitz * length**2 else 1 / 0.95
        last = (x, value, accuracy)
        x = x - z / lipschitz
    return y, x
