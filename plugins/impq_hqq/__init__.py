"""HQQ, half-quadratic quantization, as an impq backend."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_exporters() -> list[Component]:
    """``hqq``."""
    return [Component("hqq", "impq_hqq.exporter:HqqExporter", "state dict of HQQLinear modules, for hqq",
                      needs=("hqq",), extra="hqq")]


@hookimpl
def impq_backends() -> list[Component]:
    """``hqq``."""
    return [Component("hqq", "impq_hqq.backend:Hqq", "half-quadratic quantization, data-free: 8, 4, 3, 2 or 1 bits",
                      needs=("hqq",), extra="hqq")]
