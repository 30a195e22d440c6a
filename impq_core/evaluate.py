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


class ScoreLog(Ledger):
    """Held-out scores of allocations."""

    def __init__(self, path: Path, key: Key) -> None:
        super().__init__(path, "impq-scores/2", key)
        try:
            self.scores = {row["widths"]: Score.from_dict(row) for row in self.rows}
        except (KeyError, TypeError, ValueError) as error:
            self.close()
            raise ImpqError(f"{path} holds a line that is no score ({type(error).__name__}: {error})") from error

    def add(self, widths: str, score: Score) -> None:
        """Add a score; it is on the disk when this returns."""
        self.append({"widths": widths, **score.to_dict()})
        self.sync()
        self.scores[widths] = score


@dataclass(frozen=True, eq=False)
class KeptScores:
    """Scores of earlier runs on the same text, beside the variants they are scores of.

    Args:
        shelf: of the variants.
        digest: of the text's tokens.
        layers: of the bank.
    """

    shelf: Shelf
    digest: str
    layers: Sequence[LayerSpec]

    def get(self, assignment: Assignment) -> Score | None:
        """The score of an allocation; None where no run has measured it."""
        found = self.shelf.recall(self._name(assignment))
        return Score.from_dict(found) if found else None

    def put(self, assignment: Assignment, score: Score) -> None:
        """Keep a score for other runs."""
        self.shelf.remember(self._name(assignment), score.to_dict())

    def _name(self, assignment: Assignment) -> str:
        """By linears, which are the same at any granularity."""
        widths = sorted((linear.name, str(choice), choice.group_size if choice else 0)
                        for layer, choice in zip(self.layers, assignment, strict=True) for linear in layer.linears)
        return "score-" + hashlib.sha256(json.dumps([self.digest, widths]).encode()).hexdigest()[:20]


class Evaluator:
    """Scores allocations of a bank's layers on held-out windows, against the unquantized model.

    Args:
        runner: the model.
        bank: its variants.
        windows: held-out text.
        log: where scores go before they are returned, and where earlier ones come from.
        kept: where those of other runs come from and go to.
    """

    def __init__(self, runner: BlockwiseModel, bank: Bank, windows: Windows, log: ScoreLog | None = None,
                 kept: KeptScores | None = None) -> None:
        self._runner, self._bank, self._ids, self._log, self._kept = runner, bank, windows.ids, log, kept
        self._embedded = runner.embed(windows.ids)
        self._layers_of_block = [[i for i, layer in enumerate(bank.layers) if layer.block == b]
                                 for b in range(len(runner))]
        self._scores: dict[str, Score] = log.scores if log else {}
        # Made now, while the model is what it was loaded as, unless all that will be asked for may be known already.
        self._reference = None if self._scores or kept else self._run([None] * len(bank.layers))

    def _run(self, assignment: Assignment) -> list[Any]:
        def switch(block: int) -> None:
            for layer in self._layers_of_block[block]:
                self._bank.switch(layer, assignment[layer])
        return self._runner.run_all(self._embedded, switch)

    def score(self, assignment: Assignment) -> Score:
        """Score an allocation; the reference's logits are made again from its last hidden states, which cost
        thousands of times less memory than the logits would. An allocation is scored once."""
        key = " ".join(f"{choice}/{choice.group_size}" if choice else "-" for choice in assignment)
        if key not in self._scores:
            known = self._kept.get(assignment) if self._kept else None
            score = known or self._measure(assignment)
            if self._kept and not known:
                self._kept.put(assignment, score)
            if self._log:
                self._log.add(key, score)
            self._scores[key] = score
        return self._scores[key]

    def _measure(self, assignment: Assignment) -> Score:
        if self._reference is None:
            self._reference = self._run([None] * len(assignment))
        told = self._runner.compare(self._run(assignment), self._ids, self._reference)
        return Score(told.nll.mean(axis=1), float(told.kl.mean()), float(told.agree.mean()))


def evaluate_plan(evaluator: Evaluator, plan: Plan, between: Sequence[tuple[Choice, int]], windows: Windows, seed: int,
                  progress: Callable[[int, int], None]) -> Evaluation:
    """Score a plan beside the unquantized model, every uniform width, first/last-high, random plans, and the straight
    lines between uniform models at the plan's bytes.

    Args:
        evaluator: holds the model.
        plan: the plan.
        between: choices that lie between the plan's widest and narrowest without being on its menu, with the bytes of
            a model that is uniformly so.
        windows: what the evaluator scores on.
        seed: of the random plans.
        progress: told (allocations scored, allocations).
    """
    space = plan.space
    todo: list[tuple[str, int | None, Assignment]] = [("plan", plan.nbytes, space.assignment(plan.pick))]
    todo.append(("unquantized", None, [None] * len(space.everyone)))
    pinned = [pin.choice for pin in space.pinned]
    uniform = [(choice, space.bytes_of(space.uniform(k))) for k, choice in enumerate(space.choices)]
    uniform = sorted([*uniform, *between], reverse=True)
    todo += [(f"uniform {choice}", nbytes, [choice] * len(space) + pinned) for choice, nbytes in uniform]
    references = [("first/last high", first_last_high(space, plan.budget_bytes))]
    references += [(f"random {i + 1}", random_plan(space, plan.budget_bytes, np.random.default_rng([seed, i])))
                   for i in range(RANDOM_PLANS)]
    todo += [(name, space.bytes_of(pick), space.assignment(pick)) for name, pick in references]
    progress(0, len(todo))
    rows = []
    for name, nbytes, assignment in todo:
        score = evaluator.score(assignment)
        row = Row(name, score.window_nll, nbytes, score=score)
        if nbytes is not None:
            row = replace(row, bits_nominal=space.nominal_bits(nbytes), bits_stored=space.bits_per_weight(nbytes))
        rows.append(row)
        progress(len(rows), len(todo))
    return Evaluation(tuple(rows), str(windows), windows.scored_tokens).with_lines()

