"""SPQE, the Shapley-based progressive quantization estimation of IMPQ / CoopQ (arXiv 2509.15455)."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_estimators() -> list[Component]:
    """``spqe``."""
    return [Component("spqe", "impq_spqe.sampler:Spqe", "progressive demotion in random orders (IMPQ, CoopQ)")]
