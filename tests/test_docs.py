"""Every ``python`` block of the README and of the docs runs, a page in one namespace from top to
bottom.

A block fenced as ``output`` that follows a ``python`` block holds what that block prints, and is
compared with it.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.readers import as_reader
from tests.test_public import SPACES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^(?P=indent)```\s*?$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    language: str
    body: str
    line: int


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, unindented, with the line at which each body begins."""
    found = []
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        body = "".join(
            line[indent:] if line.strip() else line
            for line in match["body"].splitlines(keepends=True)
        )
        found.append(Block(match["language"], body, text.count("\n", 0, match.start("body")) + 1))
    return found


def run_page(path: Path, text: str) -> int:
    """Run a page's python blocks; returns how many ran."""
    namespace: dict = {"__name__": "__main__"}
    printed, ran = None, 0
    for block in blocks(text):
        if block.language == "python":
            out = io.StringIO()
            # Blank lines before the code make a traceback name the page's own line.
            code = compile("\n" * (block.line - 1) + block.body, str(path), "exec")
            with contextlib.redirect_stdout(out):
                exec(code, namespace)
            printed, ran = out.getvalue(), ran + 1
        elif block.language == "output":
            assert printed is not None, (
                f"{path}:{block.line}: output without a python block before it"
            )
            assert printed.strip() == block.body.strip(), (
                f"{path}:{block.line}: the page shows another output than its code prints"
            )
            printed = None
    return ran


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.turns
@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_page(page, tmp_path):
    text = page.read_text()
    with as_reader(tmp_path):
        ran = run_page(page, text)
    assert ran == len(re.findall(r"^ *```python", text, re.MULTILINE)), (
        "a python block was not recognised"
    )


@pytest.mark.parametrize(
    "name", ["README.md", "docs/index.md", "docs/concepts.md", "docs/write-your-own.md"]
)
def test_page_has_code(name):
    assert any(block.language == "python" for block in blocks((ROOT / name).read_text()))


def test_a_broken_block_fails():
    with pytest.raises(ZeroDivisionError):
        run_page(Path("page.md"), "```python\nx = 1\n```\ntext\n\n```python\nx / 0\n```\n")


def test_another_output_fails():
    with pytest.raises(AssertionError, match=r"page\.md:6"):
        run_page(Path("page.md"), "```python\nprint(1 + 1)\n```\n\n```output\n3\n```\n")


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_code_is_as_wide_as_a_page_shows(page):
    """Beyond 78 columns a reader has to scroll; `ruff format --line-length 78` of the block."""
    wide = [
        f"line {block.line + number}: {len(line)} columns"
        for block in blocks(page.read_text())
        if block.language in ("python", "py")
        for number, line in enumerate(block.body.splitlines())
        if len(line) > 78
    ]
    assert not wide, f"{_id(page)}: {wide}"


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_relative_links(page):
    """Links between the files of the repository lead somewhere."""
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
        assert (page.parent / target).exists(), f"{_id(page)}: broken link {target}"


def test_every_namespace_has_a_page():
    """Each with the names that it makes public, written by docs/extension.py from ``__all__``."""
    spaces = {name for name in SPACES if name != "base"} | {"", "base"}
    found = {}
    for page in (ROOT / "docs" / "api").glob("*.md"):
        (space,) = re.findall(r"<!-- api: ?(\w*) -->", page.read_text())
        found[space] = page.name
    assert set(found) == spaces


def test_the_table_of_contents_has_every_page():
    listed = re.findall(
        r"[\w/-]+\.md",
        (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1].split("\nmarkdown_extensions:")[0],
    )
    assert sorted(listed) == sorted(
        str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")
    )


def test_versions_stand_side_by_side(tmp_path):
    spec = importlib.util.spec_from_file_location("versions", ROOT / "docs" / "versions.py")
    versions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(versions)
    site, pages = tmp_path / "site", tmp_path / "pages"
    site.mkdir()
    pages.mkdir()
    for version in ("0.9", "0.10", "dev", "0.2"):
        (site / "index.html").write_text(version)
        entries = versions.deploy(site, pages, version)
    assert [entry["version"] for entry in entries] == ["0.10", "0.9", "0.2", "dev"]
    assert entries[0]["aliases"] == ["latest"]
    assert (pages / "latest" / "index.html").read_text() == "0.10"
    assert (pages / "0.2" / "index.html").read_text() == "0.2"


def _notebooks():
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["notebooks"] = module
    before = dict(os.environ)
    try:
        spec.loader.exec_module(module)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return module


TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))


@pytest.mark.parametrize("source", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_its_source(source):
    """Page and notebook hold the cells of the source as it is now; CI runs the cells themselves, by
    docs/notebooks.py."""
    cells = _notebooks().cells(source.read_text())
    page = source.with_suffix(".md").read_text()
    saved = json.loads(source.with_suffix(".ipynb").read_text())["cells"]
    assert [cell.text for cell in cells if cell.code] == [
        "".join(c["source"]) for c in saved[1:] if c["cell_type"] == "code"
    ]
    assert all(f"```py\n{cell.text}\n```" in page for cell in cells if cell.code)
    assert "```text\n" in page and f"{source.stem}_0.svg" in page


def test_a_source_is_cut_into_cells(tmp_path):
    notebooks = _notebooks()
    source = (
        "# %% [markdown]\n# # Title\n#\n# Words.\n\n# %%\nx = 2\nprint(x)\n\n# %%\nprint(x + 1)\n"
    )
    assert (
        notebooks.is_slow(source) is False
        and notebooks.is_slow(source.replace("[markdown]", "[markdown] slow=true")) is True
    )
    assert [cell.code for cell in notebooks.cells(source)] == [False, True, True]
    (tmp_path / "two.py").write_text(source)
    outputs = notebooks.run(tmp_path / "two.py")
    assert [output.printed for output in outputs[1:]] == ["2", "3"]
    page, pictures = notebooks.page("two", notebooks.cells(source), outputs)
    assert "```text\n3\n```" in page and not pictures
