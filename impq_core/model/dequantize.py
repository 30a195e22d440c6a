"""Models whose files are quantized already, as models of 16 bits: which of them transformers dequantizes, and how.

transformers dequantizes while it loads. What it leaves behind for its own purposes (modules that hold codes, rules that
would quantize again on saving) is removed here, so that the model is one of the unquantized class.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightTransform, revert_weight_conversion

from impq_core.errors import ImpqError

PLACES = ("quantization_config", "compression_config")
"""Names of the entry of config.json that says how the weights are stored."""

STALE = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "recipe.yaml", "quanto_qmap.json")
"""Names of files that describe a quantization."""

OFFERED = {"fp8": FineGrainedFP8Config, "mxfp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config,
           "compressed-tensors": CompressedTensorsConfig}
"""Methods that transformers dequantizes on a processor, with the class of their settings."""

ACTIVATIONS = ("activation_scale", "input_scale", "input_zero_point", "output_scale", "q_scale", "k_scale", "v_scale")
"""Names of tensors for quantized activations, which a dequantized model has not."""


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization settings in the content of a config.json, or in those of one of the model's parts; empty for an
    unquantized model."""
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for name in PLACES:
            if found := part.get(name):
                return dict(found)
    return {}


def method_of(stored: Mapping[str, Any]) -> str:
    """The name of the method in quantization settings."""
    return str(stored.get("quant_method", "unknown"))


def forget(config: Any) -> None:
    """Remove the quantization settings from a configuration object, in place."""
    for part in (config, config.get_text_config(decoder=True)):
        for name in PLACES:
            if hasattr(part, name):
                delattr(part, name)


def check(model: str, stored: Mapping[str, Any]) -> None:
    """Raises ImpqError if transformers does not dequantize the method on a processor.

    Args:
        model: the model's name.
        stored: as ``quantization_of`` returns them.
    """
    if method_of(stored) not in OFFERED:
        raise ImpqError(f"model {model} is quantized already (its config.json has a quantization_config of method "
                        f"{method_of(stored)}, and transformers dequantizes only {', '.join(OFFERED)}): give the "
                        "unquantized model that it was made from")


def loading(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for weights that ``finish`` then makes dense."""
    if not stored:
        return {}
    if _mixed(stored):
        return {"dtype": torch.float32}  # of the scales, which would be rounded in front of the products
    return {"quantization_config": OFFERED[method_of(stored)](dequantize=True)}


def writes(stored: Mapping[str, Any], config: Any, dtype: torch.dtype) -> bool:
    """Whether transformers writes the dequantized weights to a file of a dtype, so that they need not be in memory.

    Args:
        stored: as ``quantization_of`` returns them.
        config: the model's configuration.
        dtype: of the parameters; weights are not rounded to 16 bits before they are written.
    """
    return not _mixed(stored) and dtype == stored_dtype(config)


def _mixed(stored: Mapping[str, Any]) -> bool:
    """Whether linears are stored in more than one way. transformers dequantizes all of them by one group's settings, so
    such a model is loaded with its codes, and each linear is decompressed with its own settings."""
    groups = stored.get("config_groups") or {}
    return len({json.dumps([group.get("weights"), group.get("format")], sort_keys=True)
                for group in groups.values()}) > 1


def finish(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a model that was loaded with ``loading`` one of the unquantized class, in place.

    Args:
        model: the model.
        dtype: of its parameters. A weight is rounded to 16 bits first, as an export stores it.
    """
    used = {_rule(conversion) for conversion in getattr(model, "_weight_conversions", None) or []}
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.compressor.decompress_model(model)
        for name, module in list(model.named_modules()):
            if hasattr(module, "quantization_scheme"):
                model.set_submodule(name, _plain(module))
        quantizer.remove_quantization_config(model)
    forget(model.config)
    model._weight_conversions = [rule for rule in get_model_conversion_mapping(model) if _rule(rule) in used]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored_dtype(model.config)).to(dtype)


def _plain(module: nn.Module) -> nn.Linear:
    weight, bias = module.get_parameter("weight").data, module._parameters.get("bias")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear


def _rule(conversion: WeightTransform) -> tuple[str, ...]:
    """What identifies a rule. One that merges or splits tensors has those of the quantized form among its sources."""
    sources = () if isinstance(conversion, WeightConverter) else conversion.source_patterns
    return (type(conversion).__name__, *conversion.target_patterns, "from", *sources)


def stored_dtype(config: Any) -> torch.dtype:
    """The 16-bit dtype of the dequantized weights: that of the configuration, or bfloat16 if it has a wider one."""
    dtype = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a finished model by its name in files of the unquantized model; a tied head is not repeated."""
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    yield from revert_weight_conversion(model, state).items()


def check_blocks(model: str, stored: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ImpqError if a matrix is not made of whole blocks of the size that the settings give. transformers divides
    it evenly by the number of scales, which gives other blocks then.

    Args:
        model: the model's name.
        stored: as ``quantization_of`` returns them.
        shapes: of all tensors in the files.
    """
    blocks = stored.get("weight_block_size") or ()
    for name, scales in shapes.items():
        weight = shapes.get(name.removesuffix("_scale_inv"), ())
        if name.endswith("weight_scale_inv") and len(weight) == len(scales) == len(blocks) == 2:
            for size, count, block in zip(weight, scales, blocks, strict=True):
                if count > 1 and size != count * block:
                    raise ImpqError(f"model {model}: transformers does not dequantize {name.removesuffix('_scale_inv')}"
                                    f", whose {size} rows or columns are no multiple of {block}: give the unquantized "
                                    "model that it was made from")
