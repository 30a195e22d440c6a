"""Measured plans in one form for every benchmark: a line of JSON each, on disk before the next plan is measured.

Plans of different benchmarks can be compared where their ``problem`` is the same: the same model, variants and held-out
windows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from common import model_name

from impq_core.errors import ImpqError
from impq_core.model.device import hardware
from impq_core.results import Score
from impq_core.runs.prepare import Prepared
from impq_core.space import FloatArray
from impq_core.types import Plan

KEPT = Path(__file__).parent / "kept"
UNIFORM = "uniform"
"""Method of the uniform models, whose ``budget`` is their width."""


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
        machine: processor or accelerator, and the version of torch.
        made: date of the measurement.
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

    @classmethod
    def of(cls, facts: Mapping[str, Any], plan: Plan, score: Score, budget: float, method: str, seed: int = 0,
           forwards: float = 0.0) -> PlanRow:
        """The row of a scored plan.

        Args:
            facts: of ``problem_of``.
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
        return (*self.problem, self.menu, self.granularity, self.tokens, self.method, self.seed, self.budget)

    def to_json(self) -> str:
        """A line without its end."""
        data = {**asdict(self), "nll": self.nll.tolist(), "kl": self.kl.tolist()}
        return json.dumps({**data, "widths": "".join(map(str, self.widths))} if len(self.menu) < 10 else data)

    @classmethod
    def of_json(cls, line: str) -> PlanRow:
        """Read a line; raises KeyError, TypeError or ValueError if it is something else."""
        data = json.loads(line)
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
            "machine": f"{hardware(prepared.device)}, torch {version('torch')}"}


def variants_of(prepared: Prepared) -> str:
    """Digest of what decides the deployed variants: options and group sizes of the backend, the calibration tokens if
    it reads them, and the type of the forwards. Software and hardware are left out: they change the last bits only."""
    backend, config = prepared.parts.backend, prepared.config
    read = prepared.calibration.token_digest if backend.needs and prepared.calibration else ""
    groups = sorted(f"{choice.name}/{choice.group_size}" for choice in prepared.space.choices[:1])
    facts = [config.backend, sorted(backend.variant_options().items()), groups if backend.needs else [], read,
             config.dtype, config.quantize_embeddings, sorted(config.exclude)]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:12]


class Kept:
    """A file of rows that one process appends to.

    Args:
        path: the file; created with its folder if it is missing. A line that a killed process left incomplete is
            removed.

    Raises:
        ImpqError: a line is no row.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            data = path.read_bytes()
            if not data.endswith(b"\n"):
                os.truncate(path, data.rfind(b"\n") + 1)
        self.path, self.rows = path, read_rows([path])
        self._file = path.open("a", encoding="utf-8")

    def missing(self, facts: Mapping[str, Any], method: str, seed: int, budgets: Sequence[float]) -> list[float]:
        """The budgets at which a method has no row.

        Args:
            facts: of ``problem_of``.
            method, seed, budgets: see ``PlanRow``.
        """
        alike = [facts[name] for name in ("model", "backend", "variants", "text", "menu", "granularity", "tokens")]
        known = {row.identity for row in self.rows}
        return [budget for budget in budgets if (*alike, method, seed, budget) not in known]

    def add(self, rows: Iterable[PlanRow]) -> None:
        """Append rows and write them to the disk."""
        for row in rows:
            self._file.write(row.to_json() + "\n")
            self.rows.append(row)
        self._file.flush()
        os.fsync(self._file.fileno())


def read_rows(paths: Sequence[Path]) -> list[PlanRow]:
    """The rows of files; of rows with the same identity the last. A missing file has none, and an incomplete last line
    is left out.

    Raises:
        ImpqError: a line is no row.
    """
    rows: dict[tuple[Any, ...], PlanRow] = {}
    for path in paths:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for number, line in enumerate(text[:text.rfind("\n") + 1].splitlines(), start=1):
            try:
                row = PlanRow.of_json(line)
            except (KeyError, TypeError, ValueError) as error:
                raise ImpqError(f"{path}, line {number} is no measured plan ({type(error).__name__}: {error}): delete "
                                "the line") from error
            rows[row.identity] = row
    return list(rows.values())


def line_at(uniforms: Sequence[PlanRow], nbytes: int, kl: bool = False) -> FloatArray:
    """Losses (windows,) on the straight line between the uniform models of neighbouring sizes, nats per token.

    Args:
        uniforms: rows of uniform models of one problem.
        nbytes: the size.
        kl: the divergences in place of the likelihoods.

    Raises:
        ImpqError: the size lies outside those of the uniform models, or there are none.
    """
    ordered = sorted(uniforms, key=lambda row: row.nbytes)
    if not ordered or not ordered[0].nbytes <= nbytes <= ordered[-1].nbytes:
        raise ImpqError(f"no two uniform models enclose {nbytes} bytes: measure them first")
    sizes = [row.nbytes for row in ordered]
    losses = np.stack([row.kl if kl else row.nll for row in ordered], axis=1)
    return np.array([np.interp(nbytes, sizes, window) for window in losses])
