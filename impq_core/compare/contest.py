"""Comparison of finished runs: only runs that were scored on the same windows of the same text are compared."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from impq_core.config import RunConfig
from impq_core.paired_answers import AnswerTable
from impq_core.results import Evaluation, Row
from impq_core.space import Choice, FloatArray, in_bits, narrowest_first
from impq_core.task_scores import TaskTable
from impq_core.types import SensitivityEstimate
from impq_core.window_losses import Difference

ALIKE = 0.005
"""Largest difference in bytes, relative, of a given plan and a plan that it is compared with at the same budget."""

RIVALS = ("line", "first/last", "random")
"""Kinds of references that a plan has to beat at its own size."""


@dataclass(frozen=True, eq=False)
class Contestant:
    """A finished run.

    Args:
        folder: its run folder.
        config: its configuration.
        evaluation: its plan and references on held-out text.
        budget_bytes: the budget of the plan, bytes.
        bits_nominal: the plan's nominal average width, bits per weight.
        widths: choice of every layer in model order; None for a layer that stays unquantized.
        forwards: cost of the search in full-model forwards.
        measured: whether a surrogate was fitted to measured losses.
        estimate: the estimate that the plan was made from; None if the plan was given.
        convergence: float64 (2, K): forwards spent, and the mean standard error of the Shapley values at that point,
            nats per token. K is 0 if the run played no whole permutations.
        provenance: digests and versions as the run wrote them.
        tasks: scores on tasks, if the run was evaluated on some.
        answers: answers to prompts, if the run was asked some.
    """

    folder: Path
    config: RunConfig
    evaluation: Evaluation
    budget_bytes: int
    bits_nominal: float
    widths: Mapping[str, Choice | None]
    forwards: float
    measured: bool
    estimate: SensitivityEstimate | None
    convergence: FloatArray
    provenance: Mapping[str, Any]
    tasks: TaskTable
    answers: AnswerTable

    @property
    def plan(self) -> Row:
        """The plan's row of the evaluation."""
        return self.evaluation.rows[0]

    @property
    def unquantized(self) -> Row:
        """The unquantized model's row of the evaluation."""
        return self.evaluation.row("unquantized")

    @property
    def has_ends(self) -> bool:
        """Whether embedding or head have a width."""
        return any(not 0 <= block_of(name) < math.inf for name, choice in self.widths.items() if choice)

    @property
    def budget(self) -> str:
        """The budget as configured, because bytes differ between backends. A percentage is relative to the widest width
        of the menu, so that width is added; the budget of a given plan is its own nominal width. A budget for the whole
        file, or for embeddings too, is another one."""
        embeddings = " with embeddings" * self.has_ends
        if self.config.plan or not self.config.budget:
            return f"{round(self.bits_nominal, 1):g}bits{embeddings}"
        if self.config.whole:
            return f"{self.config.budget} for the file"
        widest = next(reversed(narrowest_first(self.config.bits)), "")
        return (self.config.budget + (f" of {in_bits(widest)}" if self.config.budget.endswith("%") else "")
                + embeddings)

    @property
    def parts(self) -> tuple[str, ...]:
        """Components and settings of the run, a word or two each; empty for a component that was not used."""
        c = self.config
        measured = f", measured with {c.estimate_with}" if c.estimate_with else ""
        search = (c.estimator, c.surrogate if self.measured else "", c.allocator)
        if c.plan:
            search = (f"given {Path(c.plan).name}", "", "")
        return (*search, f"{c.backend}{measured}", c.granularity, in_bits(*narrowest_first(c.bits)),
                f"refined {c.refine} by {c.refiner}" if c.refine else "unrefined", f"value {c.value}", f"seed {c.seed}")

    @property
    def rivals(self) -> dict[str, Row]:
        """The best reference of each kind in ``RIVALS``; a reference whose NLL is NaN is left out."""
        rows = {kind: [row for row in self.evaluation.rows if row.kind == kind and not math.isnan(row.nll)]
                for kind in RIVALS}
        return {kind: min(candidates, key=lambda row: row.nll) for kind, candidates in rows.items() if candidates}

    @property
    def gaps(self) -> dict[str, Difference]:
        """The plan's NLL minus that of the best reference of each kind; the plan loses if it is above zero."""
        return {kind: self.plan.minus(rival) for kind, rival in self.rivals.items()}

    @property
    def losses(self) -> dict[str, Difference]:
        """The gaps to references that are significantly better than the plan; a plan whose NLL is NaN loses to all."""
        return {kind: gap for kind, gap in self.gaps.items() if not gap.mean <= 0 and gap.significant}

    @property
    def ties(self) -> dict[str, Difference]:
        """The gaps to references that differ from the plan by no more than two standard errors."""
        return {kind: gap for kind, gap in self.gaps.items() if not gap.significant}

    @property
    def outcome(self) -> str:
        """``loses`` if a reference is significantly better than the plan, else ``ties`` if one is not significantly
        worse, else ``wins``; empty if there is no reference."""
        return "loses" if self.losses else "ties" if self.ties else "wins" if self.gaps else ""

    @property
    def verdict(self) -> str:
        """The uniform model that the plan is, if it is one; the references that the plan loses to; else those that it
        ties with; else its smallest lead."""
        is_uniform = f"is {self.evaluation.plan_is}; " if self.evaluation.plan_is else ""
        return is_uniform + self._against_rivals

    @property
    def _against_rivals(self) -> str:
        if self.losses:
            return "LOSES to " + ", ".join(f"{kind} by {gap.unsigned}" for kind, gap in self.losses.items())
        if not self.gaps:
            return "no reference"
        if self.ties:
            return "ties with " + ", ".join(f"{kind} ({gap})" for kind, gap in self.ties.items())
        return f"beats all by ≥ {max(self.gaps.values(), key=lambda gap: gap.mean).unsigned}"


@dataclass(frozen=True, eq=False)
class Contest:
    """Runs of one model that were scored on the same windows of one text."""

    contestants: tuple[Contestant, ...]

    @property
    def model(self) -> str:
        """The model's name or folder."""
        return self.contestants[0].config.model

    @property
    def text(self) -> str:
        """Description of the held-out text."""
        return self.contestants[0].evaluation.text

    @property
    def tokens(self) -> int:
        """Scored tokens of the held-out text."""
        return self.contestants[0].evaluation.tokens

    @cached_property
    def _budget_of(self) -> dict[Path, str]:
        """The budget of each contestant by its folder. A given plan stands beside the plan that a run made of the same
        layers and as many bytes, the nearest within ``ALIKE``, whatever that run's budget was called."""
        sizes = {run.folder: run.plan.nbytes or 0 for run in self.contestants}
        found = {run.folder: run.budget for run in self.contestants}
        for run in self.contestants:
            near = [(abs(sizes[other.folder] - sizes[run.folder]), other.budget != run.budget, other.budget)
                    for other in self.contestants if not other.config.plan and other.has_ends == run.has_ends]
            if run.config.plan and near and min(near)[0] <= ALIKE * sizes[run.folder]:
                found[run.folder] = min(near)[2]
        return found

    def budget_of(self, run: Contestant) -> str:
        """The budget that a contestant is compared at."""
        return self._budget_of[run.folder]

    @cached_property
    def budgets(self) -> dict[str, tuple[Contestant, ...]]:
        """The contestants of each budget, the best first; the smallest budget first."""
        groups: dict[str, list[Contestant]] = {}
        for run in sorted(self.contestants, key=lambda run: run.budget_bytes):
            groups.setdefault(self.budget_of(run), []).append(run)
        return {budget: tuple(sorted(runs, key=lambda run: (math.isnan(run.plan.nll), run.plan.nll)))
                for budget, runs in groups.items()}

    @cached_property
    def labels(self) -> dict[Path, str]:
        """A name for each contestant by its folder: its estimator and all parts that differ between contestants, and
        the folder's name if two contestants of one budget are still alike."""
        columns = list(zip(*(run.parts for run in self.contestants), strict=True))
        shown = [number for number, column in enumerate(columns) if number == 0 or len({*column} - {""}) > 1]
        labels = {run.folder: ", ".join(run.parts[number] for number in shown if run.parts[number])
                  for run in self.contestants}
        for runs in self.budgets.values():
            names = [labels[run.folder] for run in runs]
            labels |= {run.folder: f"{name} ({run.folder.name})" for run, name in zip(runs, names, strict=True)
                       if names.count(name) > 1}
        return labels

    @property
    def shared(self) -> tuple[str, ...]:
        """Components and settings that all contestants have."""
        columns = zip(*(run.parts for run in self.contestants), strict=True)
        return tuple(column[0] for column in columns if column[0] and len(set(column)) == 1)

    @property
    def ordered(self) -> tuple[Contestant, ...]:
        """The contestants by budget, the best of each first."""
        return tuple(run for runs in self.budgets.values() for run in runs)

    def label(self, run: Contestant) -> str:
        """The name of a contestant, which may be that of contestants of other budgets too."""
        return self.labels[run.folder]

    def name(self, run: Contestant) -> str:
        """The budget of a contestant, and its name unless all contestants have the same."""
        budget = self.budget_of(run)
        return budget if len(set(self.labels.values())) == 1 else f"{budget}: {self.label(run)}"

    def behind_best(self, run: Contestant) -> Difference | None:
        """A plan's NLL minus that of the best plan of its budget; None for the best itself."""
        best = self.budgets[self.budget_of(run)][0]
        return None if run is best else run.plan.minus(best.plan)


def block_of(layer: str) -> float:
    """The block that a layer belongs to: the first number in its name; -1 for an embedding, and infinity for a head.
    Plan files name pinned layers last; sorting by block restores the model's order."""
    number = re.search(r"(?<![^.])\d+(?![^.])", layer)
    if number:
        return int(number[0])
    return -1 if re.search("emb|wte", layer) else math.inf
