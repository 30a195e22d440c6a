"""Folders of tiny models of several forms, the tensors in such folders, and the bytes that an export announces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from impq_core.model.outline import outline
from impq_core.model.source import locate_model
from impq_core.parts import Parts, load_exporter
from impq_core.plugins import Plugins
from impq_core.results import RunResult
from impq_core.testing import tiny_model
from impq_core.testing.tiny import byte_tokenizer

BASE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 259, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": 258}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            found |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return found


def save(model: Any, folder: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def llama(folder: Path) -> Path:
    tiny_model(folder, blocks=2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))
    (folder / "LICENSE").write_text("terms")
    (folder / ".hidden").write_text("not a file of the model")
    return folder


def mixtral(folder: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    return save(MixtralForCausalLM(MixtralConfig(**BASE, num_local_experts=4, num_experts_per_tok=2)), folder)


def gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=512, vocab_size=259))
    model.config.tie_word_embeddings = True
    return save(model, folder)


def wrapper(folder: Path) -> Path:
    """A multimodal model whose text part is the causal language model."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = {**BASE, "head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
                                "mrope_section": [4, 2, 2]}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
              "patch_size": 8, "num_position_embeddings": 16}
    return save(Qwen3_5ForConditionalGeneration(Qwen3_5Config(
        text_config=text, vision_config=vision, image_token_id=255, video_token_id=254, vision_start_token_id=253,
        vision_end_token_id=252)), folder)


def promise(result: RunResult, name: str) -> int:
    """Bytes of the file as they are known without weights."""
    source, config = locate_model(result.config.model), result.config
    backend, options = Parts.build(config, Plugins()).backend, config.options.get("backend", {})
    exporter = load_exporter(name, config.backend, options, Plugins())
    dtype = getattr(torch, config.dtype)
    return exporter.file_bytes(outline(source, source.without_weights(), result.plan, config.backend, backend, dtype,
                                       exporter.packed))
