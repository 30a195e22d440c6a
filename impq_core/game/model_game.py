"""The game on a real model: a pick is measured by running only the blocks behind its first difference to the last."""

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
"""Called with picks, their losses and the cost so far in forwards, when the losses are on disk."""


class ModelGame:
    """Implements ``impq_core.interfaces.Game`` on a model whose variants are in a bank.

    Hidden states in front of every block are kept for the pick evaluated last, so the next pick runs only the blocks
    behind its first difference. Losses are memoised. Nothing is quantized here.

    The cost of a loss is that of the blocks that it runs and of the head (twice for ``kl``, as the reference's logits
    are made again). A loss that an earlier process left in the log is not measured again, but charged as if it had
    been: the cost of a game does not depend on how often it was interrupted.

    Args:
        space: the layers and choices on play.
        bank: the variants; its layers are the space's ``everyone``.
        runner: the model.
        windows: calibration windows that the loss is the mean over.
        log: measured losses are written to it before they are returned, and those of an earlier process are read from
            it.
        watch: called with new losses when they are on disk.
        progress: called after each evaluation with the number of evaluations so far and the number expected.
        value: the loss: ``nll``, the negative log-likelihood, or ``kl``, the divergence from the unquantized model's
            distribution, which is less noisy and rewards no luck.
        budget_bytes: the budget of the plans that the losses are for; None if there is none.
        spare: windows of the same length for further sets of as many.
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
        more = windows.ids[:0] if spare is None else spare.ids
        self._sets = [windows.ids, *(more[at:at + count] for at in range(0, len(more) - count + 1, count))]
        self._log, self._watch, self._progress = log, watch, progress
        self._expected = 0
        self._blocks = np.array([layer.block for layer in space.layers])
        self._all_blocks = np.array([layer.block for layer in space.everyone])
        self._memos: list[dict[bytes, FloatArray]] = [{} for _ in self._sets]
        self._cost, self._flops = runner.cost(windows.ids), 0
        self.tokens = windows.scored_tokens
        self.redraw(0)

    def redraw(self, number: int) -> int:
        """Continue on the set of windows of that number (modulo the number of sets) and return the set's number; its
        earlier losses are kept."""
        self._number = number % len(self._sets)
        self._ids, self._memo = self._sets[self._number], self._memos[self._number]
        self._inputs: list[Hidden] = [self._runner.embed(self._ids)]
        self._standing: IntArray | None = None
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
        """Distinct picks measured, the reference included."""
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
        """Report how many evaluations there will be in all."""
        self._expected = evaluations
        self._progress(self.evaluations, evaluations)

    def loss(self, pick: IntArray) -> float:
        """Nats per token above the reference."""
        return float(self.losses(np.asarray(pick)[None])[0])

    def losses(self, picks: IntArray) -> FloatArray:
        """Losses (N,) of picks (N, n), nats per token above the reference, measured in the cheapest of three orders."""
        picks = np.stack([self.space.check_pick(pick) for pick in picks])
        reference = self.reference_loss
        out = np.empty(len(picks))
        for row in self._cheaper_order(picks):
            out[row] = float(self._windows(picks[row]).mean()) - reference
        if self._log:
            self._log.sync()
        self._watch(picks, out, self.forwards)
        return out

    def window_losses(self, pick: IntArray) -> FloatArray:
        """Absolute losses (windows,) of one pick, nats per token."""
        self.loss(pick)
        return self._windows(self.space.check_pick(pick))

    def _first_difference(self, a: IntArray, b: IntArray) -> int:
        """The first block in which two picks differ, or 0 if the model has no partial forwards; the number of blocks if
        there is no difference."""
        where = self._blocks[a != b]
        if len(where) and not self._runner.partial:
            return 0
        return int(where.min()) if len(where) else len(self._runner)

    def _cheaper_order(self, picks: IntArray) -> IntArray:
        """The order as given, or sorted block by block (either way) so that neighbours share prefixes: the one whose
        blocks cost least."""
        by_block = np.lexsort(picks[:, np.argsort(self._blocks, kind="stable")].T[::-1])

        def price(order: IntArray) -> int:
            chain = [self._standing, *picks[order]] if self._standing is not None else list(picks[order])
            return sum(self._cost.behind(self._first_difference(a, b))
                       for a, b in pairwise(chain) if b.tobytes() not in self._memo)

        given = np.arange(len(picks))
        return min((given, by_block, by_block[::-1]), key=price)

    def _windows(self, pick: IntArray) -> FloatArray:
        key = pick.tobytes()
        if key not in self._memo:
            first = 0 if self._standing is None else self._first_difference(self._standing, pick)
            losses = self._log.losses.get((self._number, key)) if self._log else None
            if losses is None:
                losses = self._measure(pick, first)
                if self._log:
                    self._log.add(pick, losses, self._number)
            else:
                del self._inputs[first + 1:]
            self._flops += self._cost.behind(first) + self._cost.head * (1 if self._unquantized is None else 2)
            self._standing = pick.copy()
            self._memo[key] = losses
            self._progress(self.evaluations, max(self._expected, self.evaluations))
        return self._memo[key]

    def _measure(self, pick: IntArray, first: int) -> FloatArray:
        """Losses (windows,) of a pick that agrees with the one evaluated last before block ``first``."""
        first = min(first, len(self._inputs) - 1)  # losses from the log have left no hidden states
        self._standing = None  # an interruption below must not leave a pick that the model does not stand at
        del self._inputs[first + 1:]
        assignment = self.space.assignment(pick)
        for layer in np.flatnonzero(self._all_blocks >= first):
            self._bank.switch(int(layer), assignment[layer])
        outputs = self._runner.run_from(first, self._inputs[first])
        hidden = outputs[-1]
        if self._runner.partial:
            self._inputs += outputs
        tokens = (self._runner.nll(hidden, self._ids) if self._unquantized is None
                  else self._runner.compare(hidden, self._ids, self._unquantized).kl)
        losses: FloatArray = tokens.mean(axis=1)
        return losses
