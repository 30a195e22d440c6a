"""Refiners: plans improved by measuring others near them."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_refiners() -> list[Component]:
    """``swaps`` and ``evolve``."""
    return [
        Component("swaps", "impq_refine.swaps:Swaps", "exchanges proposed by a belief that each measurement corrects"),
        Component("evolve", "impq_refine.evolve:Evolve", "random exchanges, the best of a generation kept (EvoPress)"),
    ]
