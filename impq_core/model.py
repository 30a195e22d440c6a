"""What a model is made of: its blocks, its linears, and its layers (the players)."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from impq_core.errors import ImpqError
from impq_core.interfaces import Backend
from impq_core.space import Choice, LayerSpec, LinearSpec, SearchSpace

FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Linears that inference engines fuse, and so must share a width below block level."""


def blocks_of(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The decoder blocks in order, with their module names.

    Raises:
        ImpqError: no list of as many like modules as the configuration has layers.
    """
    wanted = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted and len({type(m) for m in module}) == 1:
            return [(f"{name}.{i}", block) for i, block in enumerate(module)]
    raise ImpqError(f"no list of {wanted} blocks found in {type(model).__name__}: its architecture is not supported")


def layers_of(model: PreTrainedModel, granularity: str) -> tuple[LayerSpec, ...]:
    """The players: whole blocks, groups of linears that engines fuse, or single linears.

    Embeddings, the head and anything outside the blocks are never quantized.
    """
    layers = []
    for index, (block_name, block) in enumerate(blocks_of(model)):
        groups: dict[str, list[LinearSpec]] = {}
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                key = {"block": "", "group": f"{parent}.{FUSED.get(leaf, leaf)}", "linear": name}[granularity]
                groups.setdefault(key, []).append(
                    LinearSpec(f"{block_name}.{name}", module.out_features, module.in_features))
        if not groups:
            raise ImpqError(f"block {block_name} has no linears to quantize")
        layers += [LayerSpec(f"{block_name}.{key}".rstrip("."), index, tuple(linears))
                   for key, linears in groups.items()]
    return tuple(layers)


def search_space(layers: tuple[LayerSpec, ...], backend: Backend, choices: tuple[Choice, ...]) -> SearchSpace:
    """The space of a backend's choices over layers; raises ImpqError, naming the linear, where a shape is refused."""
    for layer in layers:
        for linear in layer.linears:
            for choice in choices:
                backend.check(linear, choice)
    nbytes = [[sum(backend.nbytes(linear, choice) for linear in layer.linears) for choice in choices]
              for layer in layers]
    return SearchSpace(layers, choices, np.array(nbytes, dtype=np.int64))


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype of the forwards: ``auto`` is bfloat16 where the processor multiplies it natively, else float32."""
    if name == "auto":
        name = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
