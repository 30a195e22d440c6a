"""Meters that measure nothing: a table of one's own, and the bytes that a token reads."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_meters() -> list[Component]:
    """``table`` and ``traffic``."""
    return [Component("table", "impq_meters.table:Table", "costs from a CSV, such as times measured on the chip"),
            Component("traffic", "impq_meters.traffic:Traffic", "bytes of weights that a generated token reads")]
