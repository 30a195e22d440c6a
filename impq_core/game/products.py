"""What a probe reads of a linear in a pass: its outputs, or products of a gradient with changes of its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from impq_core.space import LinearSpec

Product = Callable[[torch.Tensor, torch.Tensor, Sequence[torch.Tensor]], list[torch.Tensor]]
"""A number for each change of a linear's weight, from its inputs (tokens, columns) in one window and the gradients of
the window's loss in its outputs (tokens, rows)."""

Changes = Callable[[LinearSpec], Iterable[torch.Tensor]]
"""Returns changes (rows, columns) of a linear's weight on the device, float32; the same number for every linear. Called
while the linear's block is loaded."""


class Mixed(Exception):
    """A linear's input holds tokens of several windows, without their windows."""


@contextmanager
def keeping_first(modules: Mapping[LinearSpec, nn.Module],
                  found: dict[LinearSpec, list[torch.Tensor]]) -> Iterator[None]:
    """The context in which the outputs of the first of some modules to run, and of those on the same input, are added
    to ``found``; for one forward."""
    first: list[torch.Tensor] = []

    def hook(linear: LinearSpec) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def forward(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not first:
                first.append(args[0])
            if args[0] is first[0]:
                found.setdefault(linear, []).append(output)
        return forward

    handles = [module.register_forward_hook(hook(linear)) for linear, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inner_products(inputs: torch.Tensor, outputs: torch.Tensor,
                   changes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Inner products with the gradient of one window.

    That is the product of the linear's output gradients and its inputs, in the model's type: on the demo model,
    rounding to bfloat16 moves slopes by 0.2 %. It is multiplied with every change in float32 and then dropped, so that
    gradients of several windows never exist at once.
    """
    gradient = (outputs.T @ inputs).flatten().float()
    return [gradient.dot(change.flatten().float()) for change in changes]


def sums_of_absolute(inputs: torch.Tensor, outputs: torch.Tensor,
                     changes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Sums of the absolute terms of the inner products."""
    gradient = (outputs.T @ inputs).float()
    return [(gradient * change).abs().sum() for change in changes]


def sums_of_squares(inputs: torch.Tensor, outputs: torch.Tensor,
                    changes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Sums over tokens of the square of a token's share of the inner product."""
    return [shares_of_tokens(inputs, outputs, change).square().sum() for change in changes]


def shares_of_tokens(inputs: torch.Tensor, outputs: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """The share (tokens,) of each token in the inner product with a change (rows, columns)."""
    return ((inputs @ change.to(inputs.dtype).T).float() * outputs.float()).sum(dim=1)


def by_window(inputs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """A linear's inputs as (windows, tokens, columns); raises Mixed if their shape does not separate the windows.

    Args:
        inputs: (windows, ..., columns), (windows * length, columns), or, for a single window, (..., columns).
        ids: the batch (windows, length).
    """
    (count, length), columns = ids.shape, inputs.shape[-1]
    rows = inputs.numel() // columns
    if count == 1 or (inputs.dim() > 2 and len(inputs) == count) or (inputs.dim() == 2 and rows == count * length):
        return inputs.reshape(count, rows // count, columns)
    raise Mixed
