"""Statistics of the inputs of a block's linears over the calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import nn

from impq_core.interfaces import Statistics
from impq_core.model.blockwise import BlockwiseModel, Hidden

Inputs = dict[nn.Module, torch.Tensor]
"""Inputs (tokens, columns) of linears in one batch: of every token, in order. A linear to which a router sends some of
the tokens has none."""


@contextmanager
def _watching(linears: Iterable[nn.Module],
              seen: Callable[[nn.Module, torch.Tensor], None]) -> Iterator[dict[nn.Module, nn.Module]]:
    """The context in which ``seen`` is called once with each input of linears, and with the first module that reads it.
    The context has that module for each linear that was reached: q, k and v read one input, and gate and up."""
    leaders: dict[nn.Module, nn.Module] = {}
    last: list[tuple[torch.Tensor, nn.Module]] = []

    def watch(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not (last and last[0][0] is args[0]):
            last[:] = [(args[0], module)]
            seen(module, args[0].reshape(-1, args[0].shape[-1]))
        leaders[module] = last[0][1]

    hooks = [linear.register_forward_pre_hook(watch) for linear in linears]
    try:
        yield leaders
    finally:
        last.clear()
        for hook in hooks:
            hook.remove()


def block_inputs(runner: BlockwiseModel, index: int, hidden: Hidden,
                 linears: Sequence[nn.Module]) -> tuple[list[Inputs], Hidden]:
    """The inputs of linears of block ``index`` in each batch, and the block's output. Linears that share an input have
    one tensor.

    Args:
        runner: the model.
        index: number of the block.
        hidden: the block's input.
        linears: modules of the block.
    """
    found, outputs = [], []
    with runner.placement.loaded(index):
        for batch in hidden:
            inputs: dict[nn.Module, list[torch.Tensor]] = {}

            def keep(module: nn.Module, x: torch.Tensor, inputs: dict[nn.Module, list[torch.Tensor]] = inputs) -> None:
                inputs.setdefault(module, []).append(x)

            with _watching(linears, keep) as leaders:
                outputs.append(runner.run_batch(index, batch))
            found.append({module: inputs[leader][0] for module, leader in leaders.items()
                          if len(inputs[leader]) == 1 and len(inputs[leader][0]) == batch.ids.numel()})
    return found, outputs


def input_statistics(runner: BlockwiseModel, index: int, hidden: Hidden, linears: Iterable[nn.Linear],
                     unquantized: Sequence[Inputs] | None = None,
                     weights: Mapping[nn.Module, torch.Tensor] = MappingProxyType({})) -> dict[nn.Module, Statistics]:
    """Run block ``index`` once over its input and sum x xT over the inputs x of each linear.

    Linears with the same input tensor (q, k and v; gate and up) share their statistics. If no token reaches a linear,
    its matrix is zero and its number of tokens is 0.

    Args:
        runner: the model.
        index: number of the block.
        hidden: the block's input.
        linears: modules of the block.
        unquantized: inputs of the same linears in the unquantized model, for the drift.
        weights: weights (tokens, row groups) of all tokens for each linear, for ``Statistics.guided``.

    Returns:
        The statistics by module, on the device; the matrices are float32 (columns, columns).
    """
    linears = tuple(linears)
    grams: dict[nn.Module, torch.Tensor] = {}
    drifts: dict[nn.Module, torch.Tensor] = {}
    tokens: dict[nn.Module, int] = {}
    shared: dict[nn.Module, nn.Module] = {}
    paired: dict[nn.Module, int] = {}  # tokens in the drift
    guided: dict[nn.Module, torch.Tensor] = {}
    first = 0  # token of the batch

    with runner.placement.loaded(index):
        for number, batch in enumerate(hidden):
            exact = unquantized[number] if unquantized else {}
            inputs: Inputs = {}

            def add(module: nn.Module, x: torch.Tensor, exact: Inputs = exact, inputs: Inputs = inputs) -> None:
                rows = x.float()
                if weights:
                    inputs[module] = rows
                _accumulate(grams, module, rows.T @ rows)
                tokens[module] = tokens.get(module, 0) + len(rows)
                if module in exact and len(exact[module]) == len(rows):
                    _accumulate(drifts, module, (exact[module].float() - rows).T @ rows)
                    paired[module] = paired.get(module, 0) + len(rows)

            with _watching(linears, add) as leaders:
                runner.run_batch(index, batch)
            shared |= leaders
            for linear in weights.keys() & leaders.keys():
                rows = inputs[leaders[linear]]
                _accumulate(guided, linear, torch.stack([
                    (rows * weight[:, None]).T @ rows for weight in weights[linear][first:first + len(rows)].T]))
            first += batch.ids.numel()
    found = {module: Statistics(gram, tokens[module],
                                drift=drifts[module] if paired.get(module) == tokens[module] else None)
             for module, gram in grams.items()}
    reached: dict[nn.Module, Statistics] = {linear: found[shared[linear]] for linear in linears if linear in shared}
    reached |= {linear: replace(reached[linear], guided=gram) for linear, gram in guided.items()}
    return {linear: reached.get(linear) or Statistics(
        torch.zeros(linear.in_features, linear.in_features, device=runner.device), 0) for linear in linears}


def _accumulate(sums: dict[nn.Module, torch.Tensor], module: nn.Module, term: torch.Tensor) -> None:
    sums[module] = sums[module] + term if module in sums else term


def stages(runner: BlockwiseModel, index: int, hidden: Hidden, linears: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """The linears of a block in the order in which the forward reaches their inputs. Linears whose inputs are those of
    modules of one name, such as the down projections of all experts, are together; those that no token of the first
    batch reaches are with the ones of their name, or else in the last stage."""
    with runner.placement.loaded(index), _watching(linears, lambda module, x: None) as leaders:
        runner.run_batch(index, hidden[0])
    names = {module: name.rpartition(".")[2] for name, module in runner.blocks[index].named_modules()}
    found: dict[str, list[nn.Module]] = {names[leader]: [] for leader in leaders.values()}
    of_name = {names[module]: names[leader] for module, leader in leaders.items()}
    for linear in linears:
        stage = names[leaders[linear]] if linear in leaders else of_name.get(names[linear], "")
        found.setdefault(stage, []).append(linear)
    return list(found.values())


def head_statistics(runner: BlockwiseModel, hidden: Hidden, unquantized: Hidden | None = None) -> Statistics:
    """The sum of x xT over the inputs x of the head at every position, and their number.

    Args:
        runner: the model.
        hidden: output of the last block.
        unquantized: that of the unquantized model, for the drift.
    """
    def inputs(states: Hidden, number: int) -> torch.Tensor:
        batch = states[number]
        return runner.forward.head_inputs(batch.ids.flatten(), runner.forward.rows(batch.states)).float()

    gram, drift, tokens = torch.zeros((), device=runner.device), torch.zeros((), device=runner.device), 0
    for number in range(len(hidden)):
        rows = inputs(hidden, number)
        gram, tokens = gram + rows.T @ rows, tokens + len(rows)
        if unquantized is not None:
            drift = drift + (inputs(unquantized, number) - rows).T @ rows
    return Statistics(gram, tokens, drift=None if unquantized is None else drift)
