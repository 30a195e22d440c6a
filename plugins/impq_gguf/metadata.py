"""What a GGUF file says about its model: sizes, rotary embeddings, attention, experts, and who made it."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from impq_core.errors import ImpqError
from impq_core.interfaces import Checkpoint
from impq_gguf.names import Architecture

if TYPE_CHECKING:
    from gguf import GGUFWriter, Metadata

PLAN_DIGEST = "impq.plan_digest"
"""Key of the SHA-256 of the plan: of the names of the model's linears and their types, as JSON with sorted keys."""


def plan_digest(checkpoint: Checkpoint) -> str:
    """The value of ``PLAN_DIGEST``."""
    types = {checkpoint.specs[name].name: str(choice) if choice else None for name, choice in checkpoint.widths.items()}
    return hashlib.sha256(json.dumps(types, sort_keys=True).encode()).hexdigest()


def add_general(writer: GGUFWriter, checkpoint: Checkpoint, kinds: Counter[str]) -> None:
    """Add where the model comes from and who quantized it.

    Args:
        writer: of the file.
        checkpoint: the model.
        kinds: weights of each ggml type in the file.
    """
    from importlib.metadata import version

    from gguf import GGML_QUANT_VERSION, LlamaFileType

    found = described(checkpoint.files, sum(kinds.values()))
    found.quantized_by = f"impq {version('impq')}"
    writer.add_type("model")
    found.set_gguf_meta_model(writer)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    common = max(kinds, key=lambda kind: kinds[kind])
    names = (f"MOSTLY_{common}", f"MOSTLY_{common}_M", f"ALL_{common}")
    writer.add_file_type(next((int(LlamaFileType[name]) for name in names if name in LlamaFileType.__members__),
                              int(LlamaFileType.GUESSED)))
    writer.add_string(PLAN_DIGEST, plan_digest(checkpoint))


def described(files: Path, parameters: int = 0) -> Metadata:
    """Name, author, licence, sampling ... of a model, from its folder."""
    from gguf import Metadata

    return Metadata.load(model_path=files, model_name=_hub_name(files), total_params=parameters)


def _hub_name(files: Path) -> str | None:
    """The name of a hub's model in the hub's cache; None of a folder, which has a name of its own."""
    if files.parent.name == "snapshots" and files.parent.parent.name.startswith("models--"):
        return files.parent.parent.name.split("--")[-1]
    return None


def add_architecture(writer: GGUFWriter, config: Any, architecture: Architecture) -> None:
    """Add what llama.cpp needs to compute the model.

    Args:
        writer: of the file.
        config: transformers' configuration.
        architecture: llama.cpp's.

    Raises:
        ImpqError: llama.cpp does not compute a setting.
    """
    heads = config.num_attention_heads
    context, window = config.max_position_embeddings, sliding_window(config)
    if window and not architecture.period:
        context = min(context, window)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_width(config))
    writer.add_value_length(head_width(config))
    writer.add_vocab_size(config.vocab_size)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        names = ("layer_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_epsilon")
        writer.add_layer_norm_eps(next((getattr(config, name) for name in names if hasattr(config, name)), 1e-5))
    if window and architecture.period:
        writer.add_sliding_window(window)
    _add_experts(writer, config)
    _add_scales(writer, config)
    _add_rotary(writer, config)


def head_width(config: Any) -> int:
    """Width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def sliding_window(config: Any) -> int:
    """Tokens that a token attends to in layers with a window; 0 if there are none."""
    if not getattr(config, "use_sliding_window", True):
        return 0
    return int(getattr(config, "sliding_window", None) or 0)


def _add_experts(writer: GGUFWriter, config: Any) -> None:
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if count:
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if width := getattr(config, "moe_intermediate_size", None):
            writer.add_expert_feed_forward_length(width)
        if width := getattr(config, "shared_expert_intermediate_size", None):
            writer.add_expert_shared_feed_forward_length(width)


def _add_scales(writer: GGUFWriter, config: Any) -> None:
    """Soft caps and multipliers. The scale of attention is llama.cpp's own in Gemma's architectures."""
    for name, add in (("embedding_multiplier", writer.add_embedding_scale),
                      ("residual_multiplier", writer.add_residual_scale), ("logits_scaling", writer.add_logit_scale),
                      ("attention_multiplier", writer.add_attention_scale), ("logit_scale", writer.add_logit_scale)):
        if (value := getattr(config, name, None)) is not None:
            add(value)
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)
    scalar = getattr(config, "query_pre_attn_scalar", None)
    blocks = {"gemma2": 46, "gemma3_text": 62}.get(config.model_type)
    if scalar:
        # llama.cpp knows the largest models of both families by their number of blocks.
        largest = config.num_hidden_layers == blocks
        own = config.hidden_size / config.num_attention_heads if largest else head_width(config)
        if scalar != own:
            raise ImpqError(f"format gguf does not hold this model: llama.cpp scales its attention by {own:g} ** -0.5, "
                            f"not by query_pre_attn_scalar = {scalar:g} in config.json")


def rotary(config: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The rotary parameters of full attention, and those of sliding attention if they have their own."""
    parameters = dict(config.rope_parameters)
    if "full_attention" in parameters:
        return dict(parameters["full_attention"]), dict(parameters["sliding_attention"])
    return parameters, None


def _add_rotary(writer: GGUFWriter, config: Any) -> None:
    from gguf import RopeScalingType

    full, sliding = rotary(config)
    share = float(full.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0)
    writer.add_rope_dimension_count(int(share * head_width(config)))
    writer.add_rope_freq_base(full["rope_theta"])
    if sliding:
        if sliding["rope_type"] != "default":
            raise ImpqError("format gguf does not hold this model: llama.cpp does not scale the rotary embeddings of "
                            "sliding attention")
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    kind, original = full["rope_type"], full.get("original_max_position_embeddings")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(full["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(original or config.max_position_embeddings)
            if any(full.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim", "beta_fast",
                                               "beta_slow")):
                raise ImpqError("format gguf does not hold this model: it writes yarn with a factor alone")
    elif kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(getattr(config, "original_max_position_embeddings", None) or original)
        writer.add_rope_scaling_attn_factors(_longrope_scale(config, full))
    elif kind not in ("default", "llama3"):
        raise ImpqError(f"format gguf does not hold this model: llama.cpp has no rotary embeddings of type {kind}")


def _longrope_scale(config: Any, full: dict[str, Any]) -> float:
    original = getattr(config, "original_max_position_embeddings", None) or full["original_max_position_embeddings"]
    scale = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def rotary_tensors(config: Any) -> dict[str, NDArray[np.float32]]:
    """Divisors of the rotary frequencies, by the name of the tensor that holds them: of llama3 and longrope."""
    full, _ = rotary(config)
    if full["rope_type"] == "longrope":
        return {f"rope_factors_{length}.weight": np.array(full[f"{length}_factor"], dtype=np.float32)
                for length in ("long", "short")}
    if full["rope_type"] != "llama3":
        return {}
    width = head_width(config)
    frequencies = full["rope_theta"] ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    waves = full["original_max_position_embeddings"] * frequencies / (2 * np.pi)  # in the original context
    low, high, factor = full["low_freq_factor"], full["high_freq_factor"], full["factor"]
    share = np.clip((waves - low) / (high - low), 0.0, 1.0)
    return {"rope_freqs.weight": (1 / ((1 - share) / factor + share)).astype(np.float32)}
