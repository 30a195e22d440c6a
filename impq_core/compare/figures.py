"""Pictures of a contest: losses against sizes and costs, convergence, and what there is layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from impq_core.compare.contest import Contest, Contestant, Scored
from impq_core.compare.drawing import GREY, PALE, Picture, legend_below, look, new_figure, shared_name, to_svg
from impq_core.compare.layers import draw_interactions, draw_sensitivities, draw_widths


@dataclass(frozen=True)
class Section:
    """Pictures that answer the same question."""

    title: str
    pictures: tuple[Picture, ...]


def draw_contest(contest: Contest) -> tuple[Section, ...]:
    """Draw what the runs of a contest have data for."""
    import matplotlib

    sections: dict[str, Callable[[Contest], Iterator[Picture]]] = {
        "Loss and size": _sizes, "Loss and cost of the search": _costs, "Widths": draw_widths,
        "Sensitivities": draw_sensitivities, "Interactions": draw_interactions, "Convergence": _convergence}
    # A dollar sign in a run's name is no formula; equal pages are equal files.
    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "impq", "font.size": 10,
                                "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}):
        drawn = [Section(title, tuple(draw(contest))) for title, draw in sections.items()]
    return tuple(section for section in drawn if section.pictures)


def _sizes(contest: Contest) -> Iterator[Picture]:
    for title, near in (("All references", False), ("Near the plans", True)):
        figure, axes = new_figure(6.4, 3.8)
        _references(contest, axes)
        for name, style in _style(contest).items():
            those = [one for one in contest.contestants if contest.label(one) == name]
            line = sorted((_megabytes(one.plan), one.plan.nll) for one in those)
            axes.plot(*zip(*line, strict=True), color=style["color"], linewidth=0.8)
            for one in those:
                _point(axes, contest, one, _megabytes(one.plan), one.plan.stderr, style)
        plans = [one.plan for one in contest.contestants if math.isfinite(one.plan.nll)]
        if near and plans:
            sizes, losses, errors = np.nan_to_num([(_megabytes(plan), plan.nll, plan.stderr) for plan in plans]).T
            _around(axes.set_xlim, sizes.min(), sizes.max(), 0.2)
            _around(axes.set_ylim, (losses - errors).min(), (losses + errors).max(), 0.15)
        axes.set(xlabel="stored bytes of the quantizable weights (MB)", ylabel="held-out NLL (nats per token)")
        legend_below(figure)
        yield Picture(title, to_svg(figure), "The same, at the plans' own scale." if near else
                      "Bars: standard error over windows. Differences, on the same windows, are surer than the bars: "
                      "the table has their paired errors. Plans that came out the same stand side by side.")


def _references(contest: Contest, axes: Any) -> None:
    """Uniform models and the line between them, random and first/last plans, once each; backends make their own."""
    lines = {tuple(sorted((row.nbytes / 1e6, row.nll, row.name.removeprefix("uniform ")) for row in one.rows
                          if row.kind == "uniform" and row.nbytes)): one.config.backend for one in contest.contestants}
    backends = list(dict.fromkeys(lines.values()))
    for line, backend in lines.items():
        if line:
            sizes, losses, names = zip(*line, strict=True)
            style = ("-", "--", "-.", ":")[backends.index(backend) % 4]
            axes.plot(sizes, losses, style, marker="o", color=GREY, markersize=4, zorder=1,
                      label=f"uniform {backend} models (bits)")
            for size, loss, name in zip(sizes, losses, names, strict=True):
                axes.annotate(name, (size, loss), textcoords="offset points", xytext=(5, 4), fontsize=9, color=GREY,
                              annotation_clip=True)
    for kind, marker in (("first/last", "s"), ("random", "x")):
        points = {(row.nbytes / 1e6, row.nll) for one in contest.contestants for row in one.rows
                  if row.kind == kind and row.nbytes}
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker, color=PALE, markersize=6, zorder=1, label=kind)
    axes.margins(0.08)  # for the names
    axes.axhline(contest.contestants[0].unquantized.nll, color=GREY, linestyle=":", linewidth=1, label="unquantized")


def _costs(contest: Contest) -> Iterator[Picture]:
    styles = _style(contest)
    for budget, those in contest.budgets.items():
        figure, axes = new_figure(6.4, 3.5)
        for one in those:
            gap = contest.behind_best(one)
            _point(axes, contest, one, one.forwards, gap.stderr if gap else 0.0, styles[contest.label(one)])
        low, high = axes.get_ylim()  # far references would flatten the plans: the legend has their losses
        for kind, rival in those[0].rivals.items():
            axes.axhline(rival.nll, color=GREY, linewidth=1, label=f"{rival.name}: {rival.nll:.3f}",
                         linestyle={"line": "-", "first/last": "-.", "random": ":"}[kind])
        axes.set_ylim(low - 0.1 * (high - low), high + 0.4 * (high - low))
        _forwards_axis(axes, [one.forwards for one in those])
        axes.set(xlabel="cost of the search (full-model forwards)", ylabel="held-out NLL (nats per token)")
        legend_below(figure)
        yield Picture(f"Budget {budget}", to_svg(figure), "Bars: standard error of the difference to the best plan, "
                      "paired over windows. Grey: the references of the best plan, where they are near.")


def _convergence(contest: Contest) -> Iterator[Picture]:
    curves: dict[bytes, list[Contestant]] = {}
    for one in contest.contestants:
        if one.convergence.shape[1]:
            curves.setdefault(one.convergence.tobytes(), []).append(one)
    if not curves:
        return
    figure, axes = new_figure(6.4, 3.5)
    for number, those in enumerate(curves.values()):
        axes.plot(*those[0].convergence, linewidth=1.2, label=shared_name(contest, those), **look(number))
    axes.set(xlabel="cost of the measurements (full-model forwards)",
             ylabel="mean standard error of the\nShapley values (nats per token)")
    axes.set_xlim(0, 1.05 * axes.dataLim.xmax)
    axes.set_ylim(0, 1.1 * axes.dataLim.ymax or 1.0)
    legend_below(figure)
    yield Picture("Standard error of the Shapley values", to_svg(figure),
                  "Every point is one more replicate: a permutation, or one and its reverse. Estimators that play no "
                  "whole permutations have no curve.")


def _style(contest: Contest) -> Mapping[str, dict[str, Any]]:
    """Colour and marker of each name."""
    names = dict.fromkeys(contest.label(one) for those in contest.budgets.values() for one in those)
    return {name: {"label": name, **look(i)} for i, name in enumerate(names)}


def _point(axes: Any, contest: Contest, one: Contestant, place: float, error: float, style: Mapping[str, Any]) -> None:
    """A plan's NLL at a place; plans of one budget that came out the same stand side by side."""
    from matplotlib.transforms import ScaledTranslation

    same = [other for other in contest.budgets[one.budget]
            if (other.plan.nbytes, other.plan.nll) == (one.plan.nbytes, one.plan.nll)]
    aside = ScaledTranslation(8 / 72 * same.index(one) if one in same else 0, 0, axes.figure.dpi_scale_trans)
    error = 0.0 if math.isnan(error) else error
    axes.errorbar(place, one.plan.nll, yerr=error, capsize=3, linestyle="", **style, transform=axes.transData + aside)
    axes.update_datalim([(place, one.plan.nll - error), (place, one.plan.nll + error)])
    axes.autoscale_view()


def _megabytes(row: Scored) -> float:
    return (row.nbytes or 0) / 1e6


def _around(limit: Callable[[float, float], object], low: float, high: float, share: float) -> None:
    margin = share * (high - low) or 0.05 * abs(high)
    limit(low - margin, high + margin)


def _forwards_axis(axes: Any, costs: Sequence[float]) -> None:
    """Costs differ by orders of magnitude, and zero is one too."""
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
