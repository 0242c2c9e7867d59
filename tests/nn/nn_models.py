"""One small network in both of Flax's styles, with the same parameters, and problems on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

from bilevax import nn

FEATURES, HIDDEN, CLASSES, ROWS = 3, 4, 2, 12
F64 = dict(dtype=jnp.float64, param_dtype=jnp.float64)


class NnxNet(nnx.Module):
    """Linear, BatchNorm, tanh, Dropout, Linear."""

    def __init__(self, rngs, *, norm=True, rate=0.0, dtypes=F64):
        self.body = nnx.Linear(FEATURES, HIDDEN, rngs=rngs, **dtypes)
        self.norm = nnx.BatchNorm(HIDDEN, momentum=0.9, rngs=rngs, **dtypes) if norm else None
        self.drop = nnx.Dropout(rate, rngs=rngs) if rate else None
        self.head = nnx.Linear(HIDDEN, CLASSES, rngs=rngs, **dtypes)

    def __call__(self, x):
        x = self.body(x)
        x = jnp.tanh(x if self.norm is None else self.norm(x))
        return self.head(x if self.drop is None else self.drop(x))


class LinenNet(linen.Module):
    """The same."""

    norm: bool = True
    rate: float = 0.0
    dtypes: tuple = tuple(F64.items())

    @linen.compact
    def __call__(self, x, train: bool):
        dtypes = dict(self.dtypes)
        x = linen.Dense(HIDDEN, name="body", **dtypes)(x)
        if self.norm:
            x = linen.BatchNorm(use_running_average=not train, momentum=0.9, name="norm", **dtypes)(
                x
            )
        x = jnp.tanh(x)
        if self.rate:
            x = linen.Dropout(self.rate, deterministic=not train)(x)
        return linen.Dense(CLASSES, name="head", **dtypes)(x)


MODES = dict(train={"train": True}, evaluate={"train": False})


def nnx_net(seed=0, **settings):
    model = NnxNet(nnx.Rngs(seed), **settings)
    if (
        model.norm is not None and settings.get("dtypes", F64) is F64
    ):  # nnx makes float32 statistics whatever the parameters are
        for name in ("mean", "var"):
            setattr(
                model.norm, name, nnx.BatchStat(getattr(model.norm, name)[...].astype(jnp.float64))
            )
    return model


def linen_variables(model):
    """The variables of `model` for `LinenNet`."""
    params = {
        name: {
            key: value[...]
            for key, value in nnx.to_pure_dict(nnx.state(getattr(model, name), nnx.Param)).items()
        }
        for name in ("body", "head")
    }
    out = {"params": params}
    if model.norm is not None:
        params["norm"] = nnx.to_pure_dict(nnx.state(model.norm, nnx.Param))
        out["batch_stats"] = {"norm": nnx.to_pure_dict(nnx.state(model.norm, nnx.BatchStat))}
    return out


def linen_net(model, wrt=True, rate=0.0, rngs=()):
    module = LinenNet(norm=model.norm is not None, rate=rate)
    return nn.from_linen(module, linen_variables(model), wrt, **MODES, rngs=rngs)


def batches(seed=0, rows=ROWS):
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(2):
        x = rng.normal(size=(rows, FEATURES))
        out.append(
            (
                jnp.asarray(x),
                jnp.asarray((x[:, 0] + 0.3 * rng.normal(size=rows) > 0).astype(np.int32)),
                jnp.arange(rows),
            )
        )
    return out


def call(model, x):
    """Flax's own BatchNorm promotes float64 with float32 to find a dtype, which strict promotion
    forbids; all else here stays strict."""
    with jax.numpy_dtype_promotion("standard"):
        return model(x)


def losses(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(call(model, batch[0]), batch[1])


def weighted(model, scores, batch):
    """Inner: weighted examples."""
    return jnp.mean(jax.nn.sigmoid(scores[batch[2]]) * losses(model, batch))


def plain(model, scores, batch):
    return jnp.mean(losses(model, batch))


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same_bits(a, b):
    a, b = leaves(a), leaves(b)
    return len(a) == len(b) and all((u == v).all() for u, v in zip(a, b, strict=True))
