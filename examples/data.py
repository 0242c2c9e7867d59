"""Where the examples' data comes from: a file in the folder that BILEVAX_DATA names, otherwise the same data set through scikit-learn."""

from __future__ import annotations

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
    """The file `name` in the folder that BILEVAX_DATA names, None where there is no such folder or file."""
    folder = os.environ.get("BILEVAX_DATA")
    path = Path(folder) / name if folder else None
    return path if path is not None and path.is_file() else None


def openml(name: str, version: int = 1, timeout: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    """A data set of OpenML through scikit-learn, which keeps it in its own cache after the first time."""
    from sklearn.datasets import fetch_openml

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)  # a machine without a network should say so soon
    try:
        return fetch_openml(name, version=version, as_frame=False, parser="liac-arff", return_X_y=True, n_retries=1, delay=1.0)
    except OSError as error:
        raise Unavailable(
            f"{name} is not on this machine and OpenML cannot be reached ({error}). Connect once, or set BILEVAX_DATA to a folder that has the file."
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
    return Split(_images(x_train), y_train.astype(np.int32), _images(x_test), y_test.astype(np.int32))


def _images(x: np.ndarray) -> np.ndarray:
    return (x.reshape(len(x), -1) / 255).astype(np.float32)


def natural_images() -> tuple[list[np.ndarray], str]:
    """Grey natural images as float32 in [0, 1], and where they come from: the 68 of BSD68, or the two that scikit-learn has in its package."""
    path = local("bsd68_gray.npz")
    if path is not None:
        with np.load(path) as file:
            return list((file["x"] / 255).astype(np.float32)), "BSD68"
    from sklearn.datasets import load_sample_images

    weights = np.array([0.299, 0.587, 0.114], np.float32)
    return [(image / 255).astype(np.float32) @ weights for image in load_sample_images().images], "scikit-learn's sample images"


def cifar10() -> Split:
    """CIFAR-10: the first 10,000 training and 1,000 test images, 32 x 32 x 3, as they are (uint8)."""
    path = local("cifar10_10k.npz")
    if path is not None:
        with np.load(path) as file:
            arrays = [file[key] for key in Split._fields]
    else:
        x, y = openml("CIFAR_10")
        x = x.astype(np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # colour by colour there
        arrays = [x[:10_000], y[:10_000], x[50_000:51_000], y[50_000:51_000]]
    x_train, y_train, x_test, y_test = arrays
    return Split(x_train, y_train.astype(np.int32), x_test, y_test.astype(np.int32))


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's own 1,797 digits of 8 x 8, inside its package."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x / 16).astype(np.float32), y.astype(np.int32)


def replace_labels(rng: np.random.Generator, y: np.ndarray, fraction: float, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which a `fraction` is drawn anew, uniformly over all classes (so some stay right), and where they were drawn."""
    drawn = rng.permutation(len(y)) < round(fraction * len(y))
    return np.where(drawn, rng.integers(0, classes, len(y)), y).astype(y.dtype), drawn


def confuse_labels(rng: np.random.Generator, y: np.ndarray, fraction: float, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which a `fraction` is moved to the next class, as an annotator with a systematic error would, and where."""
    moved = rng.permutation(len(y)) < round(fraction * len(y))
    return np.where(moved, (y + 1) % classes, y).astype(y.dtype), moved
