"""Where the examples' data comes from: a file in the folder that BILEVAX_DATA names, otherwise the
same data set through scikit-learn."""

from __future__ import annotations

import csv
import gzip
import json
import os
import socket
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Unavailable(RuntimeError):
    """The data is not on this machine and cannot be downloaded."""


class Split(NamedTuple):
    """Inputs as float32 in [0, 1] and labels as int32, for training and test."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def local(name: str) -> Path | None:
    """The file `name` in the folder that BILEVAX_DATA names, None where there is no such folder or
    file."""
    folder = os.environ.get("BILEVAX_DATA")
    path = Path(folder) / name if folder else None
    return path if path is not None and path.is_file() else None


def openml(name: str, version: int = 1, timeout: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    """A data set of OpenML through scikit-learn, which keeps it in its own cache after the first
    time."""
    from sklearn.datasets import fetch_openml

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)  # a machine without a network should say so soon
    try:
        return fetch_openml(
            name,
            version=version,
            as_frame=False,
            parser="liac-arff",
            return_X_y=True,
            n_retries=1,
            delay=1.0,
        )
    except OSError as error:
        raise Unavailable(
            f"{name} is not on this machine and OpenML cannot be reached ({error}). Connect once, "
            "or set BILEVAX_DATA to a folder that has the file."
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def mnist() -> Split:
    """MNIST with its official split: 60,000 and 10,000 images of 28 x 28, one flat row each."""
    path = local("mnist.npz")
    if path is not None:
        with np.load(path) as file:
            arrays = [file[key] for key in Split._fields]
    else:
        x, y = openml("mnist_784")
        arrays = [x[:60_000], y[:60_000], x[60_000:], y[60_000:]]
    x_train, y_train, x_test, y_test = arrays
    return Split(
        _images(x_train), y_train.astype(np.int32), _images(x_test), y_test.astype(np.int32)
    )


def fashion() -> Split:
    """Fashion-MNIST: 10,000 training and 2,000 test images of 28 x 28, one flat row each. Shuffle
    them: they may come sorted by class."""
    path = local("fashion_12k.npz")
    if path is not None:
        with np.load(path) as file:
            arrays = [file[key] for key in Split._fields]
    else:
        x, y = openml("Fashion-MNIST")
        y = y.astype(np.int32)
        arrays = [x[:10_000], y[:10_000], x[60_000:62_000], y[60_000:62_000]]
    x_train, y_train, x_test, y_test = arrays
    return Split(
        _images(x_train), y_train.astype(np.int32), _images(x_test), y_test.astype(np.int32)
    )


def _images(x: np.ndarray) -> np.ndarray:
    return (x.reshape(len(x), -1) / 255).astype(np.float32)


def natural_images() -> tuple[list[np.ndarray], str]:
    """Grey natural images as float32 in [0, 1], and where they come from: the 68 of BSD68, or the
    two that scikit-learn has in its package."""
    path = local("bsd68_gray.npz")
    if path is not None:
        with np.load(path) as file:
            return list((file["x"] / 255).astype(np.float32)), "BSD68"
    from sklearn.datasets import load_sample_images

    weights = np.array([0.299, 0.587, 0.114], np.float32)
    return [
        (image / 255).astype(np.float32) @ weights for image in load_sample_images().images
    ], "scikit-learn's sample images"


def cifar10() -> Split:
    """CIFAR-10: the first 10,000 training and 1,000 test images, 32 x 32 x 3, as they are
    (uint8)."""
    path = local("cifar10_10k.npz")
    if path is not None:
        with np.load(path) as file:
            arrays = [file[key] for key in Split._fields]
    else:
        x, y = openml("CIFAR_10")
        x = (
            x.astype(np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        )  # colour by colour there
        arrays = [x[:10_000], y[:10_000], x[50_000:51_000], y[50_000:51_000]]
    x_train, y_train, x_test, y_test = arrays
    return Split(x_train, y_train.astype(np.int32), x_test, y_test.astype(np.int32))


class Xrays(NamedTuple):
    """Chest X-rays of 28 x 28 as they are (uint8), 1 for pneumonia."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def pneumonia() -> Xrays:
    """Chest X-rays of children, of which nine in ten in training have pneumonia."""
    path = local("pneumonia.npz")
    if path is None:
        raise Unavailable(
            "pneumonia.npz is not on this machine: put PneumoniaMNIST of MedMNIST into the folder "
            "that BILEVAX_DATA names."
        )
    with np.load(path) as file:
        parts = ("train", "val", "test")
        return Xrays(*(
            file[f"{part}_{what}"] if what == "images" else file[f"{part}_{what}"][:, 0].astype(int)
            for part in parts for what in ("images", "labels")
        ))  # fmt: skip


class Census(NamedTuple):
    """The census income data: features (float32, one-hot or standardised by the training rows), 1
    for above 50K, 1 for men; their names."""

    x: np.ndarray
    y: np.ndarray
    male: np.ndarray
    train: int  # rows of the official training set, which come first
    names: list[str]


NUMBERS = ("age", "education-num", "capital-gain", "capital-loss", "hours")
ADULT = (
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education-num",
    "marital",
    "occupation",
    "relationship",
    "race",
    "sex",
    *NUMBERS[2:],
    "country",
)


def adult() -> Census:
    """Adult: 32,561 and 16,281 people with the official split. The sampling weight is left out;
    missing values are a category of their own."""
    paths = [local("adult.data.gz"), local("adult.test.gz")]
    if all(paths):
        people = []
        for path in paths:
            with gzip.open(path, "rt") as file:
                people += [
                    row
                    for row in csv.reader(file, skipinitialspace=True)
                    if len(row) == len(ADULT) + 1
                ]
        table = np.array(people)
        columns, y, male = (
            list(table.T[:-1]),
            np.char.startswith(table[:, -1], ">50K"),
            table[:, ADULT.index("sex")] == "Male",
        )
    else:
        x, label = openml("adult", 2)
        place = np.roll(np.arange(len(x)), -16_281)  # there the test set comes first
        columns, y = list(x[place].T), np.char.startswith(label[place].astype(str), ">50K")
        sex = columns[ADULT.index("sex")]
        male = sex == (0 if np.mean(sex == 0) > 0.5 else 1)  # coded by number there; most are men
    train, out, names = 32_561, [], []
    for name, column in zip(ADULT, columns, strict=True):
        if name in NUMBERS:
            column = column.astype(np.float32)
            if name.startswith("capital"):  # mostly zero, and else over four orders of magnitude
                out.append(column > 0)
                names.append(f"any {name}")
                column = np.log1p(column)
            out.append((column - column[:train].mean()) / column[:train].std())
            names.append(name)
        elif name != "fnlwgt":
            codes = np.array([str(value) for value in column])
            for value in np.unique(codes):
                out.append(codes == value)
                names.append(f"{name}={value}")
    return Census(
        np.stack(out, 1).astype(np.float32), y.astype(np.int32), male.astype(np.int32), train, names
    )


class Weak(NamedTuple):
    """One split of a data set of weak supervision: texts, gold labels as int32, and what each
    labelling function votes for each text, -1 for none."""

    texts: list[str]
    y: np.ndarray
    votes: np.ndarray


def wrench(name: str) -> dict[str, Weak]:
    """Splits ``train``, ``valid`` and ``test`` of a data set of WRENCH (Zhang et al., NeurIPS
    2021), such as ``trec`` or ``youtube``."""
    content = _packed(
        f"wrench_{name}.json.gz",
        '{"train": {id: {"label": 0, "weak_labels": [-1, ...], "data": {"text": ""}}}, "valid": '
        '..., "test": ...}',
    )
    splits = {}
    for split in ("train", "valid", "test"):
        rows = list(content[split].values())
        votes = np.array([row["weak_labels"] for row in rows], np.int32)
        splits[split] = Weak(
            [row["data"]["text"] for row in rows],
            np.array([row["label"] for row in rows], np.int32),
            votes,
        )
    return splits


def sst2() -> dict[str, tuple[list[str], np.ndarray]]:
    """SST-2 by whole sentences: texts and labels of ``train`` (6,920), ``dev`` (872) and ``test``
    (1,821)."""
    content = _packed(
        "sst2_sent.json.gz", '{"train": [[label, sentence], ...], "dev": ..., "test": ...}'
    )
    return {
        split: ([text for _, text in rows], np.array([int(label) for label, _ in rows], np.int32))
        for split, rows in content.items()
    }


def text_domains() -> dict[str, str]:
    """Six kinds of English and code by name, plain ASCII, a few MB each: plays, manual, man_pages,
    fortunes, dictionary, code."""
    return _packed("text_domains.json.gz", '{"plays": text, "manual": text, ...}')


def _packed(name: str, form: str):
    path = local(name)
    if path is None:
        raise Unavailable(
            f"{name} is not on this machine: put it into the folder that BILEVAX_DATA names. It is "
            f"gzipped JSON, {form}."
        )
    with gzip.open(path, "rt") as file:
        return json.load(file)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's own 1,797 digits of 8 x 8, inside its package."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x / 16).astype(np.float32), y.astype(np.int32)


def replace_labels(
    rng: np.random.Generator, y: np.ndarray, fraction: float, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which a `fraction` is drawn anew, uniformly over all classes (so some stay right),
    and where they were drawn."""
    drawn = rng.permutation(len(y)) < round(fraction * len(y))
    return np.where(drawn, rng.integers(0, classes, len(y)), y).astype(y.dtype), drawn


def confuse_labels(
    rng: np.random.Generator, y: np.ndarray, fraction: float, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which a `fraction` is moved to the next class, as an annotator with a systematic
    error would, and where."""
    moved = rng.permutation(len(y)) < round(fraction * len(y))
    return np.where(moved, (y + 1) % classes, y).astype(y.dtype), moved
