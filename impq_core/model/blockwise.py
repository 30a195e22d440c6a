"""A causal language model run block by block, so that a forward can start at any block.

Every evaluation is the model's own forward (``OwnForward``). It starts at a block if the blocks in front of it answer
from memory. Models whose blocks hand a state to each other have no partial forwards: each evaluation of theirs runs all
blocks in front, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from impq_core.model.cost import ForwardCost, flop_counter
from impq_core.model.forward import OwnForward
from impq_core.model.layers import blocks_of
from impq_core.space import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Batch:
    """Hidden states of some windows.

    Args:
        ids: their token ids (windows, length).
        states: the input of the first block, or the output of any (windows, length, width). A few architectures have
            further dimensions in front of those or behind the length.
    """

    ids: torch.Tensor
    states: torch.Tensor


Hidden = list[Batch]
"""Hidden states of all windows."""

BATCH_TOKENS = 2048
"""Tokens in a batch."""

HEAD_ROWS = 64
"""Positions in one computation of logits: few enough for the processor's cache, which is twice as fast."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Comparison of a model's predictions with a reference's, for each token after the first of each window.

    Args:
        nll: float64 (windows, length - 1), the model's negative log-likelihood, nats.
        kl: float64 (windows, length - 1), KL divergence of the model's distribution from the reference's, nats.
        agree: float64 (windows, length - 1), 1 if both predict the same most likely token, else 0.
    """

    nll: FloatArray
    kl: FloatArray
    agree: FloatArray


class BlockwiseModel:
    """Runs a model's blocks one at a time.

    Args:
        model: the model, on the CPU and in evaluation mode.

    Raises:
        ImpqError: the model has no list of blocks.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.blocks: list[nn.Module] = [block for _, block in blocks_of(model)]
        self.forward = OwnForward(model, self.blocks)
        self._learnt = False
        self._costs: dict[int, ForwardCost] = {}

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def partial(self) -> bool:
        """Whether a forward can begin at a block; known once windows were embedded."""
        return not self.forward.handed

    def embed(self, ids: IntArray) -> Hidden:
        """The first block's input for windows of token ids (windows, length).

        Raises:
            ImpqError: the blocks cannot be run one by one; found the first time.
        """
        per_batch = max(1, BATCH_TOKENS // ids.shape[1])
        batches = torch.split(torch.from_numpy(np.asarray(ids)), per_batch)
        if not self._learnt:
            self.forward.learn(batches[0][:1])
            self._learnt = True
        return [Batch(batch, self.forward.first_input(batch)) for batch in batches]

    def cost(self, ids: IntArray) -> ForwardCost:
        """The cost of a forward over one window of the length of ``ids`` (windows, length), counted once on the first
        window."""
        length = ids.shape[1]
        if length not in self._costs:
            blocks: list[int] = []

            def count(index: int, run: Callable[[], Any]) -> Any:
                with flop_counter() as counter:
                    output = run()
                blocks.append(counter.get_total_flops())
                return output

            [batch] = self.embed(ids[:1])
            states = self.forward.outputs(batch.ids, 0, None, len(self) - 1, count)[-1]
            head = 0
            for sign, stop in ((1, False), (-1, True)):
                with flop_counter() as counter:
                    self.forward.logits(batch.ids[:, :-1].flatten(), self.forward.rows(states, length - 1), stop)
                head += sign * counter.get_total_flops()
            self._costs[length] = ForwardCost(tuple(blocks), head)
        return self._costs[length]

    def run_batch(self, index: int, batch: Batch) -> Batch:
        """Output of block ``index`` for one batch of its input."""
        return self._outputs(batch, index, index)[0]

    def run(self, index: int, hidden: Hidden) -> Hidden:
        """Output of block ``index`` for its input."""
        return [self.run_batch(index, batch) for batch in hidden]

    def run_from(self, first: int, hidden: Hidden) -> list[Hidden]:
        """Outputs of block ``first`` and of each block behind it, for the input of block ``first``."""
        batches = [self._outputs(batch, first, len(self) - 1) for batch in hidden]
        return [list(outputs) for outputs in zip(*batches, strict=True)]

    def run_all(self, hidden: Hidden, switch: Callable[[int], None] = lambda index: None) -> Hidden:
        """The last block's output for the first block's input; ``switch`` is called for each block before it runs."""
        if not self.partial:
            for index in range(len(self)):
                switch(index)
            return self.run(len(self) - 1, hidden)
        for index in range(len(self)):
            switch(index)
            hidden = self.run(index, hidden)
        return hidden

    def _outputs(self, batch: Batch, first: int, last: int) -> list[Batch]:
        return [Batch(batch.ids, states)
                for states in self.forward.outputs(batch.ids, first, batch.states if first else None, last)]

    @torch.inference_mode()
    def scored(self, hidden: Hidden, ids: IntArray, *more: Hidden) -> Iterator[tuple[slice, list[torch.Tensor],
                                                                                     torch.Tensor]]:
        """Logits of every position that predicts a token, ``HEAD_ROWS`` rows at a time.

        Yields:
            The slice of the rows among the ``windows * (length - 1)`` scored positions; their float32 logits (rows,
            vocabulary) for ``hidden`` and each of ``more``; and the tokens (rows,) that follow them in the text.
        """
        at = 0
        for batches in zip(hidden, *more, strict=True):
            tokens, targets = batches[0].ids[:, :-1].flatten(), batches[0].ids[:, 1:].flatten()
            rows = [torch.split(self.forward.rows(batch.states, ids.shape[1] - 1), HEAD_ROWS, dim=self.forward.axis)
                    for batch in batches]
            for some, followed, *parts in zip(torch.split(tokens, HEAD_ROWS), torch.split(targets, HEAD_ROWS), *rows,
                                              strict=True):
                yield slice(at, at + len(some)), [self.forward.logits(some, part) for part in parts], followed
                at += len(some)

    def compare(self, hidden: Hidden, ids: IntArray, reference: Hidden) -> Comparison:
        """Compare a model's last hidden states with a reference's. The logits of both are computed a few rows at a
        time, because hidden states take thousands of times less memory than logits."""
        shape = ids.shape[0], ids.shape[1] - 1
        nll, kl, agree = (np.empty(shape[0] * shape[1]) for _ in range(3))
        for rows, (logits, reference_logits), targets in self.scored(hidden, ids, reference):
            log_p, log_reference = (functional.log_softmax(part, dim=-1) for part in (logits, reference_logits))
            nll[rows] = -log_p.gather(1, targets[:, None])[:, 0].double().numpy()
            divergence = functional.kl_div(log_p, log_reference, reduction="none", log_target=True)
            kl[rows] = divergence.sum(dim=1).double().numpy()
            agree[rows] = (logits.argmax(dim=1) == reference_logits.argmax(dim=1)).double().numpy()
        return Comparison(*(values.reshape(shape) for values in (nll, kl, agree)))

    def nll(self, hidden: Hidden, ids: IntArray) -> FloatArray:
        """Negative log-likelihood (windows, length - 1) of each token after the first, in nats."""
        out = np.empty(ids.shape[0] * (ids.shape[1] - 1))
        for where, (logits,), targets in self.scored(hidden, ids):
            out[where] = functional.cross_entropy(logits, targets, reduction="none").double().numpy()
        return out.reshape(ids.shape[0], -1)
