"""Lay a built site beside those of earlier versions, and write the list that the version menu
reads.

    python docs/versions.py site pages 0.2    # copies site to pages/0.2 and pages/latest
    python docs/versions.py site pages dev    # a version that is no number is never the latest

Both write pages/versions.json.
"""

import json
import re
import shutil
import sys
from pathlib import Path

_GO = '<meta http-equiv="refresh" content="0; url=latest/">'
_HOME = f'<!doctype html><meta charset="utf-8">{_GO}<a href="latest/">latest</a>\n'


def _order(version: str) -> tuple:
    numbers = re.findall(r"\d+", version)
    return (0, *(-int(number) for number in numbers)) if numbers else (1,)


def deploy(site: Path, pages: Path, version: str) -> list[dict]:
    """Copy `site`, make the highest number the latest, list all; returns the list, newest first."""
    listed = pages / "versions.json"
    known = (
        {entry["version"] for entry in json.loads(listed.read_text())} if listed.exists() else set()
    )
    versions = sorted(known | {version}, key=_order)
    newest = versions[0]
    for name in [version, "latest"] if version == newest else [version]:
        shutil.rmtree(pages / name, ignore_errors=True)
        shutil.copytree(site, pages / name)
    entries = [
        {"version": name, "title": name, "aliases": ["latest"] if name == newest else []}
        for name in versions
    ]
    listed.write_text(json.dumps(entries, indent=1) + "\n")
    (pages / "index.html").write_text(_HOME)
    (pages / ".nojekyll").touch()
    return entries


if __name__ == "__main__":
    site, pages, version = sys.argv[1:]
    Path(pages).mkdir(parents=True, exist_ok=True)
    print(json.dumps(deploy(Path(site), Path(pages), version)))
