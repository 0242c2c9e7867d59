"""How the examples report: common flags, pieces that a second call reads back, tables, pictures,
and a JSON file of all that a run depended on."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import jax
import numpy as np
import pictures
from data import Unavailable
from pictures import (  # noqa: F401 (the examples say report.BLUE)
    BLUE,
    BROWN,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
)

import bilevax as bx

Rows = Mapping[str, Mapping[str, Sequence[float]]]  # row -> column -> one number a seed


# ---- flags


def parser(
    doc: str, *, full: Mapping[str, int], small: Mapping[str, int], pieces: bool = False
) -> argparse.ArgumentParser:
    """A parser with the flags that every example has. `full` and `small` hold the defaults of
    ``seeds`` and ``steps`` in either mode.

    `pieces`: the script works through `Pieces`, and has ``--checkpoint``.
    """
    summary, _, usage = doc.strip().partition("\n\n")
    out = argparse.ArgumentParser(
        description=summary, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument(
        "--small",
        action="store_true",
        help="a small run that finishes in seconds; its numbers mean nothing",
    )
    for name, what in (("seeds", "random seeds"), ("steps", "outer steps")):
        out.add_argument(
            f"--{name}",
            type=_positive,
            help=f"{what} (default {full[name]}, with --small {small[name]})",
        )
    out.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "output",
        help="folder of the picture and the JSON file",
    )
    out.add_argument(
        "--device",
        help=(
            "where to run: cpu, gpu, tpu, or one of several, such as gpu:1 (default: what jax "
            "takes)"
        ),
    )
    if pieces:
        out.add_argument(
            "--checkpoint",
            type=Path,
            metavar="DIR",
            help="folder that keeps what is finished and the run in flight; a second call goes on",
        )
    out.set_defaults(modes={False: dict(full), True: dict(small)})
    return out


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, with the mode's defaults where none was given, and the output folder made."""
    args = parser.parse_args(argv)
    for name, value in args.modes[args.small].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    del args.modes
    if args.small:  # compiles longer than it runs
        jax.config.update("jax_disable_most_optimizations", True)
    if args.device is not None:
        try:
            jax.config.update("jax_default_device", device(args.device))
        except (RuntimeError, LookupError, ValueError) as error:
            parser.error(f"argument --device: got {args.device!r}: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def device(name: str) -> jax.Device:
    """The device ``platform`` or ``platform:number``."""
    platform, _, number = name.partition(":")
    found = jax.devices(platform)
    if number and int(number) >= len(found):
        raise LookupError(f"there are {len(found)} devices of this platform, counted from 0")
    return found[int(number or 0)]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}; expected at least 1")
    return value


def run(main: Callable) -> None:
    """Call a script's main. Data that cannot be had skips a small run (exit status 0), and fails a
    full one."""
    try:
        main()
    except Unavailable as error:
        if "--small" not in sys.argv:
            raise SystemExit(str(error)) from None
        print(f"skipped: {error}")


# ---- pieces of a long run


class Pieces:
    """What a script does, piece by piece: ``rows = pieces("seed 0, CG", lambda: train(...))``.

    With ``--checkpoint DIR`` results are kept in a folder in there, named by the script and a
    digest of the `settings`, and a piece that is there is read back. `settings` is all that results
    depend on; leave out what only says how many pieces there are, such as the number of seeds.
    """

    def __init__(self, args: argparse.Namespace, settings: Mapping):
        content = json.dumps(dict(settings), indent=1, sort_keys=True, default=_plain)
        self.folder, self.begin = None, time.perf_counter()
        if args.checkpoint is not None:
            digest = hashlib.sha256(content.encode()).hexdigest()[:10]
            self.folder = args.checkpoint / f"{Path(sys.argv[0]).stem}-{digest}"
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "settings.json").write_text(content + "\n")
            print(f"pieces are kept in {self.folder}", flush=True)

    def __call__(self, name: str, make: Callable):
        """The result of ``make()`` as JSON gives it back (arrays are lists), or that of an earlier
        call of the script. One line of progress."""
        path = None if self.folder is None else self.folder / f"{quote(name, safe=' ,=()')}.json"
        if path is not None and path.is_file():
            print(f"{self._clock()}  {name}: read back", flush=True)
            return json.loads(path.read_text())
        start = time.perf_counter()
        text = json.dumps(make(), default=_plain)
        if path is not None:
            part = path.with_suffix(".part")
            part.write_text(text + "\n")
            part.replace(path)  # there as a whole or not at all
            shutil.rmtree(self.folder / "running", ignore_errors=True)
        print(f"{self._clock()}  {name}: {time.perf_counter() - start:.1f} s", flush=True)
        return json.loads(text)

    def checkpoint(self, name: str, every: int):
        """For ``solve_bilevel(..., checkpoint=...)``: the run called `name` of the piece in
        progress, saved every so many steps. Its checkpoints go when the piece is finished. None
        without ``--checkpoint``."""
        return (
            None
            if self.folder is None
            else bx.checkpoint.every(every, self.folder / "running" / quote(name, safe=" ,=()"))
        )

    def _clock(self) -> str:
        seconds = int(time.perf_counter() - self.begin)
        return f"{seconds // 60:3d}:{seconds % 60:02d}"


def unless_preempted(solution: bx.Solution) -> bx.Solution:
    """`solution`, unless a signal ended its run: then the script ends as well, since a part of a
    run is no result, and a second call goes on."""
    if solution.result is bx.RESULTS.preempted:
        raise SystemExit("stopped by a signal; the same command goes on from here")
    return solution


# ---- numbers


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean over seeds; NaN for a single seed, which has none."""
    values = np.asarray(values, float)
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def mean_se(values: Sequence[float], digits: int = 3, signed: bool = False) -> str:
    """``mean ± standard error`` over seeds; the mean alone for a single seed. With an exponent
    where these digits would show zeros alone."""
    mean, error = np.mean(values), standard_error(values)
    shown = mean == 0 or np.fmax(abs(mean), error) >= 10.0**-digits
    form = f".{digits}f" if shown else ".1e"
    text = f"{mean:{'+' if signed else ''}{form}}"
    return text if np.isnan(error) else f"{text} ± {error:{form}}"


def table(
    rows: Rows,
    columns: Mapping[str, str],
    *,
    better: tuple[str, str] | None = None,
    digits: int = 3,
) -> str:
    """The rows as a Markdown table, mean ± standard error over seeds.

    `columns` maps a key of a row to its heading. With ``better=(row, key)`` a last column says by
    how much that row is above each other one: mean and standard error of the differences seed by
    seed (all rows of a seed share its data), and their ratio t.
    """
    lines = [["", *columns.values()] + ([f"{better[0]} is above it by"] if better else [])]
    for name, row in rows.items():
        cells = [name] + [mean_se(row[key], digits) if key in row else "" for key in columns]
        if better:
            gain = np.asarray(rows[better[0]][better[1]]) - np.asarray(row[better[1]])
            error = standard_error(gain)
            t = "" if not error > 0 else f" (t = {np.mean(gain) / error:+.1f})"
            cells.append("" if name == better[0] else mean_se(gain, digits, signed=True) + t)
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


# ---- files


@contextlib.contextmanager
def figure(
    path: Path, columns: int, *, height: float = 4.2, width: float = 5.4, **keywords
) -> Iterator[tuple]:
    """``with figure(path, 2) as (fig, axes)``: draw, and the picture is saved at the end, curves
    and bars as ``.svg``, photographs as ``.png``. Needs no display."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(pictures.STYLE | {"font.size": 11, "axes.titlesize": 12}):
        fig, axes = plt.subplots(
            1, columns, figsize=(width * columns, height), layout="constrained", **keywords
        )
        yield fig, axes
        pictures.save(fig, path)
        plt.close(fig)
    print(f"picture: {path}")


def bars(ax, rows: Rows, key: str, colors: Mapping[str, str], label: str, digits: int = 3) -> None:
    """Rows as points with two standard errors to either side, the number beside each."""
    names = list(rows)
    for place, name in enumerate(names):
        values = np.asarray(rows[name][key], float)
        error = 0.0 if len(values) == 1 else 2 * standard_error(values)
        color = colors.get(name, GREY)
        ax.errorbar(values.mean(), place, xerr=error, fmt="o", color=color, capsize=4, markersize=7)
        ax.annotate(
            f"{values.mean():.{digits}f}",
            (values.mean(), place),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
        )
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.7)
    ax.margins(x=0.12)
    ax.grid(axis="x")
    ax.set_xlabel(label)


def two_kinds(ax, values: Mapping[str, np.ndarray], bins) -> None:
    """Histograms of two kinds of examples over each other, by label."""
    for (label, found), color, hatch in zip(
        values.items(), (BLUE, ORANGE), (None, "//"), strict=True
    ):
        ax.hist(found, bins, color=color, alpha=0.75, label=label, hatch=hatch, edgecolor=GREY)
    ax.legend()


def save(path: Path, settings: Mapping, rows: Rows, seconds: float, **more) -> None:
    """Settings, results a seed, time and environment as JSON."""
    settings = {
        name: value for name, value in settings.items() if name not in ("out", "checkpoint")
    }  # where it was written says nothing
    content = {
        "settings": settings,
        "results": rows,
        "seconds": seconds,
        **more,
        "environment": environment(),
    }
    path.write_text(json.dumps(content, indent=1, default=_plain) + "\n")
    print(f"numbers: {path}")


def environment() -> dict:
    """Versions and machine."""
    packages = ("bilevax", "jax", "jaxlib", "numpy", "optax", "flax", "scikit-learn")
    versions = {}
    for name in packages:
        with contextlib.suppress(
            importlib.metadata.PackageNotFoundError
        ):  # run from a checkout that is not installed
            versions[name] = importlib.metadata.version(name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "cores": cores,
        "device": str(jax.config.jax_default_device or jax.devices()[0]),
    }


def _plain(value):
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return np.asarray(value).tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"not JSON: {type(value).__name__}")
