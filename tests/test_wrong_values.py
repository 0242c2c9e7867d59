"""Every public function, every parameter, twenty wrong values: each is refused by the parameter's
name, or stands in a list with its reason."""

import inspect
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bilevax as bx
from bilevax import certificate, testing
from bilevax.attribution import influence
from bilevax.diagnostics.checking import Prepared
from bilevax.run import chunk

MODULES = (
    "",
    "inner",
    "linear",
    "hypergradient",
    "algorithms",
    "data",
    "sharding",
    "callbacks",
    "checkpoint",
    "nn",
    "plots",
    "diagnostics",
    "games",
    "attribution",
    "replay",
    "testing",
)
CLASSES = (
    "Level",
    "nn.WeightNet",
    "nn.LabelNet",
    "nn.Prompt",
    "nn.SoftChoice",
    "nn.LoRALinear",
)  # those that users make; what the library makes is not walked


class Reached(BaseException):
    """All arguments were taken, and the work begins."""


def reached(*args, **keywords):
    raise Reached


def inner(y, x, batch):
    return 0.5 * jnp.sum((y - x) ** 2)


def outer(y, x, batch):
    return 0.5 * jnp.sum((y - 3.0) ** 2)


def gone():
    a = jnp.ones(3)
    a.delete()
    return a


VALUES = {
    "None": lambda: None,
    "True": lambda: True,
    "text": lambda: "0.1",
    "no text": lambda: "",
    "a url": lambda: "gs://bucket/run",
    "bytes": lambda: b"x",
    "complex": lambda: 1j,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "-1": lambda: -1,
    "0": lambda: 0,
    "1.5": lambda: 1.5,
    "a list": lambda: [0.1],
    "a dict": lambda: {"z": 1},
    "an object": object,
    "texts": lambda: np.asarray(["a", "b"]),
    "objects": lambda: np.asarray([object(), None]),
    "an empty array": lambda: np.zeros(0),
    "a deleted array": gone,
    "a function of nothing": lambda: lambda: None,
    "a class": lambda: int,
}

SOLVER, METHOD = bx.inner.optax(optax.sgd(0.5), 2), bx.hypergradient.implicit()
ALGORITHM = bx.algorithms.double_loop(SOLVER, METHOD, optax.sgd(0.3))
LEVELS = [
    bx.Level(
        "y", lambda p, b: jnp.sum((p["y"] - p["x"]) ** 2), solver=SOLVER, hypergradient=METHOD
    ),
    bx.Level("x", lambda p, b: jnp.sum((p["y"] - 1.0) ** 2), solver=optax.sgd(0.1)),
]

# What makes a call of each function right, by the parameter's name; what is not here has a default.
RIGHT = {
    "inner_objective": lambda: inner, "outer_objective": lambda: outer, "inner_params": lambda: jnp.zeros(2), "outer_params": lambda: jnp.ones(2),
    "objective": lambda: lambda y, *args: jnp.sum(y**2), "solver": lambda: SOLVER, "inner_solver": lambda: SOLVER, "hypergradient": lambda: METHOD,
    "outer_optimizer": lambda: optax.sgd(0.1), "levels": lambda: LEVELS, "params": lambda: {"y": jnp.zeros(2), "x": jnp.zeros(2)},
    "fn": lambda: inner, "num_tasks": lambda: 2, "factory": lambda: optax.sgd, "minimizer": lambda: lambda y, x, b: y, "step": lambda: 0.1,
    "mapping": lambda: lambda y, x, b: 0.5 * y, "smooth": lambda: inner, "prox": lambda: lambda y, s, x: y, "opt": lambda: optax.sgd(0.1),
    "steps": lambda: 2, "inner_step": lambda: 0.1, "outer_step": lambda: 0.1, "period": lambda: 2, "probability": lambda: 0.5,
    "arrays": lambda: np.ones((4, 2)), "batch_size": lambda: 2, "source": lambda: np.ones((4, 2)), "microbatches": lambda: 2,
    "axis_name": lambda: "data", "mesh": lambda: jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), "rules": dict,
    "sharding": lambda: bx.sharding.data_parallel(), "path": lambda: "log", "directory": lambda: "runs", "name": lambda: "value",
    "patience": lambda: 3, "n": lambda: 3, "writer": lambda: type("W", (), {"write_scalars": lambda self, step, row: None})(),
    "scores": lambda: jnp.zeros(3), "logits": lambda: jnp.zeros(2), "options": lambda: [jnp.ones(2)] * 2, "value": lambda: jnp.ones(2),
    "surrogate": lambda: jnp.ones(2), "patterns": lambda: ["kernel"], "run": lambda: {"value": [1.0, 2.0]}, "runs": lambda: {"a": {"value": [1.0]}},
    "equation": lambda: lambda y: y - 1.0, "network": lambda: lambda y, x, b: y, "linear": lambda: bx.linear.cg(), "loss": lambda: lambda out, x, b: jnp.sum(out**2),
    "points": lambda: {"a": np.ones((2, 2))}, "constraint": lambda: lambda y, x, b: jnp.sum(y) - 1.0, "num_steps": lambda: 1, "exact": lambda: True,
}  # fmt: skip
OWN = {
    ("solve_multilevel", "num_steps"): lambda: 1, ("argmin", "solver"): lambda: bx.inner.lbfgs(), ("linear.lineax", "solver"): lambda: None,
    ("data.episodes", "source"): lambda: lambda key, step: jnp.ones(3), ("callbacks.every", "fn"): lambda: print,
    ("metrics", "fn"): lambda: lambda y, x, d: {"m": jnp.sum(y)}, ("inner.gradient_descent", "step_size"): lambda: 0.1,
}  # fmt: skip

X = np.ones((6, 2), np.float32)
NET = bx.nn.from_nnx(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))


def losses(params, rows):
    return jnp.sum((rows - params[None]) ** 2, -1)


def measure(params, measured):
    return jnp.sum(params**2)


MORE = {
    "attribution": {
        "losses": lambda: losses, "measure": lambda: measure, "params": lambda: jnp.zeros(2, jnp.float32), "data": lambda: X,
        "checkpoints": lambda: [jnp.zeros(2, jnp.float32)], "optimizer": lambda: optax.sgd(0.1), "order": lambda: np.arange(6).reshape(3, 2),
        "retrain": lambda: lambda weights: jnp.sum(weights, -1), "key": lambda: jax.random.key(0), "at": lambda: jnp.zeros(2),
        "direction": lambda: jnp.ones(2), "groups": lambda: np.zeros(3, int), "train": lambda: lambda weights: weights,
    },
    "replay": {"optimizer": lambda: optax.sgd(0.1), "num_steps": lambda: 2, "slots": lambda: 3},
    "testing": {"method": lambda: METHOD, "key": lambda: jax.random.key(0)},
    "nn": {
        "rngs": lambda: nnx.Rngs(0), "features": lambda: 2, "classes": lambda: 2, "length": lambda: 2, "rank": lambda: 1, "base": lambda: jnp.tanh,
        "operations": lambda: [jnp.tanh], "model": lambda: nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), "chosen": lambda: lambda path, layer: True,
        "projection": lambda: lambda tree: tree, "inner": lambda: NET, "outer": lambda: jnp.zeros(2), "inner_loss": lambda: inner, "outer_loss": lambda: outer,
        "loss": lambda: inner,
    },
}  # fmt: skip
GIVEN = {("nn.bilevel", "inner"), ("nn.bilevel", "outer"), ("nn.objective", "inner")}
OWN |= {
    ("nn.LoRALinear", "features"): lambda: (2, 2), ("nn.bilevel", "model"): lambda: None, ("nn.objective", "model"): lambda: None,
    ("nn.from_nnx", "model"): lambda: nnx.Linear(2, 1, rngs=nnx.Rngs(0)), ("Level", "objective"): lambda: lambda params, batch: jnp.sum(params["y"]),
    ("replay.reader", "fn"): lambda: lambda step: X, ("error_bound", "info"): lambda: dict.fromkeys(("inner_grad_norm", "adjoint_residual", "cotangent_norm", "grad_norm"), 0.1), ("error_bound", "constants"): lambda: bx.diagnostics.Constants(*[0.5] * 6, smoothness=1.0),
}  # fmt: skip

# Functions that are not walked, and why.
LEFT_OUT = {
    "data.same": "a draw, called inside compiled code", "data.stacked": "a draw, called inside compiled code",
    "sharding.dry_run": "hands all to a driver, which checks it",
    "linear.precondition": "for writers of solvers", "linear.layers": "takes an objective's own arguments", "linear.lineax": "takes lineax's own objects", "inner.optimistix": "takes optimistix' own objects",
    "inner.jaxopt": "takes jaxopt's own objects", "nn.going_on": "takes what nn.bilevel made", "nn.hand_back": "takes what nn.bilevel made",
    "nn.paths": "takes any number of patterns", "attribution.metagradient": "takes a Training", "diagnostics.check_hypergradient": "is bx.check_hypergradient", "diagnostics.compare_hypergradients": "is bx.compare_hypergradients",
    "inner.tunable": "is bx.tunable",
}  # fmt: skip


LEFT_OUT["nn.from_linen"] = "takes modules of linen"
LEFT_OUT["diagnostics.error_bound"] = "is bx.error_bound"
CALLED = {
    ("metrics", "fn"): "metrics",
    ("plots.runs", "runs"): "run",
}  # what a message calls a parameter, where that is another name


LEFT_OUT["plots.comparison"] = "takes what compare_hypergradients found"

# What is right after all, by value: for which parameters, and why.
LATER = "what a function takes is told when the shapes are known, before the first step"
FUNCTIONS = {"inner_loss", "outer_loss", "equation", "network", "loss", "relabel", "regularizer",
             "fn", "objective", "inner_objective", "outer_objective", "inner_draw", "mapping", "minimizer", "smooth", "prox", "linear", "linear_solver",
             "preconditioner", "constraint", "equality", "inequality", "projection", "source"}  # fmt: skip
ALSO = {
    ("trust", "-1"): "a number of either sign",
    ("checkpoints", "a list"): "one checkpoint, of parameters without axes",
    ("step_sizes", "a list"): "one size for the one checkpoint",
    ("inner_params", "a list"): "parameters without axes",
    ("wrt", "True"): "a filter of nnx",
    ("text", "None"): "a compiler that says nothing",
    ("text", "no text"): "likewise",
}
INFINITE = {"max_residual", "tol"}  # infinity accepts anything, and says so
TEXTS = {
    "states",
    "text",
    "axis",
    "axis_name",
    "name",
    "path",
    "directory",
    "title",
    "run_id",
    "select",
}
ARRAYS = {
    "inner_batch",
    "outer_batch",
    "measured",
    "arrays",
    "data",
    "scores",
    "value",
    "surrogate",
    "logits",
}


def allowed(full, fn, parameter, kind):
    """Why a value is accepted, or nothing."""
    name, default = parameter.name, parameter.default
    if kind == "None" and default is None:
        return "the default"
    if kind == "None" and name in ("arrays", "data", "source", "scores"):
        return "a pytree without leaves"
    if kind == "True" and isinstance(default, bool):
        return "a flag"
    if (name, kind) in ALSO:
        return ALSO[name, kind]
    if full == "nn.bilevel" and name == "outer":
        return "parameters, which solve_bilevel looks at"
    words = set(re.findall(r"\w+", str(parameter.annotation)))
    whole = "int" in words and not words & {"float", "Any", "Number"}
    if (kind == "0" or (kind == "1.5" and not whole)) and name not in FUNCTIONS | TEXTS:
        return "a number, of those that are meant"
    if kind == "inf" and name in INFINITE:
        return "means any"
    if kind in ("a function of nothing", "a class") and name in FUNCTIONS | {"inner_init", "opt"}:
        return LATER
    if (
        kind in ("text", "a url", "no text")
        and name in TEXTS
        and not (kind == "no text" and name not in ("select", "run_id"))
    ):
        return "a name"
    if name in ARRAYS and kind in (
        "True",
        "complex",
        "nan",
        "inf",
        "-inf",
        "-1",
        "a list",
        "a dict",
        "an empty array",
    ):
        return "numbers as data, which constants may be"
    return ""


def found(full):
    one = bx
    for part in full.split("."):
        one = getattr(one, part)
    return one


def signature(fn):
    """Of a class, what it is made of: those of nnx say only ``*args``."""
    if not inspect.isclass(fn):
        return inspect.signature(fn)
    whole = inspect.signature(fn.__init__)
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def public():
    for full in CLASSES:
        yield full, found(full)
    for module in MODULES:
        holder = getattr(bx, module) if module else bx
        for name in holder.__all__:
            full, fn = f"{module}.{name}".lstrip("."), getattr(holder, name)
            if (
                callable(fn)
                and not inspect.isclass(fn)
                and not inspect.ismodule(fn)
                and full not in LEFT_OUT
            ):
                yield full, fn


def right(full, parameter):
    more = MORE.get(full.split(".")[0], {})
    make = OWN.get((full, parameter.name)) or more.get(parameter.name) or RIGHT.get(parameter.name)
    return make() if make else None


def outcome(full, fn, parameter, make):
    """Refused by name, refused otherwise (with what was said), or accepted."""
    kinds = inspect.Parameter
    parameters = [
        p
        for p in signature(fn).parameters.values()
        if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    ]
    given = {
        p.name: right(full, p)
        for p in parameters
        if p.default is p.empty or p.name == "num_steps" or (full, p.name) in GIVEN
    }
    given[parameter.name] = make()
    args = [
        given.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_ONLY and p.name in given
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fn(*args, **given)
    except (
        TypeError,
        ValueError,
        OSError,
        KeyError,
        AttributeError,
        ImportError,
        NotImplementedError,
        RuntimeError,
        ZeroDivisionError,
    ) as error:
        text = " ".join([str(error), *getattr(error, "__notes__", [])])
        word = f"(?:{parameter.name}|{CALLED.get((full, parameter.name), parameter.name)})"
        named = (
            re.search(rf"(^|\W){word}(\W|$)", text)
            and isinstance(error, (TypeError, ValueError, OSError, KeyError))
            and any(word in text for word in ("got", "returned", "raised this when called"))
        )
        return "named" if named else f"{type(error).__name__}: {' '.join(text.split())[:110]}"
    except Reached:
        pass
    return "accepted"


@pytest.mark.turns
@pytest.mark.parametrize("full", [full for full, _ in public()])
def test_wrong_values_are_refused_by_name(full, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chunk, "run_chunk", reached)
    monkeypatch.setattr(Prepared, "run", reached)
    monkeypatch.setattr(certificate, "power", reached)
    monkeypatch.setattr(influence, "_gradients", reached)
    monkeypatch.setattr(testing, "value_and_hypergrad", reached)
    fn, wrong = dict(public())[full], []
    for parameter in signature(fn).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        for kind, make in VALUES.items():
            found = outcome(full, fn, parameter, make)
            if found != "named" and not (
                found == "accepted" and allowed(full, fn, parameter, kind)
            ):
                wrong.append(f"{parameter.name} = {kind}: {found}")
    assert not wrong


def test_the_registry_is_as_large_as_it_says():
    assert sum(len(signature(fn).parameters) for _, fn in public()) * len(VALUES) > 2000
    names = {full for full, _ in public()} | set(LEFT_OUT)
    for module in MODULES:
        holder = getattr(bx, module) if module else bx
        for name in holder.__all__:
            one = getattr(holder, name)
            if callable(one) and not inspect.isclass(one):
                assert f"{module}.{name}".lstrip(".") in names
