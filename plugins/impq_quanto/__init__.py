"""optimum-quanto as an impq backend."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_exporters() -> list[Component]:
    """``quanto``."""
    return [Component("quanto", "impq_quanto.exporter:QuantoExporter",
                      "for optimum-quanto's QuantizedModelForCausalLM")]


@hookimpl
def impq_backends() -> list[Component]:
    """``quanto``."""
    return [Component("quanto", "impq_quanto.backend:Quanto", "affine rounding between minimum and maximum, data-free: "
                      "8, 4 or 2 bits", needs=("optimum.quanto",), extra="quanto")]
