"""Finished runs beside each other: only what was scored on the same windows of the same text is ever compared."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from impq_core.config import RunConfig
from impq_core.space import FloatArray
from impq_core.types import SensitivityEstimate

RIVALS = ("line", "first/last", "random")
"""Kinds of references that a plan has to beat at its own size."""


@dataclass(frozen=True)
class Difference:
    """A difference of two NLLs on the same windows, nats per token, and its standard error paired over windows (NaN
    where it is not known)."""

    mean: float
    stderr: float

    @property
    def unsigned(self) -> str:
        """Its amount, whichever way it goes."""
        return f"{abs(self.mean):.4f}{self._error}"

    @property
    def seen(self) -> bool:
        """Whether it is more than two of its standard errors, or one that is not known."""
        return self.mean != 0 and not abs(self.mean) <= 2 * self.stderr

    @property
    def _error(self) -> str:
        return "" if math.isnan(self.stderr) else f" ± {self.stderr:.4f}"

    def __str__(self) -> str:
        return f"{self.mean:+.4f}{self._error}"


@dataclass(frozen=True, eq=False)
class Scored:
    """A line of an evaluation: an allocation, its stored bytes (None: unquantized), its NLL in nats per token, and that
    of each window (None where it was interpolated between models whose windows are not known)."""

    name: str
    nbytes: int | None
    nll: float
    window_nll: FloatArray | None = None

    @property
    def stderr(self) -> float:
        """Standard error of ``nll`` over windows; NaN where it is not known."""
        return math.nan if self.window_nll is None else _stderr(self.window_nll)

    @property
    def kind(self) -> str:
        """What sort of allocation it is, however many there are of it: plan, unquantized, uniform, line, first/last,
        random."""
        return self.name.partition(" ")[0]

    def minus(self, other: Scored) -> Difference:
        """This NLL minus another on the same windows."""
        if self.window_nll is None or other.window_nll is None:
            return Difference(self.nll - other.nll, math.nan)
        with np.errstate(invalid="ignore"):  # infinite losses have no difference
            return Difference(self.nll - other.nll, _stderr(self.window_nll - other.window_nll))


@dataclass(frozen=True, eq=False)
class Contestant:
    """A finished run.

    Args:
        folder: where it is.
        config: what it was asked to do.
        text, tokens: what it was scored on, and how many tokens were scored.
        rows: its evaluation, the plan first.
        budget_bytes: what the plan had to fit in.
        bits_nominal: the plan's nominal average width, bits a weight.
        widths: bits of every layer in model order; None where it stays unquantized.
        forwards: cost of the search in full-model forwards.
        measured: whether losses were measured, which a surrogate was then fitted to.
        estimate: what the plan was made from; None where it was given.
        convergence: float64 (2, K), forwards spent and the mean standard error of the Shapley values by then, nats per
            token; K is 0 where the run tells nothing of that.
        provenance: digests and versions, as the run wrote them.
    """

    folder: Path
    config: RunConfig
    text: str
    tokens: int
    rows: tuple[Scored, ...]
    budget_bytes: int
    bits_nominal: float
    widths: Mapping[str, float | None]
    forwards: float
    measured: bool
    estimate: SensitivityEstimate | None
    convergence: FloatArray
    provenance: Mapping[str, Any]

    @property
    def plan(self) -> Scored:
        """The plan's score."""
        return self.rows[0]

    @property
    def unquantized(self) -> Scored:
        """The unquantized model's score."""
        return next(row for row in self.rows if row.name == "unquantized")

    @property
    def budget(self) -> str:
        """The budget as it was asked for: bytes differ between backends, this does not. A share is one of a menu's
        widest width, so it is named with it; a plan that was given answers to its own nominal width."""
        if self.config.plan or not self.config.budget:
            return f"{round(self.bits_nominal, 1):g}bits"
        widest = max(self.config.bits, default=0)
        return self.config.budget + (f" of {widest:g} bits" if self.config.budget.endswith("%") else "")

    @property
    def parts(self) -> tuple[str, ...]:
        """What the run was made of, each in a word or two; empty where it does not apply."""
        c = self.config
        measured = f", measured with {c.estimate_with}" if c.estimate_with else ""
        search = ("plan given", "", "") if c.plan else (c.estimator, c.surrogate if self.measured else "", c.allocator)
        return (*search, f"{c.backend}{measured}", c.granularity, "/".join(f"{b:g}" for b in sorted(c.bits)) + " bits",
                f"refined {c.refine} by {c.refiner}" if c.refine else "unrefined", f"value {c.value}", f"seed {c.seed}")

    @property
    def rivals(self) -> dict[str, Scored]:
        """The best reference of each kind: the line between uniform models, first/last, random."""
        known = {kind: [row for row in self.rows if row.kind == kind and not math.isnan(row.nll)] for kind in RIVALS}
        return {kind: min(rows, key=lambda row: row.nll) for kind, rows in known.items() if rows}

    @property
    def gaps(self) -> dict[str, Difference]:
        """The plan's NLL minus the best reference's of each kind; above zero it loses."""
        return {kind: self.plan.minus(rival) for kind, rival in self.rivals.items()}

    @property
    def losses(self) -> dict[str, Difference]:
        """The gaps to what is seen to be better than the plan; one whose NLL is no number is worse than anything."""
        return {kind: gap for kind, gap in self.gaps.items() if not gap.mean <= 0 and gap.seen}

    @property
    def verdict(self) -> str:
        """Whether the search was worth it: whom the plan loses to or ties with, or by how much at least it beats
        all."""
        if self.losses:
            return "LOSES to " + ", ".join(f"{kind} by {gap.unsigned}" for kind, gap in self.losses.items())
        if not self.gaps:
            return "no reference"
        if ties := {kind: gap for kind, gap in self.gaps.items() if not gap.seen}:
            return "ties with " + ", ".join(f"{kind} ({gap})" for kind, gap in ties.items())
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
        """The held-out text."""
        return self.contestants[0].text

    @property
    def tokens(self) -> int:
        """How many of its tokens were scored."""
        return self.contestants[0].tokens

    @cached_property
    def budgets(self) -> dict[str, tuple[Contestant, ...]]:
        """The contestants of each budget, the best first; the smallest budget first."""
        found: dict[str, list[Contestant]] = {}
        for one in sorted(self.contestants, key=lambda one: one.budget_bytes):
            found.setdefault(one.budget, []).append(one)
        return {budget: tuple(sorted(those, key=lambda one: (math.isnan(one.plan.nll), one.plan.nll)))
                for budget, those in found.items()}

    @cached_property
    def labels(self) -> dict[Path, str]:
        """A name for each contestant by its folder: its estimator and whatever else differs between contestants; the
        folder too where that leaves two of one budget alike."""
        columns = list(zip(*(one.parts for one in self.contestants), strict=True))
        telling = [number for number, column in enumerate(columns) if number == 0 or len({*column} - {""}) > 1]
        short = {one.folder: ", ".join(one.parts[number] for number in telling if one.parts[number])
                 for one in self.contestants}
        for those in self.budgets.values():
            names = [short[one.folder] for one in those]
            short |= {one.folder: f"{name} ({one.folder.name})" for one, name in zip(those, names, strict=True)
                      if names.count(name) > 1}
        return short

    def label(self, one: Contestant) -> str:
        """The name of a contestant."""
        return self.labels[one.folder]

    def behind_best(self, one: Contestant) -> Difference | None:
        """A plan's NLL minus that of the best plan of its budget; None for the best itself."""
        best = self.budgets[one.budget][0]
        return None if one is best else one.plan.minus(best.plan)


def block_of(layer: str) -> int:
    """The block a layer's name tells of: its first number. A plan's file names pinned layers last, and this sorts them
    in."""
    number = re.search(r"(?<![^.])\d+(?![^.])", layer)
    return int(number[0]) if number else -1


def _stderr(values: FloatArray) -> float:
    known = len(values) > 1 and np.isfinite(values).all()
    return float(values.std(ddof=1) / math.sqrt(len(values))) if known else math.nan
