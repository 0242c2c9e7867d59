"""Betty's half of betty_bert.py, in a process without jax: the same encoder in torch, each of
Betty's methods, times and memory as lines of JSON."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import sys
import time

import torch
from torch.nn import functional as F


class Layer(torch.nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, width)
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = (a.view(n, t, self.heads, -1).transpose(1, 2) for a in self.qkv(x).chunk(3, -1))
        x = self.norm1(
            x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))
        )
        return self.norm2(x + self.down(F.gelu(self.up(x), approximate="tanh")))


class Encoder(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        width = shape["width"]
        self.words, self.positions = (
            torch.nn.Embedding(shape["vocabulary"], width),
            torch.nn.Embedding(512, width),
        )
        self.norm, self.head = torch.nn.LayerNorm(width), torch.nn.Linear(width, shape["classes"])
        self.layers = torch.nn.ModuleList(
            Layer(width, shape["heads"], shape["hidden"]) for _ in range(shape["layers"])
        )
        for p in self.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.02)

    def forward(self, tokens):
        with torch.autocast(tokens.device.type, torch.bfloat16):
            x = self.norm(self.words(tokens) + self.positions.weight[: tokens.shape[1]])
            for layer in self.layers:
                x = layer(x)
        return self.head(x.float().mean(1))


class Weights(torch.nn.Module):
    """A number an example."""

    def __init__(self, examples):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(examples))

    def forward(self, index):
        return torch.sigmoid(self.logits[index])


def synchronized(device):
    if device == "cuda":
        torch.cuda.synchronize()


def plain(order, device, train):
    """The same step without an outer level."""
    model, weights = Encoder(order["shape"]).to(device), Weights(order["examples"]).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    tokens, labels, index = train

    def step():
        loss = (
            weights(index).detach() * F.cross_entropy(model(tokens), labels, reduction="none")
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(order["warm"]):
        step()
    seconds = []
    for _ in range(order["rounds"]):
        synchronized(device)
        begin = time.perf_counter()
        for _ in range(order["steps"]):
            step()
        synchronized(device)
        seconds.append((time.perf_counter() - begin) / order["steps"])
    return seconds


def betty(order, device, train, valid):
    """One of Betty's methods, an outer step an inner step."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    method, marks = order["method"], []
    every = order["steps"]

    class Inner(ImplicitProblem):
        def get_batch(self):
            count = self.drawn = getattr(self, "drawn", -1) + 1
            if count >= order["warm"] and (count - order["warm"]) % every == 0:
                synchronized(device)
                marks.append(time.perf_counter())
            return train

        def training_step(self, batch):
            tokens, labels, index = batch
            return (
                self.outer(index) * F.cross_entropy(self.module(tokens), labels, reduction="none")
            ).mean()

    class Outer(ImplicitProblem):
        def get_batch(self):
            return valid

        def training_step(self, batch):
            tokens, labels, _ = batch
            return F.cross_entropy(self.inner(tokens), labels)

    settings = {
        "cg": dict(cg_iterations=5), "neumann": dict(neumann_iterations=5, neumann_alpha=1e-3),
        "darts": {}, "sama": {},
    }[method]  # fmt: skip
    model, weights = Encoder(order["shape"]), Weights(order["examples"])
    inner = Inner(
        "inner",
        Config(type=method, unroll_steps=1, **settings),
        model,
        torch.optim.Adam(model.parameters(), lr=1e-5),
    )
    outer = Outer("outer", Config(), weights, torch.optim.Adam(weights.parameters(), lr=1e-3))
    iterations = order["warm"] + order["rounds"] * every + 1
    engine = Engine(
        [outer, inner],
        EngineConfig(train_iters=iterations, valid_step=10**9),
        {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )
    engine.run()
    return [(b - a) / every for a, b in itertools.pairwise(marks)]


def main():
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Betty prints where it likes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for line in sys.stdin:
        order = json.loads(line)
        shape, rows = order["shape"], order["rows"]
        torch.manual_seed(0)

        def texts(shape=shape, rows=rows, order=order):
            tokens = torch.randint(shape["vocabulary"], (rows, shape["length"]), device=device)
            return (
                tokens,
                torch.randint(shape["classes"], (rows,), device=device),
                torch.randperm(order["examples"], device=device)[:rows],
            )

        try:
            twice = order["method"] in ("cg", "neumann")
            with contextlib.redirect_stdout(sys.stderr), _attention(twice):
                gc.collect()  # the last method's model and graph
                if device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                train, valid = texts(), texts()
                seconds = (
                    plain(order, device, train)
                    if order["method"] == "plain"
                    else betty(order, device, train, valid)
                )
            answer = {
                "seconds": seconds,
                "peak MiB": torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None,
            }
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def _attention(twice):
    """Fused attention has no second derivative in torch."""
    return (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        if twice
        else contextlib.nullcontext()
    )


if __name__ == "__main__":
    main()
