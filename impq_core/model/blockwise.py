"""A causal language model run block by block, so that a forward can start at any block.

Every evaluation is the model's own forward (``OwnForward``). It starts at a block if the blocks in front of it answer
from memory. Models whose blocks hand a state to each other have no partial forwards: each evaluation of theirs runs all
blocks in front, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from impq_core.model.cost import ForwardCost, flop_counter
from impq_core.model.device import on_host
from impq_core.model.forward import OwnForward
from impq_core.model.layers import blocks_of
from impq_core.model.placement import Placement, Stored
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

CPU = torch.device("cpu")

ROOM = 2**28
"""The least room for waiting hidden states, bytes."""

HEAD_ROWS = 64
"""Positions in one computation of logits on the processor: few enough for its cache, which is twice as fast."""

HEAD_ROWS_ELSEWHERE = 1024
"""Positions in one computation of logits on an accelerator, which each time waits for the host."""


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
        model: the model in evaluation mode, on ``device``, but for the parameters in ``stored``.
        device: where blocks work and hidden states are.
        stored: parameters of blocks that stay on disk until their block works; none by default.
        room: bytes that hidden states may take which wait for later blocks, or for other windows. No number depends on
            it.

    Attributes:
        placement: gives the blocks their weights.
        head_rows: positions in one computation of logits.

    Raises:
        ImpqError: the model has no list of blocks.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device = CPU,
                 stored: Mapping[nn.Parameter, Stored] | None = None, room: int = ROOM) -> None:
        self.model, self.device, self.room = model, device, room
        self.head_rows = HEAD_ROWS if device.type == "cpu" else HEAD_ROWS_ELSEWHERE
        self.blocks: list[nn.Module] = [block for _, block in blocks_of(model)]
        self.placement = Placement(model, self.blocks, device, stored)
        self.forward = OwnForward(model, self.blocks, self.placement.loaded)
        self._learnt = self._learnt_backward = False
        self._costs: dict[int, ForwardCost] = {}

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def partial(self) -> bool:
        """Whether a forward can begin at a block; known once windows were embedded."""
        return not self.forward.handed

    def embed(self, ids: IntArray, tokens: int = BATCH_TOKENS) -> Hidden:
        """The first block's input for windows of token ids (windows, length), in batches of at most ``tokens`` tokens,
        or of one window if it has more.

        Raises:
            ImpqError: the blocks cannot be run one by one; found the first time.
        """
        batches = torch.split(torch.from_numpy(np.asarray(ids)).to(self.device), max(1, tokens // ids.shape[1]))
        if not self._learnt:
            self.forward.learn(batches[0][:1])
            self._learnt = True
        return [Batch(batch, self.forward.first_input(batch)) for batch in batches]

    def learn_backward(self, ids: IntArray) -> None:
        """Try a backward pass on the first window of ``ids`` (windows, length), the first time; see ``OwnForward``."""
        if not self._learnt_backward:
            self.forward.learn_backward(self.embed(ids[:1])[0].ids)
            self._learnt_backward = True

    @contextmanager
    def whole(self, at_once: bool) -> Iterator[PreTrainedModel]:
        """The model as an ordinary one of transformers, for code that calls or generates with it. Its weights are
        those that the placement gives its blocks.

        Args:
            at_once: keep the weights of all blocks unpacked for as long as the context lasts, which takes their memory
                once more; else each block has them while it works, in every forward anew.
        """
        with self.placement.loaded(*(range(len(self)) if at_once else ())), self.forward.whole() as model:
            yield model

    def check_ends(self, ids: IntArray) -> None:
        """Check on the first window of ``ids`` (windows, length) that embedding and head can have other weights; raises
        ImpqError if not."""
        [batch] = self.embed(ids[:1])
        self.forward.check_ends(batch.ids)

    def state_bytes(self, ids: IntArray) -> int:
        """Bytes of the hidden states of one window of the length of ``ids`` (windows, length)."""
        [batch] = self.embed(ids[:1])
        return batch.states.numel() * batch.states.element_size()

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
        states = self.forward.outputs(batch.ids, index, batch.states if index else None, index)[0]
        return Batch(batch.ids, states)

    def run(self, index: int, hidden: Hidden) -> Hidden:
        """Output of block ``index`` for its input. If the model has no partial forwards, the blocks in front run, too,
        from the first."""
        with self.placement.loaded(index):
            return [self.run_batch(index, batch) for batch in hidden]

    def run_all(self, hidden: Hidden) -> Hidden:
        """The last block's output for the first block's input."""
        for index in range(len(self) if self.partial else 0):
            hidden = self.run(index, hidden)
        return hidden if self.partial else self.run(len(self) - 1, hidden)

    def scored(self, ids: IntArray, *hidden: Hidden) -> Iterator[tuple[slice, Iterator[torch.Tensor], torch.Tensor]]:
        """Logits of every position that predicts a token, ``head_rows`` rows at a time.

        Yields:
            The slice of the rows among the ``windows * (length - 1)`` scored positions; their float32 logits (rows,
            vocabulary) for each of ``hidden``, made one after the other; and the tokens (rows,) that follow them in the
            text.
        """
        at = 0
        for batches in zip(*hidden, strict=True):
            tokens, targets = batches[0].ids[:, :-1].flatten(), batches[0].ids[:, 1:].flatten()
            rows = [torch.split(self.forward.rows(batch.states, ids.shape[1] - 1), self.head_rows,
                                dim=self.forward.axis)
                    for batch in batches]
            for some, followed, *parts in zip(
                    torch.split(tokens, self.head_rows), torch.split(targets, self.head_rows), *rows, strict=True):
                yield slice(at, at + len(some)), map(self.forward.logits, repeat(some), parts), followed
                at += len(some)

    def compare(self, hidden: Sequence[Hidden], ids: IntArray, reference: Hidden) -> list[Comparison]:
        """Compare the last hidden states of models with those of the unquantized model. Logits are computed a few rows
        at a time, because hidden states take thousands of times less memory; the reference's, once for all models, by
        the model's own head. The models share the head's weight."""
        shape = ids.shape[0], ids.shape[1] - 1
        found = [[np.empty(shape[0] * shape[1]) for _ in range(3)] for _ in hidden]
        for rows, logits, targets in self.scored(ids, reference, *hidden):
            with self.placement.unreplaced_outside():
                reference_logits = next(logits)
            log_reference, likeliest = functional.log_softmax(reference_logits, dim=-1), reference_logits.argmax(dim=1)
            del reference_logits
            for (nll, kl, agree), part in zip(found, logits, strict=True):
                nll[rows], kl[rows], agree[rows] = _differences(part, targets, log_reference, likeliest)
        return [Comparison(*(values.reshape(shape) for values in parts)) for parts in found]

    def nll(self, hidden: Hidden, ids: IntArray) -> FloatArray:
        """Negative log-likelihood (windows, length - 1) of each token after the first, in nats."""
        out = np.empty(ids.shape[0] * (ids.shape[1] - 1))
        for where, logits, targets in self.scored(ids, hidden):
            out[where] = on_host(functional.cross_entropy(next(logits), targets, reduction="none"))
        return out.reshape(ids.shape[0], -1)


def _differences(logits: torch.Tensor, targets: torch.Tensor, log_reference: torch.Tensor,
                 likeliest: torch.Tensor) -> tuple[FloatArray, FloatArray, FloatArray]:
    """NLL, KL divergence and agreement (rows,) of logits (rows, vocabulary). A function, so that what it makes of the
    size of the logits ends with it."""
    log_p = functional.log_softmax(logits, dim=-1)
    nll = -on_host(log_p.gather(1, targets[:, None])[:, 0])
    divergence = functional.kl_div(log_p, log_reference, reduction="none", log_target=True)
    return nll, on_host(divergence.sum(dim=1)), on_host(logits.argmax(dim=1) == likeliest)
