"""What the runs chose and estimated by layer: widths, sensitivities, interactions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from impq_core.compare.contest import Contest, Contestant, block_of
from impq_core.compare.drawing import COLOURS, GREY, INK, Picture, new_figure, shared_name
from impq_core.space import Choice, in_bits
from impq_core.types import SensitivityEstimate

WIDTHS = ("#D55E00", "#E69F00", "#F0E442", "#56B4E9", "#0072B2")
"""From the narrowest width to the widest."""

UNQUANTIZED = "#BBBBBB"

NAMED_LAYERS = 24
"""Most layers that an axis names one by one; with more, it names blocks."""


@dataclass(frozen=True)
class Cell:
    """Neighbouring layers of one choice.

    Args:
        first: number of the first layer.
        count: number of layers.
        kind: number of the choice among ``WidthStrips.choices``; their number for layers that stay unquantized.
        title: the layers and their choice, for a reader.
    """

    first: int
    count: int
    kind: int
    title: str


@dataclass(frozen=True)
class WidthStrips:
    """Plans over the same layers.

    Args:
        layers: names of the layers, in model order.
        choices: choices that the plans use, from the narrowest to the widest.
        colours: a colour for each choice, and one for layers that stay unquantized.
        plans: name and choice of each layer (None: unquantized) of the best plan of each budget.
        others: the same of the other plans.
    """

    layers: tuple[str, ...]
    choices: tuple[Choice, ...]
    colours: tuple[str, ...]
    plans: tuple[tuple[str, tuple[Choice | None, ...]], ...]
    others: tuple[tuple[str, tuple[Choice | None, ...]], ...] = ()

    def kinds(self, widths: Sequence[Choice | None]) -> list[int]:
        """The number of each layer's choice."""
        return [len(self.choices) if width is None else self.choices.index(width) for width in widths]

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each colour that is used."""
        unquantized = any(width is None for _, widths in (*self.plans, *self.others) for width in widths)
        return (*(in_bits(choice.name) for choice in self.choices), *["unquantized"] * unquantized)

    def cells(self, widths: Sequence[Choice | None]) -> list[Cell]:
        """The cells of a plan."""
        cells, first = [], 0
        for kind, group in groupby(self.kinds(widths)):
            count = len(list(group))
            last = self.layers[first + count - 1]
            layers = self.layers[first] + ("" if count == 1 else f" to {last}")
            cells.append(Cell(first, count, kind, f"{layers}: {self.names[kind]}"))
            first += count
        return cells

    def counts(self, widths: Sequence[Choice | None]) -> str:
        """Number of layers of each choice, in words."""
        kinds = self.kinds(widths)
        return ", ".join(f"{kinds.count(kind)} at {name}" if name != "unquantized" else f"{kinds.count(kind)} {name}"
                         for kind, name in enumerate(self.names) if kind in kinds)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places along the layers, as shares of their number, and what to write there: about six blocks."""
        firsts = [i for i in _firsts(self.layers) if 0 <= block_of(self.layers[i]) < np.inf]
        return [(i / len(self.layers), f"{block_of(self.layers[i]):g}") for i in firsts[::-(-len(firsts) // 6) or 1]]


def width_strips(contest: Contest) -> Iterator[WidthStrips]:
    """The plans of a contest, a map for each set of layers."""
    for layers in dict.fromkeys(tuple(run.widths) for run in contest.ordered):
        runs = [run for run in contest.ordered if tuple(run.widths) == layers]
        best = [run for run in runs if contest.behind_best(run) is None] or runs
        plans, others = (tuple((contest.name(run), tuple(run.widths.values())) for run in some)
                         for some in (best, [run for run in runs if run not in best]))
        choices = sorted({width for run in runs for width in run.widths.values() if width is not None},
                         key=lambda choice: (choice.bits, choice.name))
        yield WidthStrips(layers, tuple(choices), (*width_colours(len(choices)), UNQUANTIZED), plans, others)


def draw_widths(contest: Contest) -> Iterator[Picture]:
    """The width maps of a contest as figures: rows are plans, columns are layers."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    for found in width_strips(contest):
        plans = (*found.plans, *found.others)
        cells = np.array([found.kinds(widths) for _, widths in plans])
        figure, axes = new_figure(12.5, 1.4 + 0.27 * len(plans))
        axes.imshow(cells, cmap=ListedColormap(found.colours), vmin=-0.5, vmax=len(found.colours) - 0.5, aspect="auto",
                    interpolation="none")
        axes.hlines(np.arange(1, len(cells)) - 0.5, -0.5, len(found.layers) - 0.5, color="white", linewidth=1.5)
        axes.vlines(np.array(_firsts(found.layers)) - 0.5, -0.5, len(cells) - 0.5, color="white", linewidth=1.5)
        axes.set_yticks(range(len(cells)), [name for name, _ in plans])
        axes.tick_params(left=False)
        axes.spines[:].set_visible(False)
        _layer_axis(axes, found.layers)
        handles = [Patch(color=colour, label=name) for colour, name in zip(found.colours, found.names, strict=False)]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)
        yield Picture(f"{len(found.layers)} layers", figure, "Rows are plans, columns are layers.")


def draw_sensitivities(estimates: Iterable[tuple[str, SensitivityEstimate]]) -> Iterator[Picture]:
    """Cost of every layer at the narrowest width, for each titled estimate of several layers."""
    for title, estimate in estimates:
        if len(estimate.space) < 2:
            continue
        figure, axes = new_figure(height=3.2 if len(estimate.space) > NAMED_LAYERS else 4)
        draw_costs(axes, estimate)
        bars = "bars are standard errors of the measured part" if estimate.stderr is not None else "no standard errors"
        yield Picture(title, figure, f"Estimate {estimate.method}; {bars}.")


def draw_costs(axes: Any, estimate: SensitivityEstimate) -> None:
    """Draw the cost of every layer at the narrowest width on axes."""
    costs = estimate.linear[:, -1]
    wide = len(costs) > NAMED_LAYERS
    error = None if estimate.stderr is None else np.nan_to_num(estimate.stderr[:, -1])
    axes.bar(range(len(costs)), costs, yerr=error, color=COLOURS[0], ecolor=INK, capsize=0 if wide else 2,
             error_kw={"elinewidth": 0.7 if wide else 1.2})
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlim(-0.7, len(costs) - 0.3)
    _layer_axis(axes, tuple(layer.name for layer in estimate.space.layers))
    axes.set_ylabel(f"cost of {estimate.space.choices[-1]} bits (nats per token)")


def draw_interactions(estimates: Iterable[tuple[str, SensitivityEstimate]]) -> Iterator[Picture]:
    """Cost of pairs of layers beyond their single costs, for each titled estimate with pair terms."""
    for title, estimate in estimates:
        if estimate.pairwise is None or len(estimate.linear) < 3:  # two layers have one pair
            continue
        matrix, alone = estimate.pairwise[:, -1, :, -1], np.eye(len(estimate.linear), dtype=bool)
        limit = float(np.percentile(np.abs(matrix[~alone]), 99)) if len(matrix) > 1 else 0.0
        figure, axes = new_figure(height=3.9)
        axes.set_facecolor(UNQUANTIZED)
        image = axes.imshow(np.where(alone, np.nan, matrix), cmap="PuOr_r", vmin=-(limit or 1.0), vmax=limit or 1.0,
                            interpolation="none")
        figure.colorbar(image, label=f"both at {estimate.space.choices[-1]} bits (nats per token)", extend="both",
                        shrink=0.85)
        names = tuple(layer.name for layer in estimate.space.layers)
        _layer_axis(axes, names, 10)
        ticks = axes.get_xticks()
        axes.set_yticks(ticks, [label.get_text() for label in axes.get_xticklabels()], fontsize=8)
        yield Picture(title, figure, f"Estimate {estimate.method}. Above zero (brown), two layers at the "
                      "narrowest width cost more together than their costs add up to. The scale ends at the 99th "
                      "percentile.")


def distinct_estimates(contest: Contest) -> list[tuple[str, SensitivityEstimate]]:
    """Every distinct estimate once, titled with the names of the runs that made it."""
    groups: dict[Any, tuple[SensitivityEstimate, list[Contestant]]] = {}
    for run in contest.ordered:
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


def _layer_axis(axes: Any, names: tuple[str, ...], most: int = 15) -> None:
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
