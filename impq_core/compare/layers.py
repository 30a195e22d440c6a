"""Figures by layer: widths, sensitivities, interactions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from impq_core.compare.contest import Contest, Contestant, block_of
from impq_core.compare.drawing import COLOURS, GREY, Picture, new_figure, shared_name
from impq_core.space import in_bits
from impq_core.types import SensitivityEstimate

WIDTHS = ("#D55E00", "#E69F00", "#F0E442", "#56B4E9", "#0072B2")
"""From the narrowest width to the widest."""

UNQUANTIZED = "#BBBBBB"

NAMED_LAYERS = 40
"""Most layers that an axis names one by one; with more, it names blocks."""


def draw_widths(contest: Contest) -> Iterator[Picture]:
    """Plans as rows of coloured cells, one cell per layer; one figure for each set of layers."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    ordered = [(budget, run) for budget, runs in contest.budgets.items() for run in runs]
    for names in dict.fromkeys(tuple(run.widths) for _, run in ordered):
        plans = [(f"{budget}: {contest.label(run)}", list(run.widths.values())) for budget, run in ordered
                 if tuple(run.widths) == names]
        bits = sorted({width for _, widths in plans for width in widths if width is not None},
                      key=lambda choice: (choice.bits, choice.name))
        colours = [*width_colours(len(bits)), UNQUANTIZED]
        cells = np.array([[bits.index(width) if width is not None else len(bits) for width in widths]
                          for _, widths in plans])
        short = len(names) <= NAMED_LAYERS
        figure, axes = new_figure(12.5, 1.2 + 0.27 * len(plans) + (1.2 if short else 0.2))
        axes.imshow(cells, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5, aspect="auto",
                    interpolation="none")
        axes.hlines(np.arange(1, len(plans)) - 0.5, -0.5, len(names) - 0.5, color="white", linewidth=1.5)
        axes.vlines(np.arange(1, len(names)) - 0.5 if short else np.array(_firsts(names)) - 0.5, -0.5,
                    len(plans) - 0.5, color="white", linewidth=1.5)
        if short and len(bits) > 1:
            for (row, column), cell in np.ndenumerate(cells):
                text = bits[cell].name if cell < len(bits) else "16"
                axes.text(column, row, text, ha="center", va="center", fontsize=8,
                          color="white" if colours[cell] in (WIDTHS[0], WIDTHS[-1]) else "black")
        axes.set_yticks(range(len(plans)), [name for name, _ in plans])
        axes.tick_params(left=False)
        axes.spines[:].set_visible(False)
        _layer_axis(axes, names)
        handles = [Patch(color=colour, label=in_bits(width.name)) for colour, width in zip(colours, bits, strict=False)]
        handles += [Patch(color=UNQUANTIZED, label="unquantized")] if (cells == len(bits)).any() else []
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)
        yield Picture(f"{len(names)} layers", figure,
                      "Rows are plans, columns are layers; by budget, the best plan first.", True)


def draw_sensitivities(estimates: Iterable[tuple[str, SensitivityEstimate]]) -> Iterator[Picture]:
    """Cost of every layer at the narrowest width, for each titled estimate."""
    for title, estimate in estimates:
        wide = len(estimate.space) > NAMED_LAYERS
        figure, axes = new_figure(12.5, 3.2) if wide else new_figure(6.4, 4)
        draw_costs(axes, estimate)
        bars = "bars are standard errors of the measured part" if estimate.stderr is not None else "no standard errors"
        yield Picture(title, figure, f"Estimate {estimate.method}; {bars}.", wide)


def draw_costs(axes: Any, estimate: SensitivityEstimate) -> None:
    """Draw the cost of every layer at the narrowest width on axes."""
    costs = estimate.linear[:, -1]
    wide = len(costs) > NAMED_LAYERS
    error = None if estimate.stderr is None else np.nan_to_num(estimate.stderr[:, -1])
    axes.bar(range(len(costs)), costs, yerr=error, color=COLOURS[0], ecolor="black", capsize=0 if wide else 2,
             error_kw={"elinewidth": 0.7 if wide else 1.2})
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlim(-0.7, len(costs) - 0.3)
    _layer_axis(axes, tuple(layer.name for layer in estimate.space.layers))
    axes.set_ylabel(f"cost of {estimate.space.choices[-1]} bits (nats per token)")


def draw_interactions(estimates: Iterable[tuple[str, SensitivityEstimate]]) -> Iterator[Picture]:
    """Cost of pairs of layers beyond their single costs, for each titled estimate with pair terms."""
    for title, estimate in estimates:
        if estimate.pairwise is None:
            continue
        matrix, alone = estimate.pairwise[:, -1, :, -1], np.eye(len(estimate.linear), dtype=bool)
        limit = float(np.percentile(np.abs(matrix[~alone]), 99)) if len(matrix) > 1 else 0.0
        figure, axes = new_figure(6.4, 5.2)
        axes.set_facecolor(UNQUANTIZED)
        image = axes.imshow(np.where(alone, np.nan, matrix), cmap="PuOr_r", vmin=-(limit or 1.0), vmax=limit or 1.0,
                            interpolation="none")
        figure.colorbar(image, label=f"both at {estimate.space.choices[-1]} bits (nats per token)", extend="both",
                        shrink=0.85)
        names = tuple(layer.name for layer in estimate.space.layers)
        _layer_axis(axes, names, 15)
        ticks = axes.get_xticks()
        axes.set_yticks(ticks, [label.get_text() for label in axes.get_xticklabels()], fontsize=8)
        yield Picture(title, figure, f"Estimate {estimate.method}. Above zero (brown), two layers at the "
                      "narrowest width cost more together than their costs add up to. The scale ends at the 99th "
                      "percentile.")


def distinct_estimates(contest: Contest) -> list[tuple[str, SensitivityEstimate]]:
    """Every distinct estimate once, titled with the names of the runs that made it."""
    groups: dict[Any, tuple[SensitivityEstimate, list[Contestant]]] = {}
    for run in (run for runs in contest.budgets.values() for run in runs):
        if (e := run.estimate) is not None:
            key = (e.method, e.linear.tobytes(), None if e.pairwise is None else e.pairwise.tobytes())
            groups.setdefault(key, (e, []))[1].append(run)
    return [(shared_name(contest, runs), estimate) for estimate, runs in groups.values()]


def width_colours(count: int) -> list[str]:
    """Colours for ``count`` widths, from the narrowest to the widest, both ends of the scale included."""
    if count <= 1:
        return [WIDTHS[-1]] * count
    if count <= len(WIDTHS):
        return [WIDTHS[round(i * (len(WIDTHS) - 1) / (count - 1))] for i in range(count)]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["cividis_r"](i / (count - 1))) for i in range(count)]


def _firsts(names: Sequence[str]) -> list[int]:
    """Indices of the layers that begin a block."""
    blocks = [block_of(name) for name in names]
    return [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]


def _layer_axis(axes: Any, names: tuple[str, ...], most: int = 40) -> None:
    """Label the horizontal axis with layer names if they fit, else with at most ``most`` block numbers."""
    if len(names) <= NAMED_LAYERS:
        short = _shortened(names)
        turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if max(map(len, short)) > 3 else {}
        axes.set_xticks(range(len(names)), short, fontsize=8, **turned)
        axes.set_xlabel("layer in model order")
        return
    firsts = _firsts(names)
    shown = firsts[::-(-len(firsts) // most)]
    labels = [f"{block:g}" if 0 <= (block := block_of(names[i])) < np.inf else "" for i in shown]
    axes.set_xticks(np.array(shown) - 0.5, labels, fontsize=9)
    axes.set_xlabel(f"layer in model order ({len(names)}); numbers: first layer of a block")


def _shortened(names: tuple[str, ...]) -> list[str]:
    """Names without their common leading words."""
    split = [name.split(".") for name in names]
    shared = 0
    while all(len(words) > shared + 1 for words in split) and len({words[shared] for words in split}) == 1:
        shared += 1
    return [".".join(words[shared:]) for words in split]
