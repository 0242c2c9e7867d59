"""A classifier against the weights of its classes: a game in place of class weights that somebody
tunes, on digits of which half are rare. `python examples/recipes/groups.py`

The weights rise with the losses of held-out rows, since the few rows of a rare class are soon
fitted; the fixed weights beside them are tuned on the same rows.

Number at the end: test accuracy on the worst class after the game, beside plain training and the
best fixed power of the classes' sizes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import recipes

import bilevax as bx

OPTIMIZER = optax.adam(3e-3)
POWERS = jnp.array(
    [1.0, 0.75, 0.5, 0.25, 0.0, -0.25]
)  # of the classes' sizes, as weights: 1 is plain training, 0 all the same


def rare(seed):
    """Digits of which the training rows hold 60 of each class below 5, and 4 of each other one."""
    train, valid, test = recipes.digits((900, 400, 400), seed=seed)
    kept = np.concatenate(
        [np.flatnonzero(np.asarray(train["y"]) == c)[: 60 if c < 5 else 4] for c in range(10)]
    )
    return {name: a[kept] for name, a in train.items()}, valid, test


def by_class(fn, w, batch):
    """Means over each class."""
    scores = jax.nn.relu(batch["x"].reshape(-1, 64) @ w["a"] + w["b"]) @ w["c"]
    member = jax.nn.one_hot(batch["y"], 10)
    return fn(scores, batch["y"]) @ member / jnp.maximum(jnp.sum(member, axis=0), 1.0)


def worst(w, batch):
    return jnp.min(
        by_class(lambda scores, y: (jnp.argmax(scores, axis=1) == y).astype(jnp.float32), w, batch)
    )


def loss(p, batch):
    return by_class(recipes.cross_entropy, p["w"], batch) @ p["q"] + 1e-3 * optax.tree.norm(
        p["w"], squared=True
    )


def less(p, batch):
    return -loss(p, batch)


def one(seed, steps):
    train, valid, test = rare(seed)
    share = jnp.mean(jax.nn.one_hot(train["y"], 10), axis=0)
    start = {
        "a": jax.random.normal(jax.random.key(seed), (64, 32)) / 8,
        "b": jnp.zeros(32),
        "c": jnp.zeros((32, 10)),
    }

    def against(q, speed):
        """The model after a game with class weights that start at q, and move at this speed or all
        but stand."""
        players = [
            bx.Level("w", loss, solver=OPTIMIZER),
            bx.Level("q", less, solver=bx.games.mirror(speed)),
        ]
        data = {"w": train, "q": valid}
        return bx.games.solve_game(
            players, {"w": start, "q": q}, data=data, num_steps=steps
        ).outer_params["w"]

    fixed = [against(share**power / jnp.sum(share**power), 1e-9) for power in POWERS]
    tuned = max(fixed, key=lambda w: float(worst(w, valid)))
    return [float(worst(w, test)) for w in (against(jnp.ones(10) / 10, 0.03), fixed[0], tuned)]


def main(steps=1000, seeds=5):
    found = np.array([one(seed, steps) for seed in range(seeds)])
    ours, plain, tuned = (
        f"{m:.3f} ± {e:.3f}"
        for m, e in zip(found.mean(0), found.std(0) / np.sqrt(seeds), strict=True)
    )
    print(
        f"accuracy on the worst class: {ours} after the game, {plain} by plain training, "
        f"{tuned} with tuned class weights"
    )
    return float(found[:, 0].mean())


if __name__ == "__main__":
    recipes.script(main, 3, seeds=1)
