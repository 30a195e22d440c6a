"""Tiny random multimodal models: a language model and an encoder of images, video or audio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from architectures import SIZES, SPECIAL, with_large_weights
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from impq_core.testing.tiny import byte_tokenizer

ENCODER: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers", "layers", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "num_key_value_heads"), 2),
    "head_dim": 16, "out_hidden_size": 64, "num_position_embeddings": 16, "projection_dim": 32, "vocab_size": 64,
    "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1], "patch_size": 8, "image_size": 32}
"""Settings of the tiny encoders, for the configurations that have them."""

NOT_TEXT = ("blip", "blip-2", "evolla", "florence2", "git", "instructblip", "instructblipvideo", "kosmos-2",
            "kosmos-2.5", "pi0", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder")
"""Types without a language model that runs on text alone."""

KINDS = tuple(kind for kind in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES if kind not in NOT_TEXT)
"""Multimodal model types."""


def config_of(kind: str) -> Any:
    """The configuration of a tiny model of a multimodal type."""
    default = CONFIG_MAPPING[kind]()
    text = default.get_text_config(decoder=True)
    parts = {name: getattr(default, name) for name in default.sub_configs if getattr(default, name) is not None}
    tokens = [name for name, value in default.to_dict().items()
              if name.endswith(("token_id", "token_index")) and isinstance(value, int)]
    return CONFIG_MAPPING[kind](
        **{name: _text(part) if part is text else _small(part.to_dict(), ENCODER) for name, part in parts.items()},
        **{name: 200 + number for number, name in enumerate(tokens)})


def _small(settings: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    return {name: sizes.get(name, value) for name, value in settings.items()}


def _text(part: Any) -> dict[str, Any]:
    settings = {**_small(part.to_dict(), SIZES), **SPECIAL.get(part.model_type, {})}
    settings.pop("per_layer_config", None)
    if isinstance(rope := settings.get("rope_parameters"), dict) and "rope_type" in rope:
        sections = {"mrope_section": [4, 2, 2]} if part.model_type not in ("ministral", "mistral", "ministral3") else {}
        settings["rope_parameters"] = {**rope, "partial_rotary_factor": 1.0, **sections}
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(kinds := settings.get(name), list) and len(kinds) > SIZES["num_hidden_layers"]:
            settings[name] = (sorted(set(kinds), reverse=True) * 4)[:SIZES["num_hidden_layers"]]
    return settings


def tiny(kind: str) -> PreTrainedModel:
    """A tiny random model of a multimodal type. Raises ValueError if it is not tiny."""
    return with_large_weights(AutoModelForMultimodalLM, config_of(kind))


def tiny_wrapper(folder: Path, kind: str = "mistral3") -> Path:
    """Write a tiny multimodal model, a tokenizer and files of a processor to a folder."""
    torch.manual_seed(0)
    tiny(kind).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    return folder
