"""What the backends of this package have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from impq_core.interfaces import Backend

IN_SEQUENCE = ("drift_strength", "true_sequential")
"""Options without effect on the variants of a bank."""


class Mixture(Backend):
    """A backend whose options have ``drift_strength`` and ``true_sequential``."""

    devices = frozenset({"cpu", "cuda"})

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Activations, and their drift if it is corrected."""
        return frozenset({"activations"} | ({"drift"} if self.options.drift_strength else set()))

    @property
    def stages(self) -> bool:  # type: ignore[override]
        """The option ``true_sequential``."""
        return bool(self.options.true_sequential)

    def variant_options(self) -> Mapping[str, Any]:
        """All but what only a plan that is quantized in sequence is made with."""
        return {name: value for name, value in asdict(self.options).items() if name not in IN_SEQUENCE}


def check_shares(**shares: float) -> None:
    """Raises ValueError, with the option's name, if a value is not between 0 and 1."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, not {value}")
