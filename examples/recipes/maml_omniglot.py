"""MAML on Omniglot, 5-way 1-shot, with sampled tasks: no loop of one's own.
`python examples/recipes/maml_omniglot.py`

Number at the end: accuracy on characters of alphabets that were never seen, after one inner step on
five drawings. Beside its relatives: `examples/omniglot.py`.
"""

import jax
import numpy as np
import optax
import recipes
from flax import nnx
from omniglot_tasks import characters, judged, sampler, turned

import bilevax as bx

TASKS, RATE = 8, 0.4


def fit(model, meta, task):
    return judged(model(task["x"]), task["y"])[0]


def query(model, meta, task):
    return judged(model(task["x"]), task["y"])


def main(steps=3000, test=50):
    seen, new = characters()
    net = bx.nn.from_nnx(recipes.CharacterCNN(nnx.Rngs(0)))
    inner = bx.tasks(bx.nn.objective(fit, inner=net), "sum")
    outer = bx.tasks(bx.nn.objective(bx.objective(query, has_aux=True), inner=net))
    begin = bx.task_copies(TASKS, {"inner": net.state})  # both levels on statistics of the batch

    def run(images, params, optimizer, steps, key):
        drawn = bx.data.episodes(sampler(images, ways=5, shots=1, queries=10, tasks=TASKS))
        solver, method = bx.inner.optax(optax.sgd(RATE), 1), bx.hypergradient.unrolled()
        inner_params, model_state = begin(params)
        return bx.solve_bilevel(
            inner, outer, inner_params, params, inner_init=begin, model_state=model_state,
            inner_data=drawn.map(lambda t: t["support"]),
            outer_data=drawn.map(lambda t: t["query"]),
            algorithm=bx.algorithms.double_loop(solver, method, optimizer),
            num_steps=steps, key=jax.random.key(key), keep="last",
        )  # fmt: skip

    optimizer = optax.adam(optax.cosine_decay_schedule(6e-3, steps))
    trained = run(turned(seen), net.params, optimizer, steps, 0)
    tested = run(new, trained.outer_params, optax.set_to_zero(), test, 1)
    accuracy = float(np.mean(tested.history["aux"]))
    seconds = trained.stats["seconds"]
    print(f"accuracy on new characters {accuracy:.3f} after {steps} meta-steps in {seconds:.0f} s.")
    return accuracy


if __name__ == "__main__":
    recipes.script(main, 2, test=1)
