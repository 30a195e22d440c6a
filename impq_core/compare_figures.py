"""Pictures of a contest, as SVG: sizes, costs, sensitivities, interactions, widths, convergence."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from impq_core.compare import Contest, Contestant, block_of
from impq_core.types import SensitivityEstimate

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart by colour-blind eyes; yellow is left out, which nobody sees on white."""

MARKERS = "oDs^vhX"
WIDTHS = ("#D55E00", "#E69F00", "#F0E442", "#56B4E9", "#0072B2")
"""From the narrowest width to the widest, of the same set."""

UNQUANTIZED, GREY, PALE = "#BBBBBB", "#666666", "#AAAAAA"
NAMED_LAYERS = 40
"""Up to so many layers are named on an axis; of more, their blocks are."""


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


@dataclass(frozen=True)
class Section:
    """Pictures that answer the same question."""

    title: str
    pictures: tuple[Picture, ...]


def draw_contest(contest: Contest) -> tuple[Section, ...]:
    """Draw what the runs of a contest have data for."""
    import matplotlib

    sections: dict[str, Callable[[Contest], Iterator[Picture]]] = {
        "Loss and size": _sizes, "Loss and cost of the search": _costs, "Widths": _maps,
        "Sensitivities": _sensitivities, "Interactions": _interactions, "Convergence": _convergence}
    # A dollar sign in a run's name is no formula; equal pages are equal files.
    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "impq", "font.size": 10,
                                "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}):
        drawn = [Section(title, tuple(draw(contest))) for title, draw in sections.items()]
    return tuple(section for section in drawn if section.pictures)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _style(contest: Contest) -> Mapping[str, dict[str, Any]]:
    """Colour, marker and size of each name. Colours and markers cycle apart, so that 49 names differ; later ones are
    smaller, so that plans that are the same are seen one within the other."""
    names = dict.fromkeys(contest.label(one) for those in contest.budgets.values() for one in those)
    return {name: {"label": name, "markersize": 12 - 6 * i / len(names), **_look(i)} for i, name in enumerate(names)}


def _look(number: int) -> dict[str, str]:
    return {"color": COLOURS[number % 7], "marker": MARKERS[(number + number // 7) % 7], "markeredgecolor": "white"}


def _legend(figure: Any, names: int) -> None:
    if names > 1:
        figure.legend(loc="outside lower center", ncols=2 if names > 3 else 1, fontsize=9, frameon=False)


def _sizes(contest: Contest) -> Iterator[Picture]:
    for title, near in (("All references", False), ("Near the plans", True)):
        figure, axes = _figure(6.4, 5)
        _references(contest, axes)
        seen: list[tuple[float, float, float]] = []
        styles = _style(contest)
        for name, style in styles.items():
            plans = sorted((one.plan.nbytes or 0, one.plan.nll, one.plan.stderr) for one in contest.contestants
                           if contest.label(one) == name)
            sizes, losses, errors = np.array(plans).T
            axes.errorbar(sizes / 1e6, losses, yerr=np.nan_to_num(errors), capsize=3, linewidth=0.8, **style)
            seen += [(size / 1e6, loss, error) for size, loss, error in plans]
        sizes, losses, errors = np.nan_to_num(np.array(seen)).T
        if near:
            span, height = np.ptp(sizes) or 0.1 * sizes.max(), max(np.ptp(losses), 2 * errors.max()) or 0.1
            axes.set_xlim(sizes.min() - 0.25 * span, sizes.max() + 0.25 * span)
            axes.set_ylim(losses.min() - 0.8 * height, losses.max() + 0.8 * height)
        axes.set(xlabel="stored bytes of the quantizable weights (MB)", ylabel="held-out NLL (nats per token)")
        _legend(figure, 4 + len(styles))
        yield Picture(title, _svg(figure), "Bars: standard error over windows. All are scored on the same windows, so "
                      "differences are surer than the bars say: the table has their paired errors."
                      if not near else "The same, at the plans' own scale.")


def _references(contest: Contest, axes: Any) -> None:
    """Uniform models and the line between them, random and first/last plans, once each; backends make their own."""
    lines = {tuple(sorted((row.nbytes / 1e6, row.nll, row.name) for row in one.rows
                          if row.kind == "uniform" and row.nbytes)): None for one in contest.contestants}
    label: str | None = "uniform models"
    for line in filter(None, lines):
        sizes, losses, names = zip(*line, strict=True)
        axes.plot(sizes, losses, "o-", color=GREY, markersize=4, zorder=1, label=label)
        label = None
        for size, loss, name in zip(sizes, losses, names, strict=True):
            axes.annotate(name, (size, loss), textcoords="offset points", xytext=(5, 5), fontsize=9, color=GREY,
                          annotation_clip=True, clip_on=True)
    for kind, marker in (("first/last", "s"), ("random", "x")):
        points = {(row.nbytes / 1e6, row.nll) for one in contest.contestants for row in one.rows
                  if row.kind == kind and row.nbytes}
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker, color=PALE, markersize=6, zorder=1, label=kind)
    axes.margins(x=0.12)  # for the names
    axes.axhline(contest.contestants[0].unquantized.nll, color=GREY, linestyle=":", linewidth=1, label="unquantized")


def _costs(contest: Contest) -> Iterator[Picture]:
    styles = _style(contest)
    for budget, those in contest.budgets.items():
        figure, axes = _figure(6.4, 4.4)
        for one in those:
            gap = contest.behind_best(one)
            axes.errorbar(one.forwards, one.plan.nll, yerr=np.nan_to_num(gap.stderr) if gap else 0, capsize=3,
                          linestyle="", **styles[contest.label(one)])
        for kind, rival in those[0].rivals.items():
            axes.axhline(rival.nll, color=GREY, linewidth=1,
                         linestyle={"line": "-", "first/last": "-.", "random": ":"}[kind], label=rival.name)
        _forwards_axis(axes, [one.forwards for one in those])
        axes.set(xlabel="cost of the search (full-model forwards)", ylabel="held-out NLL (nats per token)")
        _legend(figure, len(those) + 3)
        yield Picture(f"Budget {budget}", _svg(figure), "Bars: standard error of the difference to the best plan, "
                      "paired over windows. Grey: the references of the best plan.")


def _forwards_axis(axes: Any, costs: Sequence[float]) -> None:
    """Costs differ by orders of magnitude, and zero is one too."""
    if max(costs) < 1:
        axes.set_xlim(-0.1, 1)
        return
    scale = [n * 10.0**power for power in range(1 + int(np.log10(max(costs)))) for n in (1, 2, 5)]
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    first = 0 if min(costs) < 1 else max(tick for tick in scale if tick <= min(costs))
    last = next((tick for tick in scale if tick > max(costs)), 2 * scale[-1])
    axes.set_xlim(-0.3 if not first else 0.8 * first, 1.1 * last)
    ticks = [tick for tick in (0, *scale, last) if first <= tick <= last]
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()


def _maps(contest: Contest) -> Iterator[Picture]:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    ordered = [(budget, one) for budget, those in contest.budgets.items() for one in those]
    for names in dict.fromkeys(tuple(one.widths) for _, one in ordered):
        plans = [(f"{budget}: {contest.label(one)}", list(one.widths.values())) for budget, one in ordered
                 if tuple(one.widths) == names]
        bits = sorted({width for _, widths in plans for width in widths if width is not None})
        colours = [*_spread(len(bits)), UNQUANTIZED]
        cells = np.array([[bits.index(width) if width is not None else len(bits) for width in widths]
                          for _, widths in plans])
        short = len(names) <= NAMED_LAYERS
        figure, axes = _figure(12.5, 1.2 + 0.27 * len(plans) + (1.2 if short else 0.2))
        axes.pcolormesh(cells, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5, edgecolor="white",
                        linewidth=1 if short else 0.25)
        if short and len(bits) > 1:
            for (row, column), cell in np.ndenumerate(cells):
                text = f"{bits[cell]:g}" if cell < len(bits) else "16"
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8,
                          color="white" if colours[cell] in (WIDTHS[0], WIDTHS[-1]) else "black")
        axes.set_yticks(np.arange(len(plans)) + 0.5, [name for name, _ in plans])
        axes.invert_yaxis()
        _layer_axis(axes, names, 0.5)
        handles = [Patch(color=colour, label=f"{width:g} bits") for colour, width in zip(colours, bits, strict=False)]
        handles += [Patch(color=UNQUANTIZED, label="unquantized")] if (cells == len(bits)).any() else []
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
        yield Picture(f"{len(names)} layers ({contest.contestants[0].config.granularity})"
                      if len({tuple(one.widths) for _, one in ordered}) == 1 else f"{len(names)} layers",
                      _svg(figure), "A row is a plan, a column a layer in model order; by budget, the best plan first.",
                      True)


def _spread(count: int) -> list[str]:
    """Colours for so many widths, the ends of the scale among them."""
    if count <= 1:
        return [WIDTHS[-1]] * count
    if count <= len(WIDTHS):
        return [WIDTHS[round(i * (len(WIDTHS) - 1) / (count - 1))] for i in range(count)]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["cividis_r"](i / (count - 1))) for i in range(count)]


def _layer_axis(axes: Any, names: tuple[str, ...], middle: float = 0.0) -> None:
    """Layers on the horizontal axis: by name where they fit, else by the blocks they lie in."""
    if len(names) <= NAMED_LAYERS:
        axes.set_xticks(np.arange(len(names)) + middle, _shortened(names), rotation=60, ha="right", fontsize=8,
                        rotation_mode="anchor")
        return
    blocks = [block_of(name) for name in names]
    firsts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    every = max(1, len(firsts) // 40)
    axes.set_xticks(np.array(firsts[::every]) - 0.5 + middle, [str(blocks[i]) for i in firsts[::every]], fontsize=9)
    axes.set_xlabel(f"layer in model order ({len(names)}); numbers: first layer of a block")


def _shortened(names: tuple[str, ...]) -> list[str]:
    """Names without the words that all of them begin with."""
    split = [name.split(".") for name in names]
    shared = 0
    while all(len(words) > shared + 1 for words in split) and len({words[shared] for words in split}) == 1:
        shared += 1
    return [".".join(words[shared:]) for words in split]


def _estimates(contest: Contest) -> Iterator[tuple[str, SensitivityEstimate, str]]:
    """Every distinct estimate once: who made it, and whose plans rest on it."""
    users: dict[Any, tuple[SensitivityEstimate, list[str]]] = {}
    for one in contest.contestants:
        if one.estimate is not None:
            e = one.estimate
            key = (e.method, e.linear.tobytes(), None if e.pairwise is None else e.pairwise.tobytes())
            users.setdefault(key, (e, []))[1].append(_of(contest, one))
    for estimate, names in users.values():
        yield estimate.method, estimate, "Plans made from it: " + "; ".join(names) + "."


def _of(contest: Contest, one: Contestant) -> str:
    return f"{contest.label(one)} ({one.budget})" if len(contest.budgets) > 1 else contest.label(one)


def _sensitivities(contest: Contest) -> Iterator[Picture]:
    for method, estimate, users in _estimates(contest):
        costs = estimate.linear[:, -1]
        wide = len(costs) > NAMED_LAYERS
        figure, axes = _figure(12.5, 3.2) if wide else _figure(6.4, 4)
        error = None if estimate.stderr is None else np.nan_to_num(estimate.stderr[:, -1])
        axes.bar(range(len(costs)), costs, yerr=error, color=COLOURS[0], ecolor="black", capsize=0 if wide else 2,
                 error_kw={"elinewidth": 0.7 if wide else 1.2})
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_xlim(-0.7, len(costs) - 0.3)
        _layer_axis(axes, tuple(layer.name for layer in estimate.space.layers))
        axes.set_ylabel(f"cost of {estimate.space.choices[-1]} bits (nats per token)")
        bars = "Bars: standard error of the measured part. " if estimate.stderr is not None else "No error is known. "
        yield Picture(method, _svg(figure), bars + users, wide)


def _interactions(contest: Contest) -> Iterator[Picture]:
    for method, estimate, users in _estimates(contest):
        if estimate.pairwise is None:
            continue
        matrix = np.ma.array(estimate.pairwise[:, -1, :, -1], mask=np.eye(len(estimate.linear), dtype=bool))
        limit = float(np.percentile(np.abs(matrix.compressed()), 99)) if len(matrix) > 1 else 0.0
        figure, axes = _figure(6.4, 5.2)
        axes.set_facecolor(UNQUANTIZED)
        image = axes.imshow(matrix, cmap="PuOr_r", vmin=-(limit or 1.0), vmax=limit or 1.0, interpolation="nearest")
        figure.colorbar(image, label=f"both at {estimate.space.choices[-1]} bits (nats per token)", extend="both",
                        shrink=0.85)
        names = tuple(layer.name for layer in estimate.space.layers)
        _layer_axis(axes, names)
        ticks = axes.get_xticks()
        axes.set_yticks(ticks, [label.get_text() for label in axes.get_xticklabels()], fontsize=8)
        yield Picture(method, _svg(figure), "Above zero, two layers at the narrowest width cost more together than "
                      f"their costs add up to. The scale ends at the 99th percentile. {users}")


def _convergence(contest: Contest) -> Iterator[Picture]:
    curves: dict[bytes, Contestant] = {}
    for one in contest.contestants:
        if one.convergence.shape[1]:
            curves.setdefault(one.convergence.tobytes(), one)
    if not curves:
        return
    figure, axes = _figure(6.4, 4.4)
    for number, one in enumerate(curves.values()):
        axes.plot(*one.convergence, markersize=7, linewidth=1.2, label=_of(contest, one), **_look(number))
    axes.set(xlabel="cost of the measurements (full-model forwards)",
             ylabel="mean standard error of the\nShapley values (nats per token)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", fontsize=9, frameon=False)
    yield Picture("Standard error of the Shapley values", _svg(figure),
                  "A point is a replicate more (a permutation, or one and its reverse). Runs that measured the same "
                  "are one curve, under the first one's name; estimators that play no whole permutations have none.")
