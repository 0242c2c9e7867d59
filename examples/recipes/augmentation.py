"""How strongly to augment: the noise and the shift that images are trained with, learned on
held-out digits. `python examples/recipes/augmentation.py`

Number at the end: validation loss with the learned policy, beside that without augmentation.
"""

import jax
import jax.numpy as jnp
import optax
import recipes
from flax import nnx

import bilevax as bx


def augmented(x, policy, key):
    """Noise of a learned size, and a shift by up to a pixel, mixed in by a learned share: both have
    derivatives."""
    one, two = jax.random.split(key)
    noise, share = jax.nn.softplus(policy["noise"]), jax.nn.sigmoid(policy["shift"])
    moved = jnp.roll(x, jax.random.randint(two, (), -1, 2), axis=2)
    return (1 - share) * x + share * moved + noise * jax.random.normal(one, x.shape)


def train_loss(model, policy, batch, *, key):
    return jnp.mean(recipes.cross_entropy(model(augmented(batch["x"], policy, key)), batch["y"]))


def valid_loss(model, policy, batch):
    return jnp.mean(recipes.cross_entropy(model(batch["x"]), batch["y"]))


def main(steps=150):
    train, valid, _ = recipes.digits((100, 400, 1))
    values = {}
    for name, start, optimizer in (
        ("learned", -2.0, optax.adam(0.05)),
        ("none", -20.0, optax.set_to_zero()),
    ):
        policy = {"noise": jnp.asarray(start), "shift": jnp.asarray(start)}
        problem = bx.nn.bilevel(
            bx.objective(train_loss, keyed=True),
            valid_loss,
            recipes.CNN(nnx.Rngs(0), rate=0.0),
            policy,
        )
        inner = bx.inner.optax(optax.adam(2e-3, eps_root=1e-8), 5)
        out = bx.solve_bilevel(
            **problem.arguments, inner_data=bx.data.minibatches(train, 50), outer_data=valid,
            num_steps=steps,
            algorithm=bx.algorithms.double_loop(inner, bx.hypergradient.unrolled(), optimizer),
            key=jax.random.key(0),
        )  # fmt: skip
        values[name] = float(out.history["value"].min())
    print(
        f"validation loss {values['learned']:.3f} with the learned policy, {values['none']:.3f} "
        "without augmentation"
    )
    return values["learned"]


if __name__ == "__main__":
    recipes.script(main, 3)
