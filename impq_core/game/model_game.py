"""The game on a real model. A pick is measured by running only the blocks from its first difference to the last pick
on."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from impq_core.errors import ImpqError
from impq_core.game.probe import ModelProbe
from impq_core.ledger import MeasurementLog
from impq_core.model.bank import Bank
from impq_core.model.blockwise import BlockwiseModel, Hidden
from impq_core.model.text import Windows
from impq_core.space import FloatArray, IntArray, SearchSpace

Watcher = Callable[[IntArray, FloatArray, float], None]
"""Called with picks, their losses and the cost so far in forwards, after the losses are on disk."""


class ModelGame:
    """Implements ``impq_core.interfaces.Game`` on a model and the bank of its variants.

    The inputs of every block are kept for the last evaluated pick, so the next pick runs only the blocks from its first
    difference on. Losses are memoised. Nothing is quantized here.

    The cost of a loss is that of the blocks that are run and of the head (twice for ``kl``, because the reference's
    logits are computed again). A loss in the log of an earlier process is not measured again, but charged: the cost of
    a game does not depend on interruptions.

    Args:
        space: the layers and choices of the game.
        bank: the variants; its layers are the space's ``everyone``.
        runner: the model.
        windows: calibration windows; a loss is the mean over them.
        log: measured losses are written to it before they are returned, and those of an earlier process are read from
            it.
        watch: called with new losses after they are on disk.
        progress: called after each evaluation with the number of evaluations so far and the number expected.
        value: the loss: ``nll``, the negative log-likelihood, or ``kl``, the divergence from the unquantized model's
            distribution, which is less noisy and never improves by quantization errors that happen to suit the text.
        budget_bytes: the budget of the plans; None if there is none.
        spare: windows of the same length, for further sets of the same size.
        probe: the probe of the same model; one over the game's windows by default.
    """

    def __init__(self, space: SearchSpace, bank: Bank, runner: BlockwiseModel, windows: Windows,
                 log: MeasurementLog | None = None, watch: Watcher = lambda *facts: None,
                 progress: Callable[[int, int], None] = lambda done, total: None, value: str = "nll",
                 budget_bytes: int | None = None, spare: Windows | None = None,
                 probe: ModelProbe | None = None) -> None:
        self.space, self.budget_bytes = space, budget_bytes
        self.probe = probe or ModelProbe(space, bank, runner, windows, value)
        self._bank, self._runner, self._value = bank, runner, value
        count = len(windows.ids)
        spare_ids = windows.ids[:0] if spare is None else spare.ids
        self._sets = [windows.ids, *(spare_ids[first:first + count]
                                     for first in range(0, len(spare_ids) - count + 1, count))]
        self._log, self._watch, self._progress = log, watch, progress
        self._expected = 0
        self._blocks = np.array([layer.block for layer in space.layers])
        self._all_blocks = np.array([layer.block for layer in space.everyone])
        self._memos: list[dict[bytes, FloatArray]] = [{} for _ in self._sets]
        self._cost, self._flops = runner.cost(windows.ids), 0
        self.tokens = windows.scored_tokens
        self.redraw(0)

    def redraw(self, number: int) -> int:
        """Continue on the set of windows with a number (modulo the number of sets); earlier losses on it are kept.
        Returns the number of the set."""
        self._number = number % len(self._sets)
        self._ids, self._memo = self._sets[self._number], self._memos[self._number]
        self._inputs: list[Hidden] = [self._runner.embed(self._ids)]  # of each block, for the current pick
        self._current: IntArray | None = None
        self._unquantized: Hidden | None = None
        if self._value == "kl":
            self._bank.apply([None] * len(self._bank.layers))
            self._unquantized = self._runner.run_all(self._inputs[0])
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
        loss = float(self._windows(self.space.uniform(0)).mean())
        if not math.isfinite(loss):
            raise ImpqError("the loss of the all-high model is not finite: try --dtype float32")
        return loss

    def expect(self, evaluations: int) -> None:
        """Set the expected number of all evaluations, for the progress."""
        self._expected = evaluations
        self._progress(self.evaluations, evaluations)

    def loss(self, pick: IntArray) -> float:
        """Loss of a pick above the reference, nats per token."""
        return float(self.losses(np.asarray(pick)[None])[0])

    def losses(self, picks: IntArray) -> FloatArray:
        """Losses (N,) of picks (N, n), nats per token above the reference, measured in the cheapest of three orders."""
        picks = np.stack([self.space.check_pick(pick) for pick in picks])
        reference = self.reference_loss
        losses = np.empty(len(picks))
        for row in self._cheapest_order(picks):
            losses[row] = float(self._windows(picks[row]).mean()) - reference
        if self._log:
            self._log.sync()
        self._watch(picks, losses, self.forwards)
        return losses

    def window_losses(self, pick: IntArray) -> FloatArray:
        """Absolute losses (windows,) of one pick, nats per token."""
        self.loss(pick)
        return self._windows(self.space.check_pick(pick))

    def _first_difference(self, a: IntArray, b: IntArray) -> int:
        """The first block in which two picks differ; the number of blocks if they are equal."""
        blocks = self._blocks[a != b]
        return int(blocks.min()) if len(blocks) else len(self._runner)

    def _cheapest_order(self, picks: IntArray) -> IntArray:
        """The cheapest of three orders of row numbers (N,): as given, or sorted block by block in either direction, so
        that neighbours share prefixes."""
        by_block = np.lexsort(picks[:, np.argsort(self._blocks, kind="stable")].T[::-1])

        def price(order: IntArray) -> int:
            chain = [self._current, *picks[order]] if self._current is not None else list(picks[order])
            return sum(self._cost.behind(self._first_difference(a, b))
                       for a, b in pairwise(chain) if b.tobytes() not in self._memo)

        given = np.arange(len(picks))
        return min((given, by_block, by_block[::-1]), key=price)

    def _windows(self, pick: IntArray) -> FloatArray:
        key = pick.tobytes()
        if key not in self._memo:
            first = 0 if self._current is None else self._first_difference(self._current, pick)
            losses = self._log.losses.get((self._number, key)) if self._log else None
            if losses is None:
                losses = self._measure(pick, first)
                if self._log:
                    self._log.add(pick, losses, self._number)
            else:
                del self._inputs[first + 1:]
            self._flops += self._cost.behind(first) + self._cost.head * (1 if self._unquantized is None else 2)
            self._current = pick.copy()
            self._memo[key] = losses
            self._progress(self.evaluations, max(self._expected, self.evaluations))
        return self._memo[key]

    def _measure(self, pick: IntArray, first: int) -> FloatArray:
        """Losses (windows,) of a pick that equals the current one in all blocks before ``first``."""
        first = min(first, len(self._inputs) - 1)  # losses from the log leave no inputs of later blocks
        self._current = None  # after an interruption below, the model has the weights of no whole pick
        del self._inputs[first + 1:]
        assignment = self.space.assignment(pick)
        for layer in np.flatnonzero(self._all_blocks >= first):
            self._bank.switch(int(layer), assignment[layer])
        hidden = self._inputs[first]
        for block in range(first, len(self._runner)):
            hidden = self._runner.run(block, hidden)
            self._inputs.append(hidden)
        tokens = (self._runner.nll(hidden, self._ids) if self._unquantized is None
                  else self._runner.compare(hidden, self._ids, self._unquantized).kl)
        losses: FloatArray = tokens.mean(axis=1)
        return losses
