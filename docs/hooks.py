"""Build hooks: formulas become MathML, which browsers show by themselves; RESULTS codes and the gallery are written from their sources."""

import ast
import html
import json
import re
from pathlib import Path

from latex2mathml.converter import convert

from bilevax import RESULTS

ROOT = Path(__file__).resolve().parent.parent
_MATH = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_page_content(content: str, **_) -> str:
    """Replace each marked formula."""

    def mathml(match: re.Match) -> str:
        return convert(html.unescape(match["tex"]).strip(), display="block" if match["tag"] == "div" else "inline")

    return _MATH.sub(mathml, content)


def on_page_markdown(markdown: str, **_) -> str:
    """Replace the markers that stand for something generated."""
    for marker, write in (("<!-- results -->", results), ("<!-- gallery -->", gallery)):
        if marker in markdown:
            markdown = markdown.replace(marker, write())
    return markdown


def results() -> str:
    """A heading for each code, with its advice."""
    return "\n\n".join(f"### `{code.name}` ({int(code)}{', a failure' if code.failed else ''})\n\n{code.message}" for code in RESULTS)


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


def gallery() -> str:
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
            parts.append(table(json.loads(saved.read_text())))
        sections.append("\n\n".join(parts))
    return "\n\n".join(sections)


def table(saved: dict) -> str:
    """Means and standard errors of what a script saved: row -> column -> a number a seed, or tables of these by name."""
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
