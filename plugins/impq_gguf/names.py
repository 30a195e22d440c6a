"""Names of a model's tensors in GGUF files, by the tables of the ``gguf`` package."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from impq_core.errors import ImpqError


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores and computes an architecture of transformers.

    Args:
        name: llama.cpp's name.
        rotated: rows of q and k are in the order of rotary pairs (0, 1), (2, 3) ..., not (0, half), (1, half + 1) ...
        shifted: norms are stored as 1 + weight.
        period: every so many blocks, the last one attends to the whole context and the others to a sliding window; 0 if
            llama.cpp has no window, so that the context ends with the model's.
        required: settings of config.json that llama.cpp takes for granted; a model with others is refused. A value is
            the only one, or a set of the possible ones.
        activations: names of the one activation that llama.cpp computes.
    """

    name: str
    rotated: bool = False
    shifted: bool = False
    period: int = 0
    required: Mapping[str, Any] = field(default_factory=dict)
    activations: tuple[str, ...] = ("silu", "swish")


_GELU = ("gelu_pytorch_tanh", "gelu_new")
_RELU2 = ("relu2",)
_ALL_EXPERTS: Mapping[str, Any] = MappingProxyType({"decoder_sparse_step": 1, "mlp_only_layers": []})

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({
    "arcee": Architecture("arcee", rotated=True, activations=_RELU2),
    "cohere": Architecture("command-r"),
    "cohere2": Architecture("cohere2", period=4),
    "ernie4_5": Architecture("ernie4_5"),
    "gemma": Architecture("gemma", shifted=True, activations=(*_GELU, "gelu")),
    "gemma2": Architecture("gemma2", shifted=True, period=2, activations=_GELU),
    "gemma3_text": Architecture("gemma3", shifted=True, period=6, activations=_GELU,
                                required={"use_bidirectional_attention": False}),
    "glm": Architecture("chatglm"),
    "glm4": Architecture("glm4"),
    "granite": Architecture("granite", rotated=True),
    "hunyuan_v1_dense": Architecture("hunyuan-dense"),
    "internlm3": Architecture("llama", rotated=True),
    "jais2": Architecture("jais2", activations=_RELU2),
    "llama": Architecture("llama", rotated=True),
    "ministral": Architecture("llama", rotated=True),
    "mistral": Architecture("llama", rotated=True),
    "mixtral": Architecture("llama", rotated=True),
    "nemotron": Architecture("nemotron", shifted=True, activations=_RELU2),
    "olmo": Architecture("olmo", rotated=True, required={"clip_qkv": None}),
    "olmo2": Architecture("olmo2"),
    "olmo3": Architecture("olmo2", period=4),
    "olmoe": Architecture("olmoe", required={"clip_qkv": None, "norm_topk_prob": False}),
    "phi": Architecture("phi2", activations=_GELU, required={"qk_layernorm": False}),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2", required={"use_sliding_window": False}),
    "qwen2_moe": Architecture("qwen2moe", required={"use_sliding_window": False, "norm_topk_prob": False,
                                                    **_ALL_EXPERTS}),
    "qwen3": Architecture("qwen3", required={"use_sliding_window": False}),
    "qwen3_moe": Architecture("qwen3moe", required={"use_sliding_window": False, "norm_topk_prob": True,
                                                    **_ALL_EXPERTS}),
    "seed_oss": Architecture("seed_oss"),
    "smollm3": Architecture("smollm3", rotated=True, required={"use_sliding_window": False,
                                                               "no_rope_layer_interval": 4}),
    "stablelm": Architecture("stablelm", required={"use_parallel_residual": False}),
    "starcoder2": Architecture("starcoder2", activations=_GELU),
})
"""The architectures whose files are known to give transformers' logits in llama.cpp (tests/test_gguf_export.py)."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a multimodal model's language model; of any other model, its own."""
    inner = config.get("text_config")
    if config.get("model_type") in ARCHITECTURES or not isinstance(inner, Mapping):
        return config
    tied = {name: config[name] for name in ("tie_word_embeddings",) if name in config}
    return {**inner, **tied}


def text_name(name: str) -> str | None:
    """The name that a tensor of a multimodal model has in the language model alone; None if it is of another part."""
    for before, after in (("model.language_model.", "model."), ("language_model.", "")):
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name if name.startswith("lm_head.") else None


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a model.

    Args:
        config: the content of config.json, or of its ``text_config``; defaults included.

    Raises:
        ImpqError: it is not known, or has a setting that llama.cpp does not compute.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise ImpqError(f"format gguf does not know architecture {kind}: it writes {', '.join(sorted(ARCHITECTURES))}")
    found = ARCHITECTURES[kind]
    for name, value in {"hidden_act": found.activations, **found.required}.items():
        own = config.get(name, config.get("hidden_activation") if name == "hidden_act" else None)
        if own is not None and not (own in value if isinstance(value, tuple) else own == value):
            raise ImpqError(f"format gguf does not hold this model: llama.cpp's {found.name} has no {name} = {own} in "
                            "config.json")
    layers = ["full_attention" if (block + 1) % found.period == 0 else "sliding_attention"
              for block in range(config.get("num_hidden_layers", 0))] if found.period else []
    if layers and config.get("sliding_window") and config.get("layer_types", layers) != layers:
        raise ImpqError(f"format gguf does not hold this model: llama.cpp's {found.name} has full attention in every "
                        f"{found.period}th block, not as layer_types in config.json says")
    return found


@dataclass(frozen=True)
class Place:
    """Where a tensor of the model is in a GGUF file.

    Args:
        name: of the tensor there, suffix included.
        expert: number of the expert if the tensor there holds all experts of a block; None otherwise.
    """

    name: str
    expert: int | None = None


_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<part>\w+)")


def gguf_places(architecture: str, blocks: int, names: Iterable[str]) -> dict[str, Place]:
    """The places of tensors in a GGUF file.

    Args:
        architecture: llama.cpp's name of it.
        blocks: number of blocks.
        names: of tensors in Hugging Face files, suffixes ``.weight`` and ``.bias`` included.

    Raises:
        ImpqError: the gguf package knows no name of a tensor.
    """
    lookup, places = _lookup(architecture, blocks), {}
    for name in names:
        stem, dot, suffix = name.rpartition(".")
        match = _EXPERT.fullmatch(stem)
        known = lookup(f"{match['experts']}.{match['part']}" if match else stem)
        if known is None or suffix not in ("weight", "bias"):
            raise ImpqError(f"format gguf does not hold this model: llama.cpp's {architecture} has no tensor for "
                            f"{name}")
        places[name] = Place(f"{known}{dot}{suffix}", int(match["number"]) if match else None)
    return places


def _lookup(architecture: str, blocks: int) -> Callable[[str], str | None]:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(kind, blocks).get_name  # type: ignore[no-any-return]
