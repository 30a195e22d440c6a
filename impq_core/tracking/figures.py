"""Figures of a single run as PNG files, drawn as those of ``impq compare``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from impq_core.compare.contest import Contest
from impq_core.compare.drawing import Picture, style
from impq_core.compare.figures import draw_sizes
from impq_core.compare.layers import draw_interactions, draw_sensitivities, draw_widths
from impq_core.compare.read import read_contestant
from impq_core.results import RunResult

DOTS_PER_INCH = 160


def draw_figures(result: RunResult, folder: Path) -> list[Path]:
    """Draw all figures that a run has data for, as PNG files in ``folder``; returns their paths."""
    drawers: dict[str, tuple[str, Iterator[Picture]]] = {}
    if result.evaluation is not None:
        contest = Contest((read_contestant(result.folder),))
        drawers["loss_against_bytes"] = f"Held-out loss: {result.evaluation.text}", draw_sizes(contest)
        drawers["widths"] = f"Widths of the plan, {contest.contestants[0].bits_nominal:.2f} bits", draw_widths(contest)
    if (estimate := result.estimate) is not None:
        drawers["sensitivities"] = f"Sensitivities: {estimate.method}", draw_sensitivities([("", estimate)])
        drawers["interactions"] = f"Pair terms: {estimate.method}", draw_interactions([("", estimate)])
    folder.mkdir(exist_ok=True)
    paths = []
    for name, (title, pictures) in drawers.items():
        with style():
            for picture in islice(pictures, 1):
                picture.figure.axes[0].set_title(textwrap.fill(title, 90))
                paths.append(folder / f"{name}.png")
                picture.figure.savefig(paths[-1], dpi=DOTS_PER_INCH)
    return paths
