"""GGUF: llama.cpp's types as choices, quantized by llama.cpp's own code, and the files that it runs."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_backends() -> list[Component]:
    """``gguf``."""
    return [Component("gguf", "impq_gguf.backend:Gguf", "llama.cpp's types, IQ1_S to F16, quantized by llama.cpp",
                      needs=("xllamacpp", "gguf"), extra="gguf")]


@hookimpl
def impq_exporters() -> list[Component]:
    """``gguf`` and ``recipe-llama.cpp``."""
    return [Component("gguf", "impq_gguf.exporter:GgufExporter", "a complete GGUF file, for llama.cpp",
                      needs=("xllamacpp", "gguf"), extra="gguf"),
            Component("recipe-llama.cpp", "impq_gguf.recipe:LlamaCppRecipe", "tensor types for llama-quantize")]


@hookimpl
def impq_meters() -> list[Component]:
    """``llamacpp``."""
    return [Component("llamacpp", "impq_gguf.meter:LlamaCpp",
                      "milliseconds a token: llama.cpp's kernels, measured on this processor",
                      needs=("xllamacpp", "gguf"), extra="gguf")]
