"""Every system of the literature has a page with its paper, levels, baselines and seeds, a row in
the table of systems, its numbers beside the pictures, and a command that runs it."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples" / "systems").glob("*.py"))
WHY = [path for path in SCRIPTS if path.stem.endswith("_why")]  # experiments on a system's result
SYSTEMS = [path for path in SCRIPTS if path not in WHY]
NUMBERS = ("One", "Two", "Three", "Four", "Five", "Six", "Eight", "Ten")


@pytest.mark.parametrize("script", SYSTEMS, ids=lambda path: path.stem)
def test_page_of_a_system(script):
    name = script.stem
    page = (ROOT / "docs" / "systems" / f"{name}.md").read_text()
    assert re.search(r"et al\.|arXiv|arxiv\.org", page), "no paper"
    for part in ("<!-- levels:", f"<!-- code: systems/{name} ", f"examples/systems/{name}.py"):
        assert part in page, part
    headings = {"## What was changed", "## What came out", "## Where it did not win"}
    assert headings <= set(page.splitlines()), headings - set(page.splitlines())
    seeds = rf"(?i)\b({'|'.join(NUMBERS)}|\d+) (\w+ )?seeds?\b"
    assert re.search(seeds, page), "not of how many seeds"
    assert "|" in page.split("## What came out")[1], "no table of rows to compare"
    row = re.search(
        rf"^\| \[[^|]*\]\({name}\.md\).*$", (ROOT / "docs/systems/index.md").read_text(), re.M
    )
    assert row and row[0].count("|") == 7 and re.search(r"gain|equal|below", row[0]), "no row"
    stored = json.loads((ROOT / "docs" / "gallery" / f"{name}.json").read_text())
    assert stored["settings"]["small"] is False and len(stored["results"]) > 1


@pytest.mark.parametrize("script", WHY, ids=lambda path: path.stem)
def test_an_experiment_is_on_its_systems_page(script):
    page = (ROOT / "docs" / "systems" / f"{script.stem.removesuffix('_why')}.md").read_text()
    assert f"examples/systems/{script.name}" in page and "\n## Why" in page
    stored = json.loads((ROOT / "docs" / "gallery" / f"{script.stem}.json").read_text())
    assert stored["settings"]["small"] is False and len(stored["results"]) > 1


def test_there_are_systems():
    assert len(SYSTEMS) >= 5
