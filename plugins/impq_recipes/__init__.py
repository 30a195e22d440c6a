"""Recipes: a plan in the configuration format of another quantizer."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_exporters() -> list[Component]:
    """``recipe-gptqmodel``, ``recipe-auto-round``, ``recipe-llama.cpp``."""
    return [
        Component("recipe-gptqmodel", "impq_recipes.exporters:GptqModelRecipe", "dynamic widths as JSON for GPTQModel"),
        Component("recipe-auto-round", "impq_recipes.exporters:AutoRoundRecipe", "layer_config as JSON for auto-round"),
        Component("recipe-llama.cpp", "impq_recipes.exporters:LlamaCppRecipe", "tensor types for llama-quantize"),
    ]
