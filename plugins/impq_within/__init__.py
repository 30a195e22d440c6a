"""Backends whose widths mix inside a linear: ``cmpq``, ``ratio`` and ``slim``."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_backends() -> list[Component]:
    """``cmpq``."""
    return [Component("cmpq", "impq_within.cmpq:Cmpq",
                      "CMPQ: channels at two widths, k-means codebooks, 16-bit outliers; 2.25 bits")]
