"""Recipes: a plan in the configuration format of another quantizer."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_exporters() -> list[Component]:
    """``recipe-gptqmodel`` and ``recipe-auto-round``."""
    return [
        Component("recipe-gptqmodel", "impq_recipes.exporters:GptqModelRecipe", "dynamic widths as JSON for GPTQModel"),
        Component("recipe-auto-round", "impq_recipes.exporters:AutoRoundRecipe", "layer_config as JSON for auto-round"),
    ]
