"""The tables of paper.py, from kept rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from common import command, heading, plus_minus, table
from rows import LINE, PlanRow, Problem, each, measured_on, problems
from task_columns import task_table

from impq_core.space import FloatArray
from impq_core.statistics import standard_error

BINS = ((2.0, 2.5), (2.5, 3.0), (3.0, 3.5), (3.5, 4.0))
"""Bins of average bits, open on the left."""

PUBLISHED = {
    "Llama-3.1-8B": ((1210, 307), (133, 53.0), (45.0, 28.8), (19.1, 14.6)),
    "Llama-3.2-3B": ((1340, 363), (164, 73.0), (55.6, 33.9), (23.6, 17.1)),
    "Gemma-2-9B": ((190, 48.5), (47.8, 26.3), (25.0, 22.1), (16.8, 22.0)),
}
"""The paper's Table 1, GPTQ, WikiText-2 validation perplexity: the best baseline and CoopQ in each bin."""

PAPERS_BASELINES = ("Z-score, more outliers", "LIM", "LLM-MQ", "Activation")
DRAWN = ("random",)
"""Methods for which a seed is a random draw, and no calibration text."""


@dataclass(frozen=True)
class Section(Problem):
    """The rows of a problem, by method and budget."""

    @cached_property
    def of_budget(self) -> dict[tuple[str, float], list[PlanRow]]:
        """The plans of each method and budget, one for each seed."""
        return {(method, budget): rows for (budget, method, _), rows in self.methods.items()}

    @cached_property
    def budgets(self) -> list[float]:
        return sorted({budget for _, budget in self.of_budget})

    @cached_property
    def names(self) -> list[str]:
        """The methods: references and baselines, CoopQ measured with Quanto and as deployed, then others."""
        names = dict.fromkeys(method for method, _ in self.of_budget)
        return sorted(names, key=place)

    @property
    def coopq(self) -> list[str]:
        """CoopQ's methods of the most permutations: measured with Quanto, then as deployed."""
        most = {kind_of(name): name for name in self.names if name.startswith("CoopQ")}
        return list(most.values())

    @property
    def shown(self) -> list[str]:
        """The methods, CoopQ's with the most permutations only."""
        return [name for name in self.names if not name.startswith("CoopQ") or name in self.coopq]

    def losses(self, method: str, budget: float) -> FloatArray | None:
        """NLL (windows,), the mean over seeds, or that of the line of uniform models at the bytes of the largest plan;
        None if the method has no plan at the budget."""
        if method == LINE:
            return self.line(max(row.nbytes for row in self.plans if row.budget == budget))
        rows = self.of_budget.get((method, budget))
        return None if rows is None else np.mean([row.nll for row in rows], axis=0)

    def over_line(self, method: str, budget: float) -> FloatArray | None:
        """NLL (windows,) minus the line of uniform models at each plan's own bytes, the mean over seeds."""
        rows = self.of_budget.get((method, budget))
        lines = [self.line(row.nbytes) for row in rows or ()]
        return None if rows is None or any(line is None for line in lines) else np.mean(
            [row.nll - line for row, line in zip(rows, lines, strict=True)], axis=0)

    def of_bin(self, method: str, ends: tuple[float, float]) -> FloatArray | None:
        """NLL (windows,), the mean over the budgets of a bin; None if the method lacks one of them."""
        return self._mean(self.losses, method, ends)

    def over_line_of_bin(self, method: str, ends: tuple[float, float]) -> FloatArray | None:
        """``over_line``, the mean over the budgets of a bin; None as ``of_bin``."""
        return self._mean(self.over_line, method, ends)

    def _mean(self, value: Callable[[str, float], FloatArray | None], method: str,
              ends: tuple[float, float]) -> FloatArray | None:
        found = [value(method, budget) for budget in self.budgets if ends[0] < budget <= ends[1]]
        return None if not found or any(each is None for each in found) else np.mean(found, axis=0)

    def perplexity(self, method: str, ends: tuple[float, float]) -> float | None:
        """Mean of the perplexities of the plans in a bin, as in the paper; None as ``of_bin``."""
        if self.of_bin(method, ends) is None:
            return None
        budgets = [budget for budget in self.budgets if ends[0] < budget <= ends[1]]
        if method == LINE:
            values = [losses.mean() for budget in budgets if (losses := self.losses(LINE, budget)) is not None]
        else:
            values = [row.nll.mean() for budget in budgets for row in self.of_budget[method, budget]]
        return float(np.mean(np.exp(values)))


def place(method: str) -> tuple[int, str, int]:
    """Where a method stands among others; methods of one group stay in the order of the rows."""
    if method.startswith("CoopQ"):
        return 1, "" if method.endswith("Quanto") else "deployed", permutations_of(method)
    return (2 if method.startswith("impq") else 0), "", 0


def kind_of(method: str) -> str:
    """Returns the part of the name of a CoopQ method that says what it was measured with."""
    return method.rpartition(", ")[2]


def permutations_of(method: str) -> int:
    """The number of permutations of one of CoopQ's methods."""
    return int(method.split(" ")[1])


def report(rows: Sequence[PlanRow]) -> list[str]:
    """The page."""
    sections = [section for section in problems(rows, Section, ("menu", "granularity", "tokens"))
                if section.uniforms]
    lines = [*heading("CoopQ's protocol: its measurement, its baselines and its budgets", command(),
                      measured_on(rows)), *method_of(rows)]
    for model in dict.fromkeys(section.rows[0].model for section in sections):
        mine = [section for section in sections if section.rows[0].model == model]
        lines += [f"## {model}", "", *table_1(mine)]
    lines += [*claims(sections), *gains(sections), *numbers_of_permutations(sections)]
    for section in sections:
        lines += [f"## {section.title}: every budget", "", *every_budget(section), *machines(section),
                  *task_table(section)]
    return lines


def machines(section: Section) -> list[str]:
    """Which rows were measured on another machine than most; nothing if none were."""
    places: dict[str, list[PlanRow]] = {}
    for row in section.rows:
        places.setdefault(row.machine, []).append(row)
    most, *others = sorted(places, key=lambda machine: -len(places[machine]))
    return [line for machine in others for line in (
        f"{len(places[machine])} rows were measured on {machine}, with variants made there, the others on {most}: "
        f"{each(row.method for row in places[machine])}.", "")]


def method_of(rows: Sequence[PlanRow]) -> list[str]:
    return [
        "The players are decoder blocks at 2 or 4 bits. CoopQ (arXiv 2509.15455) is SPQE without antithetic orders, "
        "every order on the same calibration windows, the covariance surrogate with alpha 0.5, and the quadratic "
        "program; *measured with Quanto* is the paper's protocol, *measured as deployed* plays the game with the "
        "variants that the plan is made of. Baselines rank blocks; the most important ones keep 4 bits. Z-score is "
        "shown in both directions: CoopQ says that more outlying weights make a block more important, the original "
        "paper says fewer. All plans of a column have the same budget in bytes, and the line of uniform models "
        "joins all widths that the backend has from 2 to 4; its row is at the bytes of the largest plan of a budget, "
        "and differences to it are at the bytes of each plan.", "",
        f"Every estimator reads {each(sorted({row.tokens for row in rows}))} scored calibration tokens. Held-out text: "
        f"{each(row.shown for row in rows)}. Errors are standard errors of differences paired over windows.", ""]


def table_1(sections: Sequence[Section]) -> list[str]:
    """The paper's Table 1: mean perplexity of the plans in each bin of average bits."""
    header = ["method", *(f"{section.short} {shown(ends)}" for section in sections for ends in BINS)]
    names = [*sorted(dict.fromkeys(name for section in sections for name in section.shown), key=place), LINE]
    least = {(i, ends): min((value for name in section.shown
                             if (value := section.perplexity(name, ends)) is not None), default=math.nan)
             for i, section in enumerate(sections) for ends in BINS}
    cells = []
    for name in names:
        row = [name]
        for i, section in enumerate(sections):
            for ends in BINS:
                value = section.perplexity(name, ends)
                text = "" if value is None else rounded(value)
                row.append(f"**{text}**" if value is not None and value == least[i, ends] else text)
        cells.append(row)
    unquantized = next((section.unquantized for section in sections if section.unquantized), None)
    note = f"; unquantized {rounded(float(np.exp(unquantized.nll.mean())))}" if unquantized else ""
    return [f"Perplexity, the mean over the plans in a bin of average bits, as in the paper's Table 1{note}. The least "
            "of the plans is bold.", "", *table(header, cells)]


def claims(sections: Sequence[Section]) -> list[str]:
    """CoopQ minus the best baseline, paired, beside the paper's numbers."""
    rows = []
    won = tied = cells_counted = 0
    for section in sections:
        for name in section.coopq:
            cells = []
            for ends in BINS:
                ours = section.of_bin(name, ends)
                others = {method: losses for method in PAPERS_BASELINES
                          if (losses := section.of_bin(method, ends)) is not None}
                if ours is None or not others:
                    cells.append("")
                    continue
                best = min(others, key=lambda method: others[method].mean())
                apart = ours - others[best]
                cells_counted += 1
                won += bool(apart.mean() < 0)
                tied += not apart.any()
                cells.append(f"{plus_minus(float(apart.mean()), standard_error(apart), sign=True)} ({best})")
            rows.append([f"{section.title}: {name}", *cells])
    for model, cells in PUBLISHED.items():
        rows.append([f"{model}, GPTQ, as published", *(f"{math.log(ours / best):+.3f}" for best, ours in cells)])
    return ["## Against the best baseline", "",
            "NLL of CoopQ minus that of the best of the paper's four baselines in the bin (named in brackets), nats "
            "per token, the mean over the plans in the bin. The published rows are the logarithms of the paper's "
            "ratios of mean perplexities; their errors are not published.", "",
            *table(["", *map(shown, BINS)], rows),
            f"CoopQ has the lower loss in {won} of {cells_counted} cells here, and the same plans in {tied}; in the "
            "paper it has the lower one in 67 of 72.", ""]


def gains(sections: Sequence[Section]) -> list[str]:
    """Returns the lines with the differences between CoopQ's two measurements, and between each of them and the
    references of its bytes."""
    rows = []
    below = compared = 0
    for section in sections:
        names = section.coopq
        pairs: list[tuple[str, str, str]] = []
        if len(names) == 2:
            pairs.append((f"{names[1]}, minus {names[0]}", names[1], names[0]))
        pairs += [(f"{name}, minus {reference}", name, reference)
                  for name in names for reference in (LINE, "random", "first/last high")]
        for label, one, other in pairs:
            cells = []
            for ends in BINS:
                losses, reference = section.of_bin(one, ends), section.of_bin(other, ends)
                apart = None if losses is None or reference is None else losses - reference
                if other == LINE:
                    apart = section.over_line_of_bin(one, ends)
                if apart is not None and other == LINE:
                    compared += 1
                    below += bool(apart.mean() < 0)
                cells.append("" if apart is None else plus_minus(
                    float(apart.mean()), standard_error(apart), sign=True))
            rows.append([f"{section.title}: {label}", *cells])
    return ["## Against references of the same bytes", "",
            "NLL of CoopQ's plans minus that of others, nats per token, the mean over the plans in the bin; negative "
            "is better.", "", *table(["", *map(shown, BINS)], rows),
            f"CoopQ's plans lie below the line of uniform models in {below} of {compared} cells.", ""]


def numbers_of_permutations(sections: Sequence[Section]) -> list[str]:
    """Mean losses by the number of permutations, as in the paper's Table 2."""
    counts = sorted({permutations_of(name) for section in sections for name in section.names
                     if name.startswith("CoopQ")})
    rows = []
    for section in sections:
        for kind in dict.fromkeys(kind_of(name) for name in section.coopq):
            cells = []
            for count in counts:
                name = f"CoopQ, {count} permutations, {kind}"
                losses = [found for budget in section.budgets if (found := section.losses(name, budget)) is not None]
                cells.append(f"{np.mean(losses):.3f}" if len(losses) == len(section.budgets) else "")
            rows.append([f"{section.title}: {kind}", *cells])
    return ["## Number of permutations", "",
            "NLL, the mean over all budgets. The paper's Table 2 has mean perplexities of 19.78k for 10 permutations, "
            "19.22k for 50 and 19.26k for 100: no gain beyond 50, and 3 % from 10 to 50.", "",
            *table(["", *(f"{count} permutations" for count in counts)], rows)]


def every_budget(section: Section) -> list[str]:
    """NLL at every budget, and its distance to the line of uniform models."""
    cells = []
    costs: Mapping[str, float] = {row.method: row.forwards for row in section.rows}
    for name in (*section.names, LINE):
        row = [name, f"{costs[name]:.0f}" if name in costs else ""]
        for budget in section.budgets:
            losses, apart = section.losses(name, budget), section.over_line(name, budget)
            if losses is None:
                row.append("")
            elif apart is None:
                row.append(f"{losses.mean():.3f}")
            else:
                plans = section.of_budget[name, budget]
                spread = np.std([plan.nll.mean() for plan in plans], ddof=1) if len(plans) > 1 else None
                what = "draws" if name in DRAWN else "texts"
                row.append(f"{losses.mean():.3f} ({plus_minus(float(apart.mean()), standard_error(apart), sign=True)}"
                           + ("" if spread is None else f"; sd of {len(plans)} {what} {spread:.3f}") + ")")
        cells.append(row)
    return ["NLL, nats per token; in brackets minus the line of uniform models at the plan's bytes. Forwards are of "
            "the calibration windows, and do not contain the calibration of the variants.", "",
            *table(["method", "forwards", *(f"{budget:g} bits" for budget in section.budgets)], cells)]


def shown(ends: tuple[float, float]) -> str:
    """A bin in words."""
    return f"{ends[0]:g}-{ends[1]:g} b"


def rounded(value: float) -> str:
    """Three digits, as in the paper."""
    return f"{value:.3g}" if value < 1000 else f"{value:.2e}" if value >= 1e5 else f"{value:.0f}"
