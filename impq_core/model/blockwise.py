"""A causal language model run block by block, so that a forward can start at any block.

It supports every architecture that calls its blocks one after the other on the hidden states. The other arguments of a
block (rotary embeddings, masks) are recorded in one ordinary forward for each shape of a batch, and replayed for every
batch of that shape. This is correct only if they do not depend on the text. Therefore the arguments are compared
between two texts, and replayed logits with the model's own; an architecture that fails either check is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from impq_core.errors import ImpqError
from impq_core.model.arguments import Call, unlike_calls
from impq_core.model.cost import ForwardCost, flop_counter
from impq_core.model.layers import blocks_of
from impq_core.space import FloatArray, IntArray

Hidden = list[torch.Tensor]
"""Hidden states of all windows: a tensor (windows in the batch, length, width) for each batch."""

BATCH_TOKENS = 2048
"""Tokens in a batch."""

HEAD_ROWS = 64
"""Positions in one computation of logits: few enough for the processor's cache, which is twice as fast."""

UNSUPPORTED = "impq cannot run this architecture block by block yet"

CHECKED = 8
"""Number of last positions of each window at which replayed logits are compared with the model's own."""


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


@dataclass(frozen=True, eq=False)
class _Observed:
    """Record of one ordinary forward of a batch.

    Args:
        first: the first block's input.
        calls: the arguments of each block.
        leaves: their leaves after the forward.
        logits: the logits of the last positions.
    """

    first: torch.Tensor
    calls: list[Call]
    leaves: list[dict[str, Any]]
    logits: torch.Tensor


class _Stop(Exception):
    """Ends a forward at the first block."""


class BlockwiseModel:
    """Runs a model's blocks one at a time. All windows given to one object must have the same length.

    Args:
        model: the model, on the CPU and in evaluation mode.

    Raises:
        ImpqError: the model has no list of blocks, no final norm beside it, or no head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        named = blocks_of(model)
        self.blocks: list[nn.Module] = [block for _, block in named]
        parent = model.get_submodule(named[0][0].rsplit(".", 2)[0])
        norm = getattr(parent, "norm", None)
        head = model.get_output_embeddings()
        if not isinstance(norm, nn.Module) or head is None:
            part = "output head" if isinstance(norm, nn.Module) else "final norm called 'norm' beside its blocks"
            raise ImpqError(f"{self._name} has no {part}: {UNSUPPORTED}")
        self._norm, self._head = norm, head
        self._softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._costs: dict[int, ForwardCost] = {}
        accepted = inspect.signature(model.forward).parameters.values()
        self._accepted = {parameter.name for parameter in accepted}
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted):
            self._accepted.add("use_cache")

    def __len__(self) -> int:
        return len(self.blocks)

    def forward(self, ids: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """Logits (windows, ``keep``, vocabulary) of the last positions by the model's own forward; all positions if
        ``keep`` is 0. ``logits_to_keep`` and ``use_cache`` are passed only if the forward accepts them."""
        given = {"use_cache": False, "logits_to_keep": keep}
        output = self.model(input_ids=ids, **{name: value for name, value in given.items() if name in self._accepted})
        logits: torch.Tensor = output.logits[:, -keep:]
        return logits

    def embed(self, ids: IntArray) -> Hidden:
        """The first block's input for windows of token ids (windows, length).

        Raises:
            ImpqError: the blocks cannot be run one by one, which is checked on the first batch of each shape.
        """
        per_batch = max(1, BATCH_TOKENS // ids.shape[1])
        return [self._embed_batch(batch) for batch in torch.split(torch.from_numpy(np.asarray(ids)), per_batch)]

    @torch.inference_mode()
    def _embed_batch(self, ids: torch.Tensor) -> torch.Tensor:
        if (ids.shape[0], ids.shape[1]) not in self._calls:
            self._record(ids)
        inputs: list[torch.Tensor] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        hook = self.blocks[0].register_forward_pre_hook(record, with_kwargs=True)
        try:
            self.forward(ids, keep=CHECKED)
        except _Stop:
            pass
        finally:
            hook.remove()
        return inputs[0]

    def _record(self, ids: torch.Tensor) -> None:
        """Record the blocks' arguments for batches of the shape of ``ids``.

        For the first batch of a length, the arguments must be equal for a window and for its tokens in reverse, and the
        reversed window must have the model's own logits if it is replayed with the arguments of the window.
        """
        windows, length = ids.shape
        if (1, length) not in self._calls:
            window, reverse = self._observe(ids[:1]), self._observe(ids[:1].flip(1))
            if name := unlike_calls(window.leaves, reverse.leaves):
                raise ImpqError(f"{self._name} gives its blocks '{name}', which depends on the text or holds a state: "
                                f"{UNSUPPORTED}")
            self._check(reverse, window.calls)
            self._calls[1, length] = window.calls
        if windows > 1:
            batch = self._observe(ids)
            self._check(batch, batch.calls)
            self._calls[windows, length] = batch.calls

    def _observe(self, ids: torch.Tensor) -> _Observed:
        hidden: list[Any] = []
        calls: list[Call] = []
        before: list[dict[str, Any]] = []
        order: list[nn.Module] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = {name: value for name, value in kwargs.items() if args or name != "hidden_states"}
            order.append(module)
            hidden.append(args[0] if args else kwargs.get("hidden_states"))
            calls.append(Call(args[1:], named))
            before.append(calls[-1].leaves())

        hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in self.blocks]
        try:
            logits = self.forward(ids, keep=CHECKED)
        finally:
            for hook in hooks:
                hook.remove()
        if order != self.blocks or not all(isinstance(states, torch.Tensor) for states in hidden):
            raise ImpqError(f"{self._name} does more than run its blocks in order, once each, on hidden states: "
                            f"{UNSUPPORTED}")
        after = [call.leaves() for call in calls]
        if name := unlike_calls(before, after):
            raise ImpqError(f"{self._name} gives its blocks '{name}', which is a cache or is changed by them: "
                            f"{UNSUPPORTED}")
        return _Observed(hidden[0], calls, after, logits.float())

    def _check(self, observed: _Observed, calls: list[Call]) -> None:
        """Raises ImpqError if a replay with ``calls`` gives other logits than the observed forward."""
        states = observed.first
        for block, call in zip(self.blocks, calls, strict=True):
            states = _run(block, states, call)
        replayed = self.logits(states[:, -CHECKED:])
        if not (replayed - observed.logits).abs().max() <= 0.05 * observed.logits.std():
            raise ImpqError(f"{self._name} does more than run its blocks in order between embeddings and logits (such "
                            f"as scaling them): {UNSUPPORTED}")

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def cost(self, ids: IntArray) -> ForwardCost:
        """The cost of a forward over one window of the length of ``ids`` (windows, length), counted once on the first
        window."""
        length = ids.shape[1]
        if length not in self._costs:
            [hidden] = self.embed(ids[:1])
            counts = []
            for index in range(len(self)):
                with flop_counter() as counter:
                    hidden = self.run_batch(index, hidden)
                counts.append(counter.get_total_flops())
            with flop_counter() as counter:
                self.nll([hidden], ids[:1])
            self._costs[length] = ForwardCost(tuple(counts), counter.get_total_flops())
        return self._costs[length]

    @torch.inference_mode()
    def run_batch(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Output of block ``index`` for one batch of its input."""
        return _run(self.blocks[index], hidden, self._calls[hidden.shape[0], hidden.shape[1]][index])

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
        """Logits of every position that predicts a token, ``HEAD_ROWS`` rows at a time.

        Yields:
            The slice of the rows among the ``windows * (length - 1)`` scored positions; their float32 logits (rows,
            vocabulary) for ``hidden`` and each of ``more``; and the tokens (rows,) that follow them in the text.
        """
        length = ids.shape[1]
        targets = torch.from_numpy(np.asarray(ids))[:, 1:].flatten()
        first = 0
        for batches in zip(hidden, *more, strict=True):
            states = [batch[:, :length - 1].flatten(0, 1) for batch in batches]
            for start in range(0, len(states[0]), HEAD_ROWS):
                logits = [self.logits(state[start:start + HEAD_ROWS]) for state in states]
                rows = slice(first, first + len(logits[0]))
                yield rows, logits, targets[rows]
                first += len(logits[0])

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
        nll = np.empty(ids.shape[0] * (ids.shape[1] - 1))
        for rows, (logits,), targets in self.scored(hidden, ids):
            nll[rows] = functional.cross_entropy(logits, targets, reduction="none").double().numpy()
        return nll.reshape(ids.shape[0], -1)


def _run(block: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    output = block(hidden, *call.positional, **call.named)
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states
