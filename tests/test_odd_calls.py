"""Wrong and odd calls that were met in use, each as a user makes it: the message names the
argument, what came and what was expected."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bilevax as bx

HG, IN, AL, LI, S, CB, CK = (
    bx.hypergradient,
    bx.inner,
    bx.algorithms,
    bx.linear,
    bx.sharding,
    bx.callbacks,
    bx.checkpoint,
)
SOLVER, METHOD = IN.optax(optax.sgd(0.5), 2), HG.implicit()
ALGORITHM = AL.double_loop(SOLVER, METHOD, optax.sgd(0.3))
X, T = np.ones((6, 2), np.float32), np.ones(6, np.float32)


def inner(y, x, b):
    return 0.5 * jnp.sum((y - x) ** 2)


def outer(y, x, b):
    return 0.5 * jnp.sum((y - 3.0) ** 2)


def on_rows(y, x, b):
    return jnp.mean((b[0] @ y - b[1]) ** 2) + jnp.sum(x**2) * jnp.sum(y**2)


def go(inner=inner, outer=outer, y=None, x=None, **keywords):
    y, x = (
        jnp.zeros(2, jnp.float32) if y is None else y,
        jnp.ones(2, jnp.float32) if x is None else x,
    )
    return bx.solve_bilevel(
        inner, outer, y, x, **{"algorithm": ALGORITHM, "num_steps": 3, **keywords}
    )


def levels(**keywords):
    return [
        bx.Level(
            "y",
            lambda p, b: jnp.sum((p["y"] - p["x"]) ** 2),
            solver=SOLVER,
            hypergradient=METHOD,
            **keywords,
        ),
        bx.Level("x", lambda p, b: jnp.sum((p["y"] - 1.0) ** 2), solver=optax.sgd(0.1)),
    ]


def cyclic():
    out = [jnp.zeros(2)]
    out.append(out)
    return out


class Unhashable:
    __hash__ = None

    def __eq__(self, other):
        return self is other

    def __call__(self, y, x, b):
        return inner(y, x, b)


def file(name, text):
    with open(name, "w") as out:
        out.write(text)
    return name


def estimate(**keywords):
    return bx.value_and_hypergrad(
        inner, outer, **{"solver": SOLVER, "hypergradient": METHOD, **keywords}
    )


def gone(shape=(2,)):
    a = jnp.ones(shape)
    a.delete()
    return a


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(2, rngs=rngs)


NUMBERS = {"text": "0.1", "complex": 1j, "None": None, "a list": [0.1], "a flag": True}
ROWS = {
    "aux of text": (lambda: go(outer=bx.objective(lambda y, x, b: (outer(y, x, b), {"a": "text"}), has_aux=True)), r"outer_objective.*str.*expected"),
    "axis_mean outside a map": (lambda: go(inner=S.axis_mean(inner, "data")), r"axis_name: got 'data'.*expected"),
    "a pattern that matches nothing": (
        lambda: go(sharding=S.by_path(S.fsdp().mesh, {"nothing": jax.sharding.PartitionSpec()})), (
            r"rules: got 'nothing', which matches no parameter; expected"
        ),
    ),
    "progress_bar, uncalled": (lambda: go(callbacks=[CB.progress_bar]), r"callbacks\[0\]: got the factory.*expected"),
    "jsonl, uncalled": (lambda: go(callbacks=[CB.jsonl]), r"callbacks\[0\]: got the factory.*expected"),
    "tol of cg": (lambda: LI.cg(tol=jnp.inf), r"tol: got inf; expected"),
    "no folder": (lambda: CK.every(3, ""), r"directory: got ''; expected"),
    "a folder with a nul": (lambda: CK.every(3, "a\0b"), r"directory: got 'a.*; expected"),
    "a long name": (lambda: go(checkpoint=CK.every(3, "a" * 300)), (
        r"checkpoint: got the directory .*cannot be made.*expected"
    )),
    "a bucket without its package": (lambda: go(checkpoint=CK.every(3, "gs://bucket/run")), (
        r"(checkpoint|directory): got .*gs://bucket/run.*expected"
    )),
    "compare without a solver": (lambda: bx.compare_hypergradients(inner, outer, X[0], X[0], solver=None), r"solver: got .*None; expected"),
    "csv over a file of another kind": (lambda: go(callbacks=[CB.csv(file("f.csv", "a,b\n1.5,x\n"))]), r"path: got .*f.csv.*expected"),
    "jsonl over a file of another kind": (lambda: go(callbacks=[CB.jsonl(file("f.jsonl", "what\never\n"))]), r"path: got .*f.jsonl.*expected"),
    "an iterator over keys": (lambda: go(inner_data=iter({"x": 1, "y": 2})), r"inner_data, batch 1: got str 'x'; expected"),
    "a data function whose arguments are swapped": (
        lambda: go(inner_data=lambda step, key: jax.random.normal(key, (2,)), key=jax.random.key(0)),
        r"inner_data: raised this when called as \(key, step\) -> batch",
    ),
    "metrics whose arguments are swapped": (
        lambda: go(metrics=bx.metrics(lambda d, y, x: {"m": d["a"]}, data={"a": T})),
        r"metrics .*: raised this when called as \(inner_params, outer_params, data\)",
    ),
    "rows that eight devices cannot share": (
        lambda: go(inner=on_rows, inner_data=(X, T), sharding=S.data_parallel()),
        r"batch of on_rows: got \[6\] rows on 8 devices; expected a multiple of 8. Leave out",
    ),
    "a network as it is": (
        lambda: go(y=Normed(nnx.Rngs(0))),
        r"inner_params: got .*Normed.* with BatchStat in it, which would stand still; expected .*bx.nn.bilevel",
    ),
    "a network's state with streams": (
        lambda: go(x=nnx.state(nnx.Dropout(0.1, rngs=nnx.Rngs(0)))),
        r"outer_params: got .* with RngCount, RngKey in it.*expected",
    ),
    "an optimizer that holds a model": (
        lambda: IN.optax(nnx.Optimizer(Normed(nnx.Rngs(0)), optax.adam(0.1), wrt=nnx.Param), 2),
        r"opt: got .*; expected .*bx.nn.going_on",
    ),
    "scores of all, a batch of some": (
        lambda: go(
            inner=lambda y, x, b: jnp.mean(x * (y[0] - b) ** 2),
            x=jnp.ones(6),
            inner_data=bx.data.minibatches(T, 2),
            key=jax.random.key(0),
        ),
        r"inner_objective.*batch=.*let the batch hold the examples' numbers",
    ),
    "a source where a batch is due": (
        lambda: bx.value_and_multilevel_grad(levels())(
            {"y": X[0], "x": X[0]}, {"y": bx.data.minibatches(T, 2)}
        ),
        r"batches\['y'\]: got a data source.*expected one batch",
    ),
    "a start that was forgotten": (
        lambda: go(inner=lambda y, x, b: jnp.sum(y**2)), r"outer_params: .*give inner_init=",
    ),
    "a data function of one argument": (lambda: go(inner_data=lambda key: X, key=jax.random.key(0)), r"inner_data: got a function of \(key\); expected"),
    "a data function that returns None": (lambda: go(inner=on_rows, inner_data=lambda key, step: None, key=jax.random.key(0)), (
        r"inner_data: got a function that returned .*None; expected a batch"
    )),
    "a data function that returns text": (lambda: go(inner_data=lambda key, step: [X, "a"], key=jax.random.key(0)), (
        r"inner_data's batch.1.: got str 'a'; expected"
    )),
    "batches that are None": (lambda: go(inner_data=iter([X, None, X])), (
        r"inner_data, batch 2: got the structure .*None.*expected"
    )),
    "another dtype on the way": (lambda: go(inner_data=iter([X, X.astype(int), X] * 5)), r"inner_data, batch 2: got int64.*expected"),
    "another shape on the way": (lambda: go(inner_data=iter([X, X[:3], X] * 5)), r"inner_data, batch 2: got float32\[3, 2\].*expected"),
    "another structure on the way": (lambda: go(inner_data=iter([X, (X, X), X] * 5)), r"inner_data, batch 2: got .*expected"),
    "an empty iterable": (lambda: go(inner_data=[]), r"inner_data: got .*expected"),
    "no data": (lambda: go(inner=on_rows), (
        r"inner_objective.*raised this when called .*batch=None.*No data was given"
    )),
    "data as text": (lambda: go(inner_data=np.asarray(["a", "b"])), r"inner_data: got <U1.*expected"),
    "data of another width": (lambda: go(inner=on_rows, inner_data=(X[:, :1], T)), (
        r"inner_objective.*raised this when called .*float32.6, 1.*expected"
    )),
    "devices as numbers": (lambda: S.data_parallel([0, 1]), r"devices: got .*expected"),
    "dry_run of no driver": (lambda: S.dry_run(3, inner, outer, X[0], X[0], sharding=S.data_parallel()), r"driver: got .*3.*expected"),
    "min_delta as text": (lambda: CB.early_stopping("value", patience=3, min_delta="0.1"), r"min_delta: got '0.1'; expected"),
    "from_process of text": (lambda: S.from_process(S.data_parallel(), np.asarray(["a"] * 8)), r"arrays: got .*expected"),
    "parameters as text": (lambda: go(y="abc"), r"inner_params: got str 'abc'; expected"),
    "identity, an infinite scale": (lambda: LI.identity(scale=jnp.inf), r"scale: got inf; expected"),
    "a linear solver of one argument": (lambda: go(algorithm=AL.double_loop(SOLVER, HG.implicit(lambda v: v), optax.sgd(0.1))), r"linear: got .*expected"),
    "a linear solver, uncalled": (lambda: HG.implicit(LI.cg), (
        r"linear: got a function of .maxiter.*expected"
    )),
    "rows that devices do not divide": (
        lambda: go(inner=on_rows, inner_data=(X, T), outer_data=(X, T), sharding=S.data_parallel()), r"(inner_data|outer_data|batch).*got \[6\] rows.*expected",
    ),
    "inner_init of nothing": (lambda: go(inner_init=lambda: X[0]), r"inner_init: got a function of \(\); expected"),
    "several keys": (lambda: go(key=jax.random.split(jax.random.key(0), 3)), r"key: got .*expected"),
    "several old keys": (lambda: go(key=jnp.zeros((3, 2), jnp.uint32)), r"key: got .*expected"),
    "reads of a level": (lambda: levels(reads=3), r"reads: got 3; expected"),
    "low_precision as text": (lambda: S.low_precision(inner, "abc"), r"dtype: got .*'abc'; expected"),
    "metrics on a file's name": (lambda: go(metrics=bx.metrics(lambda y, x, d: {"m": y[0]}, data=["file.csv"])), r"data.*got str 'file.csv'.*expected"),
    "metrics of text": (lambda: go(metrics=lambda y, x, d: {"m": "good"}), r"metrics.*returned str 'good' at .'m'.; expected"),
    "a metric without a name": (lambda: go(metrics=lambda y, x, d: {"": y[0]}), r"metrics.*got the name ''; expected"),
    "a metric whose name is no text": (lambda: go(metrics=lambda y, x, d: {("m", 1): y[0]}), r"metrics.*got the name \('m', 1\); expected"),
    "a metric called step": (lambda: go(metrics=lambda y, x, d: {"step": y[0]}), r"metrics.*got the name 'step'.*expected"),
    "metrics of two arguments": (lambda: go(metrics=lambda y, x: {"m": y[0]}), r"metrics.*got a function of \(y, x\); expected"),
    "replace as text": (lambda: bx.data.minibatches(X, 2, replace="no"), r"replace: got 'no'; expected"),
    "replace as text, partitioned": (lambda: bx.data.partitioned(X, 2, replace="no"), r"replace: got 'no'; expected"),
    "has_aux as text": (lambda: bx.objective(inner, has_aux="yes"), r"has_aux: got 'yes'; expected"),
    "a level's objective of three arguments": (
        lambda: bx.solve_multilevel([bx.Level("y", inner, solver=SOLVER, hypergradient=METHOD), levels()[1]], {"y": X[0], "x": X[0]}), r"objective.*got a function of \(y, x, b\); expected",
    ),
    "NaN as model state": (
        lambda: go(inner=bx.objective(lambda y, x, b, m: (inner(y, x, b), m), stateful=True), model_state=jnp.full(2, jnp.nan)), r"model_state: got 2 non-finite",
    ),
    "neumann, an infinite step": (lambda: LI.neumann(step=jnp.inf), r"step: got inf; expected"),
    "a net of no features": (lambda: bx.nn.WeightNet(rngs=nnx.Rngs(0), hidden=0), r"hidden: got 0; expected"),
    "a net of -1 features": (lambda: bx.nn.WeightNet(rngs=nnx.Rngs(0), features=-1), r"features: got -1; expected"),
    "lora of rank 0": (lambda: bx.nn.add_lora(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), lambda path, layer: True, 0, rngs=nnx.Rngs(0)), r"rank: got 0; expected"),
    "logits as text": (lambda: bx.nn.soft_choice(np.asarray(["a", "b"]), [X, X]), r"logits: got .*expected"),
    "more logits than options": (lambda: bx.nn.soft_choice(jnp.zeros(3), [X, X]), r"logits: got .*expected"),
    "temperature 0": (lambda: bx.nn.soft_choice(jnp.zeros(2), [X, X], temperature=0.0), r"temperature: got 0.0; expected"),
    "two shapes straight through": (lambda: bx.nn.straight_through(jnp.ones(2), jnp.ones(3)), r"(value|surrogate): got .*expected"),
    "10**12 steps": (lambda: go(num_steps=10**12, callbacks=[lambda event: True]), r"num_steps: got 1000000000000; expected"),
    "2**31 steps": (lambda: go(num_steps=2**31, callbacks=[lambda event: True]), r"num_steps: got 2147483648; expected"),
    "float() in an objective": (lambda: go(inner=lambda y, x, b: float(y[0]) * jnp.sum(x)), (
        r"float.*inner_objective.*raised this when called"
    )),
    "if in an objective": (lambda: go(inner=lambda y, x, b: jnp.sum(y) if y[0] > 0 else jnp.sum(x)), (
        r"bool.*inner_objective.*raised this when called"
    )),
    "an objective of text": (lambda: go(inner=lambda y, x, b: "a"), r"inner_objective.*returned .*str.*expected"),
    "a constant as outer objective": (lambda: go(outer=lambda y, x, b: 1.0), r"outer.*neither|outer_objective.*expected"),
    "a NumPy constant as outer objective": (lambda: go(outer=lambda y, x, b: np.float64(1.0)), r"outer.*neither|outer_objective.*expected"),
    "no entries": (lambda: go(x=jnp.zeros(0)), r"outer_params: got .*expected"),
    "no entries below": (lambda: go(y=jnp.zeros(0)), r"inner_params: got .*expected"),
    "a list that holds itself": (lambda: go(y=cyclic()), r"inner_params: got .*expected"),
    "dates": (lambda: go(y=np.asarray(["2020-01-01"], "datetime64[D]")), r"inner_params: got datetime64.*expected"),
    "keys of two kinds": (lambda: go(y={1: jnp.zeros(2), "a": jnp.zeros(2)}), r"inner_params: got .*expected"),
    "a module as parameters": (lambda: go(y=nnx.Linear(2, 2, rngs=nnx.Rngs(0))), r"raised this when called .*Linear.*expected"),
    "texts as parameters": (lambda: go(y=np.asarray(["a", "b"])), r"inner_params: got <U1.*expected"),
    "records as parameters": (lambda: go(y=np.zeros(2, [("a", "f4")])), r"inner_params: got .*expected"),
    "objects as parameters": (lambda: go(y=np.asarray([object(), None])), r"inner_params: got object.*expected"),
    "a deleted array": (lambda: go(y=gone()), r"inner_params: got .*deleted.*expected"),
    "deleted data": (lambda: go(inner=on_rows, inner_data=gone((6, 2))), r"inner_data: got .*deleted.*expected"),
    "an empty first batch": (lambda: go(inner=on_rows, inner_data=iter([None, (X, T)])), r"inner_data, batch 1: got .*None; expected arrays"),
    "an unknown kind of store": (lambda: go(checkpoint=CK.every(1, "nosuch://a/b")), r"checkpoint: got the directory 'nosuch://a/b'.*expected a folder"),
    "a dashboard of no file": (lambda: bx.plots.dashboard("x.jsonl"), r"got 'x.jsonl'.*expected"),
    "runs as a list": (lambda: bx.plots.runs([{"value": [1.0]}]), r"runs: got list.*expected"),
    "tunable of NaN": (lambda: bx.tunable(optax.sgd, learning_rate=float("nan")), r"learning_rate: got nan; expected"),
    "tunable of text": (lambda: bx.tunable(optax.sgd, learning_rate="0.1"), r"learning_rate: got .*0.1.*; expected"),
    "an estimate of nothing": (lambda: estimate()(), (
        r"inner_params.*expected|missing .*inner_params"
    )),
    "no solver": (lambda: bx.value_and_hypergrad(inner, outer, hypergradient=METHOD), r"solver"),
    "an estimate at text": (lambda: estimate()("a", X[0]), r"inner_params: got str 'a'; expected"),
    "a state of several levels": (lambda: bx.value_and_multilevel_grad(levels())({"y": X[0], "x": X[0]}, state=3), r"state: got 3|state: got int 3"),
    "a metric by a diagnostic's name": (lambda: go(metrics=lambda y, x, d: {"adjoint_residual": jnp.sum(y)}), (
        r"metrics: got the name.*adjoint_residual.*expected"
    )),
    "one generator for two": (lambda: (lambda g: go(inner_data=g, outer_data=g))(X for _ in range(99)), (
        r"outer_data: got the iterator .* that inner_data is; expected"
    )),
}  # fmt: skip
for name, value in NUMBERS.items():
    ROWS[f"damping: {name}"] = (
        lambda value=value: HG.implicit(damping=value),
        r"damping: got .*expected",
    )
    ROWS[f"max_residual: {name}"] = (
        lambda value=value: HG.implicit(max_residual=value),
        r"max_residual: got .*expected",
    )
    ROWS[f"max_residual of fixed_point: {name}"] = (
        lambda value=value: HG.fixed_point(inner, max_residual=value),
        r"max_residual: got .*expected",
    )
    ROWS[f"scale: {name}"] = (
        lambda value=value: HG.zeroth_order(scale=value),
        r"scale: got .*expected",
    )
for name in ("damping: None", "max_residual: None", "max_residual of fixed_point: None"):
    del ROWS[name]  # the default
GOOD = {
    "max_residual inf": lambda: HG.implicit(max_residual=jnp.inf), "tol, NumPy": lambda: go(tol=np.float32(0.1)), "tol, JAX": lambda: go(tol=jnp.float32(0.1)),
    "unhashable": lambda: go(inner=Unhashable()), "rbg": lambda: go(key=jax.random.key(0, impl="rbg")),
    "cyclic reads": lambda: levels(reads=("x",)),
}  # fmt: skip


@pytest.mark.turns
@pytest.mark.parametrize("name", list(ROWS))
def test_what_is_wrong_is_said_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, match = ROWS[name]
    with pytest.raises(
        (TypeError, ValueError, OSError, KeyError, ImportError, AttributeError)
    ) as caught:
        call()
    assert re.search(
        f"(?s){match}", " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    )


@pytest.mark.parametrize("name", list(GOOD))
def test_what_is_odd_and_right_is_taken(name):
    GOOD[name]()
