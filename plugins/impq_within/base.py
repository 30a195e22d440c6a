"""What the backends of this package have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from impq_core.interfaces import Backend

IN_SEQUENCE = ("drift_strength", "true_sequential")
"""Options without effect on the variants of a bank."""


@dataclass(frozen=True)
class MixtureOptions:
    """What the options of the backends of this package have in common.

    Args:
        damping: share of the Hessian's mean diagonal that is added to its diagonal.
        drift_strength: alpha of the correction of the drift of the quantized layers in front (QEP, arXiv 2504.09629),
            from 0 to 1, if a plan is quantized in sequence.
        true_sequential: if a plan is quantized in sequence, collect the statistics of a linear behind the quantized
            linears of its own block, too.
    """

    damping: float = 0.05
    drift_strength: float = 0.5
    true_sequential: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.damping < 1:
            raise ValueError(f"damping must lie between 0 and 1, not {self.damping}")
        if not 0 <= self.drift_strength <= 1:
            raise ValueError(f"drift_strength must lie between 0 and 1, not {self.drift_strength}")


@dataclass(frozen=True)
class GroupedOptions(MixtureOptions):
    """Options of the backends whose scales are those of GPTQ.

    Args:
        group_size: neighbouring weights of a row that share a scale and a zero.
    """

    group_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 8 or self.group_size % 8:
            raise ValueError(f"group_size must be a multiple of 8, not {self.group_size}")


class Mixture(Backend):
    """A backend with ``MixtureOptions``."""

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
