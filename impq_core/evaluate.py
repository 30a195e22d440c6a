"""Held-out evaluation of a plan and its references."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from impq_core.costs import Metering
from impq_core.errors import ImpqError
from impq_core.interfaces import CarryOut
from impq_core.keys import Key
from impq_core.ledger import Ledger
from impq_core.model.bank import Assignment, Bank
from impq_core.model.blockwise import BlockwiseModel, Comparison, Hidden
from impq_core.model.cache import Shelf
from impq_core.model.quantize import quantize_in_sequence
from impq_core.model.text import Windows
from impq_core.model.walk import Prefix, Walk
from impq_core.references import Mix, first_last_high, random_plan
from impq_core.results import Evaluation, Row, Score
from impq_core.space import Choice, IntArray, LayerSpec
from impq_core.types import Plan

Scores = tuple[Score, ...]
"""The scores of an allocation on each held-out text."""

HELD_OUT = "held out"
"""Name of the texts of the table, for workers."""

RANDOM_PLANS = 3
"""Number of random plans among the references."""


class ScoreLog(Ledger):
    """The log of held-out scores on each text, by the widths of an allocation."""

    def __init__(self, path: Path, key: Key) -> None:
        super().__init__(path, "impq-scores/2", key)
        try:
            self.scores = {row["widths"]: (Score.from_dict(row), *map(Score.from_dict, row.get("others", ())))
                           for row in self.rows}
        except (KeyError, TypeError, ValueError) as error:
            self.close()
            raise ImpqError(f"{path} has a line that is no score ({type(error).__name__}: {error}): delete this file, "
                            "and the scores are measured again") from error

    def add(self, widths: str, scores: Scores) -> None:
        """Add the scores of an allocation and write them to the disk."""
        others = {"others": [score.to_dict() for score in scores[1:]]} if scores[1:] else {}
        self.append({"widths": widths, **scores[0].to_dict(), **others})
        self.sync()
        self.scores[widths] = scores


@dataclass(frozen=True, eq=False)
class KeptScores:
    """Scores of earlier runs on the same texts, kept with the variants in the cache.

    Args:
        shelf: the shelf of the variants.
        digests: digests of the texts' tokens.
        layers: the layers of the bank.
        sequence: identity of how plans are quantized in sequence; empty if the shelf's variants are scored.
    """

    shelf: Shelf
    digests: Sequence[str]
    layers: Sequence[LayerSpec]
    sequence: str = ""

    def get(self, assignment: Assignment) -> Scores | None:
        """The scores of an allocation; None if one of them was not measured by any run."""
        found = [self.shelf.recall(name) for name in self._names(assignment)]
        # Versions before 0.6.0 kept no divergences of windows.
        complete = [Score.from_dict(data) for data in found if data and "window_kl" in data]
        return tuple(complete) if len(complete) == len(found) else None

    def put(self, assignment: Assignment, scores: Scores) -> None:
        """Keep scores for other runs."""
        for name, score in zip(self._names(assignment), scores, strict=True):
            self.shelf.remember(name, score.to_dict())

    def _names(self, assignment: Assignment) -> list[str]:
        """Names of an allocation's scores, from the widths of its linears, which are the same at any granularity."""
        widths = sorted((linear.name, str(choice), choice.group_size if choice else 0)
                        for layer, choice in zip(self.layers, assignment, strict=True) for linear in layer.linears)
        facts = [[digest, widths, *([self.sequence] if self.sequence else [])] for digest in self.digests]
        return ["score-" + hashlib.sha256(json.dumps(each).encode()).hexdigest()[:20] for each in facts]


class Evaluator:
    """Scores allocations of a bank's layers on held-out windows, relative to the unquantized model.

    Args:
        runner: the model.
        bank: its variants.
        texts: the held-out text, or several.
        log: scores are written to it before they are returned, and earlier ones are read from it.
        kept: scores of other runs are read from it, and new ones are written to it.
        carry_out: workers, which score allocations in tasks of kind ``score``.
        name: of the texts, for workers.

    Attributes:
        texts: the held-out texts.
    """

    def __init__(self, runner: BlockwiseModel, bank: Bank, texts: Windows | Sequence[Windows],
                 log: ScoreLog | None = None, kept: KeptScores | None = None,
                 carry_out: CarryOut | None = None, name: str = HELD_OUT) -> None:
        self._runner, self._bank, self._log, self._kept = runner, bank, log, kept
        self._carry_out, self._texts_name, self._linears = carry_out, name, False
        self.texts = (texts,) if isinstance(texts, Windows) else tuple(texts)
        self._walk, self._unquantized = Walk(runner, bank), [None] * len(bank.layers)
        self._scores: dict[str, Scores] = log.scores if log else {}
        # Computed while the model has its unquantized weights, unless every score may be in the log or the cache.
        self._reference = None if self._scores or kept or carry_out else self._outputs([self._unquantized])[0]

    def of_linears(self) -> Evaluator:
        """An evaluator of allocations with a choice for each linear of the layers, in their order. It has the same
        scores and log."""
        other = copy(self)
        other._bank, other._linears = self._bank.of_linears(self._runner), True
        other._walk, other._unquantized = Walk(self._runner, other._bank), [None] * len(other._bank.layers)
        other._kept = replace(self._kept, layers=other._bank.layers) if self._kept else None
        return other

    def of_bank(self, bank: Bank) -> Evaluator:
        """An evaluator of other variants of the same layers, beside the same outputs of the unquantized model. It has
        no scores and no log."""
        other = copy(self)
        other._bank, other._walk = bank, Walk(self._runner, bank)
        other._scores, other._log, other._kept, other._carry_out = {}, None, None, None
        return other

    def score(self, assignment: Assignment) -> Score:
        """Score an allocation on the first text, once."""
        return self.scores([assignment])[0]

    def scores(self, assignments: Sequence[Assignment],
               progress: Callable[[int, int], None] = lambda done, total: None) -> list[Score]:
        """As ``scores_of_texts``, on the first text."""
        return [scores[0] for scores in self.scores_of_texts(assignments, progress)]

    def scores_of_texts(self, assignments: Sequence[Assignment],
                        progress: Callable[[int, int], None] = lambda done, total: None) -> list[Scores]:
        """Score allocations on each text, each once, side by side as far as there is room for their hidden states.

        The unquantized model's logits are computed again from its last hidden states, which take thousands of times
        less memory than logits.

        Args:
            assignments: the allocations.
            progress: called with the number of scored allocations and the number of all allocations.
        """
        names = [_name(assignment) for assignment in assignments]
        new = [(name, assignment) for name, assignment in dict(zip(names, assignments, strict=True)).items()
               if name not in self._scores]
        if self._carry_out:
            self._share(dict(new), self._carry_out, lambda done: progress(len(names) - len(new) + done, len(names)))
            new = [(name, assignment) for name, assignment in new if name not in self._scores]
        side_by_side = self._side_by_side()
        for first in range(0, len(new), side_by_side):
            some = dict(new[first:first + side_by_side])
            done = sum(name in self._scores for name in names)

            def passed(block: int, done: int = done, count: int = len(some)) -> None:
                progress(done + count * (block + 1) // (len(self._runner) + 1), len(names))

            found = {name: self._kept.get(assignment) for name, assignment in some.items()} if self._kept else {}
            measured = self._measure({name: some[name] for name in some if not found.get(name)}, passed)
            for name in some:  # in this order, whatever was kept
                self._add(name, found.get(name) or measured[name])
        progress(len(names), len(names))
        return [self._scores[name] for name in names]

    def _add(self, name: str, scores: Scores) -> None:
        if self._log:
            self._log.add(name, scores)
        self._scores[name] = scores

    def _share(self, new: Mapping[str, Assignment], carry_out: CarryOut, progress: Callable[[int], None]) -> None:
        """Let workers score allocations that the cache does not have, one in each task."""
        tasks = [{"kind": "score", "texts": self._texts_name, "linears": self._linears, "name": name,
                  "choices": [asdict(choice) if choice else None for choice in assignment]}
                 for name, assignment in new.items() if not (self._kept and self._kept.get(assignment))]
        for done, (task, answer) in enumerate(carry_out(tasks) if tasks else (), start=1):
            scores = tuple(map(Score.from_dict, answer["scores"]))
            if self._kept:
                self._kept.put(new[task["name"]], scores)
            self._add(task["name"], scores)
            progress(done)

    def _side_by_side(self) -> int:
        """Number of allocations whose hidden states have room."""
        taken = sum(len(text.ids) * self._runner.state_bytes(text.ids) for text in self.texts)
        return max(1, self._runner.room // taken)

    def _measure(self, assignments: Mapping[str, Assignment], passed: Callable[[int], None]) -> dict[str, Scores]:
        if not assignments:
            return {}
        outputs = self._outputs([*assignments.values(), *([] if self._reference else [self._unquantized])], passed)
        if self._reference is None:
            self._reference = outputs.pop()
        names, scores = list(assignments), dict[str, Scores]()
        references = self._by_text(self._reference)
        for numbers in self._walk.by_head([*assignments.values()]):
            hidden = zip(*(self._by_text(outputs[number]) for number in numbers), strict=True)
            compared = [self._runner.compare(some, text.ids, reference)
                        for some, text, reference in zip(hidden, self.texts, references, strict=True)]
            for place, number in enumerate(numbers):
                scores[names[number]] = tuple(_score(found[place], text)
                                              for found, text in zip(compared, self.texts, strict=True))
        if self._kept:
            for name, found in scores.items():
                self._kept.put(assignments[name], found)
        return scores

    def _by_text(self, hidden: Hidden) -> list[Hidden]:
        """The batches of each text."""
        parts, first = list[Hidden](), 0
        for text in self.texts:
            end, count = first, 0
            while count < len(text.ids):
                count += len(hidden[end].ids)
                end += 1
            parts.append(hidden[first:end])
            first = end
        return parts

    def _outputs(self, assignments: Sequence[Assignment],
                 passed: Callable[[int], None] = lambda block: None) -> list[Hidden]:
        # Now: an export brings embeddings of its own. Texts share no batch, so scores do not depend on other texts.
        embedded = [batch for text in self.texts for batch in self._runner.embed(text.ids)]
        return self._walk.outputs(assignments, Prefix(None, [embedded]), progress=passed)[0]


class SequentialEvaluator(Evaluator):
    """As ``Evaluator``, but each allocation is quantized in sequence before it is scored, so that the scores are those
    of exported checkpoints.

    Args:
        runner: the model.
        bank: its layers and backend; its variants are not used.
        texts: the held-out texts.
        calibration: token ids (windows, length) of the calibration text.
        log, kept, carry_out, name: see ``Evaluator``.
    """

    def __init__(self, runner: BlockwiseModel, bank: Bank, texts: Windows | Sequence[Windows], calibration: IntArray,
                 log: ScoreLog | None = None, kept: KeptScores | None = None,
                 carry_out: CarryOut | None = None, name: str = HELD_OUT) -> None:
        super().__init__(runner, bank, texts, log, kept, carry_out, name)
        self._calibration = calibration

    def _side_by_side(self) -> int:
        return 1

    def _measure(self, assignments: Mapping[str, Assignment], passed: Callable[[int], None]) -> dict[str, Scores]:
        if not assignments:
            return {}
        self._bank.apply(self._unquantized)
        if self._reference is None:
            self._reference = self._outputs([self._unquantized])[0]
        [(name, assignment)] = assignments.items()
        bank = self._bank.without_variants(self._runner)
        quantize_in_sequence(bank, self._runner, self._calibration, assignment, lambda done, total: passed(done - 1))
        other = copy(self)
        other._bank, other._walk = bank, Walk(self._runner, bank)
        scores = Evaluator._measure(other, {name: assignment}, lambda block: None)
        bank.apply(self._unquantized)
        return scores


def _score(found: Comparison, text: Windows) -> Score:
    if text.scored is None:
        return Score(found.nll.mean(axis=1), float(found.kl.mean()), float(found.agree.mean()),
                     window_kl=found.kl.mean(axis=1))
    scored, tokens = text.scored, text.window_tokens
    nll, kl = (np.where(scored, values, 0.0).sum(axis=1) / scored.sum(axis=1) for values in (found.nll, found.kl))
    return Score(nll, float(found.kl[scored].mean()), float(found.agree[scored].mean()), tokens, kl)


def _name(assignment: Assignment) -> str:
    return " ".join(f"{choice}/{choice.group_size}" if choice else "-" for choice in assignment)


def allocations_of(plan: Plan, between: Sequence[tuple[Choice, int]], seed: int, same_size: bool = True,
                   estimated: Plan | None = None) -> list[tuple[str, int | None, Assignment]]:
    """Name, bytes (None if unquantized) and choices of each row of a plan's table but mixes and lines, the plan first.
    The arguments are those of ``evaluate_plan``."""
    space = plan.space
    allocations: list[tuple[str, int | None, Assignment]] = [("plan", plan.nbytes, space.assignment(plan.pick))]
    if estimated:
        allocations.append(("estimated plan", estimated.nbytes, space.assignment(estimated.pick)))
    allocations.append(("unquantized", None, [None] * len(space.everyone)))
    pinned = [pin.choice for pin in space.pinned]
    uniform = [(choice, space.bytes_of(space.uniform(k))) for k, choice in enumerate(space.choices)]
    uniform = sorted([*uniform, *between], key=lambda item: -item[1])
    allocations += [(f"uniform {choice}", nbytes, [choice] * len(space) + pinned) for choice, nbytes in uniform]
    references: list[tuple[str, IntArray]] = []
    if same_size:
        references = [("first/last high", first_last_high(space, plan.budget_bytes))]
        references += [(f"random {i + 1}", random_plan(space, plan.budget_bytes, np.random.default_rng([seed, i])))
                       for i in range(RANDOM_PLANS)]
    return allocations + [(name, space.bytes_of(pick), space.assignment(pick)) for name, pick in references]


def evaluate_plan(evaluator: Evaluator, plan: Plan, between: Sequence[tuple[Choice, int]], mixes: Sequence[Mix],
                  seed: int, progress: Callable[[int, int], None], same_size: bool = True,
                  meterings: Sequence[Metering] = (), estimated: Plan | None = None) -> Evaluation:
    """Score a plan and its references on each text of an evaluator: an estimated plan that it replaces, the unquantized
    model, every uniform width, mixes of other software, first/last-high, random plans, and straight lines between
    uniform models at the plan's bytes.

    Args:
        evaluator: the evaluator of the model.
        plan: the plan.
        between: choices between the widest and the narrowest that are not on the plan's menu, each with the bytes of
            the uniform model at that choice.
        mixes: plans of other software.
        seed: seed of the random plans.
        progress: called with the number of scored allocations and the number of all allocations.
        same_size: whether to score first/last-high and random plans of the plan's budget.
        meterings: what the meters of the run found.
        estimated: the plan that the search made, if ``plan`` is the uniform model in its place.
    """
    space, allocations = plan.space, allocations_of(plan, between, seed, same_size, estimated)
    total = len(allocations) + len(mixes)
    progress(0, total)
    scores = evaluator.scores_of_texts([assignment for *_, assignment in allocations],
                                       lambda done, _: progress(done, total))
    sizes = [(name, nbytes) for name, nbytes, _ in allocations]
    names = [layer.name for layer in space.everyone]
    costs = [_costs(meterings, names, assignment) for *_, assignment in allocations]
    if mixes:
        linears = [linear.name for layer in space.everyone for linear in layer.linears]
        scores += evaluator.of_linears().scores_of_texts(
            [[mix.choices[name] for name in linears] for mix in mixes],
            lambda done, _: progress(len(allocations) + done, total))
        sizes += [(f"mix {mix.name}", mix.nbytes) for mix in mixes]
        costs += [_costs(meterings, list(mix.choices), [*mix.choices.values()]) for mix in mixes]
    sequential = isinstance(evaluator, SequentialEvaluator)
    units, found = {metering.cost: metering.unit for metering in meterings}, []
    for number, text in enumerate(evaluator.texts):
        rows = []
        for (name, nbytes), on_texts, metered in zip(sizes, scores, costs, strict=True):
            score = on_texts[number]
            row = Row(name, score.window_nll, nbytes, score=score, window_tokens=score.window_tokens, costs=metered)
            if nbytes is not None:
                row = replace(row, bits_nominal=space.nominal_bits(nbytes), bits_stored=space.bits_per_weight(nbytes))
            rows.append(row)
        found.append(Evaluation(tuple(rows), str(text), text.scored_tokens, sequential,
                                text.name if len(evaluator.texts) > 1 else "", costs=units).with_lines())
    return replace(found[0], others=tuple(found[1:]))


def _costs(meterings: Sequence[Metering], names: Sequence[str], assignment: Assignment) -> dict[str, float]:
    """What the meters know of an allocation, by name of the cost."""
    found = {metering.cost: metering.of(names, assignment) for metering in meterings}
    return {cost: value for cost, value in found.items() if value is not None}

