"""The update rules of stochastic bilevel algorithms in plain numpy, one loop each, written from the
papers and sharing nothing with the library.

The problem is a finite sum of quadratics whose Hessians differ from batch to batch:
``g_i = ½y'A_i y + ½x'B_i x + x'C_i y + a_i'y`` and ``f_j = ½y'F_j y + ½x'H_j x + x'K_j y + h_j'x +
k_j'y``. Batches come as sequences of batch numbers, one for each stream, in the order in which the
rule consumes them.
"""

from __future__ import annotations

import numpy as np


class Sum:
    """Gradients and products of the finite sum; batch None is all of it."""

    def __init__(self, inner: dict, outer: dict, batch_size: int):
        self.batches, self.size = ([inner, outer]), batch_size
        self.num = [len(next(iter(d.values()))) // batch_size for d in (inner, outer)]

    def mean(self, level, name, i):
        rows = self.batches[level][name]
        return (
            rows.mean(axis=0)
            if i is None
            else rows[i * self.size : (i + 1) * self.size].mean(axis=0)
        )

    def g_y(self, y, x, i):
        return self.mean(0, "A", i) @ y + self.mean(0, "C", i).T @ x + self.mean(0, "a", i)

    def g_x(self, y, x, i):
        return self.mean(0, "B", i) @ x + self.mean(0, "C", i) @ y

    def g(self, y, x, i):
        return (
            y @ self.mean(0, "A", i) @ y / 2
            + x @ self.mean(0, "B", i) @ x / 2
            + x @ self.mean(0, "C", i) @ y
            + self.mean(0, "a", i) @ y
        )

    def hessian(self, v, i):
        return self.mean(0, "A", i) @ v

    def cross(self, v, i):
        return self.mean(0, "C", i) @ v

    def f_y(self, y, x, j):
        return self.mean(1, "F", j) @ y + self.mean(1, "K", j).T @ x + self.mean(1, "k", j)

    def f_x(self, y, x, j):
        return self.mean(1, "H", j) @ x + self.mean(1, "K", j) @ y + self.mean(1, "h", j)

    def hypergradient(self, x):
        A = self.mean(0, "A", None)
        y = -np.linalg.solve(A, self.mean(0, "C", None).T @ x + self.mean(0, "a", None))
        return self.f_x(y, x, None) - self.cross(np.linalg.solve(A, self.f_y(y, x, None)), None)

    def triple(self, y, v, x, i, j):
        return (
            self.g_y(y, x, i),
            self.hessian(v, i) + self.f_y(y, x, j),
            self.cross(v, i) + self.f_x(y, x, j),
        )


def soba(p, y, x, T, inner, outer, a, b, decay):
    v = 0 * y
    for t in range(T):
        dy, dv, dx = p.triple(y, v, x, inner[t], outer[t])
        s = (t + 1.0) ** -decay
        y, v, x = y - a * s * dy, v - a * s * dv, x - b * s * dx
    return y, x


def ma_soba(p, y, x, T, inner, outer, a, b, theta):
    v, h = 0 * y, None
    for t in range(T):
        dy, dv, dx = p.triple(y, v, x, inner[t], outer[t])
        h = dx if h is None else (1 - theta) * h + theta * dx
        y, v, x = y - a * dy, v - a * dv, x - b * h
    return y, x


def saba(p, y, x, T, inner, outer, a, b):
    v = 0 * y
    n, m = p.num
    tables = {"gy": np.zeros((n, y.size)), "hv": np.zeros((n, y.size)), "cv": np.zeros((n, x.size))}
    tables |= {"fy": np.zeros((m, y.size)), "fx": np.zeros((m, x.size))}

    def saga(name, value, i):
        old = tables[name].copy()
        tables[name][i] = value
        return value - old[i] + old.mean(axis=0)

    for t in range(T):
        i, j = inner[t], outer[t]
        dy = saga("gy", p.g_y(y, x, i), i)
        dv = saga("hv", p.hessian(v, i), i) + saga("fy", p.f_y(y, x, j), j)
        dx = saga("cv", p.cross(v, i), i) + saga("fx", p.f_x(y, x, j), j)
        y, v, x = y - a * dy, v - a * dv, x - b * dx
    return y, x


def sarah(p, y, x, T, inner, outer, a, b, refresh):
    """SRBA and SPABA: `refresh` says at which steps the directions are exact."""
    u, old, d = (y, 0 * y, x), None, None
    for t in range(T):
        if refresh[t]:
            d = p.triple(*u, None, None)
        else:
            new, past = p.triple(*u, inner[t], outer[t]), p.triple(*old, inner[t], outer[t])
            d = tuple(di + ni - oi for di, ni, oi in zip(d, new, past, strict=True))
        old = u
        u = tuple(ui - s * di for ui, s, di in zip(u, (a, a, b), d, strict=True))
    return u[0], u[2]


def fsla(p, y, x, T, inner, hyper, outer, a, b, eta, decay):
    v, d, x_before = 0 * y, None, x
    for t in range(T):
        s = (t + 1.0) ** -decay
        y_new = y - a * s * p.g_y(y, x, inner[t])
        v_new = v - a * s * (p.hessian(v, hyper[2 * t]) + p.f_y(y_new, x, outer[2 * t]))
        i, j = hyper[2 * t + 1], outer[2 * t + 1]
        new = p.cross(v_new, i) + p.f_x(y_new, x, j)
        past = p.cross(v, i) + p.f_x(y, x_before, j)
        d = new if d is None else new + (1 - eta * s) * (d - past)
        y, v, x_before, x = y_new, v_new, x, x - b * s * d
    return y, x


def amigo(p, y, x, T, inner, hyper, outer, a, b, K, M, c):
    q = 0 * y
    inner, hyper = iter(inner), iter(hyper)
    for t in range(T):
        for _ in range(K):
            y = y - a * p.g_y(y, x, next(inner))
        w = p.f_y(y, x, outer[t])
        for _ in range(M):
            q = q - c * (p.hessian(q, next(hyper)) - w)
        x = x - b * (p.f_x(y, x, outer[t]) - p.cross(q, next(hyper)))
    return y, x


def stocbio(p, y, x, T, inner, hyper, outer, a, b, K, Q, c):
    inner, hyper = iter(inner), iter(hyper)
    for t in range(T):
        for _ in range(K):
            y = y - a * p.g_y(y, x, next(inner))
        term = p.f_y(y, x, outer[t])
        series = term.copy()
        for _ in range(Q):
            term = term - c * p.hessian(term, next(hyper))
            series = series + term
        x = x - b * (p.f_x(y, x, outer[t]) - p.cross(c * series, next(hyper)))
    return y, x


def bsa(p, y, x, T, inner, hyper, outer, a, b, K, Q, c, truncations, inner_decay, outer_decay):
    """BSA, and TTSA with K = 1. `hyper` has Q numbers a step, of which the last serves the mixed
    product."""
    number = 0
    for t in range(T):
        for k in range(K):
            number += 1
            y = y - a * number**-inner_decay * p.g_y(y, x, inner[t * K + k])
        q = p.f_y(y, x, outer[t])
        for i in range(truncations[t]):
            q = q - c * p.hessian(q, hyper[t * Q + i])
        x = x - b * (t + 1.0) ** -outer_decay * (
            p.f_x(y, x, outer[t]) - p.cross(Q * c * q, hyper[t * Q + Q - 1])
        )
    return y, x


def storm(p, y, x, T, inner, hyper, outer, a, b, eta, decay, Q, c, truncations=None):
    """MRBO, and SUSTAIN where `truncations` are given."""
    y_old, x_old, u, w = y, x, 0 * y, 0 * x
    for t in range(T):
        numbers = hyper[t * (Q + 1) : (t + 1) * (Q + 1)]

        def estimate(y, x, numbers=numbers, t=t):
            term = p.f_y(y, x, outer[t])
            if truncations is None:
                series = term.copy()
                for i in range(Q):
                    term = term - c * p.hessian(term, numbers[i])
                    series = series + term
                q = c * series
            else:
                for i in range(truncations[t]):
                    term = term - c * p.hessian(term, numbers[i])
                q = Q * c * term
            return p.f_x(y, x, outer[t]) - p.cross(q, numbers[Q])

        weight = 1.0 if t == 0 else eta * (t + 1.0) ** (-2 * decay)
        u = p.g_y(y, x, inner[t]) + (1 - weight) * (u - p.g_y(y_old, x_old, inner[t]))
        w = estimate(y, x) + (1 - weight) * (w - estimate(y_old, x_old))
        s = (t + 1.0) ** -decay
        y_old, x_old, y, x = y, x, y - a * s * u, x - b * s * w
    return y, x


def vrbo(p, y, x, T, inner, hyper, outer, a, b, period, K, Q, c):
    def estimate(y, x, numbers, j):
        term = p.f_y(y, x, j)
        series = term.copy()
        for i in range(Q):
            term = term - c * p.hessian(term, numbers[i])
            series = series + term
        return p.f_x(y, x, j) - p.cross(c * series, numbers[Q])

    for t in range(T):
        if t % period == 0:
            u, w = p.g_y(y, x, None), estimate(y, x, [None] * (Q + 1), None)
        y_old, x_old, x = y, x, x - b * w
        for k in range(K):
            n = t * K + k
            numbers = hyper[n * (Q + 1) : (n + 1) * (Q + 1)]
            u = u + p.g_y(y, x, inner[n]) - p.g_y(y_old, x_old, inner[n])
            w = w + estimate(y, x, numbers, outer[n]) - estimate(y_old, x_old, numbers, outer[n])
            y_old, x_old, y = y, x, y - a * u
    return y, x


def f2sa(
    p,
    y,
    x,
    T,
    inner,
    outer,
    a,
    b,
    K,
    penalty,
    growth,
    inner_decay,
    outer_decay,
    places,
    coefficients,
):
    points = [y.copy() for _ in places]
    for t in range(T):
        lam = penalty * (t + 1.0) ** growth
        for k in range(K):
            n = t * (K + 1) + k
            points = [
                z
                - a
                * (t + 1.0) ** -inner_decay
                * (p.g_y(z, x, inner[n]) + j / lam * p.f_y(z, x, outer[n]))
                for j, z in zip(places, points, strict=True)
            ]
        n = t * (K + 1) + K
        parts = [
            p.g_x(z, x, inner[n]) + j / lam * p.f_x(z, x, outer[n])
            for j, z in zip(places, points, strict=True)
        ]
        x = x - b * (t + 1.0) ** -outer_decay * lam * sum(
            c * part for c, part in zip(coefficients, parts, strict=True)
        )
    return points, x


def bome(p, y, x, T, inner, outer, a, b, K, eta):
    for t in range(T):
        z = y
        for k in range(K):
            z = z - a * p.g_y(z, x, inner[t * (K + 1) + k])
        i, j = inner[t * (K + 1) + K], outer[t]
        gap = np.concatenate([p.g_y(y, x, i), p.g_x(y, x, i) - p.g_x(z, x, i)])
        f = np.concatenate([p.f_y(y, x, j), p.f_x(y, x, j)])
        lam = max(eta * gap @ gap - f @ gap, 0.0) / (gap @ gap)
        both = np.concatenate([y, x]) - b * (f + lam * gap)
        y, x = both[: y.size], both[y.size :]
    return y, x


def pzobo(p, y, x, T, inner, outer, a, b, K, mu, noise):
    for t in range(T):

        def solve(x, y=y, t=t):
            for k in range(K):
                y = y - a * p.g_y(y, x, inner[t * K + k])
            return y

        y = solve(x)
        w = p.f_y(y, x, outer[t])
        jacobian = sum(((solve(x + mu * u) - y) / mu) @ w * u for u in noise[t]) / len(noise[t])
        x = x - b * (p.f_x(y, x, outer[t]) + jacobian)
    return y, x


def s_tfbo(p, y, x, T, initial):
    v, beta, gamma, alpha = 0 * y, initial**2, initial**2, initial**2
    for _ in range(T):
        dy, dv, dx = p.triple(y, v, x, None, None)
        beta, gamma, alpha = beta + dy @ dy, gamma + dv @ dv, alpha + dx @ dx
        both = max(beta, gamma) ** 0.5
        y, v, x = y - dy / beta**0.5, v - dv / both, x - dx / (alpha**0.5 * both)
    return y, x


def d_tfbo(p, y, x, T, initial, tol):
    v, alpha = 0 * y, initial**2
    for _ in range(T):
        beta = initial**2
        while np.linalg.norm(d := p.g_y(y, x, None)) > tol:
            beta += d @ d
            y = y - d / beta**0.5
        gamma = initial**2
        while np.linalg.norm(d := p.triple(y, v, x, None, None)[1]) > tol:
            gamma += d @ d
            v = v - d / gamma**0.5
        d = p.triple(y, v, x, None, None)[2]
        alpha += d @ d
        x = x - d / alpha**0.5
    return y, x
