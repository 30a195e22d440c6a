"""Every linear at every width, quantized once and stored packed; switching a layer is unpacking a weight."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from impq_core.blockwise import BlockwiseModel, Hidden
from impq_core.errors import ImpqError
from impq_core.files import write_text
from impq_core.interfaces import Backend, Statistics, Variant
from impq_core.types import Choice, LayerSpec, LinearSpec

Assignment = Sequence[Choice | None]
"""A choice for each layer of the bank; None is the unquantized weight."""


class Bank:
    """The variants of a model's layers, and the switch between them.

    Args:
        model: the model whose linears are switched in place.
        layers: the players, in order.
        backend: who made the variants and unpacks them.
        dtype: of the weights given to the model.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LayerSpec], backend: Backend, dtype: torch.dtype) -> None:
        self.layers = tuple(layers)
        self.backend = backend
        self._dtype = dtype
        self._modules = {spec.name: _linear(model, spec.name) for layer in layers for spec in layer.linears}
        self._originals = {name: module.weight.data for name, module in self._modules.items()}
        self._variants: dict[tuple[str, Choice], Variant] = {}
        self._current: dict[str, Choice | None] = dict.fromkeys(self._modules)

    def module(self, linear: LinearSpec) -> nn.Linear:
        """The model's own module."""
        return self._modules[linear.name]

    def original(self, linear: LinearSpec) -> torch.Tensor:
        """The unquantized weight (rows, columns) in float32; raises ImpqError where it is not finite."""
        weight = self._originals[linear.name].float()
        if not torch.isfinite(weight).all():
            raise ImpqError(f"the model's weight {linear.name} holds NaN or infinity")
        return weight

    def add(self, linear: LinearSpec, variant: Variant) -> None:
        """Keep a variant; raises ImpqError where its size is not what the backend said it would be."""
        promised = self.backend.nbytes(linear, variant.choice)
        if variant.nbytes != promised:
            raise ImpqError(f"backend bug: {linear.name} at {variant.choice} bits takes {variant.nbytes} bytes, "
                            f"the backend said {promised}")
        self._variants[linear.name, variant.choice] = variant

    @property
    def nbytes(self) -> int:
        """Bytes of all variants together."""
        return sum(variant.nbytes for variant in self._variants.values())

    def switch(self, layer: int, choice: Choice | None) -> None:
        """Give a layer's linears the weights of a choice, or their own back."""
        for spec in self.layers[layer].linears:
            if self._current[spec.name] != choice:
                if choice is None:
                    weight = self._originals[spec.name]
                else:
                    weight = self.backend.dequantize(self._variants[spec.name, choice]).to(self._dtype)
                self._modules[spec.name].weight.data = weight
                self._current[spec.name] = choice

    def apply(self, assignment: Assignment) -> None:
        """Switch every layer."""
        for layer, choice in enumerate(assignment):
            self.switch(layer, choice)

    def save_record(self, path: Path) -> None:
        """Write what the backend told of every variant (bytes, damping used ...) as JSON."""
        rows = [{"linear": name, "bits": choice.bits, "group_size": choice.group_size, "bytes": variant.nbytes,
                 **variant.record} for (name, choice), variant in self._variants.items()]
        write_text(path, json.dumps(rows, indent=0) + "\n")


def fill_bank(bank: Bank, runner: BlockwiseModel, hidden: Hidden, choices: Sequence[Choice],
              progress: Callable[[int, int], None]) -> float:
    """Quantize every linear at every choice, block after block.

    The statistics of a block are collected once, behind a prefix at the widest choice, and serve every width: the
    Hessian of GPTQ does not depend on the width. (Strictly it depends on the widths of the blocks before; a bank has
    to settle on one prefix, and the widest is nearest to the plans of interest.) Afterwards the model stands at the
    widest choice.

    Args:
        bank: to be filled.
        runner: the same model, block by block.
        hidden: the first block's input over the calibration windows.
        choices: widths, widest first.
        progress: told (blocks done, blocks).

    Returns:
        seconds taken.
    """
    began = time.monotonic()
    progress(0, len(runner))
    for index in range(len(runner)):
        layers = [i for i, layer in enumerate(bank.layers) if layer.block == index]
        linears = [spec for i in layers for spec in bank.layers[i].linears]
        wants = "activations" in bank.backend.needs
        statistics = _collect(runner, index, hidden, bank, linears) if wants else {}
        for spec in linears:
            weight = bank.original(spec)
            for choice in choices:
                bank.add(spec, bank.backend.quantize(weight, choice, statistics.get(spec.name)))
        for layer in layers:
            bank.switch(layer, choices[0])
        hidden = runner.run(index, hidden)
        progress(index + 1, len(runner))
    return time.monotonic() - began


def _collect(runner: BlockwiseModel, index: int, hidden: Hidden, bank: Bank,
             linears: Iterable[LinearSpec]) -> dict[str, Statistics]:
    """Input statistics of a block's linears; linears that read the same tensor share one Gram matrix."""
    grams: dict[str, torch.Tensor] = {}
    tokens: dict[str, int] = {}
    leaders: dict[str, str] = {}
    last: list[tuple[torch.Tensor, str]] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if last and last[0][0] is x:
                leaders[name] = last[0][1]
                return
            last[:] = [(x, name)]
            leaders[name] = name
            rows = x.reshape(-1, x.shape[-1]).float()
            grams[name] = grams[name] + rows.T @ rows if name in grams else rows.T @ rows
            tokens[name] = tokens.get(name, 0) + len(rows)
        return hook

    hooks = [bank.module(spec).register_forward_pre_hook(watch(spec.name)) for spec in linears]
    try:
        for batch in hidden:
            runner.run_batch(index, batch)
            last.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: Statistics(grams[leader], tokens[leader]) for name, leader in leaders.items()}


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
