"""The components of this plugin: names and summaries only. impq imports the module of a component when it is used."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_estimators() -> list[Component]:
    """``example``."""
    return [Component("example", "impq_example.estimator:Example", "squared error of the weights")]


@hookimpl
def impq_allocators() -> list[Component]:
    """``example``."""
    return [Component("example", "impq_example.allocator:Example", "demotions by least loss per byte")]


@hookimpl
def impq_backends() -> list[Component]:
    """``example``."""
    return [Component("example", "impq_example.backend:Example", "rounding in groups: 8, 4 or 2 bits")]
