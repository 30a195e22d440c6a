"""The table of plans on the page: a row for each plan, and the models it is compared with below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from impq_core.compare.contest import Contest, Contestant
from impq_core.compare.uniform import UniformLine
from impq_core.compare.verdict import equal_loss
from impq_core.results import Row
from impq_core.window_losses import Difference

AGAINST = {"line": "minus uniform", "first/last": "minus first/last high", "random": "minus best random"}
"""Columns of differences, by kind of reference."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: its text.
        outcome: ``wins``, ``ties`` or ``loses`` of a difference, ``best`` of the name of a budget's best plan, or
            empty.
        note: a second line; empty for none.
    """

    text: str
    outcome: str = ""
    note: str = ""


@dataclass(frozen=True)
class PlanTable:
    """The table.

    Args:
        header: names of the columns.
        plans: cells of each plan, the smallest budget first, in a budget the best plan first.
        references: cells of the unquantized model, of uniform models and of mixes, with as many columns.
        note: how to read it.
    """

    header: tuple[str, ...]
    plans: tuple[tuple[Cell, ...], ...]
    references: tuple[tuple[Cell, ...], ...]
    note: str


def plan_table(contest: Contest) -> PlanTable:
    """The table of a contest. Columns in which no plan has anything are left out."""
    several = len(contest.contestants) > len(contest.budgets)
    columns: dict[str, dict[Contestant | Row, Cell]] = {}

    def put(column: str, line: Contestant | Row, text: str, outcome: str = "") -> None:
        columns.setdefault(column, {})[line] = Cell(text, outcome)

    ordered = contest.ordered
    for run in ordered:
        put("plan", run, contest.name(run), "best" if several and contest.behind_best(run) is None else "")
        put("MB", run, megabytes(run.plan.nbytes))
        for kind, name in AGAINST.items():
            if (gap := run.gaps.get(kind)) is not None:
                outcome = "loses" if kind in run.losses else "ties" if kind in run.ties else "wins"
                put(name, run, _difference(gap), outcome)
            if kind == "line" and (equal := equal_loss(run)) is not None:
                error = "" if math.isnan(equal.saved_stderr) else f" ± {100 * equal.saved_stderr:.1f}"
                sign = {"above": "≥ ", "below": "≤ ", "": ""}[equal.bound]
                put("smaller at equal loss", run, f"{sign}{100 * equal.saved:.1f}{error} %")
        if several:
            behind = contest.behind_best(run)
            put("minus best", run, "best" if behind is None else _difference(behind))
        put("above unquantized", run, _difference(run.plan.minus(run.unquantized)))
        put("NLL", run, f"{run.plan.nll:.3f}")
        if run.plan.score is not None and math.isfinite(run.plan.score.kl):
            put("KL", run, f"{run.plan.score.kl:.3f}")
        put("bits", run, f"{run.bits_nominal:.2f}")
    if len({run.forwards for run in ordered}) > 1:
        for run in ordered:
            put("forwards", run, f"{run.forwards:.1f}")
    references = _references(contest)
    for row, run in references.items():
        put("plan", row, row.name)
        put("MB", row, megabytes(row.nbytes))
        if row.bits_nominal is not None and math.isfinite(row.bits_nominal):
            put("bits", row, f"{row.bits_nominal:.2f}")
        put("NLL", row, f"{row.nll:.3f}")
        if row.name != "unquantized":
            put("above unquantized", row, _difference(row.minus(run.unquantized)))
        if row.score is not None and math.isfinite(row.score.kl):
            put("KL", row, f"{row.score.kl:.3f}")

    def cells(line: Contestant | Row) -> tuple[Cell, ...]:
        return tuple(column.get(line, Cell("")) for column in columns.values())

    return PlanTable(tuple(columns), tuple(map(cells, ordered)), tuple(map(cells, references)), _note(ordered))


def _references(contest: Contest) -> dict[Row, Contestant]:
    """The unquantized model, and distinct uniform models and mixes, the largest first; each with a run that has it."""
    best = contest.contestants[0]
    found: dict[tuple[str, int | None, float], tuple[Row, Contestant]] = {}
    for run in contest.contestants:
        for row in run.evaluation.rows:
            if row.kind in ("uniform", "mix") and row.nbytes:
                found.setdefault((row.name, row.nbytes, row.nll), (row, run))
    rows = sorted(found.values(), key=lambda item: -(item[0].nbytes or 0))
    return {best.unquantized: best, **dict(rows)}


def _note(runs: Sequence[Contestant]) -> str:
    error = runs[0].unquantized.stderr
    shared = "" if math.isnan(error) else f" (± {error:.3f} for the text itself, which all rows share)"
    sizes = "" if not any(UniformLine.of(run.evaluation) for run in runs) else (
        " Uniform: the line between uniform models at the plan's bytes; smaller at equal loss: than a point of that "
        "line with the plan's loss.")
    return (f"NLL in nats per token{shared}. Differences ± standard errors are paired over windows; a difference of up "
            f"to two is a tie.{sizes} MB: stored bytes of the quantized weights, scales and zeros included; bits: "
            "nominal average.")


def megabytes(nbytes: int | None) -> str:
    """Bytes in megabytes; nothing if they are unknown."""
    return "" if nbytes is None else f"{nbytes / 1e6:.2f}" if nbytes >= 1e6 else f"{nbytes / 1e6:.3f}"


def _difference(gap: Difference) -> str:
    return f"{gap.mean:+.3f}" + ("" if math.isnan(gap.stderr) else f" ± {gap.stderr:.3f}")
