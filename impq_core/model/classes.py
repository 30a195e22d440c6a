"""The class of transformers for a model, and whether it runs on text alone."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING


def loader_of(config: Any) -> Any:
    """The class of transformers that loads a model of a configuration. A multimodal model is loaded whole, so that all
    its parts are counted and have the names of its own modules; its language model runs on text alone."""
    whole = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING and not config.is_encoder_decoder
    return AutoModelForMultimodalLM if whole else AutoModelForCausalLM


def needed_by(model: PreTrainedModel) -> str:
    """What the forward of a model needs beside token ids; empty if it needs nothing."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    if not any(parameter.name == "input_ids" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return "no token ids, but other inputs"
    return ", ".join(parameter.name for parameter in parameters
                     if parameter.name not in ("self", "input_ids") and parameter.default is parameter.empty
                     and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD))
