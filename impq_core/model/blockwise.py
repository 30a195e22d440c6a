"""A causal language model run block by block, so that a forward can start behind any block.

Works for any architecture whose blocks are called one after the other on the hidden states: what else each block is
called with (rotary embeddings, masks) is caught from one ordinary forward and given again. The first batch is run both
ways and the logits must agree, so an architecture that does more between its blocks is refused, not mismeasured.
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

from impq_core.errors import ImpqError
from impq_core.model.layers import blocks_of
from impq_core.space import FloatArray, IntArray

Hidden = list[torch.Tensor]
"""Hidden states of all windows, a tensor (windows in the batch, length, width) for each batch."""

BATCH_TOKENS = 2048
HEAD_ROWS = 64
"""Logits are made for this many positions at a time: they stay in the cache, which is twice as fast as all at once."""

CHECKED = 8
"""Positions of each window whose logits must be the same by both ways."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a model says of each token after the first of each window, float64 (windows, length - 1): its negative
    log-likelihood (nats), the KL divergence of its distribution from a reference's (nats), and whether (1 or 0) both
    hold the same token for the likeliest."""

    nll: FloatArray
    kl: FloatArray
    agree: FloatArray


class _Stop(Exception):
    """Ends a forward once the first block's input is known."""


class BlockwiseModel:
    """Runs a model's blocks one at a time. All windows given to one object must have the same length."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        named = blocks_of(model)
        self.blocks: list[nn.Module] = [block for _, block in named]
        parent = model.get_submodule(named[0][0].rsplit(".", 2)[0])
        norm = getattr(parent, "norm", None)
        head = model.get_output_embeddings()
        if not isinstance(norm, nn.Module) or head is None:
            raise ImpqError(f"{type(model).__name__} has no final norm or no head where expected: not supported")
        self._norm, self._head = norm, head
        self._softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._calls: dict[tuple[int, int], list[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self.blocks)

    def embed(self, ids: IntArray) -> Hidden:
        """The first block's input for windows of token ids (windows, length)."""
        per_batch = max(1, BATCH_TOKENS // ids.shape[1])
        return [self._embed_batch(batch) for batch in torch.split(torch.from_numpy(np.asarray(ids)), per_batch)]

    @torch.inference_mode()
    def _embed_batch(self, ids: torch.Tensor) -> torch.Tensor:
        shape = (ids.shape[0], ids.shape[1])
        caught: list[torch.Tensor] = []
        calls: list[dict[str, Any]] = []
        known = shape in self._calls

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not caught:
                caught.append(args[0] if args else kwargs["hidden_states"])
            calls.append({key: value for key, value in kwargs.items() if key != "hidden_states"})
            if len(args) > 1 or known:
                raise _Stop

        hooks = [block.register_forward_pre_hook(catch, with_kwargs=True) for block in self.blocks]
        logits = None
        try:
            logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=CHECKED).logits
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if not known:
            self._calls[shape] = calls
            if logits is None or len(calls) != len(self) or not self._agrees(caught[0], logits.float()):
                raise ImpqError(f"{type(self.model).__name__} does more than run its blocks in order: not supported")
        return caught[0]

    def _agrees(self, hidden: torch.Tensor, logits: torch.Tensor) -> bool:
        [last] = self.run_all([hidden])
        replayed = self.logits(last[:, -CHECKED:])
        return bool((replayed - logits).abs().max() <= 0.05 * logits.std())

    @torch.inference_mode()
    def run_batch(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Output of block ``index`` for one batch of its input."""
        out = self.blocks[index](hidden, **self._calls[hidden.shape[0], hidden.shape[1]][index])
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def run(self, index: int, hidden: Hidden) -> Hidden:
        """Output of block ``index`` for its input."""
        return [self.run_batch(index, batch) for batch in hidden]

    def run_all(self, hidden: Hidden, switch: Callable[[int], None] = lambda index: None) -> Hidden:
        """The last block's output for the first block's input; ``switch`` is called before each block."""
        for index in range(len(self)):
            switch(index)
            hidden = self.run(index, hidden)
        return hidden

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Float32 logits (..., vocabulary) of the last block's output (..., width)."""
        logits = self._head(self._norm(rows)).float()
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    @torch.inference_mode()
    def scored(self, hidden: Hidden, ids: IntArray, *more: Hidden) -> Iterator[tuple[slice, list[torch.Tensor],
                                                                                     torch.Tensor]]:
        """Logits of every position that predicts a token, a few rows at a time.

        Yields:
            where the rows stand among the ``windows * (length - 1)`` scored positions; their float32 logits (rows,
            vocabulary) for ``hidden`` and each of ``more``; and the tokens (rows,) that followed.
        """
        length = ids.shape[1]
        targets = torch.from_numpy(np.asarray(ids))[:, 1:].flatten()
        at = 0
        for batches in zip(hidden, *more, strict=True):
            rows = [batch[:, :length - 1].flatten(0, 1) for batch in batches]
            for start in range(0, len(rows[0]), HEAD_ROWS):
                parts = [self.logits(part[start:start + HEAD_ROWS]) for part in rows]
                where = slice(at, at + len(parts[0]))
                yield where, parts, targets[where]
                at += len(parts[0])

    def compare(self, hidden: Hidden, ids: IntArray, reference: Hidden) -> Comparison:
        """A model's last hidden states against a reference's: logits are made again from both, a few rows at a time,
        which costs thousands of times less memory than to keep them."""
        shape = ids.shape[0], ids.shape[1] - 1
        nll, kl, agree = (np.empty(shape[0] * shape[1]) for _ in range(3))
        for where, (logits, other), targets in self.scored(hidden, ids, reference):
            ours, theirs = functional.log_softmax(logits, dim=-1), functional.log_softmax(other, dim=-1)
            nll[where] = -ours.gather(1, targets[:, None])[:, 0].double().numpy()
            kl[where] = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1).double().numpy()
            agree[where] = (logits.argmax(dim=1) == other.argmax(dim=1)).double().numpy()
        return Comparison(*(values.reshape(shape) for values in (nll, kl, agree)))

    def nll(self, hidden: Hidden, ids: IntArray) -> FloatArray:
        """Negative log-likelihood (windows, length - 1) of each token after the first, in nats."""
        out = np.empty(ids.shape[0] * (ids.shape[1] - 1))
        for where, (logits,), targets in self.scored(hidden, ids):
            out[where] = functional.cross_entropy(logits, targets, reduction="none").double().numpy()
        return out.reshape(ids.shape[0], -1)
