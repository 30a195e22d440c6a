"""Pictures of a run: sensitivities, widths, interactions, and loss against bytes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from impq_core.results import RunResult

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # told apart by colour-blind eyes


def draw_figures(result: RunResult, folder: Path) -> list[Path]:
    """Draw what the run has data for, as PNG files in ``folder``; returns their paths."""
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    drawers: dict[str, Callable[[RunResult, Any], None]] = {}
    if result.evaluation is not None:
        drawers |= {"loss_against_bytes": _loss, "widths": _widths}
    if result.estimate is not None:
        drawers["sensitivities"] = _sensitivities
        if result.estimate.pairwise is not None:
            drawers["interactions"] = _interactions
    paths = []
    for name, draw in drawers.items():
        figure = Figure(figsize=(9, 4.5), layout="constrained", dpi=110)
        draw(result, figure.add_subplot())
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1])
    return paths


def _loss(result: RunResult, axes: Any) -> None:
    evaluation = result.evaluation
    assert evaluation is not None
    points = [(row.name, row.nbytes / 1e6, row.nll, row.score.stderr) for row in evaluation.rows
              if row.nbytes is not None and row.score is not None]
    uniform = sorted((p for p in points if p[0].startswith("uniform")), key=lambda p: p[1])
    plan, *rest = [p for p in points if p not in uniform]
    axes.plot([p[1] for p in uniform], [p[2] for p in uniform], "o-", color=GREY, label="uniform")
    for name, size, nll, _ in uniform:
        axes.annotate(name, (size, nll), textcoords="offset points", xytext=(6, 4), fontsize=8)
    for group, style, color, label in ((rest, "s", ORANGE, "first/last high, random"), ([plan], "D", BLUE, "plan")):
        axes.errorbar([p[1] for p in group], [p[2] for p in group], yerr=[p[3] for p in group], fmt=style, color=color,
                      capsize=3, label=label)
    axes.margins(x=0.12)  # the name of the widest stands to its right
    axes.axhline(evaluation.row("unquantized").nll, color=GREY, linestyle=":", label="unquantized")
    axes.set(xlabel="stored bytes of the quantizable weights (MB)", ylabel="NLL (nats per token)",
             title=textwrap.fill(f"Held-out loss: {evaluation.text}", 100))
    axes.legend()


def _widths(result: RunResult, axes: Any) -> None:
    plan = result.plan
    assert plan is not None
    bits = [plan.space.choices[k].bits for k in plan.pick]
    axes.bar(range(len(bits)), bits, color=[BLUE if k == 0 else ORANGE for k in plan.pick])
    axes.set(xlabel="layer, in order", ylabel="bits", yticks=sorted({c.bits for c in plan.space.choices}),
             title=f"Widths of the plan ({plan.space.nominal_bits(plan.nbytes):.2f} bits nominal)")


def _sensitivities(result: RunResult, axes: Any) -> None:
    estimate = result.estimate
    assert estimate is not None
    narrowest = estimate.linear[:, -1]
    error = None if estimate.stderr is None else np.nan_to_num(estimate.stderr[:, -1])
    axes.bar(range(len(narrowest)), narrowest, yerr=error, color=BLUE, ecolor=GREY, capsize=2)
    axes.set(xlabel="layer, in order", ylabel="cost of the narrowest width (nats per token)",
             title=f"Sensitivities: {estimate.method} (bars: standard error of the measured part)")


def _interactions(result: RunResult, axes: Any) -> None:
    estimate = result.estimate
    assert estimate is not None and estimate.pairwise is not None
    matrix = estimate.pairwise[:, -1, :, -1]
    limit = float(np.abs(matrix).max()) or 1.0
    image = axes.imshow(matrix, cmap="PuOr_r", vmin=-limit, vmax=limit)
    axes.figure.colorbar(image, label="nats per token for both at the narrowest width")
    axes.set(xlabel="layer", ylabel="layer", title=f"Pair terms of the estimate: {estimate.method}")
