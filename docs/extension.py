"""What the pages hold beyond their own words: formulas as MathML, which browsers show by themselves, and what is written from the sources."""

import ast
import html
import importlib
import inspect
import json
import re
from pathlib import Path

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor
from markdown.preprocessors import Preprocessor

ROOT = Path(__file__).resolve().parent.parent
_MATH = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)
_MARKER = re.compile(r"<!-- (?P<what>results|api|table|gallery):? ?(?P<name>[\w.]*) ?-->")


def results(_: str) -> str:
    """A heading for each code, with its advice."""
    from bilevax import RESULTS

    return "\n\n".join(f"### `{code.name}` ({int(code)}{', a failure' if code.failed else ''})\n\n{code.message}" for code in RESULTS)


# ---- pages of the API: what `__all__` names, and nothing else

# The contract has no `__all__`, since all of the package is written against it: what a person's own piece is made of.
_CONTRACT = (
    "Ctx", "Feed", "Objective", "InnerState", "InnerSolver", "Lower", "Hypergradient", "LinearInfo", "LinearSolver", "Linear", "Problem", "StepInfo",
    "Draws", "Algorithm",
)  # fmt: skip


def api(space: str) -> str:
    """A table of the names of a namespace with their first lines, then each of them."""
    module = importlib.import_module(f"bilevax.{space}" if space else "bilevax")
    names = [name for name in getattr(module, "__all__", _CONTRACT) if not inspect.ismodule(getattr(module, name))]
    prefix = f"bx.{space}." if space else "bx."
    rows, entries = ["| name | what it is |", "| --- | --- |"], []
    for name in names:
        path = _path(getattr(module, name), f"{module.__name__}.{name}")
        rows.append(f"| [`{name}`][{path}] | {_first_line(getattr(module, name))} |")
        entries.append(f"::: {path}\n    options:\n      heading: {prefix}{name}\n      toc_label: {name}")
    return "\n".join(rows) + "\n\n" + "\n\n".join(entries)


def _path(value: object, public: str) -> str:
    """Where the source of a name stands: a function may have the name of its own file."""
    if inspect.isfunction(value) or inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    return public


def _first_line(value: object) -> str:
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        return ""
    return (inspect.getdoc(value) or "").splitlines()[0].replace("``", "`").replace("|", "\\|")


# ---- what examples measured


# Headings that are not the script's name, in the order of the page: from the first example to whole systems. Others follow.
_TITLES = {
    "quickstart": "Quickstart",
    "hyper_cleaning": "Hyper-cleaning",
    "my_own_loop": "My own loop",
    "no_tuning": "No tuning",
    "denoising": "Denoising",
    "nested_argmin": "Nested argmin",
    "learning_by_ignoring": "Learning by ignoring",
    "flax_nnx": "Flax: nnx",
    "flax_linen": "Flax: linen",
    "reweight_cnn": "Reweighting a CNN",
    "multihost": "Several hosts",
    "weak_supervision": "Weak supervision",
    "data_pruning": "Data pruning",
    "autolora": "AutoLoRA",
    "mlo_mae": "MLO-MAE",
    "learning_by_grouping": "Learning by grouping",
    "attribution": "Attribution to training data",
    "data_selection": "Selection of training data",
    "learned_schedule": "A learned schedule",
}


def gallery(_: str) -> str:
    """A section for each example: what it is, the command, its picture, its numbers."""
    sections = []
    known = list(_TITLES)
    place = {script: known.index(script.stem) if script.stem in known else len(known) for script in (ROOT / "examples").glob("*.py")}
    for script in sorted(place, key=lambda script: (place[script], script.stem)):
        doc = ast.get_docstring(ast.parse(script.read_text())) or ""
        if "python examples/" not in doc:
            continue  # what the scripts share
        summary = doc.split("\n\n")[0].replace("\n", " ")
        title = _TITLES.get(script.stem, script.stem.replace("_", " ").capitalize())
        parts = [f"## {title}", summary, f"```bash\npython examples/{script.name}\n```"]
        if (ROOT / "docs" / "systems" / f"{script.stem}.md").exists():
            parts.insert(2, f"[What came out, and how](systems/{script.stem}.md).")
        pictures = sorted((ROOT / "docs" / "gallery").glob(f"{script.stem}*.png"))
        parts += [f"![{script.stem}](gallery/{picture.name})" for picture in pictures]
        saved = ROOT / "docs" / "gallery" / f"{script.stem}.json"
        if saved.exists():
            parts.append(table(script.stem))
        sections.append("\n\n".join(parts))
    return "\n\n".join(sections)


def table(name: str) -> str:
    """The table of an example's saved results: means over seeds and their standard errors, row by row."""
    saved = json.loads((ROOT / "docs" / "gallery" / f"{name}.json").read_text())
    found = saved["results"]
    nested = any(isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()) for value in found.values())
    out = []
    for title, rows in found.items() if nested else [("", found)]:
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        lines = [["", *columns], ["---", *["---:"] * len(columns)]]
        lines += [[name, *(_cell(row.get(column)) for column in columns)] for name, row in rows.items()]
        out.append((f"**{title}**\n\n" if title else "") + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    run = saved["environment"]
    out.append(f"{saved['seconds']:.0f} s on {run['cores']} cores, {run['device']}; jax {run['jax']}.")
    return "\n\n".join(out)


def _cell(values) -> str:
    if values is None:
        return ""
    values = values if isinstance(values, list) else [values]
    if not values or any(isinstance(value, (list, str)) or value is None for value in values):
        return ""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.4g}"
    error = (sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5
    return f"{mean:.4g} ± {error:.2g}"


# ---- the extension


class _Written(Preprocessor):
    """Markers such as ``<!-- api: linear -->``."""

    def run(self, lines: list[str]) -> list[str]:
        writers = {"results": results, "api": api, "table": table, "gallery": gallery}
        return _MARKER.sub(lambda found: writers[found["what"]](found["name"]), "\n".join(lines)).split("\n")


class _Math(Postprocessor):
    """Formulas that ``pymdownx.arithmatex`` has marked."""

    def run(self, text: str) -> str:
        def mathml(found: re.Match) -> str:
            return convert(html.unescape(found["tex"]).strip(), display="block" if found["tag"] == "div" else "inline")

        return _MATH.sub(mathml, text)


class _Pages(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Written(md), "bilevax-written", 40)
        md.postprocessors.register(_Math(md), "bilevax-math", 0)


def makeExtension(**settings) -> Extension:
    """What ``markdown_extensions`` in mkdocs.yml loads."""
    return _Pages(**settings)
