"""How pictures are drawn: on nothing, in colours and a middle grey that are seen on a light page
and on a dark one, and saved small."""

from __future__ import annotations

import io
import re
from pathlib import Path

# Okabe and Ito's colours, distinguishable with any kind of colour vision, the blue a little lighter
# and in place of black a middle grey: each is seen on white and on black.
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, BROWN, GREY = (
    "#1A7FC0",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#A8763E",
    "#808080",
)

STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text, not outlines of its letters
    "svg.hashsalt": "bilevax",  # the same picture is the same file
}

_DRAWN = re.compile(r'\b(?:d|points|x|y|transform)="[^"]*"')
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_FAMILY = re.compile(r"'DejaVu Sans', '[^;\"]*")


def save(figure, path: Path) -> None:
    """As SVG or, for photographs, as PNG: what the path says."""
    if path.suffix != ".svg":
        figure.savefig(path, dpi=130)
        return
    out = io.StringIO()
    figure.savefig(out, format="svg")
    path.write_text(compact(out.getvalue()))


def compact(svg: str) -> str:
    """An SVG without what is not seen: metadata, comments, margins, thousandths of a point; and in
    letters as wide as those that it was laid out for."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", re.sub(r"\s*\n\s*", "\n", svg))
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(r'(<use [^>]*)style="fill: ([^;"]+); stroke: [^"]*"', r'\1fill="\2"', svg)
    svg = _FAMILY.sub("DejaVu Sans, Verdana, sans-serif", svg)
    return _DRAWN.sub(lambda drawn: _short(drawn[0]), svg)


def _short(attribute: str) -> str:
    if "scale" in attribute:
        return attribute
    short = _NUMBER.sub(lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), attribute)
    return re.sub(r"\s*([MLCQz])\s*", r"\1", short) if short.startswith("d=") else short
