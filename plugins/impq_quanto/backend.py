"""The Quanto backend: an adapter to optimum-quanto."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from impq_core.errors import ImpqError
from impq_core.interfaces import Backend, Statistics, Variant
from impq_core.space import Choice, LinearSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Options:
    """Options of the Quanto backend.

    Args:
        group_size: weights of a row that share a scale and a shift below 8 bits, reduced in steps of 32 until it
            divides a linear's inputs (the rule of quanto, which assumes 128 for its files); at 8 bits a row has one
            scale.
    """

    group_size: int = 128

    def __post_init__(self) -> None:
        if self.group_size < 32 or self.group_size % 32:
            raise ValueError(f"group_size must be a multiple of 32, not {self.group_size}")


def group_size(linear: LinearSpec, choice: Choice) -> int:
    """Weights in a group of this linear: a whole row if it is no longer than a group, or if no group divides it."""
    size = choice.group_size
    while size > 32 and linear.columns % size:
        size -= 32
    return size if size and linear.columns > choice.group_size and linear.columns % size == 0 else linear.columns


class Quanto(Backend):
    """Quanto's ``MaxOptimizer``: qint8 with a 16-bit scale for each row; qint4 and qint2 with a 16-bit scale and shift
    for each group."""

    Options = Options
    default_bits = (2.0, 4.0, 8.0)

    def choices(self) -> tuple[Choice, ...]:
        """8 bits (with group size 0: a whole row), 4 and 2 bits."""
        return (Choice(8.0, 0), Choice(4.0, self.options.group_size), Choice(2.0, self.options.group_size))

    def check(self, linear: LinearSpec, choice: Choice) -> None:
        """Raises ImpqError if the groups do not fill the packed bytes."""
        groups, codes = linear.parameters // group_size(linear, choice), 8 // int(choice.bits)
        if groups % codes:
            raise ImpqError(f"backend quanto: the {groups} groups of {linear.name} do not fill bytes of {codes} codes")

    def nbytes(self, linear: LinearSpec, choice: Choice) -> int:
        """Bytes of the codes, and a 16-bit scale (and shift) for each group."""
        if not choice.group_size:
            return linear.parameters + linear.rows * 2
        return linear.parameters * int(choice.bits) // 8 + linear.parameters // group_size(linear, choice) * 4

    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        """Quantize the weight in 16 bits, without data, as quanto does for a 16-bit model."""
        quanto = _library()
        base = weight.half()
        qtype = {8: quanto.qint8, 4: quanto.qint4, 2: quanto.qint2}[int(choice.bits)]
        if not choice.group_size:
            scale = quanto.AbsmaxOptimizer()(base, qtype, axis=0)
            packed = quanto.quantize_weight(base, qtype, 0, scale, optimized=False)
            return Variant(choice, {"codes": packed._data, "scale": packed._scale})
        group = group_size(LinearSpec("", *weight.shape), choice)
        scale, shift = quanto.MaxOptimizer()(base, qtype, axis=0, group_size=group)
        packed = quanto.quantize_weight(base, qtype, 0, scale, shift, group, optimized=False)
        return Variant(choice, {"codes": packed._data._data, "scale": packed._scale, "shift": packed._shift})

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        """The weight that quanto computes from the stored tensors."""
        quanto = _library()
        codes, scale = variant.tensors["codes"], variant.tensors["scale"]
        if not variant.choice.group_size:
            weight: torch.Tensor = codes.float() * scale.float()
            return weight
        bits, group = int(variant.choice.bits), group_size(linear, variant.choice)
        packed = quanto.WeightQBitsTensor(
            {4: quanto.qint4, 2: quanto.qint2}[bits], 0, group, (linear.rows, linear.columns), (linear.columns, 1),
            quanto.PackedTensor(codes, bits, (linear.parameters // group, group), (group, 1)), scale,
            variant.tensors["shift"])
        return packed.dequantize().float()


@dataclass(frozen=True)
class _Library:
    AbsmaxOptimizer: Any
    MaxOptimizer: Any
    PackedTensor: Any
    WeightQBitsTensor: Any
    quantize_weight: Any
    qint2: Any
    qint4: Any
    qint8: Any
    unpacker: Any


@lru_cache(maxsize=1)
def _library() -> _Library:
    """The classes of quanto. Its CPU unpacking compiles C++ on first use; a torch function replaces it, so that no
    compiler is needed."""
    import torch
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, WeightQBitsTensor, qint2, qint4, qint8, quantize_weight
    from optimum.quanto.tensor.packed import PackedTensor

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.cat(parts)

    unpacker = torch.library.Library("quanto", "IMPL", "CPU")  # kept, because its garbage collection undoes it
    unpacker.impl("unpack", unpack, allow_override=True)
    return _Library(AbsmaxOptimizer, MaxOptimizer, PackedTensor, WeightQBitsTensor, quantize_weight, qint2, qint4,
                    qint8, unpacker)
