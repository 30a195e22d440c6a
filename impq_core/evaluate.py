"""Held-out evaluation of a plan and its references."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from impq_core.errors import ImpqError
from impq_core.keys import Key
from impq_core.ledger import Ledger
from impq_core.model.bank import Assignment, Bank
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.cache import Shelf
from impq_core.model.text import Windows
from impq_core.references import first_last_high, random_plan
from impq_core.results import Evaluation, Row, Score
from impq_core.space import Choice, LayerSpec
from impq_core.types import Plan

RANDOM_PLANS = 3
"""Number of random plans among the references."""


class ScoreLog(Ledger):
    """The log of held-out scores, by the widths of an allocation."""

    def __init__(self, path: Path, key: Key) -> None:
        super().__init__(path, "impq-scores/2", key)
        try:
            self.scores = {row["widths"]: Score.from_dict(row) for row in self.rows}
        except (KeyError, TypeError, ValueError) as error:
            self.close()
            raise ImpqError(f"{path} has a line that is no score ({type(error).__name__}: {error}): delete this file, "
                            "and the scores are measured again") from error

    def add(self, widths: str, score: Score) -> None:
        """Add a score and write it to the disk."""
        self.append({"widths": widths, **score.to_dict()})
        self.sync()
        self.scores[widths] = score


@dataclass(frozen=True, eq=False)
class KeptScores:
    """Scores of earlier runs on the same text, kept with the variants in the cache.

    Args:
        shelf: the shelf of the variants.
        digest: digest of the text's tokens.
        layers: the layers of the bank.
    """

    shelf: Shelf
    digest: str
    layers: Sequence[LayerSpec]

    def get(self, assignment: Assignment) -> Score | None:
        """The score of an allocation; None if no run has measured it."""
        data = self.shelf.recall(self._name(assignment))
        return Score.from_dict(data) if data else None

    def put(self, assignment: Assignment, score: Score) -> None:
        """Keep a score for other runs."""
        self.shelf.remember(self._name(assignment), score.to_dict())

    def _name(self, assignment: Assignment) -> str:
        """Name of an allocation's score, from the widths of its linears, which are the same at any granularity."""
        widths = sorted((linear.name, str(choice), choice.group_size if choice else 0)
                        for layer, choice in zip(self.layers, assignment, strict=True) for linear in layer.linears)
        return "score-" + hashlib.sha256(json.dumps([self.digest, widths]).encode()).hexdigest()[:20]


class Evaluator:
    """Scores allocations of a bank's layers on held-out windows, relative to the unquantized model.

    Args:
        runner: the model.
        bank: its variants.
        windows: the held-out text.
        log: scores are written to it before they are returned, and earlier ones are read from it.
        kept: scores of other runs are read from it, and new ones are written to it.
    """

    def __init__(self, runner: BlockwiseModel, bank: Bank, windows: Windows, log: ScoreLog | None = None,
                 kept: KeptScores | None = None) -> None:
        self._runner, self._bank, self._ids, self._log, self._kept = runner, bank, windows.ids, log, kept
        self._embedded = runner.embed(windows.ids)
        self._layers_of_block = [[i for i, layer in enumerate(bank.layers) if layer.block == b]
                                 for b in range(len(runner))]
        self._scores: dict[str, Score] = log.scores if log else {}
        # Computed while the model has its unquantized weights, unless every score may be in the log or the cache.
        self._reference = None if self._scores or kept else self._run([None] * len(bank.layers))

    def _run(self, assignment: Assignment) -> list[Any]:
        def switch(block: int) -> None:
            for layer in self._layers_of_block[block]:
                self._bank.switch(layer, assignment[layer])
        return self._runner.run_all(self._embedded, switch)

    def score(self, assignment: Assignment) -> Score:
        """Score an allocation, once.

        The unquantized model's logits are computed again from its last hidden states, which take thousands of times
        less memory than logits.
        """
        key = " ".join(f"{choice}/{choice.group_size}" if choice else "-" for choice in assignment)
        if key not in self._scores:
            kept_score = self._kept.get(assignment) if self._kept else None
            score = kept_score or self._measure(assignment)
            if self._kept and not kept_score:
                self._kept.put(assignment, score)
            if self._log:
                self._log.add(key, score)
            self._scores[key] = score
        return self._scores[key]

    def _measure(self, assignment: Assignment) -> Score:
        if self._reference is None:
            self._reference = self._run([None] * len(assignment))
        comparison = self._runner.compare(self._run(assignment), self._ids, self._reference)
        return Score(comparison.nll.mean(axis=1), float(comparison.kl.mean()), float(comparison.agree.mean()))


def evaluate_plan(evaluator: Evaluator, plan: Plan, between: Sequence[tuple[Choice, int]], windows: Windows, seed: int,
                  progress: Callable[[int, int], None]) -> Evaluation:
    """Score a plan and its references: the unquantized model, every uniform width, first/last-high, random plans, and
    straight lines between uniform models at the plan's bytes.

    Args:
        evaluator: the evaluator of the model.
        plan: the plan.
        between: choices between the widest and the narrowest that are not on the plan's menu, each with the bytes of
            the uniform model at that choice.
        windows: the evaluator's windows.
        seed: seed of the random plans.
        progress: called with the number of scored allocations and the number of all allocations.
    """
    space = plan.space
    allocations: list[tuple[str, int | None, Assignment]] = [("plan", plan.nbytes, space.assignment(plan.pick))]
    allocations.append(("unquantized", None, [None] * len(space.everyone)))
    pinned = [pin.choice for pin in space.pinned]
    uniform = [(choice, space.bytes_of(space.uniform(k))) for k, choice in enumerate(space.choices)]
    uniform = sorted([*uniform, *between], reverse=True)
    allocations += [(f"uniform {choice}", nbytes, [choice] * len(space) + pinned) for choice, nbytes in uniform]
    references = [("first/last high", first_last_high(space, plan.budget_bytes))]
    references += [(f"random {i + 1}", random_plan(space, plan.budget_bytes, np.random.default_rng([seed, i])))
                   for i in range(RANDOM_PLANS)]
    allocations += [(name, space.bytes_of(pick), space.assignment(pick)) for name, pick in references]
    progress(0, len(allocations))
    rows = []
    for name, nbytes, assignment in allocations:
        score = evaluator.score(assignment)
        row = Row(name, score.window_nll, nbytes, score=score)
        if nbytes is not None:
            row = replace(row, bits_nominal=space.nominal_bits(nbytes), bits_stored=space.bits_per_weight(nbytes))
        rows.append(row)
        progress(len(rows), len(allocations))
    return Evaluation(tuple(rows), str(windows), windows.scored_tokens).with_lines()

