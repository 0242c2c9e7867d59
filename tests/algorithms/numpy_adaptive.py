"""MAID and HOAG in plain numpy, on the quadratics of `numpy_algorithms.Sum`, full batch: gradient
descent inside, conjugate gradients for the adjoint."""

from __future__ import annotations

import numpy as np

norm = np.linalg.norm
UNIT = np.finfo(np.float64).eps


def descend_to(p, y, x, size, tol):
    """Fixed steps until two iterates in a row are within ``tol ‖y‖`` of the solution, as the
    smallest curvature along the last steps tells."""
    g, low, high, reach, near = p.g_y(y, x, None), np.inf, 1 / size, norm(y), 0
    while near < 2 and norm(g) > 0:
        new = y - size * g
        g_new = p.g_y(new, x, None)
        s, u = new - y, g_new - g
        if not norm(s) > 0:
            break
        met = s @ u / (s @ s)
        if norm(s) > UNIT**0.5 * norm(y):
            high = max(high, met)
        if s @ u > 0 and norm(u) > 10 * UNIT * high * norm(y):
            low = min(1.1 * low, met)
        y, g, reach = new, g_new, max(reach, norm(new))
        close = (
            np.isfinite(low)
            and norm(g) <= max(tol, 4 * UNIT) * max(norm(y), UNIT**0.5 * reach) * low
        )
        near = near + 1 if close else 0
    return y, norm(g)


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


def finer(accuracy, factor):
    return max(factor * accuracy, min(accuracy, max(1e-8, 16 * UNIT)))


def maid(p, y, x, T, size, k, *, epsilon, delta, max_error, decrease):
    """With gradient directions, and with a certificate where `k` holds μ, ‖B‖, L_f and L_fx; the
    other constants of a quadratic are 0."""
    A, q = p.mean(0, "A", None), 0 * y
    f = lambda y, x: (
        sum(
            [
                y @ p.mean(1, "F", None) @ y / 2,
                x @ p.mean(1, "H", None) @ x / 2,
                x @ p.mean(1, "K", None) @ y,
            ]
        )
        + linear(y, x)
    )
    linear = lambda y, x: p.mean(1, "h", None) @ x + p.mean(1, "k", None) @ y
    slack = lambda y, x, error: norm(p.f_y(y, x, None)) * error + k[2] * error**2 / 2 if k else 0.0
    radius, bb, stuck, told, z = 0.1 * max(np.sqrt(x.size), norm(x)), 0.0, 0, False, 0 * x
    value, wrong, margin, promised = np.inf, 0.0, 0.0, 0.0
    step = lambda z: (bb if bb > 0 else radius / norm(z)) * z
    for t in range(T):
        # the search
        p_now = step(z) if t else 0 * x
        cap = min(1.0, radius / norm(p_now)) if norm(p_now) else 1.0
        finest = finer(epsilon, 0.1) >= epsilon and finer(delta, 0.1) >= delta
        stays, moved, trials, length = (
            t == 0 or promised <= 0 or (stuck >= 3 if finest else abs(wrong) > promised),
            False,
            0,
            cap,
        )
        while not stays and trials < 8:
            trials += 1
            x_new = x - length * p_now
            y_new, left = descend_to(p, y, x_new, size, epsilon)
            change = f(y_new, x_new) - value
            if not k:
                change = max(
                    change, change - ((q @ p.g_y(y_new, x_new, None) if told else 0.0) - wrong)
                )
            drop = z @ (x - x_new)
            if (
                change + (slack(y_new, x_new, left / k[0]) + margin if k else 0.0)
                <= -decrease * drop
            ):
                moved = True
                break
            bend = 2 * (change + drop)
            length *= np.clip(drop / bend, 0.1, 0.5) if bend > 0 else 0.2
        failed = not stays and not moved
        if not moved:
            trials += 1
            x_new = x
            epsilon = finer(epsilon, 0.1) if failed else epsilon
            y_new, left = descend_to(p, y, x, size, epsilon)
        delta = finer(delta, 0.1) if failed else delta
        # the hypergradient
        for _ in range(30):
            if k:
                y_new, left = descend_to(p, y_new, x_new, size, epsilon)
            f_y = p.f_y(y_new, x_new, None)
            q, residual = conjugate(A, f_y, q, delta * norm(f_y))
            z_new = p.f_x(y_new, x_new, None) - p.cross(q, None)
            if not k:
                break
            slope, weight, error = k[3] + k[1] * k[2] / k[0], k[1] / k[0], left / k[0]
            if weight * residual + slope * error <= max_error * norm(z_new):
                break
            wanted = 0.25 * max_error * norm(z_new)
            epsilon = max(epsilon * np.clip(wanted / (slope * error), 0.5**5, 0.5), 4 * UNIT)
            delta = max(delta * np.clip(wanted / (weight * residual), 0.5**5, 0.5), 4 * UNIT)
        # what was learned
        new_value = f(y_new, x_new)
        if not stays:
            blurred = abs(new_value - value) > promised
            s, u, forget = x_new - x, z_new - z, failed and not blurred
            keep = not forget and s @ s > 0 and s @ u > 1e-4 * norm(s) * norm(u)
            bb = s @ s / (s @ u) if keep else 0.0 if forget else bb
            old, shortened = radius, max(2 * norm(s), 0.1 * radius)
            radius = (
                0.1 * old
                if forget
                else shortened
                if trials > 1
                else 2 * radius
                if cap < 1
                else radius
            )
            stuck = stuck + 1 if failed else 0
        x, y, z, value, told = x_new, y_new, z_new, new_value, residual <= 0.1 * norm(f_y)
        wrong = q @ p.g_y(y, x, None) if told and not k else 0.0
        margin = slack(y, x, left / k[0]) if k else 0.0
        promised = min(1.0, radius / norm(step(z))) * (z @ step(z))
        if not k and (abs(wrong) > 0.1 * promised or trials > 2 or not told):
            epsilon, delta = finer(epsilon, 0.2), finer(delta, 0.2)
    return y, x


def hoag(p, y, x, T, size, epsilon, rate):
    A, q, lipschitz, last = p.mean(0, "A", None), 0 * y, None, None
    linear = lambda y, x: p.mean(1, "h", None) @ x + p.mean(1, "k", None) @ y
    f = lambda y, x: (
        sum(
            [
                y @ p.mean(1, "F", None) @ y / 2,
                x @ p.mean(1, "H", None) @ x / 2,
                x @ p.mean(1, "K", None) @ y,
            ]
        )
        + linear(y, x)
    )
    for t in range(T):
        accuracy = epsilon * rate**t
        y, _ = descend_to(p, y, x, size, accuracy)
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
                lipschitz *= (
                    0.95 if value <= value_last + slack - lipschitz * length**2 else 1 / 0.95
                )
        last = (x, value, accuracy)
        x = x - z / lipschitz
    return y, x
