"""GPTQ (arXiv 2210.17323) as an impq backend, in the file format of gptqmodel."""

from impq_core.hookspecs import Component, hookimpl

_GPTQ = {"target": "impq_gptq.backend:Gptq", "needs": ("gptqmodel",), "extra": "gptq"}


@hookimpl
def impq_exporters() -> list[Component]:
    """``gptq`` and ``compressed-tensors``."""
    return [Component("gptq", "impq_gptq.exporter:GptqExporter",
                      "GPTQ checkpoint with per-module widths, for GPTQModel, vLLM, SGLang"),
            Component("compressed-tensors", "impq_gptq.compressed:CompressedTensorsExporter",
                      "packed symmetric GPTQ codes, for transformers and vLLM", needs=("compressed_tensors",),
                      extra="gptq")]


@hookimpl
def impq_backends() -> list[Component]:
    """``gptq``, and ``auto-gptq``, an alias with the name of the library's predecessor."""
    return [
        Component("gptq", summary="GPTQ in gptqmodel's format: 2, 3, 4 or 8 bits from one Hessian", **_GPTQ),
        Component("auto-gptq", summary="the same as gptq", **_GPTQ,
                  notice="auto-gptq is archived and does not work with current transformers; impq writes "
                         "the file format of gptqmodel, its maintained successor (backend gptq)"),
    ]
