"""The curve of a model as a table, a picture and sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from impq_core.compare.drawing import COLOURS, GREY, Picture, legend_below, look, new_figure, style
from impq_core.curve import KNEE, Curve, Outcome, Point
from impq_core.results import Row
from impq_core.target import measured_loss
from impq_core.window_losses import Difference

PICTURE = "curve.png"
"""The picture in the folder of a run or sweep."""

DOTS_PER_INCH = 160

SURE = 0.95
"""Confidence from which a plan is called sure to be within a target."""


def curve_table(curve: Curve, answer: Outcome | None = None) -> Table:
    """Plans and uniform models by size, with their loss above the unquantized model."""
    target = answer if answer and answer.curve.parts == curve.parts else None
    files = any(point.file_bytes for point in curve.points)
    sequence = ", quantized in sequence" if curve.sequential else ""
    table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left", title_style="bold",
                  title=Text(f"{curve.name} on {curve.text}, {curve.tokens} scored tokens{sequence}"))
    header = ["budget", "bits", "stored", "MB", *(["file MB"] if files else []), "above unquantized", "KL",
              "minus uniform line", *([f"sure of {target.target}"] if target else []), ""]
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number in (0, len(header) - 1) else "right", no_wrap=True)
    rows: list[tuple[int, int, list[str], str]] = []
    for point in curve.points:
        cells = [point.budget, *_sizes(point.row)]
        if files:
            cells.append("" if point.file_bytes is None else f"{point.file_bytes / 1e6:.2f}")
        cells += [_shown(point.excess), _shown(point.divergence)]
        cells.append("" if point.minus_line is None else str(point.minus_line))
        if target:
            cells.append(percent(target.confidence(point)))
        notes = [*([point.evaluation.plan_is] if point.evaluation.plan_is else []),
                 *(["knee"] if curve.knee and curve.knee.point is point else []),
                 *(["target"] if target and target.within is point else [])]
        rows.append((point.nbytes, 1, [*cells, ", ".join(notes)], "bold" if notes else ""))
    for row in curve.uniform:
        assert row.score is not None and row.nbytes is not None
        cells = [row.name, *_sizes(row), *([""] if files else []), _shown(row.minus(curve.unquantized)),
                 _shown(row.score.divergence)]
        rows.append((row.nbytes, 0, [*cells, *[""] * (len(header) - len(cells))], "dim"))
    for *_, cells, look_of in sorted(rows, key=lambda row: row[:2]):
        table.add_row(*map(Text, cells), style=look_of)
    return table


def curve_lines(curve: Curve, answer: Outcome | None = None) -> list[str]:
    """Sentences about the knee, and about the answer to a target."""
    knee, first, last = curve.knee, curve.points[0], curve.points[-1]
    if knee:
        lines = [f"knee: {size_of(knee.point)}, {_shown(knee.depth)} nats per token below the straight line from "
                 f"{_bits(first)} to {_bits(last)}"]
    elif len({point.nbytes for point in curve.points}) < 3:
        lines = ["knee: unknown with fewer than three sizes"]
    else:
        lines = [f"knee: none; no plan lies more than two standard errors below the straight line from {_bits(first)} "
                 f"to {_bits(last)}"]
    return [*lines, *(answer_lines(answer) if answer else [])]


def answer_lines(answer: Outcome) -> list[str]:
    """The smallest plan within a target with its neighbour, and how sure that is."""
    points, target = answer.curve.points, answer.target
    last = max(points, key=lambda point: point.budget_bytes)
    uniform = answer.uniform_within
    smaller = [] if uniform is None else [
        f"{uniform.name} is smaller and within it: {(uniform.nbytes or 0) / 1e6:.2f} MB, "
        f"{_judged(answer, target.loss(uniform, answer.curve.unquantized))}"]
    if answer.within is None:
        return [f"target {target}: even the plan for the largest budget misses it: {size_of(last)}, "
                f"{_against(answer, last)}", *(line.replace("smaller and ", "") for line in smaller)]
    lines = [f"target {target}: {size_of(answer.within)}, {_against(answer, answer.within)} ({answer.within.run})"]
    if answer.outside is None:
        lines.append("even the narrowest plan meets it")
    else:
        lines.append(f"next smaller budget measured: {size_of(answer.outside)}, {_against(answer, answer.outside)}")
    if answer.larger_outside:
        missing = ", ".join(map(_bits, answer.larger_outside))
        lines.append(f"measured losses do not fall with size: larger plans miss the target ({missing}). The plan above "
                     f"is the smallest of {len(points)} that were measured; a smaller one may be within the target")
    sure = next((point for point in points if answer.confidence(point) >= SURE), None)
    if sure is not None and sure is not answer.within and sure.nbytes > answer.within.nbytes:
        lines.append(f"smallest measured plan that is {100 * SURE:.0f}% sure: {size_of(sure)}, "
                     f"{_against(answer, sure)}")
    return [*lines, *smaller]


def draw_curves(curves: Sequence[Curve], answer: Outcome | None = None) -> Picture:
    """Loss above the unquantized model against stored bytes, beside the uniform models of each backend: KL if a target
    bounds that, else NLL."""
    measure = answer.target.measure if answer else "nll"
    with style():
        figure, axes = new_figure(7.2, 4.4)
        drawn: list[str] = []
        for number, curve in enumerate(curves):
            if (backend := curve.parts["backend"]) not in drawn:
                drawn.append(backend)
                _uniform(axes, curve, measure, ("-", "--", "-.", ":")[(len(drawn) - 1) % 4])
            sizes = [point.nbytes / 1e6 for point in curve.points]
            losses = [measured_loss(measure, point.row, curve.unquantized) for point in curve.points]
            errors = [0.0 if math.isnan(loss.stderr) else loss.stderr for loss in losses]
            axes.errorbar(sizes, [loss.mean for loss in losses], yerr=errors, capsize=3, linewidth=1, label=curve.name,
                          **look(number))
            if curve.knee and measure == "nll":
                place = curve.knee.point.nbytes / 1e6, curve.knee.point.excess.mean
                axes.annotate(f"knee, {_bits(curve.knee.point)}", place, textcoords="offset points",
                              xytext=(-14, -24), ha="right", fontsize=9,  # below a curve that bends nothing is drawn
                              arrowprops={"arrowstyle": "-", "color": GREY})
        if answer:
            axes.axhline(answer.target.limit, color=COLOURS[1], linewidth=1, linestyle="--",
                         label=f"target {answer.target}")
            if point := answer.within:
                axes.plot(point.nbytes / 1e6, answer.loss(point).mean, "o", markersize=14, markerfacecolor="none",
                          markeredgecolor=COLOURS[1], label=f"smallest within it: {_bits(point)}")
        axes.axhline(0, color=GREY, linestyle=":", linewidth=1)
        _limit_height(axes, [measured_loss(measure, point.row, curve.unquantized).mean
                             for curve in curves for point in curve.points])
        row = curves[0].points[0].row
        if row.nbytes and row.bits_stored:
            each = row.bits_stored / (row.nbytes / 1e6)
            top = axes.secondary_xaxis("top", functions=(lambda size: size * each, lambda bits: bits / each))
            top.set_xlabel("stored bits a weight")
        name = "NLL above the unquantized model" if measure == "nll" else "KL from the unquantized model"
        axes.set(xlabel="stored MB of quantized weights", ylabel=f"{name}\n(nats per token)")
        legend_below(figure)
    return Picture(f"Loss against size: {curves[0].text}", figure, "Bars: standard errors over windows, those of the "
                   f"NLL paired with the unquantized model. The knee is {KNEE}.")


def save_picture(curves: Sequence[Curve], answer: Outcome | None, folder: Path) -> Path:
    """Write the picture of curves into a folder; returns its path."""
    path = folder / PICTURE
    picture = draw_curves(curves, answer)
    with style():
        picture.figure.savefig(path, dpi=DOTS_PER_INCH)
    return path


def percent(share: float) -> str:
    """A probability as a percentage; never 0 % or 100 %."""
    if math.isnan(share):
        return "unknown"
    return ">99%" if share > 0.99 else "<1%" if share < 0.01 else f"{100 * share:.0f}%"


def size_of(point: Point) -> str:
    """The size of a plan in bits and megabytes."""
    file = f", a file of at most {point.file_bytes / 1e6:.6g} MB" if point.file_bytes else ""
    return f"{_bits(point)}, {point.nbytes / 1e6:.2f} MB{file}"


def _bits(point: Point) -> str:
    return f"{point.row.bits_nominal:.3f} bits"


def _against(answer: Outcome, point: Point) -> str:
    return _judged(answer, answer.loss(point))


def _judged(answer: Outcome, loss: Difference) -> str:
    target = answer.target
    sign, sure = "<=" if target.met_by(loss) else ">", target.confidence(loss, answer.curve.windows)
    return f"{_shown(loss)} {sign} {target.limit:g}: {percent(sure)} sure to be within"


def _uniform(axes: Any, curve: Curve, measure: str, dashes: str) -> None:
    points = [((row.nbytes or 0) / 1e6, measured_loss(measure, row, curve.unquantized).mean, row.name)
              for row in curve.uniform if math.isfinite(row.nll)]
    if not points:
        return
    sizes, losses, _ = zip(*points, strict=True)
    axes.plot(sizes, losses, dashes, marker="o", color=GREY, markersize=4, zorder=1,
              label=f"uniform {curve.parts['backend']} models (bits)")
    for size, loss, name in points:
        axes.annotate(name.removeprefix("uniform "), (size, loss), textcoords="offset points", xytext=(5, 4),
                      fontsize=9, color=GREY, annotation_clip=True)


def _limit_height(axes: Any, losses: Sequence[float]) -> None:
    """Keep the axis at the scale of the plans, if uniform models lie far above them."""
    axes.margins(0.06)
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite and max(finite) > 0:
        axes.set_ylim(min(0.0, *finite) - 0.06 * max(finite), min(axes.get_ylim()[1], 1.35 * max(finite)))


def _sizes(row: Row) -> list[str]:
    assert row.nbytes is not None
    return [f"{row.bits_nominal:.3f}", f"{row.bits_stored:.3f}", f"{row.nbytes / 1e6:.2f}"]


def _shown(difference: Difference) -> str:
    return f"{difference.mean:.4f}" + ("" if math.isnan(difference.stderr) else f" ± {difference.stderr:.4f}")
