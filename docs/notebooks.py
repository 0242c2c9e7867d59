"""Tutorials: sources in jupytext's percent format, from which pages and notebooks are made by
running them.

    python docs/notebooks.py            # runs the quick ones; fails where a cell fails
    python docs/notebooks.py --slow     # the slow ones, too
    python docs/notebooks.py --write    # writes their pages, notebooks and pictures, too
    python docs/notebooks.py darts      # some of them, slow or not

A source is a script, too: `python docs/tutorials/darts.py`. A first cell that is ``slow=true``
keeps it out of a quick run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import pictures

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ["MPLBACKEND"] = "agg"

FOLDER = Path(__file__).resolve().parent / "tutorials"
HOSTED = "https://colab.research.google.com/github/bilevax/bilevax/blob/main/docs/tutorials/"


class Cell(NamedTuple):
    """A cell of a source: its text as it stands in a notebook."""

    code: bool
    text: str


class Output(NamedTuple):
    """What a code cell printed, and its pictures as SVG."""

    printed: str
    pictures: list[str]


def cells(source: str) -> list[Cell]:
    """The cells of a script in percent format; comments of Markdown cells are their text."""
    found = []
    for head, body in re.findall(
        r"^# %%([^\n]*)\n(.*?)(?=^# %%|\Z)", source, re.MULTILINE | re.DOTALL
    ):
        code = "[markdown]" not in head
        text = body if code else re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        found.append(Cell(code, text.strip("\n")))
    return found


def is_slow(source: str) -> bool:
    """Whether a source says so."""
    return re.search(r"^# %% \[markdown\] slow=true$", source, re.MULTILINE) is not None


def run(path: Path) -> list[Output | None]:
    """Run the cells in one namespace, from an empty folder; an output for each code cell."""
    import matplotlib.pyplot as plt

    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs: list[Output | None] = []
    others = plt.get_fignums()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        plt.rc_context(pictures.STYLE | {"figure.constrained_layout.use": True}),
    ):
        for number, cell in enumerate(cells(path.read_text())):
            if not cell.code:
                outputs.append(None)
                continue
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(cell.text, f"{path.name}, cell {number}", "exec"), namespace)
            drawn = [number for number in plt.get_fignums() if number not in others]
            outputs.append(
                Output(out.getvalue().rstrip(), [_svg(plt.figure(number)) for number in drawn])
            )
            for number in drawn:
                plt.close(number)
    return outputs


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg")
    return pictures.compact(out.getvalue())


def page(name: str, source: list[Cell], outputs: list[Output | None]) -> tuple[str, dict[str, str]]:
    """Markdown with what the cells printed, and the pictures by file name."""
    title, _, rest = source[0].text.partition("\n")
    links = (
        f"[Open in a hosted notebook]({HOSTED}{name}.ipynb) · the source is "
        f"`docs/tutorials/{name}.py`, made into this page by running it."
    )
    parts, pictures = [title, links, rest.strip()], {}
    for cell, output in zip(source[1:], outputs[1:], strict=True):
        if not cell.code:
            parts.append(cell.text)
            continue
        parts.append(
            f"```py\n{cell.text}\n```"
        )  # py, not python: what runs these cells is this script
        if output is not None and output.printed:
            parts.append(f"```text\n{output.printed}\n```")
        for picture in [] if output is None else output.pictures:
            file = f"{name}_{len(pictures)}.svg"
            pictures[file] = picture
            parts.append(f"![{title.lstrip('# ')}, picture {len(pictures)}]({file})")
    return "\n\n".join(part for part in parts if part) + "\n", pictures


def notebook(source: list[Cell], outputs: list[Output | None]) -> str:
    """The same as a notebook of nbformat 4, with an installing cell in front for hosts that have no
    bilevax."""
    install = "%pip install -q bilevax scikit-learn matplotlib"
    made = [_code("install", install, None)]
    for number, (cell, output) in enumerate(zip(source, outputs, strict=True)):
        if cell.code:
            made.append(_code(f"c{number}", cell.text, output))
        else:
            made.append(
                {
                    "cell_type": "markdown",
                    "id": f"m{number}",
                    "metadata": {},
                    "source": cell.text.splitlines(keepends=True),
                }
            )
    kernel = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return (
        json.dumps(
            {"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5},
            indent=1,
            ensure_ascii=False,
        )
        + "\n"
    )


def _code(name: str, text: str, output: Output | None) -> dict[str, Any]:
    shown: list[dict[str, Any]] = []
    if output is not None and output.printed:
        shown.append(
            {
                "output_type": "stream",
                "name": "stdout",
                "text": (output.printed + "\n").splitlines(keepends=True),
            }
        )
    for picture in [] if output is None else output.pictures:
        data = {"image/svg+xml": picture.splitlines(keepends=True)}
        shown.append({"output_type": "display_data", "metadata": {}, "data": data})
    return {
        "cell_type": "code", "id": name, "metadata": {}, "execution_count": None,
        "source": text.splitlines(keepends=True), "outputs": shown,
    }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="which (default: all quick ones)")
    parser.add_argument("--slow", action="store_true", help="the slow ones, too")
    parser.add_argument(
        "--write",
        action="store_true",
        help="write pages, notebooks and pictures beside the sources",
    )
    args = parser.parse_args()
    sys.path.insert(0, str(FOLDER.parents[1]))
    for path in sorted(FOLDER.glob("*.py")):
        text = path.read_text()
        if path.stem not in args.names if args.names else is_slow(text) and not args.slow:
            continue
        begin = time.perf_counter()
        outputs = run(path)
        print(f"{path.stem}: {time.perf_counter() - begin:.1f} s", flush=True)
        if args.write:
            source = cells(text)
            markdown, pictures = page(path.stem, source, outputs)
            (FOLDER / f"{path.stem}.md").write_text(markdown)
            (FOLDER / f"{path.stem}.ipynb").write_text(notebook(source, outputs))
            for file, picture in pictures.items():
                (FOLDER / file).write_text(picture)


if __name__ == "__main__":
    main()
