"""Quantization of a model into a bank, block after block: at every width for a search, or one plan in sequence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch
from torch import nn

from impq_core.errors import ImpqError
from impq_core.interfaces import Statistics, Variant
from impq_core.model.backward import token_weights
from impq_core.model.bank import Assignment, Bank
from impq_core.model.blockwise import BlockwiseModel, Hidden
from impq_core.model.calibration import Inputs, block_inputs, head_statistics, input_statistics, stages
from impq_core.model.threads import side_by_side
from impq_core.space import Choice, IntArray, LinearSpec

FEWEST = 32
"""Tokens that must reach a linear for its statistics to be used; as many as a group has weights if there are groups."""

Wanted = Sequence[tuple[LinearSpec, Choice]]
"""Variants that are to be made."""


class Filling:
    """Quantizes the linears of a bank, block after block. Variants on the bank's shelf are not made again.

    The statistics of a block are collected once, behind a prefix, and are used for every width: the Hessian of GPTQ
    does not depend on the linear's own width. (It does depend on the widths of the blocks before; a bank needs one
    prefix. The widest choices are nearest to the plans of interest; behind the unquantized model every block can be
    quantized without waiting for another.) A linear that fewer tokens reach than a group has weights, such as a rarely
    used expert, is quantized as if no token reached it.

    An embedding is quantized in front of the blocks, also as if no token reached it: it reads numbers of tokens. The
    head is quantized behind them, and so is an embedding that is tied to it: the statistics are those of the head's
    inputs, and the blocks' are behind the unquantized embedding.

    Args:
        bank: the bank to fill.
        runner: the same model, block by block.
        ids: token ids (windows, length) of the calibration text; None for a backend that needs no activations.
        menus: choices of each of the bank's layers, widest first; an empty menu leaves the layer unquantized.
        further: choices beyond its layer's menu that a linear is also quantized to, by its name.
        unquantized: whether the prefix is the unquantized model; else it is at the widest choices.

    Attributes:
        blocks: numbers of the places to fill, in order: -1 is the embedding, and behind the last block is the head.
    """

    def __init__(self, bank: Bank, runner: BlockwiseModel, ids: IntArray | None, menus: Sequence[Sequence[Choice]],
                 further: Mapping[str, Sequence[Choice]] = MappingProxyType({}), unquantized: bool = False) -> None:
        self._bank, self._runner, self._ids, self._menus, self._further = bank, runner, ids, menus, further
        self._unquantized = unquantized
        self._places = _places(bank, runner)
        self.blocks = range(-1, len(runner) + 1)
        self._weights: Mapping[nn.Module, torch.Tensor] = {}
        if "gradients" in bank.backend.needs:  # they are those of the unquantized model
            every = [spec for block in self.blocks for spec, _ in self.missing(block)]
            self._weights = _token_weights(bank, runner, ids, every)
        self._at, self._hidden = 0, None if ids is None else runner.embed(ids)

    def missing(self, index: int, widest: bool = False) -> list[tuple[LinearSpec, Choice]]:
        """The variants of a place that neither bank nor shelf has; with ``widest``, only those that the blocks behind
        it wait for."""
        bank = self._bank
        return [(spec, choice) for layer in self._layers(index) for spec in bank.layers[layer].linears
                for choice in dict.fromkeys(
                    bank.backend.stand_in(spec, wanted) for wanted in (
                        self._menus[layer][:1] if widest else [*self._menus[layer], *self._further.get(spec.name, ())]))
                if not (bank.has(spec, choice) or bank.take(spec, choice))]

    def make(self, index: int, wanted: Wanted) -> None:
        """Quantize linears of a place. The variants of the prefix must be in the bank or on its shelf. Places must come
        in ascending order; one may come again.

        Raises:
            ImpqError: the backend cannot quantize a linear, which the message names.
        """
        if not wanted:
            return
        if self._hidden is not None:
            for block in range(self._at, min(index, len(self._runner))):
                self.missing(block, widest=True)  # takes them from the shelf
                self.settle(block)
                self._hidden = self._runner.run(block, self._hidden)
                self._at = block + 1
        for layer in self._layers(index):
            self._bank.switch(layer, None)
        statistics: Mapping[nn.Module, Statistics] = {}
        if self._hidden is not None:
            statistics = _statistics(self._bank, self._runner, index, self._hidden, [spec for spec, _ in wanted],
                                     weights=self._weights)
        _make(self._bank, self._runner, wanted, statistics)

    def settle(self, index: int) -> None:
        """Let the layers of a place have the weights that the blocks behind it are quantized behind."""
        for layer in self._layers(index):
            menu = [] if self._unquantized else self._menus[layer][:1]
            self._bank.switch(layer, menu[0] if menu else None)

    def report_unreached(self) -> None:
        """One warning about the variants with ``unreached`` in their record."""
        _report_unreached(self._bank, [spec for layer, menu, place in zip(
            self._bank.layers, self._menus, self._places, strict=True) for spec in layer.linears if place >= 0
            and any(self._bank.record(spec, choice).get("unreached") for choice in menu)])

    def _layers(self, index: int) -> list[int]:
        return [i for i, place in enumerate(self._places) if place == index]


def fill_bank(bank: Bank, runner: BlockwiseModel, ids: IntArray | None, menus: Sequence[Sequence[Choice]],
              progress: Callable[[int, int], None],
              further: Mapping[str, Sequence[Choice]] = MappingProxyType({}), unquantized: bool = False) -> None:
    """Quantize every linear at every choice of its layer's menu, block after block, see ``Filling``. Afterwards every
    layer of the model is as in the prefix. One warning reports the variants with ``unreached`` in their record.

    Args:
        bank, runner, ids, menus, further, unquantized: see ``Filling``.
        progress: called with the number of finished blocks and the number of all blocks.

    Raises:
        ImpqError: the backend cannot quantize a linear, which the message names.
    """
    progress(0, len(runner))
    filling = Filling(bank, runner, ids, menus, further, unquantized)
    for index in filling.blocks:
        filling.make(index, filling.missing(index))
        filling.settle(index)
        if 0 <= index < len(runner):
            progress(index + 1, len(runner))
    filling.report_unreached()


def quantize_in_sequence(bank: Bank, runner: BlockwiseModel, ids: IntArray | None, assignment: Assignment,
                         progress: Callable[[int, int], None]) -> None:
    """Quantize the linears of one plan, each block behind the quantized blocks in front of it, as an export stores
    them. Afterwards the model has the plan's weights.

    If the backend needs ``drift``, the unquantized model runs beside the quantized one. If it has ``stages``, the
    statistics of a block are collected anew behind the quantized linears of the same block. An embedding that is not
    tied to the head is quantized first, and the blocks' statistics are those behind it.

    Memory: with ``drift``, a second set of hidden states, and the inputs of a block's linears over all windows.

    Args:
        bank: a bank without variants.
        runner: the same model, block by block.
        ids: token ids (windows, length) of the calibration text; None for a backend that needs no activations.
        assignment: a choice for each of the bank's layers; None leaves the layer unquantized.
        progress: called with the number of finished blocks and the number of all blocks.

    Raises:
        ImpqError: the backend cannot quantize a linear, which the message names.
    """
    progress(0, len(runner))
    backend = bank.backend
    hidden = exact = None if ids is None else runner.embed(ids)
    if "drift" not in backend.needs:
        exact = None
    places = _places(bank, runner)
    weights = _token_weights(bank, runner, ids, [spec for layer, choice in zip(bank.layers, assignment, strict=True)
                                                 if choice for spec in layer.linears])
    for index in range(-1, len(runner) + 1):
        layers = [i for i, place in enumerate(places) if place == index and assignment[i]]
        wanted = {spec: backend.stand_in(spec, choice) for i in layers for spec in bank.layers[i].linears
                  if (choice := assignment[i])}
        inside = 0 <= index < len(runner)
        inputs, following = _unquantized_inputs(bank, runner, index, exact, list(wanted)) if inside else (None, None)
        for part in _in_stages(bank, runner, index, hidden, list(wanted)) if inside and backend.stages else [
                list(wanted)]:
            statistics = {} if hidden is None or not part else _statistics(
                bank, runner, index, hidden, part, inputs, exact, weights)
            _make(bank, runner, [(spec, wanted[spec]) for spec in part], statistics)
            for spec in part:
                bank.put(spec, wanted[spec])
        if index < 0 and wanted and ids is not None:
            hidden = runner.embed(ids)
        if inside:
            if hidden is not None and index + 1 <= max(places):
                hidden = runner.run(index, hidden)
            exact = following
            progress(index + 1, len(runner))
    _report_unreached(bank, [spec for layer, choice, place in zip(bank.layers, assignment, places, strict=True)
                             if choice and place >= 0 for spec in layer.linears
                             if bank.record(spec, choice).get("unreached")])


def _unquantized_inputs(bank: Bank, runner: BlockwiseModel, index: int, exact: Hidden | None,
                        linears: Sequence[LinearSpec]) -> tuple[list[Inputs] | None, Hidden | None]:
    """The inputs of linears of a block in the unquantized model, and the block's output, for its input there."""
    if exact is None:
        return None, None
    with runner.placement.unreplaced():
        return block_inputs(runner, index, exact, [bank.module(spec) for spec in linears])


def _in_stages(bank: Bank, runner: BlockwiseModel, index: int, hidden: Hidden | None,
               linears: Sequence[LinearSpec]) -> list[list[LinearSpec]]:
    """Linears of a block in the stages of its forward."""
    if hidden is None or not linears:
        return [list(linears)]
    of_module: dict[nn.Module, LinearSpec] = {bank.module(spec): spec for spec in linears}
    return [[of_module[module] for module in stage] for stage in stages(runner, index, hidden, list(of_module))]


def _token_weights(bank: Bank, runner: BlockwiseModel, ids: IntArray | None,
                   linears: Sequence[LinearSpec]) -> Mapping[nn.Module, torch.Tensor]:
    """The weights (tokens, row groups) of tokens for each linear of a block, with a mean of 1, if the backend needs
    ``gradients``. The model must have its unquantized weights. The largest thousandth of the weights is cut off: their
    tail is so heavy that a few tokens would decide.

    Raises:
        ImpqError: a router sends only some of the tokens to a linear.
    """
    if ids is None or "gradients" not in bank.backend.needs:
        return {}
    modules = {bank.module(spec): spec for spec in linears}
    inside = {module for block in runner.blocks for module in block.modules()}
    found = token_weights(runner, ids, {module: module for module in modules if module in inside},
                          bank.backend.row_groups)
    weights: dict[nn.Module, torch.Tensor] = {}
    for module, weight in found.items():
        if len(weight) != ids.size:
            raise ImpqError(f"{len(weight)} of {ids.size} tokens of the calibration text reach {modules[module].name}: "
                            "tokens cannot be weighted by gradients in a mixture of experts, whose routers may send "
                            "others to a linear once the layers in front of it are quantized")
        largest = weight.flatten().kthvalue(max(1, math.ceil(0.999 * weight.numel()))).values
        weight = weight.clamp(max=largest)
        weights[module] = weight / weight.mean(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    return weights


def _places(bank: Bank, runner: BlockwiseModel) -> list[int]:
    """For each layer the number of its block; -1 for an embedding that is not tied, and the number behind the last
    block for the head."""
    return [len(runner) if i == bank.head else layer.block for i, layer in enumerate(bank.layers)]


def _report_unreached(bank: Bank, linears: Sequence[LinearSpec]) -> None:
    if linears:
        warnings.warn(f"{len(linears)} linears (first: {linears[0].name}) are quantized without statistics: hardly "
                      "a token of the calibration text reaches them; more calibration text may", RuntimeWarning,
                      stacklevel=3)


def _make(bank: Bank, runner: BlockwiseModel, wanted: Wanted, statistics: Mapping[nn.Module, Statistics]) -> None:
    """Quantize linears of a block, and put the variants into the bank."""
    tasks = [partial(_quantize, bank, runner, some, seen) for some, seen in _shared(
        wanted, [statistics.get(bank.module(spec)) for spec, _ in wanted])]
    # A task at a time on an accelerator, whose work is side by side already.
    for made in side_by_side(tasks) if _where(bank, runner).type == "cpu" else (task() for task in tasks):
        for spec, variant in made:
            bank.add(spec, variant)


def _statistics(bank: Bank, runner: BlockwiseModel, index: int, hidden: Hidden, linears: Sequence[LinearSpec],
                inputs: Sequence[Inputs] | None = None,
                exact: Hidden | None = None,
                weights: Mapping[nn.Module, torch.Tensor] = MappingProxyType({})) -> Mapping[nn.Module, Statistics]:
    """Statistics of the inputs of linears of a block, of the embedding (index -1) or of the head, by module; ``inputs``
    and ``exact`` are those of the unquantized model, for the drift, and ``weights`` are those of tokens."""
    modules = {bank.module(spec): spec.columns for spec in linears}
    if index < 0:
        return {module: Statistics(torch.zeros(columns, columns, device=runner.device), 0)
                for module, columns in modules.items()}
    if index == len(runner):
        statistics = head_statistics(runner, hidden, exact)
        return {module: statistics for module in modules}
    return input_statistics(runner, index, hidden, [module for module in modules if isinstance(module, nn.Linear)],
                            inputs, {module: weights[module] for module in modules if module in weights})


def _shared(wanted: Wanted, statistics: Sequence[Statistics | None]) -> Iterator[tuple[Wanted, Statistics | None]]:
    """The variants in groups of linears with the same statistics; each linear without statistics is a group."""
    groups: dict[object, tuple[list[tuple[LinearSpec, Choice]], Statistics | None]] = {}
    for (spec, choice), seen in zip(wanted, statistics, strict=True):
        groups.setdefault(spec if seen is None else id(seen), ([], seen))[0].append((spec, choice))
    yield from groups.values()


def _quantize(bank: Bank, runner: BlockwiseModel, wanted: Wanted,
              seen: Statistics | None) -> list[tuple[LinearSpec, Variant]]:
    """Quantize linears that share their statistics, on the device if the backend can."""
    device = _where(bank, runner)
    weights = {spec: bank.original(spec).to(device) for spec, _ in wanted}
    made: list[tuple[LinearSpec, Variant]] = []
    few: list[tuple[LinearSpec, Choice]] = []
    enough: list[tuple[LinearSpec, Choice]] = []
    for spec, choice in wanted:
        (few if seen and seen.tokens < (choice.group_size or FEWEST) else enough).append((spec, choice))
    for some, tokens in ((few, 0), (enough, seen.tokens if seen else 0)):
        statistics = seen and _on(device, seen, tokens)
        if some:
            made += bank.backend.quantize_together(weights, some, statistics)
    return made


def _on(device: torch.device, seen: Statistics, tokens: int) -> Statistics:
    """Statistics on a device; those of no token if ``tokens`` is 0."""
    if not tokens:
        return Statistics(torch.zeros_like(seen.gram, device=device), 0)
    return replace(seen, gram=seen.gram.to(device), guided=None if seen.guided is None else seen.guided.to(device),
                   drift=None if seen.drift is None else seen.drift.to(device))


def _where(bank: Bank, runner: BlockwiseModel) -> torch.device:
    """The device on which the backend works."""
    return runner.device if runner.device.type in bank.backend.devices else torch.device("cpu")
