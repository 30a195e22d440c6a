"""Measured plans in one form for every benchmark: a line of JSON each, on disk before the next plan is measured.

Plans of different benchmarks can be compared where their ``problem`` is the same: the same model, variants and held-out
windows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from common import model_name
from lines import Lines, read_lines
from uniform_line import line

from impq_core.errors import ImpqError
from impq_core.model.device import hardware
from impq_core.results import Score
from impq_core.runs.prepare import Prepared
from impq_core.space import FloatArray
from impq_core.types import Plan

UNIFORM = "uniform"
"""Method of the uniform models, whose ``budget`` is their width."""

UNQUANTIZED = "unquantized"
"""Method of the unquantized model."""

LINE = "line of uniform models"


@dataclass(frozen=True)
class PlanRow:
    """A plan, what it cost to make, and its held-out losses.

    Args:
        model: name of the model.
        backend: of the plan's variants.
        variants: digest of what decides the variants beside model and backend: see ``variants_of``.
        menu: names of the choices, widest first.
        granularity: ``block``, ``group``, ``expert`` or ``linear``.
        budget: in nominal bits.
        budget_bytes: the same in bytes.
        nbytes: stored bytes of the quantizable weights under the plan.
        text: digest of the tokens of the held-out windows.
        method: what made the plan, in words.
        seed: number of the calibration text, or of the random draw.
        forwards: cost of the estimate, in forwards of ``tokens`` calibration tokens.
        tokens: scored tokens of the game's windows.
        nll: (windows,) mean negative log-likelihood of each held-out window, nats per token.
        kl: (windows,) mean divergence from the unquantized model, nats per token; empty if it was not measured.
        widths: the choice of each linear, in alphabetical order of their names, by its place in ``menu``; empty if it
            is not on the menu or unknown.
        shown: the held-out windows in words.
        machine: processor or accelerator, and the versions of impq and torch.
        made: date of the measurement.
        read: digest of the calibration tokens that the search read; empty if it read none.
        tasks: the value of each document by task and metric, such as ``continuation acc``; empty if none was asked.
    """

    model: str
    backend: str
    variants: str
    menu: tuple[str, ...]
    granularity: str
    budget: float
    budget_bytes: int
    nbytes: int
    text: str
    method: str
    seed: int
    forwards: float
    tokens: int
    nll: FloatArray
    kl: FloatArray
    widths: tuple[int, ...] = ()
    shown: str = ""
    machine: str = ""
    made: str = field(default_factory=lambda: date.today().isoformat())
    read: str = ""
    tasks: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: Mapping[str, Any], plan: Plan, score: Score, budget: float, method: str, seed: int = 0,
           forwards: float = 0.0) -> PlanRow:
        """The row of a scored plan.

        Args:
            facts: of ``problem_of``, and ``read``.
            plan: the plan.
            score: its score on the problem's held-out windows.
            budget, method, seed, forwards: see ``PlanRow``.
        """
        menu = [choice.name for choice in plan.space.choices]
        widths = [choice.name if choice else "" for _, choice in sorted(plan.widths().items())]
        known = all(width in menu for width in widths)
        return cls(**facts, budget=budget, budget_bytes=plan.budget_bytes, nbytes=plan.nbytes, method=method, seed=seed,
                   forwards=forwards, nll=score.window_nll,
                   kl=np.zeros(0) if score.window_kl is None else score.window_kl,
                   widths=tuple(menu.index(width) for width in widths) if known else ())

    @property
    def problem(self) -> tuple[Any, ...]:
        """What plans must have in common to be compared window by window."""
        return self.model, self.backend, self.variants, self.text

    @property
    def identity(self) -> tuple[Any, ...]:
        """What is measured once."""
        return (*self.problem, self.menu, self.granularity, self.tokens, self.read, self.method, self.seed, self.budget)

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = {**asdict(self), "nll": self.nll.tolist(), "kl": self.kl.tolist()}
        return {**data, "widths": "".join(map(str, self.widths))} if len(self.menu) < 10 else data

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> PlanRow:
        """Read the data of ``to_data``; raises KeyError, TypeError or ValueError if it is something else."""
        known = {each.name for each in fields(cls)}
        return cls(**{**{name: value for name, value in data.items() if name in known}, "menu": tuple(data["menu"]),
                      "nll": np.array(data["nll"], float), "kl": np.array(data["kl"], float),
                      "widths": tuple(map(int, data.get("widths", ())))})


def problem_of(prepared: Prepared, calibration_tokens: int, name: str = "") -> dict[str, Any]:
    """The fields of a row that all plans of a prepared run share.

    Args:
        prepared: the run.
        calibration_tokens: scored tokens of a forward, the unit of costs.
        name: of the model; by default that of its folder, and ``SmolLM2-135M`` for the demo.
    """
    config = prepared.config
    return {"model": name or model_name(config.model), "backend": config.backend, "variants": variants_of(prepared),
            "menu": tuple(choice.name for choice in prepared.space.choices),
            "granularity": prepared.parts.granularity, "text": prepared.evaluation.digest,
            "shown": str(prepared.evaluation), "tokens": calibration_tokens,
            "machine": f"{hardware(prepared.device)}, impq {version('impq')}, torch {version('torch')}"}


def variants_of(prepared: Prepared) -> str:
    """Digest of what decides the deployed variants: the model's files, options and group sizes of the backend, the
    calibration tokens if it reads them, the type of the forwards and the hardware. Versions of software are left out:
    a row names the one of torch."""
    backend, config = prepared.parts.backend, prepared.config
    read = prepared.calibration.token_digest if backend.needs and prepared.calibration else ""
    groups = sorted(f"{choice.name}/{choice.group_size}" for choice in prepared.space.choices[:1])
    facts = [prepared.source.digest, hardware(prepared.device), config.backend,
             sorted(backend.variant_options().items()), groups if backend.needs else [], read,
             config.dtype, config.quantize_embeddings, sorted(config.exclude)]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:12]


class Kept:
    """A file of rows that one process appends to.

    Args:
        path: of ``Lines``.

    Raises:
        ImpqError: a line is no row.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lines = path, Lines(path)
        self._rows = {row.identity: row for row in read_rows([path])}

    @property
    def rows(self) -> list[PlanRow]:
        """The rows; of those with the same identity the last."""
        return list(self._rows.values())

    def missing(self, facts: Mapping[str, Any], method: str, seed: int, budgets: Sequence[float]) -> list[float]:
        """The budgets at which a method has no row.

        Args:
            facts: of ``problem_of``, and ``read``.
            method, seed, budgets: see ``PlanRow``.
        """
        alike = [facts[name] for name in ("model", "backend", "variants", "text", "menu", "granularity", "tokens")]
        alike.append(facts.get("read", ""))
        return [budget for budget in budgets if (*alike, method, seed, budget) not in self._rows]

    def add(self, rows: Iterable[PlanRow]) -> None:
        """Append rows and write them to the disk."""
        rows = list(rows)
        self._lines.add(*(row.to_data() for row in rows))
        self._rows |= {row.identity: row for row in rows}


@dataclass(frozen=True)
class Problem:
    """Rows that can be compared: of one model, backend, set of variants and held-out text.

    Args:
        rows: uniform models, the unquantized one, and plans.
        title: model and backend, and what differs from other problems of the same ones.
    """

    rows: Sequence[PlanRow]
    title: str = ""

    @property
    def short(self) -> str:
        """The title without the model."""
        return self.title.removeprefix(f"{self.rows[0].model}, ")

    @cached_property
    def uniforms(self) -> list[PlanRow]:
        """The uniform models, one of each size, from small to large."""
        found = {row.nbytes: row for row in self.rows if row.method == UNIFORM}
        return [found[nbytes] for nbytes in sorted(found)]

    @cached_property
    def unquantized(self) -> PlanRow | None:
        """The unquantized model; None if it was not measured."""
        return next((row for row in self.rows if row.method == UNQUANTIZED), None)

    @cached_property
    def plans(self) -> list[PlanRow]:
        """The rows of plans. Of those that differ in the text that their search read alone, the last, so that a seed
        counts once."""
        found = {replace(row, read="").identity: row for row in self.rows if row.method not in (UNIFORM, UNQUANTIZED)}
        return [*found.values()]

    @cached_property
    def unit(self) -> int:
        """Scored tokens of the forwards that costs are shown in: the fewest of any method."""
        return min(row.tokens for row in self.plans)

    @cached_property
    def methods(self) -> dict[tuple[float, str, str], list[PlanRow]]:
        """The plans by nominal bits, method and granularity, a row for each seed. A method's name has the tokens that
        it reads and its menu, unless all plans of the problem have the same."""
        menus = {row.menu for row in self.plans}
        found: dict[tuple[float, str, str], list[PlanRow]] = {}
        for row in self.plans:
            name = row.method + (f" on {row.tokens:,} tokens" if row.tokens != self.unit else "")
            name += f", menu {','.join(row.menu)}" if len(menus) > 1 else ""
            found.setdefault((row.budget, name, row.granularity), []).append(row)
        return found

    def line(self, nbytes: int, kl: bool = False) -> FloatArray | None:
        """Losses (windows,) on the line of uniform models, see ``line_at``; None outside of it, or if not all uniform
        models have a divergence."""
        if kl and not all(len(row.kl) for row in self.uniforms):
            return None
        try:
            return line_at(self.uniforms, nbytes, kl)
        except ImpqError:
            return None


SomeProblem = TypeVar("SomeProblem", bound=Problem)


def problems(rows: Iterable[PlanRow], kind: type[SomeProblem], apart: Sequence[str] = ()) -> list[SomeProblem]:
    """The problems that have plans.

    Args:
        rows: of any problems.
        kind: the class of a problem.
        apart: fields of ``PlanRow`` in which rows of one problem must not differ either.
    """
    groups: dict[tuple[object, ...], list[PlanRow]] = {}
    for row in rows:
        groups.setdefault((*row.problem, *(getattr(row, name) for name in apart)), []).append(row)
    found = {key: group for key, group in groups.items() if kind(group).plans}
    return [kind(group, title) for group, title in zip(found.values(), _titles(list(found.values())), strict=True)]


def _titles(groups: Sequence[Sequence[PlanRow]]) -> list[str]:
    """A title for each group of rows: model and backend; of groups that share these, also what tells them apart."""
    facts: list[Callable[[PlanRow], str]] = [
        lambda row: f"{row.model}, {row.backend}", lambda row: row.shown, lambda row: row.machine,
        lambda row: f"menu {','.join(row.menu)}", lambda row: row.granularity, lambda row: f"{row.tokens:,} tokens",
        lambda row: f"text {row.text}", lambda row: f"variants {row.variants}"]
    titles = [""] * len(groups)
    for fact in facts:
        words = [each(map(fact, group)) for group in groups]
        alike = {title: {word for word, other in zip(words, titles, strict=True) if other == title} for title in titles}
        titles = [f"{title}, {word}" if title and len(alike[title]) > 1 else title or word
                  for title, word in zip(titles, words, strict=True)]
    return titles


def each(values: Iterable[object]) -> str:
    """Different values in words."""
    return "; ".join(dict.fromkeys(map(str, values)))


def measured_on(rows: Iterable[PlanRow]) -> str:
    """The machines and dates of rows, for a page's heading."""
    rows = list(rows)
    return (f"rows measured on {' and on '.join(dict.fromkeys(row.machine for row in rows))}, "
            f"{each(sorted({row.made for row in rows}))}")


def read_rows(paths: Sequence[Path]) -> list[PlanRow]:
    """The rows of files; of rows with the same identity the last. A missing file has none, and an incomplete last line
    is left out.

    Raises:
        ImpqError: a line is no row.
    """
    rows: dict[tuple[Any, ...], PlanRow] = {}
    for path in paths:
        for number, data in enumerate(read_lines(path), start=1):
            try:
                row = PlanRow.of_data(data)
            except (KeyError, TypeError, ValueError) as error:
                raise ImpqError(f"{path}, line {number} is no measured plan ({type(error).__name__}: {error}): delete "
                                "the line") from error
            rows[row.identity] = row
    return list(rows.values())


def read_all(kept: Path, others: Sequence[Path]) -> list[PlanRow]:
    """The rows of a benchmark's own file and of others; raises ImpqError if there are none, or another is missing."""
    for path in others:
        if not path.is_file():
            raise ImpqError(f"--rows {path}: there is no such file")
    rows = read_rows([kept, *others])
    if not rows:
        raise ImpqError(f"{kept} has no rows: leave out --report, and they are measured")
    return rows


def line_at(uniforms: Sequence[PlanRow], nbytes: int, kl: bool = False) -> FloatArray:
    """Losses (windows,) on the straight line between the uniform models of neighbouring sizes, nats per token.

    Args:
        uniforms: rows of uniform models of one problem.
        nbytes: the size.
        kl: the divergences in place of the likelihoods.

    Raises:
        ImpqError: the size lies outside those of the uniform models, or there are none.
    """
    return line([row.nbytes for row in uniforms], [row.kl if kl else row.nll for row in uniforms], nbytes)
