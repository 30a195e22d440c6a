"""Refiners: improve a plan by measuring plans near it."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_refiners() -> list[Component]:
    """``swaps`` and ``evolve``."""
    return [
        Component("swaps", "impq_refine.swaps:Swaps", "exchanges of widths, proposed by Thompson sampling"),
        Component("evolve", "impq_refine.evolve:Evolve", "random exchanges, the best of a generation kept (EvoPress)"),
    ]
