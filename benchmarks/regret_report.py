"""The table and the picture of regret.py, from kept rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import fill

import numpy as np
from common import command, heading, plus_minus, table
from rows import LINE, UNIFORM, PlanRow, Problem, each, measured_on, problems
from task_columns import task_table

from impq_core.space import FloatArray
from impq_core.statistics import standard_error

SIGNS = "osv^"
"""Markers; with ten colours each, enough for forty methods."""

FILLS = ("full", "none", "left", "bottom")
PANELS = 4
"""Most budgets of a problem that are drawn; the table has all."""

LEAST_FORWARDS = 0.5
"""Where methods without a forward are drawn."""


@dataclass(frozen=True)
class Entry:
    """A method at one budget, over its seeds.

    Args:
        method: its name in ``Problem.methods``.
        granularity: of its plans.
        forwards: mean cost, in forwards of the problem's unit.
        nll: (windows,) mean over seeds, nats per token.
        spread: standard deviation over seeds; None for one seed.
    """

    method: str
    granularity: str
    forwards: float
    nll: FloatArray
    spread: float | None

    @property
    def key(self) -> tuple[str, str]:
        return self.method, self.granularity


@dataclass(frozen=True)
class Compared(Problem):
    """The rows of a problem, by budgets in bytes."""

    @cached_property
    def budgets(self) -> dict[int, float]:
        """Nominal bits of each budget in bytes, from small to large."""
        found = {row.budget_bytes: row.budget for row in self.plans}
        return dict(sorted(found.items()))

    @property
    def drawn(self) -> dict[int, float]:
        """The budgets in the picture, spread evenly."""
        every = list(self.budgets.items())
        places = np.linspace(0, len(every) - 1, min(PANELS, len(every))).round().astype(int)
        return dict(every[i] for i in dict.fromkeys(places))

    def best(self, nbytes: int) -> PlanRow:
        """The plan of least loss within a budget, uniform models among them."""
        found = best_within([*self.plans, *self.uniforms], nbytes)
        assert found is not None
        return found

    def entries(self, nbytes: int) -> list[Entry]:
        """The methods that have a plan at a budget."""
        return [Entry(method, granularity, float(np.mean([row.forwards * row.tokens for row in rows])) / self.unit,
                      np.mean([row.nll for row in rows], axis=0),
                      float(np.std([row.nll.mean() for row in rows], ddof=1)) if len(rows) > 1 else None)
                for (_, method, granularity), rows in self.methods.items() if rows[0].budget_bytes == nbytes]


def best_within(rows: Iterable[PlanRow], nbytes: int) -> PlanRow | None:
    """The row of least mean loss among those of at most that many bytes; None if there is none."""
    return min((row for row in rows if row.nbytes <= nbytes), key=lambda row: float(row.nll.mean()), default=None)


def report(rows: Sequence[PlanRow]) -> list[str]:
    """The page."""
    lines = [*heading("Regret: the distance of every method to the best plan that anything found", command(),
                      measured_on(rows)),
             "Regret is a method's held-out NLL minus that of the best known plan of at most the budget's bytes, nats "
             "per token, with its standard error paired over the held-out windows. The best plan is chosen on the same "
             "windows, which favours it: a method within two errors of it may be as good. Costs do not contain the "
             "calibration of the variants. The line of uniform models is no plan; where its regret is negative, no "
             "known plan is as good as a mixture of two uniform models would be. A plan that starts "
             "from another one has the costs of both. `--estimator NAME` adds a method.", "",
             "![Regret over cost](regret.png)", ""]
    for problem in problems(rows, Compared):
        lines += [f"## {problem.title}", "", *about(problem), *best_plans(problem), *regrets(problem),
                  *task_table(problem)]
    return lines


def about(problem: Compared) -> list[str]:
    return [f"Held-out text: {each(row.shown for row in problem.rows)}. Forwards are of {problem.unit:,} scored "
            f"calibration tokens. Measured {each(sorted({r.made for r in problem.rows}))} on "
            f"{each(row.machine for row in problem.rows)}.", ""]


def best_plans(problem: Compared) -> list[str]:
    """The best plan of each budget."""
    cells = []
    for nbytes, budget in problem.budgets.items():
        best, line = problem.best(nbytes), problem.line(nbytes)
        apart = None if line is None else best.nll - line
        cells.append([f"{budget:g}", f"{nbytes:,}", f"{best.nbytes:,}", found_by(best),
                      f"{best.forwards:.0f}", plus_minus(float(best.nll.mean()), standard_error(best.nll)),
                      f"{best.kl.mean():.3f}" if len(best.kl) else "",
                      "" if apart is None else plus_minus(float(apart.mean()), standard_error(apart), sign=True)])
    return ["The best plan of each budget:", "", *table(
        ["bits", "budget, bytes", "its bytes", "found by", "forwards", "NLL", "KL", "minus the line of uniforms"],
        cells)]


def found_by(row: PlanRow) -> str:
    """The method of a row in words."""
    return f"{UNIFORM} {row.budget:g}" if row.method == UNIFORM else f"{row.method}, {row.granularity}"


def regrets(problem: Compared) -> list[str]:
    """The table of regrets, the least mean first; methods that lack a budget come last."""
    found: dict[tuple[str, str], dict[int, Entry]] = {}
    for nbytes in problem.budgets:
        for entry in problem.entries(nbytes):
            found.setdefault(entry.key, {})[nbytes] = entry
    cells = []
    for (method, granularity), entries in found.items():
        values = {nbytes: entry.nll - problem.best(nbytes).nll for nbytes, entry in entries.items()}
        row = [method, granularity, f"{np.mean([entry.forwards for entry in entries.values()]):.0f}"]
        for nbytes in problem.budgets:
            if nbytes not in values:
                row.append("")
                continue
            spread = entries[nbytes].spread
            row.append(plus_minus(float(values[nbytes].mean()), standard_error(values[nbytes]))
                       + ("" if spread is None else f" (sd of seeds {spread:.3f})"))
        mean = float(np.mean([value.mean() for value in values.values()]))
        cells.append((len(values) < len(problem.budgets), mean, [*row, f"{mean:.3f}"]))
    lines = {nbytes: line - problem.best(nbytes).nll for nbytes in problem.budgets
             if (line := problem.line(nbytes)) is not None}
    if lines:
        mean = float(np.mean([value.mean() for value in lines.values()]))
        cells.append((len(lines) < len(problem.budgets), mean, [
            LINE, "", "0", *(plus_minus(float(lines[n].mean()), standard_error(lines[n])) if n in lines else ""
                             for n in problem.budgets), f"{mean:.3f}"]))
    return ["Regret:", "", *table(
        ["method", "layers", "forwards", *(f"{bits:g} bits" for bits in problem.budgets.values()), "mean"],
        [row for *_, row in sorted(cells, key=lambda cell: cell[:2])])]


def draw(rows: Sequence[PlanRow], path: Path) -> None:
    """Draw regret against forwards: a row of panels for each problem, a panel for each budget, a colour and a marker
    for each method, filled by granularity."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    found = problems(rows, Compared)
    if not found:
        return
    width = max(len(problem.drawn) for problem in found)
    figure = Figure(figsize=(4.2 * width + 2.6, 3.8 * len(found)), layout="constrained", dpi=110)
    names = list(dict.fromkeys(entry.method for problem in found for nbytes in problem.drawn
                               for entry in problem.entries(nbytes)))
    signs = {name: (SIGNS[i // 10 % 4], f"C{i % 10}") for i, name in enumerate(names)}
    sizes = dict(zip(dict.fromkeys(row.granularity for p in found for row in p.plans), FILLS, strict=False))
    panels = figure.subplots(len(found), width, squeeze=False)
    for line, problem in zip(panels, found, strict=True):
        for axes in line[len(problem.drawn):]:
            axes.set_visible(False)
        for axes, (nbytes, budget) in zip(line, problem.drawn.items(), strict=False):
            best = problem.best(nbytes).nll
            for entry in problem.entries(nbytes):
                regret = entry.nll - best
                sign, colour = signs[entry.method]
                axes.errorbar(max(entry.forwards, LEAST_FORWARDS), regret.mean(), standard_error(regret), fmt=sign,
                              color=colour, fillstyle=sizes[entry.granularity], markersize=6, linewidth=1)
            if (uniform := problem.line(nbytes)) is not None:
                axes.axhline((uniform - best).mean(), color="0.6", linestyle="--", linewidth=1)
            axes.axhline(0.0, color="black", linewidth=1)
            axes.set(xscale="log", xlabel="cost, forwards", ylabel="regret, nats per token")
            axes.set_title(fill(f"{problem.title}, {budget:g} bits", 52), fontsize=9)
            axes.set_yscale("symlog", linthresh=0.1)
    handles = [Line2D([], [], marker=sign, color=colour, linestyle="", label=name)
               for name, (sign, colour) in signs.items()]
    handles += [Line2D([], [], marker="D", color="0.3", fillstyle=style, linestyle="", label=size)
                for size, style in sizes.items()]
    handles += [Line2D([], [], color="0.6", linestyle="--", label=LINE),
                Line2D([], [], color="black", label="best known plan")]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
