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

    def run(start, optimizer):
        policy = {"noise": jnp.asarray(start), "shift": jnp.asarray(start)}
        model, inner_loss = recipes.CNN(nnx.Rngs(0), rate=0.0), bx.objective(train_loss, keyed=True)
        problem = bx.nn.bilevel(inner_loss, valid_loss, model, policy)
        inner = bx.inner.optax(optax.adam(2e-3, eps_root=1e-8), 5)
        out = bx.solve_bilevel(
            **problem.arguments, inner_data=bx.data.minibatches(train, 50), outer_data=valid,
            algorithm=bx.algorithms.double_loop(inner, bx.hypergradient.unrolled(), optimizer),
            num_steps=steps, key=jax.random.key(0),
        )  # fmt: skip
        return float(out.history["value"].min())

    learned, none = run(-2.0, optax.adam(0.05)), run(-20.0, optax.set_to_zero())
    print(f"validation loss {learned:.3f} with the learned policy, {none:.3f} without augmentation")
    return learned


if __name__ == "__main__":
    recipes.script(main, 3)
