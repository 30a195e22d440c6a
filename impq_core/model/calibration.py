"""Statistics of the inputs of a block's linears over the calibration text."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from impq_core.interfaces import Statistics
from impq_core.model.blockwise import BlockwiseModel, Hidden


def input_statistics(runner: BlockwiseModel, index: int, hidden: Hidden,
                     linears: Iterable[nn.Linear]) -> dict[nn.Module, Statistics]:
    """Run block ``index`` once over its input and sum x xT over the inputs x of each linear.

    Linears with the same input tensor (q, k and v; gate and up) share their statistics. If no token reaches a linear,
    its matrix is zero and its number of tokens is 0.

    Args:
        runner: the model.
        index: number of the block.
        hidden: the block's input.
        linears: modules of the block.

    Returns:
        The statistics by module, on the device; the matrices are float32 (columns, columns).
    """
    linears = tuple(linears)
    grams: dict[nn.Module, torch.Tensor] = {}
    tokens: dict[nn.Module, int] = {}
    leaders: dict[nn.Module, nn.Module] = {}  # the first module with the same input
    last: list[tuple[torch.Tensor, nn.Module]] = []

    def watch(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0]
        if not (last and last[0][0] is x):
            last[:] = [(x, module)]
            rows = x.reshape(-1, x.shape[-1]).float()
            gram = rows.T @ rows
            grams[module] = grams[module] + gram if module in grams else gram
            tokens[module] = tokens.get(module, 0) + len(rows)
        leaders[module] = last[0][1]

    hooks = [linear.register_forward_pre_hook(watch) for linear in linears]
    try:
        with runner.placement.loaded(index):
            for batch in hidden:
                runner.run_batch(index, batch)
                last.clear()
    finally:
        for hook in hooks:
            hook.remove()
    shared = {leader: Statistics(gram, tokens[leader]) for leader, gram in grams.items()}
    reached = {module: shared[leader] for module, leader in leaders.items()}
    return {linear: reached.get(linear) or Statistics(
        torch.zeros(linear.in_features, linear.in_features, device=runner.device), 0) for linear in linears}


def head_statistics(runner: BlockwiseModel, hidden: Hidden) -> Statistics:
    """The sum of x xT over the inputs x of the head at every position, and their number.

    Args:
        runner: the model.
        hidden: output of the last block.
    """
    gram, tokens = torch.zeros((), device=runner.device), 0
    for batch in hidden:
        inputs = runner.forward.head_inputs(batch.ids.flatten(), runner.forward.rows(batch.states)).float()
        gram = gram + inputs.T @ inputs
        tokens += len(inputs)
    return Statistics(gram, tokens)
