"""Figures of a contest: size against quality, cost of the search, convergence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from impq_core.compare.contest import Contest, Contestant
from impq_core.compare.drawing import GREY, INK, PALE, Picture, legend_below, look, new_figure, shared_name, style
from impq_core.compare.layers import distinct_estimates, draw_interactions, draw_sensitivities
from impq_core.compare.uniform import UniformLine
from impq_core.results import Row
from impq_core.window_losses import Difference

BESIDE = {"first/last": "s", "random": "x", "mix": "+"}
"""Markers of references beside the uniform models, by kind."""


@dataclass(frozen=True)
class Section:
    """Figures of one kind."""

    title: str
    pictures: tuple[Picture, ...]


def draw_glance(contest: Contest) -> tuple[Picture, ...]:
    """Size against quality, and cost against quality if there is a choice."""
    with style():
        return *draw_sizes(contest), *_costs(contest)


def draw_details(contest: Contest) -> tuple[Section, ...]:
    """Figures of how the plans were found, for which the runs have data."""
    estimates = distinct_estimates(contest)
    drawers = {"Sensitivities": draw_sensitivities(estimates), "Interactions": draw_interactions(estimates),
               "Convergence": _convergence(contest)}
    with style():
        sections = [Section(title, tuple(pictures)) for title, pictures in drawers.items()]
    return tuple(section for section in sections if section.pictures)


def draw_sizes(contest: Contest) -> Iterator[Picture]:
    """Loss against stored bytes: as difference from the line between uniform models if there are plans of several
    budgets, and above the unquantized model. All errors are paired over windows: the error of the text itself, which
    all allocations share, is not in them."""
    if len({run.plan.nbytes for run in contest.contestants if _line_gap(run)}) > 1:
        yield _minus_line(contest)
    yield _above_unquantized(contest)


def draw_comparison(axes: Any, contest: Contest) -> None:
    """Loss against stored bytes on given axes: minus that of uniform models if every run has some, else above the
    unquantized model."""
    if all(map(_line_gap, contest.contestants)):
        _draw_minus_line(axes, contest)
    else:
        _draw_above_unquantized(axes, contest)
    axes.legend(frameon=False, fontsize=9)


def _minus_line(contest: Contest) -> Picture:
    figure, axes = new_figure()
    hidden = _draw_minus_line(axes, contest)
    if len(_curves(contest)) > 1 or axes.get_legend_handles_labels()[1][1:]:
        legend_below(figure)
    outside = f" Outside the figure: {', '.join(hidden)}." if hidden else ""
    return Picture("Better or worse than uniform models of the same size", figure,
                   "Below zero: better. Zero is the line between uniform models of that size, whose widths are named. "
                   f"Bars: standard errors, paired over windows.{outside}")


def _draw_minus_line(axes: Any, contest: Contest) -> list[str]:
    """Draw plans and references minus the line between uniform models; returns what is outside the axes."""
    axes.axhline(0, color=INK, linewidth=1)
    for name, runs in _curves(contest).items():
        points = [(_megabytes(run.plan), gap) for run in runs if (gap := _line_gap(run))]
        _curve(axes, points, _styles(contest)[name])
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    lines = {run.folder: line for run in contest.contestants if (line := UniformLine.of(run.evaluation))}
    models = {(_megabytes(row), row.name.removeprefix("uniform ")) for line in lines.values() for row in line.models}
    for place, name in sorted(models):
        if left <= place <= right:
            axes.plot(place, 0, "o", color=GREY, markersize=4)
            axes.annotate(name, (place, 0), textcoords="offset points", xytext=(3, 4), fontsize=9, color=GREY)
    hidden: list[str] = []
    for kind, marker in BESIDE.items():
        gaps = {(_megabytes(row), row.minus(line.at(row.nbytes)).mean) for run in contest.contestants
                if (line := lines.get(run.folder)) for row in run.evaluation.rows if row.kind == kind and row.nbytes}
        shown = [(x, y) for x, y in gaps if left <= x <= right and low <= y <= high + 0.5 * (high - low)]
        if shown:
            axes.plot(*zip(*sorted(shown), strict=True), marker, color=PALE, markersize=6, zorder=1, label=kind)
        if len(shown) < len(gaps):
            far = [y for x, y in gaps if (x, y) not in shown and math.isfinite(y)]
            hidden += [f"{kind} {_range(far)}"] if far else []
    axes.set_xlim(left, right)
    axes.set(xlabel="quantized weights (MB)", ylabel="NLL minus uniform models (nats)")
    return hidden


def _above_unquantized(contest: Contest) -> Picture:
    figure, axes = new_figure()
    _draw_above_unquantized(axes, contest)
    legend_below(figure)
    return Picture("What the bytes buy", figure, "Loss above that of the unquantized model. Bars: standard errors, "
                   "paired over windows.")


def _draw_above_unquantized(axes: Any, contest: Contest) -> None:
    lines = {tuple((row.nbytes, row.nll, row.name) for row in line.models): (line, run)
             for run in contest.contestants if (line := UniformLine.of(run.evaluation))}
    backends = list(dict.fromkeys(run.config.backend for _, run in lines.values()))
    for line, run in lines.values():
        sizes = np.linspace(line.models[0].nbytes or 0, line.models[-1].nbytes or 0, 80)
        dashes = ("-", "--", "-.", ":")[backends.index(run.config.backend) % 4]
        name = "uniform models" if len(backends) == 1 else f"uniform {run.config.backend} models"
        axes.plot(sizes / 1e6, [line.at(size).minus(run.unquantized).mean for size in sizes], dashes, color=GREY,
                  linewidth=1, zorder=1, label=name)
        for row in line.models:
            place = _megabytes(row), row.minus(run.unquantized).mean
            axes.plot(*place, "o", color=GREY, markersize=4, zorder=1)
            axes.annotate(row.name.removeprefix("uniform "), place, textcoords="offset points", xytext=(4, 3),
                          fontsize=9, color=GREY, annotation_clip=True)
    for kind, marker in BESIDE.items():
        points = {(_megabytes(row), row.minus(run.unquantized).mean) for run in contest.contestants
                  for row in run.evaluation.rows if row.kind == kind and row.nbytes}
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker, color=PALE, markersize=6, zorder=1, label=kind)
    for name, runs in _curves(contest).items():
        _curve(axes, [(_megabytes(run.plan), run.plan.minus(run.unquantized)) for run in runs],
               _styles(contest)[name])
    drawn = np.concatenate([np.asarray(line.get_ydata(), float).ravel() for line in axes.lines])
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) and drawn.min() > 0 and drawn.max() > 4 * drawn.min():
        axes.set_yscale("log")
        _plain_ticks(axes, drawn.min(), drawn.max())
    axes.margins(0.08)  # for the names
    axes.set(xlabel="quantized weights (MB)", ylabel="NLL above unquantized (nats)")


def _costs(contest: Contest) -> Iterator[Picture]:
    """Cost of the search against quality, once for all budgets, if plans of one budget differ in cost."""
    groups = {budget: sorted((run for run in runs if math.isfinite(run.plan.nll)), key=lambda run: run.forwards)
              for budget, runs in contest.budgets.items()}
    groups = {budget: runs for budget, runs in groups.items() if len({run.forwards for run in runs}) > 1}
    if not groups:
        return
    figure, axes = new_figure()
    styles = _styles(contest)
    for budget, runs in groups.items():
        gaps = [run.plan.minus(contest.budgets[budget][0].plan) for run in runs]
        axes.plot([run.forwards for run in runs], [gap.mean for gap in gaps], color=PALE, linewidth=0.8, zorder=1)
        for run, gap in zip(runs, gaps, strict=True):
            _curve(axes, [(run.forwards, gap)], styles[contest.label(run)])
        if len(groups) > 1:
            axes.annotate(budget, (runs[-1].forwards, gaps[-1].mean), textcoords="offset points", xytext=(6, 3),
                          fontsize=9, color=GREY)
    _forwards_axis(axes, [run.forwards for runs in groups.values() for run in runs])
    axes.axhline(0, color=INK, linewidth=1, zorder=1)
    axes.set(xlabel="cost of the search (forwards)", ylabel="NLL minus the best plan (nats)")
    legend_below(figure)
    yield Picture("What a longer search buys", figure, "Loss above that of the best plan of the budget. Bars: standard "
                  "errors, paired over windows. A line joins the plans of a budget.")


def _convergence(contest: Contest) -> Iterator[Picture]:
    curves: dict[bytes, list[Contestant]] = {}
    for run in contest.contestants:
        if run.convergence.shape[1] > 1:
            curves.setdefault(run.convergence.tobytes(), []).append(run)
    if not curves:
        return
    figure, axes = new_figure()
    for number, runs in enumerate(curves.values()):
        axes.plot(*runs[0].convergence, linewidth=1.2, label=shared_name(contest, runs), **look(number))
    axes.set(xlabel="cost of the measurements (forwards)", ylabel="mean standard error (nats)")
    axes.set_xlim(0, 1.05 * axes.dataLim.xmax)
    axes.set_ylim(0, 1.1 * axes.dataLim.ymax or 1.0)
    legend_below(figure)
    yield Picture("Standard error of the Shapley values", figure,
                  "Each point adds a replicate: a permutation, or a permutation and its reverse. Estimators that play "
                  "no whole permutations have no curve.")


def _curves(contest: Contest) -> Mapping[str, Sequence[Contestant]]:
    """The runs of each name, the smallest plan first."""
    curves: dict[str, list[Contestant]] = {}
    for run in sorted(contest.contestants, key=lambda run: run.plan.nbytes or 0):
        curves.setdefault(contest.label(run), []).append(run)
    return curves


def _styles(contest: Contest) -> Mapping[str, dict[str, Any]]:
    """Colour and marker of each name."""
    names = dict.fromkeys(contest.label(run) for runs in contest.budgets.values() for run in runs)
    return {name: {"label": name, **look(i)} for i, name in enumerate(names)}


def _curve(axes: Any, points: Sequence[tuple[float, Difference]], marker: Mapping[str, Any]) -> None:
    """Draw differences and their errors, joined by a line; what is not finite is left out."""
    shown = [(place, gap.mean, np.nan_to_num(gap.stderr)) for place, gap in points if math.isfinite(gap.mean)]
    if shown:
        places, means, errors = zip(*shown, strict=True)
        axes.errorbar(places, means, yerr=errors, capsize=3, linewidth=1, **marker)


def _line_gap(run: Contestant) -> Difference | None:
    gap = run.gaps.get("line")
    return gap if gap and math.isfinite(gap.mean) else None


def _megabytes(row: Row) -> float:
    return (row.nbytes or 0) / 1e6


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):+.2f}", f"{max(values):+.2f}"
    return low if low == high else f"{low} to {high}"


def _plain_ticks(axes: Any, low: float, high: float) -> None:
    """Ticks of a logarithmic axis as plain numbers."""
    ticks = [n * 10.0**power for power in range(-6, 4) for n in (1, 2, 5)]
    ticks = [tick for tick in ticks if 0.8 * low <= tick <= 1.25 * high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _forwards_axis(axes: Any, costs: Sequence[float]) -> None:
    """Scale the horizontal axis for costs that differ by orders of magnitude and may be zero."""
    if max(costs) < 1:
        axes.set_xlim(-0.1, 1)
        return
    decades = 1 + int(np.log10(max(costs)))
    scale = [n * 10.0**power for power in range(decades + 1) for n in ((1, 2, 5) if decades < 3 else (1, 3))]
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    first = 0 if min(costs) < 1 else max(tick for tick in scale if tick <= min(costs))
    last = next(tick for tick in scale if tick > max(costs))
    axes.set_xlim(-0.3 if not first else 0.8 * first, 1.1 * last)
    ticks = [tick for tick in (0, *scale) if first <= tick <= last]
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
