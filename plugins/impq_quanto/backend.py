"""The Quanto backend: an adapter to optimum-quanto."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    default_bits = ("2", "4", "8")
    devices = frozenset({"cpu", "cuda", "mps", "xpu"})

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
        import torch
        from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint2, qint4, qint8, quantize_weight
        from optimum.quanto.tensor.packed import pack_weights

        base = weight.half()
        if not choice.group_size:
            scale = AbsmaxOptimizer()(base, qint8, axis=0)
            stored = quantize_weight(base, qint8, 0, scale, optimized=False)
            return _on_host(choice, codes=stored._data, scale=stored._scale)
        bits, group = int(choice.bits), group_size(LinearSpec("", *weight.shape), choice)
        scale, shift = MaxOptimizer()(base, {4: qint4, 2: qint2}[bits], axis=0, group_size=group)
        codes = torch.ops.quanto.quantize_affine(base, bits, 0, group, scale, shift)
        return _on_host(choice, codes=pack_weights(codes, bits), scale=scale, shift=shift)

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        """scale * code - shift in 16 bits, as quanto computes it from the stored tensors. The codes are unpacked here:
        quanto's own function compiles C++ or CUDA on first use."""
        import torch

        codes, scale = variant.tensors["codes"], variant.tensors["scale"]
        if not variant.choice.group_size:
            return codes.float() * scale.float()
        bits = int(variant.choice.bits)
        values = torch.empty(len(codes) * (8 // bits), codes.shape[1], dtype=torch.float16, device=codes.device)
        for part, rows in enumerate(values.chunk(8 // bits)):
            rows.copy_((codes >> bits * part) & (2**bits - 1))
        return values.mul_(scale).sub_(variant.tensors["shift"]).float().view(linear.rows, linear.columns)


def _on_host(choice: Choice, **tensors: torch.Tensor) -> Variant:
    return Variant(choice, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
