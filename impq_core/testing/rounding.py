"""A backend without a library, for the variants of tiny models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from impq_core.interfaces import Backend, Statistics, Variant
from impq_core.space import Choice, LinearSpec

if TYPE_CHECKING:
    import torch


class Rounding(Backend):
    """Rounds every row to a symmetric grid, with one byte for a code of any width and a float32 scale for each row."""

    default_bits = ("8", "4", "2")
    devices = frozenset({"cpu", "cuda", "mps", "xpu"})

    def choices(self) -> tuple[Choice, ...]:
        """8, 4, 3 and 2 bits."""
        return tuple(Choice(float(bits), 0) for bits in (8, 4, 3, 2))

    def check(self, linear: LinearSpec, choice: Choice) -> None:
        """Accepts every shape."""

    def nbytes(self, linear: LinearSpec, choice: Choice) -> int:
        """Bytes of codes and scales."""
        return linear.parameters + 4 * linear.rows

    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        """Round to the nearest code."""
        import torch

        most = 2 ** (choice.bits - 1) - 1
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / most
        return Variant(choice, {"codes": (weight / scale).round().to(torch.int8).cpu(), "scale": scale.cpu()})

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        """Codes times scales."""
        return variant.tensors["codes"].float() * variant.tensors["scale"]
