"""Results as figures on matplotlib axes, without pyplot."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import singledispatch
from typing import Any

import numpy as np

from impq_core.compare.comparison import Comparison
from impq_core.compare.drawing import COLOURS, GREY, new_figure, style
from impq_core.compare.figures import draw_comparison
from impq_core.compare.layers import UNQUANTIZED, draw_costs, width_colours
from impq_core.errors import ImpqError
from impq_core.results import Evaluation, RunResult
from impq_core.space import Choice, in_bits
from impq_core.types import Plan, SensitivityEstimate
from impq_core.width_map import WidthMap

DOTS_PER_INCH = 110


def plot(result: Any, axes: Any = None) -> Any:
    """Draw the figure of a result on axes, or on those of a new figure; returns the axes."""
    draw = _drawer(result)
    with style():
        if axes is None:
            figure, axes = new_figure(7.2, 3.6)
            # A notebook shows a value by these methods. pyplot would show the figure of every cell, and keep it.
            axes._repr_png_ = figure._repr_png_ = _png(figure)
        draw(result, axes)
    return axes


def _png(figure: Any) -> Callable[[], bytes]:
    def png() -> bytes:
        file = io.BytesIO()
        with style():
            figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
        return file.getvalue()
    return png


@singledispatch
def _drawer(result: Any) -> Callable[[Any, Any], None]:
    """The function that draws a result; raises TypeError if there is none."""
    raise TypeError(f"{type(result).__name__} has no figure")


@_drawer.register
def _(_result: Evaluation) -> Callable[[Any, Any], None]:
    return _evaluation


@_drawer.register
def _(_result: Plan) -> Callable[[Any, Any], None]:
    return _plan


@_drawer.register
def _(_result: SensitivityEstimate) -> Callable[[Any, Any], None]:
    return _estimate


@_drawer.register
def _(_result: RunResult) -> Callable[[Any, Any], None]:
    return _run


@_drawer.register
def _(_result: Comparison) -> Callable[[Any, Any], None]:
    return _comparison


def _evaluation(evaluation: Evaluation, axes: Any) -> None:
    """The difference of every allocation to the plan, with its standard error paired over windows."""
    rows = [(row, gap) for row in evaluation.rows[1:] if (gap := evaluation.against_plan(row)) is not None]
    places = np.arange(len(rows))
    for place, (row, gap) in zip(places, rows, strict=True):
        axes.errorbar(gap.mean, place, xerr=np.nan_to_num(gap.stderr), fmt="o", capsize=3,
                      color=GREY if row.score is None or row.name == "unquantized" else COLOURS[0])
    axes.axvline(0, color=COLOURS[1], linewidth=1)
    axes.set_yticks(places, [row.name for row, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"held-out NLL minus the plan's {evaluation.plan.nll:.3f} (nats per token)")
    axes.figure.set_figheight(max(axes.figure.get_figheight(), 0.9 + 0.26 * len(rows)))


def _plan(plan: Plan, axes: Any) -> None:
    """The width of every layer: a row for each kind of layer, a column for each block."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    widths = WidthMap.of(plan)
    narrow_first: list[Choice] = sorted(widths.choices, key=lambda choice: (choice.bits, choice.name))
    colours = [*width_colours(len(narrow_first)), UNQUANTIZED]
    cells = np.full((len(widths.rows), max(widths.blocks, 1)), np.nan)
    for number, row in enumerate(widths.rows.values()):
        for block, choices in row.items():  # of several experts, the mean of their places in the menu
            cells[number, block] = np.mean([len(narrow_first) if choice is None else narrow_first.index(choice)
                                            for choice in choices])
    axes.imshow(cells, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5, aspect="auto",
                interpolation="none")
    axes.set_yticks(range(len(widths.rows)), list(widths.rows))
    axes.set_xlabel("block")
    axes.spines[:].set_visible(False)
    handles = [Patch(color=colour, label=in_bits(choice.name))
               for colour, choice in zip(colours, narrow_first, strict=False)]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), frameon=False)


def _estimate(estimate: SensitivityEstimate, axes: Any) -> None:
    draw_costs(axes, estimate)


def _run(result: RunResult, axes: Any) -> None:
    """The evaluation of a finished run; else the plan, or the estimate."""
    if result.evaluation is not None:
        _evaluation(result.evaluation, axes)
    elif result.plan is not None:
        _plan(result.plan, axes)
    elif result.estimate is not None:
        _estimate(result.estimate, axes)


def _comparison(comparison: Comparison, axes: Any) -> None:
    """The first figure of the page of ``impq compare``."""
    if len(comparison.contests) != 1:
        raise ImpqError("a figure shows runs that were scored on the same text, and these are "
                        f"{len(comparison.contests)} groups: read fewer folders")
    draw_comparison(axes, comparison.contests[0])
