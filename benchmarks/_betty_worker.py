"""Betty's half of betty.py: runs under a Python of its own, which has torch and betty-ml, and takes
its orders line by line.

Reads the problem (JSON) from the first line of its input, then a method's name a line; answers each
with a line of JSON.
"""

import contextlib
import json
import math
import os
import sys

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem


class Decay(torch.nn.Module):
    """One logarithmic decay a weight."""

    def __init__(self, start, features, classes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((classes, features), start))
        self.bias = torch.nn.Parameter(torch.full((classes,), start))


class Inner(ImplicitProblem):
    def get_batch(self):
        return self.cfg["train"]

    def training_step(self, batch):
        x, y = batch
        loss = torch.nn.functional.cross_entropy(self.module(x), y)
        decay = sum(
            (torch.exp(d) * w * w).sum()
            for d, w in zip(self.outer.module.parameters(), self.module.parameters(), strict=True)
        )
        return loss + 0.5 * decay


class Outer(ImplicitProblem):
    def get_batch(self):
        return self.cfg["valid"]

    def training_step(self, batch):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.inner(x), y)


def run(problem, data, method):
    """`steps` outer steps from the common start: the loss of every tenth of them, last first in the
    answer."""
    features, classes = data["train"][0].shape[1], problem["classes"]
    linear = torch.nn.Linear(features, classes)
    for p in linear.parameters():
        torch.nn.init.zeros_(p)
    settings = {
        "cg": dict(cg_iterations=problem["cg"], cg_alpha=1.0),
        "neumann": dict(
            neumann_iterations=problem["terms"] - 1, neumann_alpha=problem["neumann_step"]
        ),
        "darts": dict(darts_alpha=problem["radius"]),
        "sama": dict(sama_adam_alpha=problem["radius"]),
    }[method]
    low = Config(type=method, unroll_steps=problem["inner_steps"], **settings)
    decay = Decay(problem["start"], features, classes)
    inner_opt = torch.optim.Adam(linear.parameters(), lr=problem["inner_rate"])
    outer_opt = torch.optim.Adam(decay.parameters(), lr=problem["outer_rate"])
    inner = Inner("inner", low, linear, inner_opt, extra_config=data)
    outer = Outer("outer", Config(), decay, outer_opt, extra_config=data)
    engine = Engine(
        [outer, inner],
        EngineConfig(train_iters=problem["inner_steps"] * problem["steps"], valid_step=10**9),
        {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )
    engine.run()
    with torch.no_grad():
        out = {}
        for name in ("valid", "test"):
            x, y = data[name]
            logits = inner.module(x)
            out[f"{name} loss"] = torch.nn.functional.cross_entropy(logits, y).item()
            out[f"{name} accuracy"] = (logits.argmax(1) == y).float().mean().item()
    assert all(math.isfinite(v) for v in out.values()), out
    return out


def main():
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Betty prints where it likes
    torch.set_num_threads(1)
    problem = json.loads(sys.stdin.readline())
    data = {
        name: (torch.tensor(x, dtype=torch.float32), torch.tensor(y))
        for name, (x, y) in problem.pop("data").items()
    }
    for line in sys.stdin:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                answer = run(problem, data, line.strip())
        except Exception as error:  # the other side raises it
            answer = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
