"""Style of all figures: colours, fonts, legends, SVG."""

from __future__ import annotations

import html
import io
import re
import textwrap
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from impq_core.compare.contest import Contest, Contestant

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, distinguishable by colour-blind readers; without its yellow, which is invisible on white."""

MARKERS = "oDs^vhX"
INK, GREY, PALE, PAPER = "#1A1A1A", "#595959", "#8C8C8C", "#FFFFFF"

VARIABLES = {INK: "ink", GREY: "muted", PALE: "faint", PAPER: "paper"} | {
    colour: f"c{number}" for number, colour in enumerate(COLOURS)}
"""CSS variables of the page that replace the colours of a figure, so that both follow the reader's scheme."""

WIDTH = 4.6
"""Width of a figure in inches: its text is 11 pixels high on a telephone that is 390 pixels wide."""


@dataclass(frozen=True)
class Picture:
    """A figure with its title and caption.

    Args:
        title: title of the figure, which is not drawn in it.
        figure: the matplotlib figure.
        caption: how to read it.
    """

    title: str
    figure: Any
    caption: str

    @property
    def svg(self) -> str:
        """The figure as SVG inside HTML; equal figures give equal text. Colours are CSS variables, with those of a
        light page where there are none; identifiers begin with a digest of the figure, so that those of two figures
        do not clash."""
        file = io.StringIO()
        with style():
            self.figure.savefig(file, format="svg", transparent=True,
                                metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "",
                      file.getvalue(), flags=re.DOTALL)
        text = text[text.index("<svg"):]
        box = re.search(r'viewBox="[^"]*"', text)
        assert box is not None
        label = html.escape(f"{self.title}. {self.caption}")
        text = f'<svg {box[0]} role="img" aria-label="{label}">' + text.partition(">")[2]
        text = re.sub("#[0-9a-f]{6}", lambda found: _variable(found[0]), text)
        prefix = f"f{zlib.crc32(text.encode()):08x}-"
        return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", text).replace("xlink:href", "href")


def style() -> AbstractContextManager[Any]:
    """matplotlib settings that figures are drawn and saved with."""
    import matplotlib

    # Names of texts and runs may hold a dollar sign: no formulas. The salt makes equal pages equal files. Text stays
    # text, for readers of the page and of its source.
    return matplotlib.rc_context({
        "text.parse_math": False, "svg.hashsalt": "impq", "svg.fonttype": "none", "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "text.color": INK,
        "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK})


def new_figure(width: float = WIDTH, height: float = 3.1) -> tuple[Any, Any]:
    """A figure of a width and height in inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def look(number: int) -> dict[str, Any]:
    """Colour and marker of curve or plan ``number``; 49 combinations differ."""
    return {"color": COLOURS[number % 7], "marker": MARKERS[(number + number // 7) % 7], "markersize": 7,
            "markeredgecolor": PAPER}


def legend_below(figure: Any) -> None:
    """Add a legend below the axes, each name once."""
    handles = {textwrap.fill(label, 52): handle for axes in figure.axes
               for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if not handles:
        return
    columns = 2 if len(handles) > 1 and max(map(len, handles)) < 26 else 1
    figure.legend(handles.values(), handles, loc="outside lower center", fontsize=9, frameon=False, ncols=columns)
    lines = sum(name.count("\n") + 1 for name in handles)
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-lines // columns))  # the axes keep their height


def shared_name(contest: Contest, runs: Sequence[Contestant]) -> str:
    """One name for several runs: their labels, and their budgets unless all budgets are among them."""
    names = "; ".join(dict.fromkeys(map(contest.label, runs)))
    budgets = dict.fromkeys(map(contest.budget_of, runs))
    return names if len(budgets) == len(contest.budgets) else f"{names} at {', '.join(budgets)}"


def _variable(colour: str) -> str:
    name = VARIABLES.get(colour.upper())
    return f"var(--{name}, {colour})" if name else colour
