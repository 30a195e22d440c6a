"""What this plugin offers to impq. Only names and summaries: a part is imported when somebody chooses it."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_estimators() -> list[Component]:
    """``example``."""
    return [Component("example", "impq_example.estimator:Example", "squared error of the weights")]


@hookimpl
def impq_allocators() -> list[Component]:
    """``example``."""
    return [Component("example", "impq_example.allocator:Example", "all the way down, cheapest bytes first")]


@hookimpl
def impq_backends() -> list[Component]:
    """``example``."""
    return [Component("example", "impq_example.backend:Example", "rounding in groups: 8, 4 or 2 bits")]
