"""MAML on Omniglot, 5-way 1-shot, with sampled tasks: no loop of one's own.
`python examples/recipes/maml_omniglot.py`

Number at the end: accuracy on characters of alphabets that were never seen, after one inner step on
five images.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import recipes
from flax import nnx

import bilevax as bx

WAYS, QUERIES, TASKS, RATE = 5, 5, 8, 0.4


class Conv4(nnx.Module):
    def __init__(self, rngs, width=32):
        self.convs = nnx.List(
            [
                nnx.Conv(1 if i == 0 else width, width, (3, 3), strides=2, rngs=rngs)
                for i in range(4)
            ]
        )
        self.norms = nnx.List(
            [nnx.BatchNorm(width, use_running_average=False, rngs=rngs) for _ in range(4)]
        )
        self.head = nnx.Linear(4 * width, WAYS, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.reshape(len(x), -1))


def loss(model, meta, batch):
    scores = model(batch["x"])
    hit = jnp.mean(jnp.argmax(scores, -1) == batch["y"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"])), hit


def main(steps=1500, test=50):
    seen, new = recipes.omniglot()
    net = bx.nn.from_nnx(Conv4(nnx.Rngs(0)))
    inner = bx.tasks(bx.nn.objective(lambda *args: loss(*args)[0], inner=net), "sum")
    outer = bx.tasks(
        bx.nn.objective(bx.objective(loss, has_aux=True), inner=net)
    )  # both on batch statistics
    start, copies = bx.task_copies(TASKS, {"inner": net.state}), bx.task_copies(TASKS)
    shared = dict(model_state=copies({"inner": net.state}), inner_init=start)

    def run(images, params, optimizer, steps, key):
        tasks = bx.data.episodes(recipes.characters(images, WAYS, QUERIES, TASKS))
        support, query = tasks.map(lambda t: t["support"]), tasks.map(lambda t: t["query"])
        loop = bx.algorithms.double_loop(
            bx.inner.optax(optax.sgd(RATE), 1), bx.hypergradient.unrolled(), optimizer
        )
        return bx.solve_bilevel(inner, outer, copies(params), params, inner_data=support,
        outer_data=query, algorithm=loop,
                                num_steps=steps, key=jax.random.key(key), keep="last",
                                **shared)  # fmt: skip

    trained = run(
        jnp.asarray(seen),
        net.params,
        optax.adam(optax.cosine_decay_schedule(3e-3, steps)),
        steps,
        0,
    )
    tested = run(jnp.asarray(new), trained.outer_params, optax.set_to_zero(), test, 1)
    accuracy = float(np.mean(tested.history["aux"]))
    print(
        f"{accuracy:.3f} of {TASKS * test * WAYS * QUERIES:,} images right, {steps} meta-steps in "
        f"{trained.stats['seconds']:.0f} s"
    )
    return accuracy


if __name__ == "__main__":
    recipes.script(main, 2, test=1)
