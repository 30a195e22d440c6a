"""The game on a real model. Picks are measured side by side: at each block, each distinct prefix is run once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from impq_core.errors import ImpqError
from impq_core.game.probe import ModelProbe
from impq_core.interfaces import CarryOut
from impq_core.ledger import MeasurementLog
from impq_core.model.bank import Assignment, Bank
from impq_core.model.blockwise import BlockwiseModel, Hidden
from impq_core.model.text import Windows
from impq_core.model.walk import Prefix, Walk
from impq_core.space import FloatArray, IntArray, SearchSpace

PICKS = 32
"""Picks that are measured side by side. Their states exist at once, and an interruption loses their work."""

ALONE = 2
"""The most new picks of one call that are not worth a worker."""

FEWEST, MOST = 4, 16
"""Picks in a task of a worker: more share more prefixes and unpacked weights, fewer keep more workers busy."""

Watcher = Callable[[IntArray, FloatArray, float], None]
"""Called with picks, their losses and the cost so far in forwards, after the losses are on disk."""


class ModelGame:
    """Implements ``impq_core.interfaces.Game`` on a model and the bank of its variants.

    New picks are measured in batches of up to ``PICKS`` (``Walk``). The inputs of every block are kept for the last of
    them, so the next picks run only the blocks from their first difference to it on. Losses are memoised. Nothing is
    quantized here.

    The cost of losses is that of the blocks that are run and of the head (for ``kl`` once more in each batch and for
    each choice of the head in it, because the reference's logits are computed again). A loss in the log of an earlier
    process is not measured again, but charged: the cost of a game does not depend on interruptions.

    Args:
        space: the layers and choices of the game.
        bank: the variants; its layers are the space's ``everyone``.
        runner: the model.
        windows: calibration windows; a loss is the mean over them, or over their scored tokens.
        log: measured losses are written to it before they are returned, and those of an earlier process are read from
            it.
        watch: called with new losses after they are on disk.
        progress: called after each evaluation with the number of evaluations so far and the number expected.
        value: the loss: ``nll``, the negative log-likelihood, or ``kl``, the divergence from the unquantized model's
            distribution, which is less noisy and never improves by quantization errors that happen to suit the text.
        budget_bytes: the budget of the plans; None if there is none.
        spare: windows of the same length, for further sets of the same size.
        probe: the probe of the same model; one over the game's windows by default.
        carry_out: workers, which measure for the log in advance: losses are then found there as after an interruption.
            Their tasks of kind ``losses`` are answered by ``measured`` of the same game of the worker.
        name: of the game, for the workers.
    """

    def __init__(self, space: SearchSpace, bank: Bank, runner: BlockwiseModel, windows: Windows,
                 log: MeasurementLog | None = None, watch: Watcher = lambda *facts: None,
                 progress: Callable[[int, int], None] = lambda done, total: None, value: str = "nll",
                 budget_bytes: int | None = None, spare: Windows | None = None,
                 probe: ModelProbe | None = None, carry_out: CarryOut | None = None, name: str = "") -> None:
        self.space, self.budget_bytes = space, budget_bytes
        self._carry_out, self._name = carry_out, name
        self.probe = probe or ModelProbe(space, bank, runner, windows, value)
        self._bank, self._runner, self._value = bank, runner, value
        count = len(windows.ids)
        spare = spare or windows.part(0, 0)
        self._sets = [windows, *(spare.part(first, first + count)
                                 for first in range(0, len(spare.ids) - count + 1, count))]
        self._log, self._watch, self._progress = log, watch, progress
        self._expected = 0
        self._walk = Walk(runner, bank)
        self._by_block = np.argsort([layer.block for layer in space.layers], kind="stable")
        self._memos: list[dict[bytes, FloatArray]] = [{} for _ in self._sets]
        self._cost, self._flops = runner.cost(windows.ids), 0
        self.tokens = windows.scored_tokens
        self.redraw(0)

    def redraw(self, number: int) -> int:
        """Continue on the set of windows with a number (modulo the number of sets); earlier losses on it are kept.
        Returns the number of the set."""
        self._number = number % len(self._sets)
        self._text, self._memo = self._sets[self._number], self._memos[self._number]
        self._ids = self._text.ids
        embedded = self._runner.embed(self._ids)
        self._known: Assignment | None = None  # of the pick that was charged last
        self._last = Prefix(None, [embedded])  # the states of the pick that was measured last
        self._unquantized: Hidden | None = None
        if self._value == "kl":
            self._bank.apply([None] * len(self._bank.layers))
            self._unquantized = self._runner.run_all(embedded)
            self._flops += self._cost.behind(0)
        return self._number

    @property
    def forwards(self) -> float:
        """Cost so far in forwards of the game's windows, as ``ForwardCost`` defines them, the probe's included."""
        return self._flops / self._cost.total + self.probe.forwards

    @property
    def evaluations(self) -> int:
        """Number of distinct measured picks, the reference included."""
        return sum(map(len, self._memos))

    @property
    def reference_loss(self) -> float:
        """Absolute loss of the all-reference model, nats per token.

        Raises:
            ImpqError: it is not finite.
        """
        loss = float(self._window_losses(self.space.uniform(0)[None])[0].mean())
        if not math.isfinite(loss):
            raise ImpqError("the loss of the all-high model is not finite: try --dtype float32")
        return loss

    def expect(self, evaluations: int, wanted: Iterable[tuple[int, IntArray]] = ()) -> None:
        """Set the expected number of all evaluations, for the progress; workers measure the picks that are wanted."""
        self._expected = evaluations
        self._progress(self.evaluations, evaluations)
        reference = self.space.uniform(0)[None]
        self._share([(number % len(self._sets), pick) for number, picks in wanted
                     for pick in np.concatenate([reference, picks])])

    def loss(self, pick: IntArray) -> float:
        """Loss of a pick above the reference, nats per token."""
        return float(self.losses(np.asarray(pick)[None])[0])

    def losses(self, picks: IntArray) -> FloatArray:
        """Losses (N,) of picks (N, n), nats per token above the reference."""
        picks = np.stack([self.space.check_pick(pick) for pick in picks])
        absolute = self._window_losses(np.concatenate([self.space.uniform(0)[None], picks]))[1:]
        losses: FloatArray = absolute.mean(axis=1) - self.reference_loss
        if self._log:
            self._log.sync()
        self._watch(picks, losses, self.forwards)
        return losses

    def window_losses(self, pick: IntArray) -> FloatArray:
        """Absolute losses (windows,) of one pick, nats per token."""
        self.loss(pick)
        return self._memo[self.space.check_pick(pick).tobytes()]

    def measured(self, number: int, picks: IntArray) -> FloatArray:
        """Absolute losses (N, windows) of picks (N, n) on the set of windows with a number, nats per token."""
        if number != self._number:
            self.redraw(number)
        return self._window_losses(picks)

    def _share(self, wanted: Iterable[tuple[int, IntArray]]) -> None:
        """Let workers measure picks on the sets of windows with these numbers, as far as they are not in the log."""
        if not self._carry_out or not self._log:
            return
        by_set: dict[int, dict[bytes, IntArray]] = {}
        for number, pick in wanted:
            if (number, pick.tobytes()) not in self._log.losses:
                by_set.setdefault(number, {})[pick.tobytes()] = pick
        tasks = [{"kind": "losses", "game": self._name, "set": number, "picks": some.tolist()}
                 for number, new in by_set.items() for some in self._portions(np.array([*new.values()]))]
        done, count = self.evaluations, sum(map(len, by_set.values()))
        for task, answer in self._carry_out(tasks) if tasks else ():
            for pick, losses in zip(task["picks"], answer["losses"], strict=True):
                self._log.add(np.array(pick, dtype=np.int64), np.array(losses), task["set"])
            self._log.sync()
            done += len(task["picks"])
            self._progress(done, max(self._expected, self.evaluations + count))

    def _portions(self, picks: IntArray) -> list[IntArray]:
        """Picks in parts of about the same size, with neighbours that share prefixes."""
        ordered = picks[np.lexsort(picks[:, self._by_block].T[::-1])]
        size = min(max(FEWEST, math.ceil(len(ordered) / 4)), MOST)
        return np.array_split(ordered, math.ceil(len(ordered) / size))

    def _window_losses(self, picks: IntArray) -> FloatArray:
        """Absolute losses (N, windows) of picks (N, n), nats per token."""
        new = np.array(list({pick.tobytes(): pick for pick in picks if pick.tobytes() not in self._memo}.values()))
        if len(new) > ALONE:
            self._share((self._number, pick) for pick in new)
        if len(new) > PICKS:  # neighbours share prefixes
            new = new[np.lexsort(new[:, self._by_block].T[::-1])]
        for first in range(0, len(new), PICKS):
            self._measure(new[first:first + PICKS])
        return np.stack([self._memo[pick.tobytes()] for pick in picks])

    def _measure(self, picks: IntArray) -> None:
        """Measure a batch of distinct new picks, or find their losses in the log, and charge them."""
        logged = self._log.losses if self._log else {}
        found = {pick.tobytes(): logged[self._number, pick.tobytes()] for pick in picks
                 if (self._number, pick.tobytes()) in logged}
        if self._log and any(len(losses) != len(self._ids) for losses in found.values()):
            raise ImpqError(f"{self._log.path} has a line whose number of losses is not that of the {len(self._ids)} "
                            "windows: start a new run")
        missing = [pick for pick in picks if pick.tobytes() not in found]
        if missing:
            assignments = [self.space.assignment(pick) for pick in missing]
            outputs, self._last = self._walk.outputs(
                assignments, self._last, True, partial(self._report, len(missing)))
            for number, losses in self._losses(outputs, assignments):
                pick = missing[number]
                if self._log:
                    self._log.add(pick, losses, self._number)
                found[pick.tobytes()] = losses
        charged = [self.space.assignment(pick) for pick in picks]
        runs, self._known = self._walk.runs(charged, self._known), charged[-1]
        heads = len(picks) + (self._walk.heads(charged) if self._unquantized is not None else 0)
        self._flops += int(np.dot(runs, self._cost.blocks)) + self._cost.head * heads
        self._memo.update(found)
        self._progress(self.evaluations, max(self._expected, self.evaluations))

    def _losses(self, outputs: Sequence[Hidden],
                assignments: Sequence[Assignment]) -> Iterator[tuple[int, FloatArray]]:
        """Number of each assignment, and the losses (windows,) of its last hidden states."""
        for numbers in self._walk.by_head(assignments):
            some = [outputs[number] for number in numbers]
            if self._unquantized is None:
                found = (self._text.window_losses(self._runner.nll(hidden, self._ids)) for hidden in some)
            else:
                found = (self._text.window_losses(compared.kl)
                         for compared in self._runner.compare(some, self._ids, self._unquantized))
            yield from zip(numbers, found, strict=True)

    def _report(self, count: int, block: int) -> None:
        done = self.evaluations + count * (block + 1) // (len(self._runner) + 1)
        self._progress(done, max(self._expected, done))
