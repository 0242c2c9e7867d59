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
    "svg.hashsalt": "bilevax",  # the same picture is the same file
}

_DRAWN = re.compile(r'\b(?:d|points|x|y|transform)="[^"]*"')
_NUMBER = re.compile(r"-?\d+\.\d{2,}")


def save(figure, path: Path) -> None:
    """As SVG or, for photographs, as PNG: what the path says."""
    if path.suffix != ".svg":
        figure.savefig(path, dpi=130)
        return
    out = io.StringIO()
    figure.savefig(out, format="svg")
    path.write_text(compact(out.getvalue()))


def compact(svg: str) -> str:
    """An SVG without what is not seen: metadata, comments, thousandths of a point."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    return _DRAWN.sub(lambda drawn: _short(drawn[0]), svg)


def _short(attribute: str) -> str:
    if "scale" in attribute:  # of letters, whose units are small
        return attribute
    return _NUMBER.sub(lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), attribute)
