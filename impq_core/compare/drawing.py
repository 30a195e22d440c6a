"""Style of all figures: colours, fonts, legends, SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from impq_core.compare.contest import Contest, Contestant

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, distinguishable by colour-blind readers; without its yellow, which is invisible on white."""

MARKERS = "oDs^vhX"
GREY, PALE = "#666666", "#AAAAAA"


@dataclass(frozen=True)
class Picture:
    """A figure with its title and caption.

    Args:
        title: title of the figure, which is not drawn in it.
        figure: the matplotlib figure.
        caption: how to read it.
        wide: whether it needs the width of the page.
    """

    title: str
    figure: Any
    caption: str
    wide: bool = False

    @property
    def svg(self) -> str:
        """The figure as SVG; equal figures give equal text."""
        file = io.StringIO()
        with style():
            self.figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()


def style() -> AbstractContextManager[Any]:
    """matplotlib settings that figures are drawn and saved with."""
    import matplotlib

    # Names of texts and runs may hold a dollar sign: no formulas. The salt makes equal pages equal files.
    return matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "impq", "font.size": 10,
                                  "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10})


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of a width and height in inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def look(number: int) -> dict[str, Any]:
    """Colour and marker of curve or plan ``number``; 49 combinations differ."""
    return {"color": COLOURS[number % 7], "marker": MARKERS[(number + number // 7) % 7], "markersize": 7,
            "markeredgecolor": "white"}


def legend_below(figure: Any) -> None:
    """Add a legend below the axes, each name once."""
    handles = {label: handle for axes in figure.axes
               for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = 2 if len(handles) > 3 and max(map(len, handles)) < 36 else 1
    figure.legend(handles.values(), handles, loc="outside lower center", fontsize=9, frameon=False, ncols=columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(handles) // columns))  # the axes keep their height


def shared_name(contest: Contest, runs: Sequence[Contestant]) -> str:
    """One name for several runs: their labels, and their budgets unless all budgets are among them."""
    names = "; ".join(dict.fromkeys(map(contest.label, runs)))
    budgets = dict.fromkeys(map(contest.budget_of, runs))
    return names if len(budgets) == len(contest.budgets) else f"{names} at {', '.join(budgets)}"
