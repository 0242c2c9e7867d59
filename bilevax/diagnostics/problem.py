"""A look at a problem of one's own before it is solved: shapes, scales, curvature, smoothness, and
which method that asks for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevax import check, inner, tree
from bilevax._core.spectrum import NEGATIVE, krylov
from bilevax.base import Objective, PyTree
from bilevax.estimate import value_and_hypergrad
from bilevax.hypergradient import unrolled

PRODUCTS = 20  # with the inner Hessian, for its extreme eigenvalues
ILL = 1e4  # condition from which a linear solve wants damping or a preconditioner
# change of a second difference between two small steps from which a function is not smooth there
KINK = 0.1
NAMES = ("inner_objective", "outer_objective", "inner_params", "outer_params")
DATA = ("inner_data", "outer_data")


def load(where: str) -> dict[str, Any]:
    """What ``module:function`` returns: the arguments of `solve_bilevel` by name, or the first four
    and both batches in order.
    """
    module, colon, name = where.partition(":")
    if not (module and colon and name):
        raise ValueError(
            f"problem: got {where!r}; expected module:function. Try mymodule:problem, from the "
            "folder that has mymodule.py."
        )
    made = getattr(importlib.import_module(module), name)()
    if isinstance(made, (tuple, list)):
        made = dict(zip((*NAMES, *DATA), made, strict=False))
    missing = [name for name in NAMES if not isinstance(made, dict) or name not in made]
    if missing:
        raise ValueError(
            f"problem: got {check.describe(made)} from {where}, without {', '.join(missing)}; "
            f"expected a dict with {', '.join(NAMES)}."
        )
    for name in NAMES[:2]:
        if not callable(made[name]) or isinstance(made[name], Objective):
            raise ValueError(
                f"{name}: got {check.describe(made[name])}; expected a plain function "
                "(inner_params, outer_params, batch) -> scalar."
            )
    return made


def report(problem: dict[str, Any]) -> Iterator[str]:
    """Lines of what was found, and at the end what to take.

    `problem` has the objectives and parameters of `solve_bilevel` by name, ``inner_data`` and
    ``outer_data`` as batches.
    """
    g, f = problem["inner_objective"], problem["outer_objective"]
    y, x = (
        jax.tree.map(jnp.asarray, problem["inner_params"]),
        jax.tree.map(jnp.asarray, problem["outer_params"]),
    )
    batches = problem.get("inner_data"), problem.get("outer_data")
    for name, value in (("inner_params", y), ("outer_params", x)):
        yield f"{name}: {tree.size(value):,} numbers in {_shapes(value)}"
    for name, value in zip(DATA, batches, strict=True):
        yield f"{name}: {'none' if value is None else _shapes(value)}"

    inner_value, (g_y, g_x) = jax.jit(jax.value_and_grad(g, argnums=(0, 1)))(y, x, batches[0])
    outer_value, (f_y, f_x) = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(y, x, batches[1])
    sizes = {
        "g": inner_value,
        "∇_y g": tree.norm(g_y),
        "f": outer_value,
        "∇_y f": tree.norm(f_y),
        "∇_x f": tree.norm(f_x),
    }
    yield "at the start: " + ", ".join(f"{name} {float(size):.3g}" for name, size in sizes.items())
    if not all(np.isfinite(float(size)) for size in sizes.values()):
        yield (
            "NOT FINITE at the start: no method can begin here. Look for a log of zero, a division "
            "by a zero spread, an overflow."
        )
        return
    yield from _leaf_scales(g_y)

    products = jax.jit(
        lambda y, x, v: jax.jvp(
            lambda y, x: jax.grad(g, argnums=(0, 1))(y, x, batches[0]),
            (y, x),
            (v, tree.zeros_like(x)),
        )
    )
    direction = tree.normal_like(jax.random.key(0), y)
    crossed = tree.norm(products(y, x, direction)[1][1])
    if float(tree.norm(f_y)) == 0:
        yield (
            "the outer objective does not read the inner parameters: the hypergradient is its own "
            "gradient in x, and needs no method."
        )
    if float(crossed) == 0:  # as that of exp(x) y² is at y = 0: look beside the start, too
        near = jax.tree.map(lambda a, d: a + jnp.asarray(0.1, d.dtype) * d, y, direction)
        crossed = tree.norm(products(near, x, direction)[1][1])
    if float(crossed) == 0:
        yield (
            "the inner objective's gradient does not depend on the outer parameters, at the start "
            "and beside it: a hypergradient through it is zero there."
        )
        return
    eigenvalues = _ritz(lambda v: products(y, x, v)[1][0], direction)
    least, largest = eigenvalues[0], max(abs(eigenvalues[0]), abs(eigenvalues[-1]))
    convex = least >= -NEGATIVE * largest
    condition = largest / least if least > 1e-7 * largest else np.inf
    word = "none negative" if convex else "NEGATIVE curvature: not convex here"
    yield (
        f"curvature of the lower level: {least:.3g} to {eigenvalues[-1]:.3g}, condition about "
        f"{condition:.1e}, {word}"
    )
    smooth = _smooth(lambda y: jax.grad(g)(y, x, batches[0]), y, direction)
    yield "smoothness of the lower level: " + (
        "its gradient changes smoothly"
        if smooth
        else "its gradient JUMPS nearby (relu, abs, max or clip)"
    )

    step = 1.0 / max(largest, 1e-30)
    yield f"largest stable step of plain gradient descent inside: below {2 * step:.3g}"
    solver = inner.optax(optax.sgd(step), 10)
    fn = jax.jit(value_and_hypergrad(g, f, solver=solver, hypergradient=unrolled()))
    estimate = fn(y, x, *batches)
    there, size = float(estimate.info["inner_grad_norm"]), float(tree.norm(estimate.grad))
    yield (
        f"ten such steps: ∇_y g {float(tree.norm(g_y)):.3g} -> {there:.3g}, hypergradient "
        f"{size:.3g}"
    )
    yield from _advice(convex, condition, smooth)


def _advice(convex: bool, condition: float, smooth: bool) -> Iterator[str]:
    if not smooth:
        yield (
            "take: hypergradient.unrolled(); or, for a proximal or projected lower level, "
            "hypergradient.fixed_point with its mapping."
        )
        yield (
            "implicit differentiation assumes a smooth lower level; check it by "
            "check_hypergradient before you trust it."
        )
    elif not convex:
        yield (
            "take: hypergradient.unrolled() with the optimizer that you train by; implicit needs "
            "damping= or linear.minres() here."
        )
    elif condition > ILL:
        yield (
            "take: inner.lbfgs() with hypergradient.implicit(linear.cg(maxiter=100), "
            "damping=1e-3), or a regulariser in the lower level;"
        )
        yield "unrolled() is exact for the steps that you do."
    else:
        yield (
            "take: hypergradient.implicit(linear.cg()) with inner.lbfgs(), or on whole batches "
            "algorithm=None, which has nothing to tune."
        )
    yield "then: bx.check_hypergradient on this problem says whether the choice is right."


def _shapes(value: PyTree) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(value)
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf))
        for path, leaf in leaves[:6]
    ]
    shown = [f"{name} {leaf.dtype}{list(leaf.shape)}".strip() for name, leaf in named]
    return ", ".join(shown) + (f", ... ({len(leaves)} leaves)" if len(leaves) > 6 else "")


def _leaf_scales(gradient: PyTree) -> Iterator[str]:
    """Leaves whose gradients are so different in size that one step size cannot suit them."""
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(jnp.sqrt(jnp.mean(a**2)))
        for path, a in leaves
    }
    moving = {name: size for name, size in sizes.items() if size > 0}
    for name in sorted(set(sizes) - set(moving)):
        yield f"inner leaf {name!r} has a gradient of zero at the start: dead, or read by nothing."
    if moving and max(moving.values()) > 1e4 * min(moving.values()):
        small, big = min(moving, key=moving.__getitem__), max(moving, key=moving.__getitem__)
        yield (
            f"scales: gradients of {moving[big]:.1e} in {big!r} and {moving[small]:.1e} in "
            f"{small!r}; take Adam inside, or rescale the inputs."
        )


def _ritz(matvec: Any, start: PyTree) -> np.ndarray:
    """Eigenvalues of a symmetric operator on the Krylov space of `start`."""
    found = jax.jit(lambda v: krylov(matvec, v, min(PRODUCTS, tree.size(start))))(start)
    n = int(found.used.sum())
    return np.linalg.eigvalsh(np.asarray(found.gram, np.float64)[:n, :n])


def _smooth(gradient: Any, y: PyTree, direction: PyTree) -> bool:
    """Whether differences of the gradient over a step and over half of it agree, as they do where
    it has a derivative.
    """
    scale = 1e-2 * (1.0 + float(tree.norm(y))) / float(tree.norm(direction))
    at = jax.jit(lambda t: gradient(tree.axpy(t * scale, direction, y)))
    here = at(0.0)
    whole, half = tree.sub(at(1.0), here), tree.sub(at(0.5), here)
    gap = tree.norm(tree.axpy(-2.0, half, whole))
    return float(gap) <= KINK * float(tree.norm(whole)) + 1e-6 * float(tree.norm(here))
