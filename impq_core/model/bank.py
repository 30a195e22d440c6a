"""The bank: every linear is quantized once at every width and stored packed; switching a layer unpacks its weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from impq_core.errors import ImpqError
from impq_core.files import write_text
from impq_core.interfaces import Backend, Variant
from impq_core.model.blockwise import BlockwiseModel, Hidden
from impq_core.model.cache import Shelf
from impq_core.model.calibration import input_statistics
from impq_core.space import Choice, LayerSpec, LinearSpec

Assignment = Sequence[Choice | None]
"""A choice for each layer of the bank; None is the unquantized weight."""


_BLENDED = Choice(-1.0, -1)
"""The current choice of a linear with blended weights: it differs from every choice of a menu."""


class Bank:
    """The variants of a model's layers. It switches the layers of the model between them, in place.

    Args:
        model: the model.
        layers: its layers in order.
        backend: quantizes and dequantizes the variants.
        dtype: type of the weights in the model.
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
        """The module of the model that holds a linear's weight."""
        return self._modules[linear.name]

    def original(self, linear: LinearSpec) -> torch.Tensor:
        """The unquantized weight (rows, columns) in float32; raises ImpqError if it is not finite."""
        weight = self._originals[linear.name].float()
        if not torch.isfinite(weight).all():
            raise ImpqError(f"the model's weight {linear.name} holds NaN or infinity")
        return weight

    def variant(self, linear: LinearSpec, choice: Choice) -> torch.Tensor:
        """The weight (rows, columns) of a stored variant in float32."""
        return self.backend.dequantize(self._variants[linear.name, choice], linear)

    def stored(self, linear: LinearSpec, choice: Choice) -> Variant:
        """The packed variant."""
        return self._variants[linear.name, choice]

    def has(self, linear: LinearSpec, choice: Choice) -> bool:
        """Whether the bank holds the variant."""
        return (linear.name, choice) in self._variants

    def add(self, linear: LinearSpec, variant: Variant) -> None:
        """Keep a variant; raises ImpqError if its size in bytes is not that of the backend's ``nbytes``."""
        expected = self.backend.nbytes(linear, variant.choice)
        if variant.nbytes != expected:
            raise ImpqError(f"backend bug: {linear.name} at {variant.choice} bits takes {variant.nbytes} bytes, "
                            f"but the backend's nbytes is {expected}")
        self._variants[linear.name, variant.choice] = variant

    @property
    def nbytes(self) -> int:
        """Bytes of all variants together."""
        return sum(variant.nbytes for variant in self._variants.values())

    def switch(self, layer: int, choice: Choice | None) -> None:
        """Give a layer's linears the weights of a choice; None restores the unquantized weights."""
        for spec in self.layers[layer].linears:
            if self._current[spec.name] != choice:
                weight = self.variant(spec, choice).to(self._dtype) if choice else self._originals[spec.name]
                self._modules[spec.name].weight.data = weight
                self._current[spec.name] = choice

    def blend(self, layer: int, shares: Mapping[Choice, float]) -> None:
        """Give a layer's linears the weighted sum of the weights of several choices."""
        for spec in self.layers[layer].linears:
            weight = sum(share * self.variant(spec, choice) for choice, share in shares.items())
            assert isinstance(weight, torch.Tensor)
            self._modules[spec.name].weight.data = weight.to(self._dtype)
            self._current[spec.name] = _BLENDED

    def apply(self, assignment: Assignment) -> None:
        """Switch every layer to its choice in an assignment."""
        for layer, choice in enumerate(assignment):
            self.switch(layer, choice)

    def save_record(self, path: Path) -> None:
        """Write each variant's bytes and the backend's record of it (such as the damping used) as JSON."""
        rows = [{"linear": name, "bits": choice.bits, "group_size": choice.group_size, "bytes": variant.nbytes,
                 **variant.record} for (name, choice), variant in sorted(self._variants.items())]
        write_text(path, json.dumps(rows, indent=0) + "\n")


def fill_bank(bank: Bank, runner: BlockwiseModel, hidden: Hidden | None, menus: Sequence[Sequence[Choice]],
              progress: Callable[[int, int], None], shelf: Shelf | None = None) -> None:
    """Quantize every linear at every choice of its layer's menu, block after block.

    The statistics of a block are collected once, with the blocks before it at their widest choices, and are used for
    every width: the Hessian of GPTQ does not depend on the linear's own width. (It does depend on the widths of the
    blocks before; a bank needs one prefix, and the widest is nearest to the plans of interest.) Afterwards every layer
    of the model is at its widest choice. One warning reports the variants with ``unreached`` in their record: no token
    of the calibration text reached their linear.

    Args:
        bank: the bank to fill.
        runner: the same model, block by block.
        hidden: the first block's input over the calibration windows; None for a backend that needs no activations.
        menus: choices of each of the bank's layers, widest first; an empty menu leaves the layer unquantized.
        progress: called with the number of finished blocks and the number of all blocks.
        shelf: variants of the cache are read from it, and new ones are kept in it.

    Raises:
        ImpqError: the backend cannot quantize a linear, which the message names.
    """
    progress(0, len(runner))
    blocks = [[i for i, layer in enumerate(bank.layers) if layer.block == index] for index in range(len(runner))]
    for layers in blocks:
        for layer in layers:
            for spec in bank.layers[layer].linears:
                for choice in menus[layer]:
                    if shelf and (variant := shelf.get(spec, choice)):
                        bank.add(spec, variant)
    missing = [[(spec, choice) for layer in layers for spec in bank.layers[layer].linears for choice in menus[layer]
                if not bank.has(spec, choice)] for layers in blocks]
    for index, layers in enumerate(blocks):
        modules = {spec: bank.module(spec) for spec, _ in missing[index]}
        statistics = {}
        if hidden is not None and modules:
            statistics = input_statistics(runner, index, hidden, modules.values())
        for spec, choice in missing[index]:
            weight = bank.original(spec)
            try:
                variant = bank.backend.quantize(weight, choice, statistics.get(modules[spec]))
            except ImpqError as error:
                raise ImpqError(f"{spec.name}: {error}") from error
            # The memory layout of a variant from disk: another layout may be multiplied in another order.
            variant = replace(variant, tensors={name: t.contiguous() for name, t in variant.tensors.items()})
            bank.add(spec, variant)
            if shelf:
                shelf.put(spec, variant)
        for layer in layers:
            bank.switch(layer, menus[layer][0] if menus[layer] else None)
        if hidden is not None and any(missing[index + 1:]):
            hidden = runner.run(index, hidden)
        progress(index + 1, len(runner))
    unreached = [spec.name for layer, menu in zip(bank.layers, menus, strict=True) for spec in layer.linears
                 if any(bank.stored(spec, choice).record.get("unreached") for choice in menu)]
    if unreached:
        warnings.warn(f"no token of the calibration text reaches {len(unreached)} linears (first: {unreached[0]}), so "
                      "they are rounded to nearest; more calibration text may reach them", RuntimeWarning, stacklevel=2)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
