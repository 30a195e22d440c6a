"""What the pictures of a contest have in common: colours, paper, legends."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from impq_core.compare.contest import Contest, Contestant

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart by colour-blind eyes; yellow is left out, which nobody sees on white."""

MARKERS = "oDs^vhX"
GREY, PALE = "#666666", "#AAAAAA"


@dataclass(frozen=True)
class Picture:
    """A picture of a page.

    Args:
        title: what it is of.
        svg: the drawing, on its own.
        caption: how to read it.
        wide: whether it needs the width of the page.
    """

    title: str
    svg: str
    caption: str
    wide: bool = False


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def to_svg(figure: Any) -> str:
    """The figure as SVG; the same one at any time."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def look(number: int) -> dict[str, Any]:
    """Colour and marker of a curve or plan by its number; the two cycle apart, so that 49 differ."""
    return {"color": COLOURS[number % 7], "marker": MARKERS[(number + number // 7) % 7], "markersize": 7,
            "markeredgecolor": "white"}


def legend_below(figure: Any) -> None:
    """A legend below, each name once."""
    shown = {label: handle for axes in figure.axes
             for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = 2 if len(shown) > 3 and max(map(len, shown)) < 36 else 1
    figure.legend(shown.values(), shown, loc="outside lower center", fontsize=9, frameon=False, ncols=columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(shown) // columns))  # not at the drawing's expense


def shared_name(contest: Contest, those: Sequence[Contestant]) -> str:
    """What runs are called that share something; their budgets too where it is not shared by all budgets."""
    names = "; ".join(dict.fromkeys(map(contest.label, those)))
    budgets = dict.fromkeys(one.budget for one in those)
    return names if len(budgets) == len(contest.budgets) else f"{names} at {', '.join(budgets)}"
