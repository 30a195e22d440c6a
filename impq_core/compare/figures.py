"""Figures of a contest: loss against size and cost, convergence, widths and estimates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from impq_core.compare.contest import Contest, Contestant
from impq_core.compare.drawing import GREY, PALE, Picture, legend_below, look, new_figure, shared_name, style
from impq_core.compare.layers import distinct_estimates, draw_interactions, draw_sensitivities, draw_widths
from impq_core.results import Row


@dataclass(frozen=True)
class Section:
    """Figures of one kind."""

    title: str
    pictures: tuple[Picture, ...]


def draw_contest(contest: Contest) -> tuple[Section, ...]:
    """Draw all figures that the runs of a contest have data for."""
    estimates = distinct_estimates(contest)
    drawers = {"Loss and size": draw_sizes(contest), "Loss and cost of the search": _costs(contest),
               "Widths": draw_widths(contest), "Sensitivities": draw_sensitivities(estimates),
               "Interactions": draw_interactions(estimates), "Convergence": _convergence(contest)}
    with style():
        sections = [Section(title, tuple(pictures)) for title, pictures in drawers.items()]
    return tuple(section for section in sections if section.pictures)


def draw_sizes(contest: Contest) -> Iterator[Picture]:
    """Held-out NLL against stored bytes: with all references, then at the scale of the plans."""
    for title, near in (("All references", False), ("Near the plans", True)):
        figure, axes = new_figure(6.4, 3.8)
        _references(contest, axes)
        for name, marker in _styles(contest).items():
            runs = [run for run in contest.contestants if contest.label(run) == name]
            line = sorted((_megabytes(run.plan), run.plan.nll) for run in runs)
            axes.plot(*zip(*line, strict=True), color=marker["color"], linewidth=0.8)
            for run in runs:
                _point(axes, contest, run, _megabytes(run.plan), run.plan.stderr, marker)
        plans = [run.plan for run in contest.contestants if math.isfinite(run.plan.nll)]
        if near and plans:
            sizes, losses, errors = np.nan_to_num([(_megabytes(plan), plan.nll, plan.stderr) for plan in plans]).T
            _around(axes.set_xlim, sizes.min(), sizes.max(), 0.2)
            _around(axes.set_ylim, (losses - errors).min(), (losses + errors).max(), 0.15)
        axes.set(xlabel="stored bytes of the quantizable weights (MB)", ylabel="held-out NLL (nats per token)")
        legend_below(figure)
        yield Picture(title, figure, "The same, at the plans' own scale." if near else
                      "Bars: standard error over windows. Differences on the same windows are more precise than the "
                      "bars: the table has their paired errors. Equal plans are drawn side by side.")


def _references(contest: Contest, axes: Any) -> None:
    """Draw uniform models and the line between them for each backend, and random and first/last plans, once each."""
    lines = {tuple(sorted((_megabytes(row), row.nll, row.name.removeprefix("uniform ")) for row in run.evaluation.rows
                          if row.kind == "uniform" and row.nbytes)): run.config.backend for run in contest.contestants}
    backends = list(dict.fromkeys(lines.values()))
    for line, backend in lines.items():
        if line:
            sizes, losses, names = zip(*line, strict=True)
            dashes = ("-", "--", "-.", ":")[backends.index(backend) % 4]
            axes.plot(sizes, losses, dashes, marker="o", color=GREY, markersize=4, zorder=1,
                      label=f"uniform {backend} models (bits)")
            for size, loss, name in zip(sizes, losses, names, strict=True):
                axes.annotate(name, (size, loss), textcoords="offset points", xytext=(5, 4), fontsize=9, color=GREY,
                              annotation_clip=True)
    for kind, marker in (("first/last", "s"), ("random", "x")):
        points = {(_megabytes(row), row.nll) for run in contest.contestants for row in run.evaluation.rows
                  if row.kind == kind and row.nbytes}
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker, color=PALE, markersize=6, zorder=1, label=kind)
    axes.margins(0.08)  # for the names
    axes.axhline(contest.contestants[0].unquantized.nll, color=GREY, linestyle=":", linewidth=1, label="unquantized")


def _costs(contest: Contest) -> Iterator[Picture]:
    styles = _styles(contest)
    for budget, runs in contest.budgets.items():
        figure, axes = new_figure(6.4, 3.5)
        for run in runs:
            gap = contest.behind_best(run)
            _point(axes, contest, run, run.forwards, gap.stderr if gap else 0.0, styles[contest.label(run)])
        low, high = axes.get_ylim()  # distant references would flatten the plans: the legend has their losses
        for kind, rival in runs[0].rivals.items():
            axes.axhline(rival.nll, color=GREY, linewidth=1, label=f"{rival.name}: {rival.nll:.3f}",
                         linestyle={"line": "-", "first/last": "-.", "random": ":"}[kind])
        axes.set_ylim(low - 0.1 * (high - low), high + 0.4 * (high - low))
        _forwards_axis(axes, [run.forwards for run in runs])
        axes.set(xlabel="cost of the search (full-model forwards)", ylabel="held-out NLL (nats per token)")
        legend_below(figure)
        yield Picture(f"Budget {budget}", figure, "Bars: standard error of the difference to the best plan, "
                      "paired over windows. Grey: the references of the best plan that lie in this range.")


def _convergence(contest: Contest) -> Iterator[Picture]:
    curves: dict[bytes, list[Contestant]] = {}
    for run in contest.contestants:
        if run.convergence.shape[1]:
            curves.setdefault(run.convergence.tobytes(), []).append(run)
    if not curves:
        return
    figure, axes = new_figure(6.4, 3.5)
    for number, runs in enumerate(curves.values()):
        axes.plot(*runs[0].convergence, linewidth=1.2, label=shared_name(contest, runs), **look(number))
    axes.set(xlabel="cost of the measurements (full-model forwards)",
             ylabel="mean standard error of the\nShapley values (nats per token)")
    axes.set_xlim(0, 1.05 * axes.dataLim.xmax)
    axes.set_ylim(0, 1.1 * axes.dataLim.ymax or 1.0)
    legend_below(figure)
    yield Picture("Standard error of the Shapley values", figure,
                  "Each point adds a replicate: a permutation, or a permutation and its reverse. Estimators that play "
                  "no whole permutations have no curve.")


def _styles(contest: Contest) -> Mapping[str, dict[str, Any]]:
    """Colour and marker of each name."""
    names = dict.fromkeys(contest.label(run) for runs in contest.budgets.values() for run in runs)
    return {name: {"label": name, **look(i)} for i, name in enumerate(names)}


def _point(axes: Any, contest: Contest, run: Contestant, place: float, error: float, marker: Mapping[str, Any]) -> None:
    """Draw a plan's NLL at a place on the horizontal axis; equal plans of one budget are drawn side by side."""
    from matplotlib.transforms import ScaledTranslation

    same = [other for other in contest.budgets[contest.budget_of(run)]
            if (other.plan.nbytes, other.plan.nll) == (run.plan.nbytes, run.plan.nll)]
    aside = ScaledTranslation(8 / 72 * same.index(run) if run in same else 0, 0, axes.figure.dpi_scale_trans)
    error = 0.0 if math.isnan(error) else error
    axes.errorbar(place, run.plan.nll, yerr=error, capsize=3, linestyle="", **marker, transform=axes.transData + aside)
    axes.update_datalim([(place, run.plan.nll - error), (place, run.plan.nll + error)])
    axes.autoscale_view()


def _megabytes(row: Row) -> float:
    return (row.nbytes or 0) / 1e6


def _around(limit: Callable[[float, float], object], low: float, high: float, share: float) -> None:
    margin = share * (high - low) or 0.05 * abs(high)
    limit(low - margin, high + margin)


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
