"""Formats for the plans of every backend: the variants themselves, and 16-bit weights with the quantized values."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_exporters() -> list[Component]:
    """``impq`` and ``dense``."""
    return [Component("impq", "impq_files.exporters:ImpqExporter",
                      "variants of any backend as they are counted, for impq_core.load_quantized"),
            Component("dense", "impq_files.exporters:DenseExporter",
                      "quantized values of any backend at 16 bits, for all that loads the model")]
