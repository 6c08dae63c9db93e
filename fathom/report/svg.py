"""A matplotlib figure -> SVG that lives inside an HTML page.

Figures are drawn in stand-in colours, each of which becomes a CSS variable, so that one drawing suits light and dark;
text stays text, in the page's own typeface; ids are made unique in the page. Equal figures give equal bytes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1000f0", "#1000f1", "#1000f2"
SERIES = tuple(f"#2000f{number}" for number in range(8))
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {
    color: f"--s{number}" for number, color in enumerate(SERIES)
}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "fathom",  # ids that do not change from call to call
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; wider than most, so that what fits it fits
    "font.size": 10.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "figure.dpi": 72,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
    "path.simplify_threshold": 0.3,
}


@contextmanager
def style() -> Iterator[None]:
    """Inside, figures are drawn as the page wants them, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def figure(width: float, height: float, fitted: bool = True) -> Figure:
    """An empty figure of so many CSS pixels; within `style`. Never pyplot's, which keeps what it makes.

    fitted: margins as wide as the labels need, which costs a second drawing.
    """
    return Figure(figsize=(width / 72, height / 72), layout="constrained" if fitted else None)


def axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, horizontal grid lines only."""
    made = figure(width, height)
    ax = made.subplots()
    ax.grid(axis="x", visible=False)
    return made, ax


def to_svg(drawn: Figure, name: str, alt: str) -> str:
    """The figure as an <svg> element; within `style`. name: unique in the page; alt: what a screen reader says."""
    out = io.StringIO()
    # dpi: of pictures inside; everything else has no pixels
    drawn.savefig(out, format="svg", dpi=144, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r"\s*font-family:[^;\"]*;?", "", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    # a hundredth of a pixel is enough
    text = re.sub(r' (?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    box = "0 0 " + " ".join(f"{72 * inches:g}" for inches in drawn.get_size_inches())
    head = f'<svg role="img" aria-label="{html.escape(alt)}" viewBox="{box}">'
    text = re.sub(r"^<svg[^>]*>", lambda _: head, text)
    # matplotlib's own style element would speak to every drawing of the page
    text = re.sub(r"<style type=\"text/css\">[^<]*</style>", "", text)
    return re.sub(r"\s*\n\s*", "\n", text).replace('\n"', '"').strip()
