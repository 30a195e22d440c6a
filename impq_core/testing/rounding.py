"""A backend without a library, to make tiny models' variants with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from impq_core.interfaces import Backend, Statistics, Variant
from impq_core.space import Choice, LinearSpec

if TYPE_CHECKING:
    import torch


class Rounding(Backend):
    """Every row rounded to a symmetric grid; a byte for each code, whatever its width, and a float32 scale a row."""

    default_bits = (8, 4, 2)

    def choices(self) -> tuple[Choice, ...]:
        """8, 4, 3 and 2 bits."""
        return tuple(Choice(float(bits), 0) for bits in (8, 4, 3, 2))

    def check(self, linear: LinearSpec, choice: Choice) -> None:
        """Takes every shape."""

    def nbytes(self, linear: LinearSpec, choice: Choice) -> int:
        """Codes and scales."""
        return linear.parameters + 4 * linear.rows

    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        """To the nearest code."""
        import torch

        most = 2 ** (choice.bits - 1) - 1
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / most
        return Variant(choice, {"codes": (weight / scale).round().to(torch.int8), "scale": scale})

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        """Codes times scales."""
        return variant.tensors["codes"].float() * variant.tensors["scale"]
