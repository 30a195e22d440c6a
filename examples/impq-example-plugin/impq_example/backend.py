"""Rounds weights to a symmetric grid in groups along the inputs; reads no text."""

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
    """Options of example.

    Args:
        group_size: weights of a row that share a scale.
    """

    group_size: int = 32

    def __post_init__(self) -> None:
        if self.group_size < 8 or self.group_size % 8:
            raise ValueError("group_size must be a multiple of 8")


class Example(Backend):
    """Codes of 8, 4 or 2 bits packed into bytes, and a float16 scale for each group."""

    Options = Options
    default_bits = ("8", "4", "2")

    def choices(self) -> tuple[Choice, ...]:
        """8, 4 and 2 bits."""
        return tuple(Choice(float(bits), self.options.group_size) for bits in (8, 4, 2))

    def check(self, linear: LinearSpec, choice: Choice) -> None:
        """Raises ImpqError if groups do not divide the inputs."""
        if linear.columns % choice.group_size:
            raise ImpqError(f"groups of {choice.group_size} do not divide the {linear.columns} inputs of {linear.name}")

    def nbytes(self, linear: LinearSpec, choice: Choice) -> int:
        """Bytes of the packed codes, and two bytes for each group."""
        return int(linear.parameters * choice.bits) // 8 + 2 * linear.parameters // choice.group_size

    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        """Round to the nearest code; the largest weight of a group is at an end of the grid."""
        import torch

        bits, most = int(choice.bits), 2 ** (int(choice.bits) - 1) - 1
        groups = weight.float().reshape(-1, choice.group_size)
        scale = (groups.abs().amax(dim=1, keepdim=True) / most).clamp(min=1e-6).half()
        codes = (groups / scale.float()).round().clamp(-most, most).to(torch.int16) + most
        shifts = torch.arange(0, 8, bits, dtype=torch.int16)
        packed = (codes.reshape(-1, 8 // bits) << shifts).sum(dim=1).to(torch.uint8)
        return Variant(choice, {"codes": packed, "scale": scale})

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        """Codes times scales."""
        import torch

        bits = int(variant.choice.bits)
        shifts = torch.arange(0, 8, bits, dtype=torch.int16)
        codes = (variant.tensors["codes"].to(torch.int16)[:, None] >> shifts) & (2**bits - 1)
        groups = codes.reshape(-1, variant.choice.group_size).float() - (2 ** (bits - 1) - 1)
        return (groups * variant.tensors["scale"].float()).reshape(linear.rows, linear.columns)
