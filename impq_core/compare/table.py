"""The table of a contest, for the terminal and the page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from impq_core.compare.contest import Contest, Contestant
from impq_core.compare.verdict import give_verdict
from impq_core.results import Row

HEADER = ("allocation", "MB", "bits", "forwards", "NLL", "minus best", "against references")

@dataclass(frozen=True)
class Line:
    """A line of the table.

    Args:
        cells: one for each column of ``HEADER``.
        kind: ``best`` (plan of its budget), ``plan`` or ``reference``.
        loses: whether a reference is significantly better than the plan.
    """

    cells: tuple[str, ...]
    kind: str
    loses: bool = False


def contest_lines(contest: Contest) -> dict[str, tuple[Line, ...]]:
    """By budget: the plans, the best first, then the references of the best plan."""
    return {budget: (*(_plan_line(contest, run) for run in runs),
                     *(_reference_line(runs[0], row) for row in runs[0].rivals.values()))
            for budget, runs in contest.budgets.items()}


def contest_title(contest: Contest) -> str:
    """Model and held-out text of a contest, in one line."""
    in_sequence = ", quantized in sequence" if contest.contestants[0].evaluation.sequential else ""
    return f"{model_name(contest)} on {contest.text}, {contest.tokens} scored tokens{in_sequence}"


def model_name(contest: Contest) -> str:
    """The model's name; of a path, its last part."""
    return Path(contest.model).name if Path(contest.model).is_absolute() else contest.model


def contest_table(contest: Contest) -> Table:
    """The table that ``impq compare`` prints for a contest."""
    # Text and not str: names given by users are not markup.
    table = Table(box=None, header_style="bold", pad_edge=False, title=Text(contest_title(contest)),
                  title_justify="left", title_style="bold", caption=Text(give_verdict(contest).sentence),
                  caption_justify="left", caption_style="bold")
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


def _plan_line(contest: Contest, run: Contestant) -> Line:
    behind = contest.behind_best(run)
    cells = (contest.label(run), _megabytes(run.plan), f"{run.bits_nominal:.2f}", f"{run.forwards:.1f}",
             _nll(run.plan), "best" if behind is None else str(behind), run.verdict)
    return Line(cells, "best" if behind is None else "plan", bool(run.losses))


def _reference_line(best: Contestant, row: Row) -> Line:
    return Line((row.name, _megabytes(row), "", "", _nll(row), str(row.minus(best.plan)), ""), "reference")


def _megabytes(row: Row) -> str:
    return "" if row.nbytes is None else f"{row.nbytes / 1e6:.3f}"


def _nll(row: Row) -> str:
    return f"{row.nll:.4f}" + ("" if math.isnan(row.stderr) else f" ± {row.stderr:.4f}")
