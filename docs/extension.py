"""What the pages hold beyond their own words: formulas as MathML, which browsers show by
themselves, and what is written from the sources."""

import ast
import html
import importlib
import inspect
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor
from markdown.preprocessors import Preprocessor
from markdown.treeprocessors import Treeprocessor

ROOT = Path(__file__).resolve().parent.parent
_MATH = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
_DIRECTIVE = re.compile(
    r"^(?P<margin> *)\.\. math::\n\s*\n?(?P<tex>(?:(?P=margin) +\S.*\n|\n(?=(?P=margin) ))+)",
    re.MULTILINE,
)
_ROLE = re.compile(r":math:`(?P<tex>[^`]*)`")
_PROSE = re.compile(
    r'^(?P<margin> *)(?:"""(?P<quoted>.*?)"""|# (?P<words>[^\n]*(?:\n(?P=margin)# [^\n]*)*))$',
    re.MULTILINE | re.DOTALL,
)
_STRING = re.compile(r'^(?P<margin> +)(?P<form>f?)"(?P<text>[^"\\\n]+)"(?P<end>,?)$', re.MULTILINE)
_CELL, _CODE = re.compile(r"<(t[dh])\b.*?</\1>", re.DOTALL), re.compile(r"(?<=<code>)[^<]*")
_JOINT = re.compile(r"(?<=[._(=,/-])(?=\w)")
_MARKER = re.compile(
    r"<!-- (?P<what>results|api|table|code|levels|recipes):? ?(?P<name>[^>]*?) ?-->"
)


def results(_: str) -> str:
    """A heading for each code, with its advice."""
    from bilevax import RESULTS

    return "\n\n".join(
        f"### `{code.name}` ({int(code)}{', a failure' if code.failed else ''})\n\n{code.message}"
        for code in RESULTS
    )


# ---- pages of the API: what `__all__` names, and nothing else


def api(space: str) -> str:
    """A table of the names of a namespace with their first lines, then each of them."""
    module = importlib.import_module(f"bilevax.{space}" if space else "bilevax")
    names = [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
    prefix = f"bx.{space}." if space else "bx."
    rows, entries = ["| name | what it is |", "| --- | --- |"], []
    for name in names:
        path = _path(getattr(module, name), f"{module.__name__}.{name}")
        rows.append(f"| [`{name}`][{path}] | {_first_line(getattr(module, name))} |")
        entries.append(
            f"::: {path}\n    options:\n      heading: {prefix}{name}\n      toc_label: {name}"
        )
    return "\n".join(rows) + "\n\n" + "\n\n".join(entries)


def _path(value: object, public: str) -> str:
    """Where the source of a name stands: a function may have the name of its own file."""
    if inspect.isfunction(value) or inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    return public


def _first_line(value: object) -> str:
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        return ""
    return (
        " ".join((value.__doc__ or "").split("\n\n")[0].split())
        .replace("``", "`")
        .replace("|", "\\|")
    )


# ---- examples: their code, their levels, what they measured


def code(name: str) -> str:
    """Functions of an example, ``quickstart inner outer``, as they stand in its file, and what is
    given a name there."""
    script, *wanted = name.split()
    text = (ROOT / "examples" / f"{script}.py").read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.get_source_segment(text, node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.get_source_segment(text, node)
    return "```py\n" + narrow("\n\n\n".join(found[one] for one in wanted)) + "```"


def narrow(text: str) -> str:
    """Code in the 78 columns that a page shows without a scroll bar."""
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "78", "-"]
    text = re.sub(r"  # (noqa|fmt)\b[^\n(]*(\([^\n]*\))?$", "", text, flags=re.MULTILINE)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    text = _STRING.sub(_cut, _PROSE.sub(_filled, done.stdout))
    wide = [line for line in text.splitlines() if len(line) > 78]
    if wide:
        raise ValueError(f"wider than a page shows: {wide}")
    return text


def _cut(found: re.Match) -> str:
    """A line that is one text of more than 78 columns, as two: at a space that is in no braces."""
    if len(found[0]) <= 78:
        return found[0]
    begin, text = f'{found["margin"]}{found["form"]}"', found["text"]
    spaces = [i + 1 for i, letter in enumerate(text) if letter == " "]
    outside = [i for i in spaces if text[:i].count("{") == text[:i].count("}")]
    at = max((i for i in outside if len(begin) + i < 78), default=0)
    rest = begin + text[at:] + '"' + found["end"]
    return f'{begin}{text[:at]}"\n{_STRING.sub(_cut, rest)}' if at else found[0]


def _filled(found: re.Match) -> str:
    """A docstring or a comment, whose lines the formatter leaves as they are."""
    if max(map(len, found[0].splitlines())) <= 78:
        return found[0]
    margin, comment = found["margin"], found["quoted"] is None
    text = found["words"].replace(f"\n{margin}# ", "\n") if comment else found["quoted"]
    begin, text = margin + "# " * comment, text if comment else f'"""{text.strip()}"""'
    return "\n\n".join(
        textwrap.fill(" ".join(part.split()), 78, initial_indent=begin, subsequent_indent=begin)
        for part in text.split("\n\n")
    )


def levels(name: str) -> str:
    """A drawing of the levels, lowest first, ``model: weighted examples | weights: clean
    examples``: who is solved for whom."""
    parts = [part.strip().partition(": ") for part in name.split("|")]
    height, out = 78, []
    for i, (called, _, judged) in enumerate(reversed(parts)):
        y = 4 + i * height
        out.append(f'<rect x="4" y="{y}" width="332" height="46" rx="8"/>')
        out.append(
            f'<text x="170" y="{y + 19}" class="name">{html.escape(called)}</text><text x="170" '
            f'y="{y + 36}">{html.escape(judged)}</text>'
        )
        if i + 1 < len(parts):
            out.append(
                f'<path d="M120 {y + 48} v26 m-4 -7 l4 7 l4 -7"/><text x="110" y="{y + 66}" '
                'class="left">decides</text>'
            )
            out.append(
                f'<path d="M220 {y + 74} v-26 m-4 7 l4 -7 l4 7" class="back"/><text x="230" '
                f'y="{y + 66}" class="right">is differentiated</text>'
            )
    size = 12 + (len(parts) - 1) * height + 46
    label = html.escape(", ".join(called for called, _, _ in parts))
    return (
        f'<svg class="levels" viewBox="0 0 340 {size}" role="img" aria-label="Levels, lowest '
        f'first: {label}">{"".join(out)}</svg>'
    )


def recipes(_: str) -> str:
    """A section for each recipe: what it is, its code, the number that was printed at the end."""
    saved = ROOT / "docs" / "gallery" / "recipes.json"
    printed = json.loads(saved.read_text()) if saved.exists() else {}
    sections = []
    for script in sorted((ROOT / "examples" / "recipes").glob("*.py")):
        text = script.read_text()
        tree = ast.parse(text)
        doc = ast.get_docstring(tree) or ""
        if "python examples/" not in doc:
            continue  # what they share
        body = [
            node
            for node in tree.body[1:]
            if not isinstance(node, (ast.Import, ast.ImportFrom, ast.If))
        ]
        shown = "\n".join(text.splitlines()[body[0].lineno - 1 : body[-1].end_lineno])
        title = (
            script.stem.replace("_", " ")
            .capitalize()
            .replace("Maml", "MAML")
            .replace("Darts", "DARTS")
            .replace("Svm", "SVM")
        )
        about = doc.replace(f"`python examples/recipes/{script.name}`", "").strip()
        result = f"\n\nPrinted at the end: {printed[script.stem]}" if script.stem in printed else ""
        run = f"```bash\npython examples/recipes/{script.name}\n```"
        sections.append(f"## {title}\n\n{about}{result}\n\n{run}\n\n```py\n{narrow(shown)}```")
    return "\n\n".join(sections)


_COLUMNS = {
    "test": "test accuracy",
    "l2": "L2",
    "auc": "AUC",
    "step": "kept step",
    "held_out": "held-out loss",
    "rare": "accuracy on rare classes",
}
_COLUMNS_OF = {
    "data_selection": {"area": "area under the curve, good text against junk"},
    "poisoning": {
        "area": "area under the curve",
        "found": "poison found in a tenth of the examples",
        "clean": "right on clean digits",
        "away": "ten losses, away from the truth",
    },
    "denoising": {"test": "test PSNR, dB", "work": "gradients and products"},
    "nested_argmin": {"norm": "log10 of the gradient, over the first"},
    "no_tuning": {"value": "outer value", "relative": "gradient over the first"},
    "multihost": {"first": "first loss", "last": "last loss"},
    "omniglot": {"test": "accuracy, new characters"},
    "omniglot_5": {"test": "accuracy, new characters"},
}
_ROWS_OF = {
    "nested_argmin": "method",
    "no_tuning": "problem and algorithm",
    "multihost": "run",
    "data_pruning": "share of rows kept by",
    "attribution": "influence by",
    "data_selection": "trained on",
    "poisoning": "blamed by",
    "learned_schedule": "learning rates",
    "omniglot": "learner",
    "omniglot_5": "learner",
}


def table(name: str) -> str:
    """The table of an example's saved results: means over seeds and their standard errors, row by
    row."""
    saved = json.loads((ROOT / "docs" / "gallery" / f"{name}.json").read_text())
    found = saved["results"]
    named = _COLUMNS | _COLUMNS_OF.get(name, {})
    nested = any(
        isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values())
        for value in found.values()
    )
    out = []
    for title, rows in found.items() if nested else [("", found)]:
        columns = [
            column
            for column in dict.fromkeys(c for row in rows.values() for c in row)
            if any(_cell(row.get(column)) for row in rows.values())
        ]
        lines = [
            [_ROWS_OF.get(name, "row"), *(named.get(column, column) for column in columns)],
            ["---", *["---:"] * len(columns)],
        ]
        lines += [
            [row, *(_cell(cells.get(column)) for column in columns)] for row, cells in rows.items()
        ]
        out.append(
            (f"**{title}**\n\n" if title else "")
            + "\n".join("| " + " | ".join(line) + " |" for line in lines)
        )
    run = saved["environment"]
    several = saved["settings"].get("seeds", 1) > 1
    what = "Means over seeds ± a standard error" if several else "One seed"
    out.append(f"{what}; {run['device']}, jax {run['jax']}.")
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
    return f"{mean:.4g} ± {error:.2g}" if error > 1e-12 * abs(mean) else f"{mean:.4g}"


# ---- the extension


class _Written(Preprocessor):
    """Markers such as ``<!-- api: linear -->``."""

    def run(self, lines: list[str]) -> list[str]:
        writers = {
            "results": results,
            "api": api,
            "table": table,
            "code": code,
            "levels": levels,
            "recipes": recipes,
        }
        return _MARKER.sub(
            lambda found: writers[found["what"]](found["name"]), "\n".join(lines)
        ).split("\n")


class _Pictures(Treeprocessor):
    """A picture leads to itself, to be seen as large as it is."""

    def run(self, root: Element) -> None:
        for parent in root.iter("p"):
            for i, picture in enumerate(list(parent)):
                if picture.tag == "img" and not picture.get("src", "").startswith("http"):
                    link = Element("a", {"href": picture.get("src", ""), "class": "picture"})
                    link.tail, picture.tail = picture.tail, None
                    parent[i] = link
                    link.append(picture)


class _Directives(Preprocessor):
    """The formulas of docstrings, which are written for any reader of reStructuredText."""

    def run(self, lines: list[str]) -> list[str]:
        text = _DIRECTIVE.sub(
            lambda found: f"{found['margin']}$$\n{found['tex'].rstrip()}\n{found['margin']}$$\n\n",
            "\n".join(lines) + "\n",
        )
        return _ROLE.sub(r"$\g<tex>$", text).split("\n")


class _Math(Postprocessor):
    """Formulas that ``pymdownx.arithmatex`` has marked."""

    def run(self, text: str) -> str:
        def mathml(found: re.Match) -> str:
            return convert(
                html.unescape(found["tex"]).strip(),
                display="block" if found["tag"] == "div" else "inline",
            )

        return _MATH.sub(mathml, text)


class _Breaks(Postprocessor):
    """Where a name in a table may be folded on a phone: behind its dots, bars and brackets."""

    def run(self, text: str) -> str:
        return _CELL.sub(
            lambda cell: _CODE.sub(lambda name: _JOINT.sub("<wbr>", name[0]), cell[0]), text
        )


class _Pages(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Written(md), "bilevax-written", 40)
        md.preprocessors.register(_Directives(md), "bilevax-directives", 35)
        md.treeprocessors.register(_Pictures(md), "bilevax-pictures", 12)
        md.postprocessors.register(_Math(md), "bilevax-math", 0)
        md.postprocessors.register(_Breaks(md), "bilevax-breaks", -1)


def makeExtension(**settings) -> Extension:
    """What ``markdown_extensions`` in mkdocs.yml loads."""
    return _Pages(**settings)
