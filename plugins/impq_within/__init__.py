"""Backends whose widths mix inside a linear: ``cmpq``, ``ratio`` and ``slim``."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_backends() -> list[Component]:
    """``cmpq``, ``ratio`` and ``slim``."""
    return [Component("cmpq", "impq_within.cmpq:Cmpq",
                      "CMPQ: channels at two widths, k-means codebooks; any width, such as 2.25"),
            Component("ratio", "impq_within.ratio:Ratio",
                      "GPTQ with a share of the channels one bit wider, such as 2+10%"),
            Component("slim", "impq_within.slim:Slim",
                      "SliM-LLM: GPTQ with groups of columns at b-1, b and b+1 bits")]
