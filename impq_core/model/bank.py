"""The bank: every linear is quantized once at every width and kept packed, and unpacked when its block works."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from impq_core.errors import ImpqError
from impq_core.files import write_text
from impq_core.interfaces import Backend, Variant
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.cache import Shelf
from impq_core.model.ends import ends_of
from impq_core.space import Choice, LayerSpec, LinearSpec, in_bits

Assignment = Sequence[Choice | None]
"""A choice for each layer of the bank; None is the unquantized weight."""


@dataclass(frozen=True, eq=False)
class _Kept:
    """What the bank keeps of a variant: its bytes, the backend's record, and the variant if it is on no shelf."""

    nbytes: int
    record: Mapping[str, float]
    variant: Variant | None


class Bank:
    """The variants of a model's layers, and the choice of each layer.

    A layer's weights are unpacked when its block is loaded (``Placement``), so unpacked weights of one block exist at a
    time. Embedding and head are unpacked at once. Variants on a shelf are mapped from its files for as long as they are
    unpacked, and take no memory otherwise.

    Args:
        runner: the model.
        layers: its layers in order.
        backend: quantizes and dequantizes the variants.
        shelf: the cache of the variants; None keeps them in memory.

    Attributes:
        embedding: number of the layer that is the input embedding; None if it is no layer.
        head: number of the layer that is the head: the embedding's if they are tied; None if it is no layer.
    """

    def __init__(self, runner: BlockwiseModel, layers: Sequence[LayerSpec], backend: Backend,
                 shelf: Shelf | None = None) -> None:
        self.layers = tuple(layers)
        self.backend = backend
        self._placement, self._shelf = runner.placement, shelf
        self._modules = {spec.name: _module(runner.model, spec.name) for layer in layers for spec in layer.linears}
        self.embedding, self.head = (
            next((i for i, layer in enumerate(layers) if layer.block == block), None) for block in (-1, len(runner)))
        if self.embedding is not None and ends_of(runner.model).tied:
            self.head = self.embedding
        self._kept: dict[tuple[str, Choice], _Kept] = {}

    def module(self, linear: LinearSpec) -> nn.Linear | nn.Embedding:
        """The module of the model that holds a linear's weight when its block is loaded."""
        return self._modules[linear.name]

    def original(self, linear: LinearSpec) -> torch.Tensor:
        """The unquantized weight (rows, columns) in float32, on the device; raises ImpqError if it is not finite."""
        weight = self._placement.original(self._modules[linear.name]).float()
        if not torch.isfinite(weight).all():
            raise ImpqError(f"the model's weight {linear.name} holds NaN or infinity")
        return weight

    def variant(self, linear: LinearSpec, choice: Choice) -> torch.Tensor:
        """The weight (rows, columns) of a variant in float32, on the device."""
        packed, device = self.stored(linear, choice), self._placement.device
        if device.type not in self.backend.devices:
            return self.backend.dequantize(packed, linear).to(device)
        there = {name: tensor.to(device) for name, tensor in packed.tensors.items()}
        return self.backend.dequantize(replace(packed, tensors=there), linear)

    def stored(self, linear: LinearSpec, choice: Choice) -> Variant:
        """The packed variant in host memory; raises ImpqError if its file was deleted since it was put on the shelf."""
        choice = self.backend.stand_in(linear, choice)
        kept = self._kept[linear.name, choice].variant
        if kept is None:
            assert self._shelf is not None
            kept = self._shelf.reopen(linear, choice)
        return kept

    def record(self, linear: LinearSpec, choice: Choice) -> Mapping[str, float]:
        """The backend's record of a variant, such as the damping used."""
        return self._kept[linear.name, self.backend.stand_in(linear, choice)].record

    def has(self, linear: LinearSpec, choice: Choice) -> bool:
        """Whether the bank holds the variant."""
        return (linear.name, self.backend.stand_in(linear, choice)) in self._kept

    def take(self, linear: LinearSpec, choice: Choice) -> bool:
        """Whether the shelf has the variant, which the bank then holds."""
        stored = self.backend.stand_in(linear, choice)
        if self._shelf and (variant := self._shelf.get(linear, stored)):
            self._keep(linear, variant, on_shelf=True)
        return self.has(linear, choice)

    def add(self, linear: LinearSpec, variant: Variant) -> None:
        """Keep a variant, on the shelf if there is one.

        Raises:
            ImpqError: its size in bytes is not that of the backend's ``nbytes``.
        """
        expected = self.backend.nbytes(linear, variant.choice)
        if variant.nbytes != expected:
            raise ImpqError(f"backend bug: {linear.name} at {in_bits(variant.choice.name)} takes {variant.nbytes} "
                            f"bytes, but the backend's nbytes is {expected}")
        # The memory layout of a variant from disk: another layout may be multiplied in another order.
        variant = replace(variant, tensors={name: t.cpu().contiguous() for name, t in variant.tensors.items()})
        self._keep(linear, variant, self._shelf is not None and self._shelf.put(linear, variant))

    def add_all(self, other: Bank) -> None:
        """Hold the variants of another bank of the same backend and linears; those on its shelf stay there."""
        assert self._shelf is None and not self._kept
        self._shelf, self._kept = other._shelf, dict(other._kept)

    def of_linears(self, runner: BlockwiseModel) -> Bank:
        """A bank of the same model and variants with a layer for each linear."""
        single = Bank(runner, [LayerSpec(linear.name, layer.block, (linear,)) for layer in self.layers
                               for linear in layer.linears], self.backend)
        single.add_all(self)
        return single

    def without_variants(self, runner: BlockwiseModel) -> Bank:
        """A bank of the same model, layers and backend that holds no variant, and keeps its own in memory."""
        return Bank(runner, self.layers, self.backend)

    def _keep(self, linear: LinearSpec, variant: Variant, on_shelf: bool) -> None:
        self._kept[linear.name, variant.choice] = _Kept(variant.nbytes, variant.record, None if on_shelf else variant)

    @property
    def nbytes(self) -> int:
        """Bytes of all variants together."""
        return sum(kept.nbytes for kept in self._kept.values())

    def switch(self, layer: int, choice: Choice | None) -> None:
        """Let a layer's linears have the weights of a choice from the next time that their block is loaded; None is the
        unquantized weights. Embedding and head have them at once."""
        for spec in self.layers[layer].linears:
            self.put(spec, choice)

    def put(self, linear: LinearSpec, choice: Choice | None) -> None:
        """As ``switch``, for one linear of a layer."""
        self._placement.replace(self._modules[linear.name], _Unpacked(self, linear, choice) if choice else None)

    def blend(self, layer: int, shares: Mapping[Choice, float]) -> None:
        """Let a layer's linears have the weighted sum of the weights of several choices."""
        def blended(spec: LinearSpec) -> torch.Tensor:
            weight = sum(share * self.variant(spec, choice) for choice, share in shares.items())
            assert isinstance(weight, torch.Tensor)
            return weight

        for spec in self.layers[layer].linears:
            self._placement.replace(self._modules[spec.name], partial(blended, spec))

    def apply(self, assignment: Assignment) -> None:
        """Switch every layer to its choice in an assignment."""
        for layer, choice in enumerate(assignment):
            self.switch(layer, choice)

    def save_record(self, path: Path) -> None:
        """Write each variant's bytes and the backend's record of it (such as the damping used) as JSON."""
        ordered = sorted(self._kept.items(), key=lambda item: (item[0][0], item[0][1].bits, item[0][1].name))
        rows = [{"linear": name, **asdict(choice), "bytes": kept.nbytes, **kept.record}
                for (name, choice), kept in ordered]
        write_text(path, json.dumps(rows, indent=0) + "\n")


@dataclass(frozen=True)
class _Unpacked:
    """Returns the weight of a variant; equal if bank, linear and choice are."""

    bank: Bank
    linear: LinearSpec
    choice: Choice

    def __call__(self) -> torch.Tensor:
        return self.bank.variant(self.linear, self.choice)


def _module(model: nn.Module, name: str) -> nn.Linear | nn.Embedding:
    module = model.get_submodule(name)
    assert isinstance(module, (nn.Linear, nn.Embedding))
    return module
