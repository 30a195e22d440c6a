"""Allocators without a solver: greedy search, and exhaustive search of small spaces."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_allocators() -> list[Component]:
    """``greedy`` and ``exhaustive``."""
    return [Component("greedy", "impq_greedy.allocators:Greedy", "best loss per byte, step by step from both ends"),
            Component("exhaustive", "impq_greedy.allocators:Exhaustive", "every plan: the optimum of a small space")]
