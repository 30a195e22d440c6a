"""Backward passes, block by block: the gradients of a loss in the outputs of the blocks' linears."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional

from impq_core.model.blockwise import BlockwiseModel, Hidden
from impq_core.model.device import repeatable
from impq_core.space import FloatArray, IntArray

BATCH_TOKENS = 1024
"""Tokens in a backward pass through a block."""

Key = TypeVar("Key")

Watch = Callable[[Key, torch.Tensor], Callable[[torch.Tensor], None]]
"""Called with a linear and its inputs, detached, when it runs. Returns what is called with the gradient in its output,
unless the loss does not depend on that."""


@dataclass(eq=False)
class Rows:
    """The rows that logits are computed of: the number of the first among those of all windows, and their number."""

    first: int = 0
    count: int = 0


@dataclass(frozen=True, eq=False)
class Stage:
    """A block to be run backwards, or all blocks of a model without partial forwards.

    Args:
        first: the first of its blocks.
        last: the last of them.
        batches: its inputs.
        run: runs the batch with a number forward once more, with a graph, and backwards; once for each batch.
    """

    first: int
    last: int
    batches: Hidden
    run: Callable[[int], None]


class Backward:
    """The backward pass of some windows, for the sum over windows of the mean loss of a token.

    The states in front of every block are kept. Then, from the last block to the first, a block's forward is run again
    with a graph, and backwards: the graph of one block and one batch exists at a time. A model without partial forwards
    is run as if it were one block.

    Args:
        runner: the model, with the weights that the gradients are taken at.
        ids: token ids (windows, length).
        tokens: tokens in a batch.
        weights: (windows, length - 1), of the predicted tokens in the mean of a window; None for 1.
    """

    def __init__(self, runner: BlockwiseModel, ids: IntArray, tokens: int = BATCH_TOKENS,
                 weights: FloatArray | None = None) -> None:
        self._runner, self._ids, last = runner, ids, len(runner) - 1
        self._weights = None if weights is None else torch.from_numpy(weights).float().to(runner.device).flatten()
        runner.learn_backward(ids)
        inputs = [runner.embed(ids, tokens)]
        self._parts = [(block, block) for block in range(last + 1)] if runner.partial else [(0, last)]
        for first, _ in self._parts[:-1]:
            inputs.append(runner.run(first, inputs[-1]))
        self._inputs, self._outputs = inputs, runner.run(last, inputs[-1])

    def head(self, reference: torch.Tensor | None = None, rows: Rows | None = None) -> list[torch.Tensor]:
        """The gradient in the last block's output, by batch. Logits exist for a few positions at a time.

        Args:
            reference: the last hidden states of the unquantized model for the same windows, for the divergence from it;
                None for the negative log-likelihood.
            rows: told which rows the next logits are of.
        """
        forward, scored = self._runner.forward, self._ids.shape[1] - 1
        rows = rows or Rows()
        gradients, window, done, plain = [], 0, 0, self._weights is None
        for batch in self._outputs:
            count, axis = len(batch.ids), forward.axis
            states, target_rows = forward.rows(batch.states, scored), None
            if reference is not None:
                unquantized = reference.narrow(axis, window, count)
                target_rows = forward.rows(unquantized.to(states.dtype), scored)  # float32 for hawq
            tokens, followed = batch.ids[:, :-1].flatten(), batch.ids[:, 1:].flatten()
            parts = []
            for first in range(0, len(tokens), self._runner.head_rows):
                some = slice(first, first + self._runner.head_rows)
                size = len(tokens[some])
                rows.first, rows.count = done + first, size
                leaf = states.narrow(axis, first, size).clone().requires_grad_()
                logits = forward.logits(tokens[some], leaf)
                if target_rows is None:
                    losses = functional.cross_entropy(logits, followed[some], reduction="sum" if plain else "none")
                else:
                    with self._runner.placement.unreplaced_outside():
                        target = forward.logits(tokens[some], target_rows.narrow(axis, first, size)).log_softmax(dim=-1)
                    losses = functional.kl_div(logits.log_softmax(dim=-1), target, reduction="sum" if plain else "none",
                                               log_target=True)
                if self._weights is not None:
                    weights = self._weights[rows.first:rows.first + size]
                    losses = (losses.flatten(1).sum(dim=1) if losses.dim() > 1 else losses) @ weights
                with repeatable(self._runner.device):
                    (losses / scored).backward()  # type: ignore[no-untyped-call]
                assert leaf.grad is not None
                parts.append(leaf.grad)
            gradients.append(forward.from_rows(torch.cat(parts, dim=axis), count, scored + 1))
            window += count
            done += len(tokens)
        return gradients

    def stages(self, gradients: list[torch.Tensor]) -> Iterator[Stage]:
        """The stages from the last to the first, each while its blocks are loaded; once.

        Args:
            gradients: what ``head`` returned; replaced by the gradients in the inputs of each stage.
        """
        for first, last in reversed(self._parts):
            batches = self._inputs.pop()

            def run(number: int, first: int = first, last: int = last, batches: Hidden = batches) -> None:
                batch = batches[number]
                found = self._runner.forward.backward(batch.ids, first, batch.states if first else None, last,
                                                      gradients[number])
                if found is not None:
                    gradients[number] = found

            with self._runner.placement.loaded(*range(first, last + 1)):
                yield Stage(first, last, batches, run)


def inside(runner: BlockwiseModel, stage: Stage, modules: Mapping[Key, nn.Module]) -> dict[Key, nn.Module]:
    """Those of some modules that a stage's blocks have."""
    there = {module for block in runner.blocks[stage.first:stage.last + 1] for module in block.modules()}
    return {key: module for key, module in modules.items() if module in there}


@contextmanager
def watching(modules: Mapping[Key, nn.Module], watch: Watch[Key]) -> Iterator[None]:
    """The context in which ``watch`` sees the inputs of some linears, and the gradients in their outputs."""
    def hook(key: Key) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def forward(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            backward = watch(key, args[0].detach())
            if output.requires_grad:
                output.register_hook(backward)  # type: ignore[no-untyped-call]
        return forward

    handles = [module.register_forward_hook(hook(key)) for key, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_room(runner: BlockwiseModel, ids: IntArray, tokens: int = BATCH_TOKENS) -> Iterator[slice]:
    """Slices of the windows ``ids`` (windows, length) whose states in front of every block fit the model's room; at
    least a batch of ``tokens`` tokens each."""
    per_batch = max(1, tokens // ids.shape[1])
    room = runner.room // ((len(runner) + 1) * runner.state_bytes(ids))
    some = max(1, room // per_batch) * per_batch
    return (slice(first, first + some) for first in range(0, len(ids), some))


def squared_gradients(gradient: torch.Tensor, scored: int, groups: int) -> torch.Tensor:
    """Mean squares (tokens, groups) of the gradient of the token-summed loss in a linear's outputs, float32.

    Args:
        gradient: (..., rows), of the sum over windows of the mean loss of a token.
        scored: scored tokens of a window.
        groups: number of groups that the rows are split into, in order.
    """
    squares = (gradient.reshape(-1, gradient.shape[-1]).float() * scored).square()
    return torch.stack([part.mean(dim=1) for part in squares.tensor_split(groups, dim=1)], dim=1)


def token_weights(runner: BlockwiseModel, ids: IntArray, linears: Mapping[Key, nn.Module],
                  groups: int = 1) -> dict[Key, torch.Tensor]:
    """How much the loss depends on each linear's output at each token (GuidedQuant, arXiv 2505.07004):
    ``s_tg = mean over the rows of group g of (dL/dz_t)^2``, with L the token-summed negative log-likelihood and z the
    linear's output, at the model's current weights. Costs about three forwards.

    Args:
        runner: the model.
        ids: token ids (windows, length).
        linears: modules inside blocks, each in one block, by any key.
        groups: number of groups that the rows of a linear are split into, in order.

    Returns:
        By key, float32 (tokens, groups) on the device, in the order in which a forward of the windows calls the linear
        with them; 0 where the loss does not depend on the output, and without rows if no token reaches it.
    """
    found: dict[Key, list[torch.Tensor]] = {key: [] for key in linears}
    scored = ids.shape[1] - 1
    for some in by_room(runner, ids):
        backward = Backward(runner, ids[some])
        for stage in backward.stages(backward.head()):
            called: dict[Key, list[torch.Tensor]] = {}

            def watch(key: Key, inputs: torch.Tensor,
                      called: dict[Key, list[torch.Tensor]] = called) -> Callable[[torch.Tensor], None]:
                calls = called.setdefault(key, [])
                place = len(calls)
                calls.append(torch.zeros(inputs.numel() // inputs.shape[-1], groups, device=inputs.device))

                def seen(gradient: torch.Tensor) -> None:
                    calls[place] = squared_gradients(gradient, scored, groups)
                return seen

            with watching(inside(runner, stage, linears), watch):
                for number in range(len(stage.batches)):
                    stage.run(number)
            for key, calls in called.items():
                found[key] += calls
    return {key: torch.cat(calls) if calls else torch.zeros(0, groups, device=runner.device)
            for key, calls in found.items()}
