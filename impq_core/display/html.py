"""Results as HTML for notebooks: tables and maps of widths. Nothing is loaded, and colours of text are the page's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, singledispatch
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from impq_core.compare.comparison import Comparison
from impq_core.compare.layers import UNQUANTIZED, width_colours
from impq_core.compare.table import HEADER, contest_lines, contest_title
from impq_core.results import Evaluation, RunResult
from impq_core.space import Choice
from impq_core.terminal import evaluation_rows, summary
from impq_core.types import Plan, SensitivityEstimate
from impq_core.width_map import WidthMap

MOST_LAYERS = 12
"""Layers of an estimate that its table shows: the most expensive ones."""


@dataclass(frozen=True)
class Cell:
    """A block in a row of a map.

    Args:
        title: what the mouse shows.
        symbol: the character in it.
        colour: of its background; empty for none.
        ink: of the character.
    """

    title: str = ""
    symbol: str = ""
    colour: str = ""
    ink: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a view: a heading, lines of text, a table and a map; each may be empty.

    Args:
        title: the heading.
        lines: paragraphs.
        header: of the table; its first column is text, the others are numbers.
        rows: of the table, each with a class: ``plan``, ``group`` (one cell for the whole row) or none.
        legend: of the map: name and colour of each choice.
        cells: of the map, by the name of the row.
    """

    title: str = ""
    lines: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[tuple[str, Sequence[str]]] = ()
    legend: Sequence[tuple[str, str]] = ()
    cells: dict[str, list[Cell]] = field(default_factory=dict)


@singledispatch
def sections(result: Any) -> Iterable[Section]:
    """The parts of the view of a result; raises TypeError if it has none."""
    raise TypeError(f"{type(result).__name__} has no view")


def html(result: Any) -> str:
    """The view of a result."""
    return _template().render(sections=list(sections(result)))


@sections.register
def _(evaluation: Evaluation) -> Iterator[Section]:
    how = "quantized in sequence, as an export is" if evaluation.sequential else (
        "every width quantized behind a prefix at the widest")
    yield Section(lines=[f"{evaluation.text}, {evaluation.tokens} scored tokens; {how}"])
    yield _scores(evaluation)


@sections.register
def _(plan: Plan) -> Iterator[Section]:
    space = plan.space
    line = (f"plan by {plan.method or 'hand'}: {plan.nbytes / 1e6:.2f} MB, {space.nominal_bits(plan.nbytes):.3f} bits "
            f"nominal, {space.bits_per_weight(plan.nbytes):.3f} stored")
    if plan.predicted_loss is not None:
        line += f"; predicted cost {plan.predicted_loss:.4f}" + (" nats per token" if plan.is_loss else "")
    yield Section(lines=[line])
    yield _widths(plan)


@sections.register
def _(estimate: SensitivityEstimate) -> Iterator[Section]:
    unit = "nats per token" if estimate.is_loss and estimate.link is None else "scores without unit"
    pairs = "with pair terms" if estimate.pairwise is not None else "additive"
    line = f"estimate {estimate.method}: {len(estimate.space)} layers, {pairs}, {estimate.forwards:.1f} forwards"
    order = sorted(range(len(estimate.space)), key=lambda i: -estimate.linear[i, -1])[:MOST_LAYERS]
    rows = [("", [estimate.space.layers[i].name, *(_cost(estimate, i, k) for k in range(len(estimate.space.choices)))])
            for i in order]
    more = len(estimate.space) - len(rows)
    note = [f"the most expensive layers; {more} more in to_pandas()"] if more else []
    yield Section(lines=[line, f"cost of each choice, {unit}", *note],
                  header=["layer", *(choice.name for choice in estimate.space.choices)], rows=rows)


@sections.register
def _(result: RunResult) -> Iterator[Section]:
    yield Section(f"{result.config.model}: {result.state} run {result.folder.name}", summary(result))
    if result.plan is not None:
        yield _widths(result.plan)
    if result.evaluation is not None:
        yield _scores(result.evaluation)
    elif result.estimate is not None and result.plan is None:
        yield from sections(result.estimate)


@sections.register
def _(comparison: Comparison) -> Iterator[Section]:
    for contest in comparison.contests:
        rows = [(kind, cells) for budget, lines in contest_lines(contest).items()
                for kind, cells in [("group", [f"budget {budget}"]),
                                    *(("plan" if line.kind == "best" else "", line.cells) for line in lines)]]
        yield Section(contest_title(contest), header=HEADER, rows=rows)
    if comparison.notes:
        yield Section(lines=comparison.notes)


def _scores(evaluation: Evaluation) -> Section:
    """The held-out table."""
    header, rows = evaluation_rows(evaluation)
    return Section(header=header, rows=[("plan" if row[0] == "plan" else "", row) for row in rows])


def _cost(estimate: SensitivityEstimate, layer: int, choice: int) -> str:
    error = math.nan if estimate.stderr is None else float(estimate.stderr[layer, choice])
    return f"{estimate.linear[layer, choice]:.4f}" + ("" if not choice or math.isnan(error) else f" ± {error:.4f}")


def _widths(plan: Plan) -> Section:
    """The map of a plan's widths."""
    widths = WidthMap.of(plan)
    narrow_first = sorted(widths.choices, key=lambda choice: (choice.bits, choice.name))
    colours: dict[Choice | None, str] = {**dict(zip(narrow_first, width_colours(len(narrow_first)), strict=True)),
                                         None: UNQUANTIZED}
    cells = {kind: [_cell(kind, block, row.get(block, ()), colours, widths) for block in range(widths.blocks)]
             for kind, row in widths.rows.items()}
    cells |= {name: [_cell(name, None, (choice,), colours, widths)] for name, choice in widths.ends.items()}
    used = [choice for choice in widths.choices if any(choice in cell for row in widths.rows.values()
                                                       for cell in row.values()) or choice in widths.ends.values()]
    legend = [(choice.name, colours[choice]) for choice in used]
    if plan.space.pinned and None in [pin.choice for pin in plan.space.pinned]:
        legend.append(("unquantized", UNQUANTIZED))
    return Section(legend=legend, cells=cells)


def _cell(kind: str, block: int | None, choices: Sequence[Choice | None], colours: dict[Choice | None, str],
          widths: WidthMap) -> Cell:
    """A block of a row; of several experts, their most frequent choice."""
    if not choices:
        return Cell()
    counts = Counter(choices)
    [(most, _)] = counts.most_common(1)
    said = ", ".join(f"{'unquantized' if choice is None else choice}" + (f" {count} times" if len(choices) > 1 else "")
                     for choice, count in counts.items())
    symbol = "" if most is None or len(widths.symbols[most]) > 1 or most.name != widths.symbols[most] else most.name
    return Cell(f"{kind}{'' if block is None else f', block {block}'}: {said}", symbol, colours[most],
                ink_on(colours[most]))


def ink_on(colour: str) -> str:
    """Black or white, whichever is readable on a colour ``#RRGGBB``."""
    red, green, blue = (int(colour[i:i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 127 else "#FFFFFF"


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(
        resources.files("impq_core.display").joinpath("view.html.jinja").read_text(encoding="utf-8"))
