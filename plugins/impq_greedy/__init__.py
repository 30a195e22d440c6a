"""Allocators without a solver: greedy, and exhaustive search for small spaces."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_allocators() -> list[Component]:
    """``greedy`` and ``exhaustive``."""
    return [Component("greedy", "impq_greedy.allocators:Greedy", "best step a byte, from both ends"),
            Component("exhaustive", "impq_greedy.allocators:Exhaustive", "every plan, for small spaces: the truth")]
