"""The table of a contest, for the terminal and for the page alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from impq_core.compare.contest import Contest, Contestant, Scored

HEADER = ("allocation", "MB", "bits", "forwards", "NLL", "minus best", "against references")

EXPLAINED = (
    "NLL in nats per token ± its standard error over windows. Differences are paired over the same windows, and so are "
    "their standard errors; 'minus best' is to the best plan of the budget. Every plan is held against the references "
    "of its own run: the line between uniform models at the plan's bytes, the first and last layers at the widest, and "
    "the best of the random plans. Below the plans are those of the best one. MB: stored bytes of the quantizable "
    "weights. bits: nominal average. forwards: full-model forwards the search took.")


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Args:
        cells: as ``HEADER``.
        kind: ``best`` plan of its budget, another ``plan``, or ``reference``.
        loses: whether a reference is better than the plan.
    """

    cells: tuple[str, ...]
    kind: str
    loses: bool = False


def contest_lines(contest: Contest) -> dict[str, tuple[Line, ...]]:
    """By budget: the plans, the best first, and the references of the best."""
    return {budget: (*(_plan_line(contest, one) for one in those),
                     *(_reference_line(those[0], row) for row in those[0].rivals.values()))
            for budget, those in contest.budgets.items()}


def contest_title(contest: Contest) -> str:
    """What the plans of a contest have in common, in a line."""
    return f"{model_name(contest)} on {contest.text}, {contest.tokens} scored tokens"


def model_name(contest: Contest) -> str:
    """The model's name; the last part of it where it is a folder's path."""
    return Path(contest.model).name if Path(contest.model).is_absolute() else contest.model


def contest_table(contest: Contest) -> Table:
    """What ``impq compare`` prints about a contest."""
    # Text and not str: what users name is no markup.
    table = Table(box=None, header_style="bold", pad_edge=False, title=Text(contest_title(contest)),
                  title_justify="left", title_style="bold")
    for name in HEADER:
        left = name in (HEADER[0], HEADER[-1])
        table.add_column(name, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    styles = {"best": "bold", "plan": "", "reference": "dim"}
    for budget, lines in contest_lines(contest).items():
        table.add_row(Text(f"budget {budget}", style="italic"))
        for line in lines:
            *cells, verdict = map(Text, line.cells)
            verdict.stylize("bold red" if line.loses else "green")
            table.add_row(*cells, verdict, style=styles[line.kind])
        table.add_section()
    return table


def _plan_line(contest: Contest, one: Contestant) -> Line:
    behind = contest.behind_best(one)
    cells = (contest.label(one), _megabytes(one.plan), f"{one.bits_nominal:.2f}", f"{one.forwards:.1f}",
             _nll(one.plan), "best" if behind is None else str(behind), one.verdict)
    return Line(cells, "best" if behind is None else "plan", bool(one.losses))


def _reference_line(best: Contestant, row: Scored) -> Line:
    return Line((row.name, _megabytes(row), "", "", _nll(row), str(row.minus(best.plan)), ""), "reference")


def _megabytes(row: Scored) -> str:
    return "" if row.nbytes is None else f"{row.nbytes / 1e6:.3f}"


def _nll(row: Scored) -> str:
    return f"{row.nll:.4f}" + ("" if math.isnan(row.stderr) else f" ± {row.stderr:.4f}")
