"""What the recipes share: flags, and small data sets."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data as examples_data


def script(main: Callable[..., float], steps: int, **small) -> None:
    """Run `main` with the flags that every recipe has.

    ``--small`` takes this many `steps` and the `small` arguments, and its number means nothing;
    ``--out`` keeps the number as JSON. A recipe that has forms takes one as ``--form``.
    """
    parser = argparse.ArgumentParser(description=sys.modules[main.__module__].__doc__)
    parser.add_argument("--small", action="store_true", help="few steps; its number means nothing")
    parser.add_argument("--steps", type=int, help="outer steps")
    parser.add_argument("--out", type=Path, help="folder for a JSON file with the number")
    if "form" in inspect.signature(main).parameters:
        parser.add_argument("--form", help="which form of the method")
    given = vars(parser.parse_args())
    out, quick = given.pop("out"), given.pop("small")
    arguments = {"steps": steps, **small} if quick else {}
    arguments |= {name: value for name, value in given.items() if value is not None}
    try:
        number = main(**arguments)
    except examples_data.Unavailable as error:
        if not quick:
            raise SystemExit(str(error)) from None
        print(f"skipped: {error}")
    else:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            name = "_".join([Path(sys.argv[0]).stem, *filter(None, [given.get("form")])])
            (out / f"{name}.json").write_text(json.dumps({"number": number, **arguments}))


def digits(sizes=(300, 300, 500), seed=0, noise=0.0):
    """Digits of 8 x 8 in parts of these sizes, dicts of ``x``, ``y`` and ``i``; of the first part a share `noise` is labelled at random."""
    x, y = map(np.asarray, examples_data.digits())
    rng = np.random.default_rng(seed)
    order, parts, begin = rng.permutation(len(x)), [], 0
    for size in sizes:
        rows = order[begin : begin + size]
        parts.append({"x": x[rows].reshape(-1, 8, 8, 1).astype(np.float32), "y": y[rows].astype(np.int32), "i": np.arange(size)})
        begin += size
    wrong = rng.random(sizes[0]) < noise
    parts[0]["y"] = np.where(wrong, rng.integers(0, 10, sizes[0]), parts[0]["y"]).astype(np.int32)
    return [{name: jnp.asarray(a) for name, a in part.items()} for part in parts]


def cross_entropy(scores, labels):
    """Of each row."""
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels)
