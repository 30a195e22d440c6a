"""GGUF files of tiny models: what the exporter writes, and the least that an importer reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import config_of, with_large_weights
from gguf import GGMLQuantizationType, GGUFWriter
from impq_gguf.exporter import GgufExporter
from impq_gguf.names import gguf_places
from impq_gguf.types import TYPES
from transformers import AutoModelForCausalLM

from impq_core.interfaces import Checkpoint
from impq_core.model.ends import end_layers
from impq_core.model.layers import layers_of
from impq_core.model.source import locate_model
from impq_core.space import LinearSpec
from impq_core.testing.tiny import byte_tokenizer
from impq_core.types import Plan

NEEDS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"num_hidden_layers": 7},
    **{kind: {"sliding_window": 64} for kind in ("ministral", "mistral", "mixtral", "phi3", "starcoder2")},
    "olmoe": {"num_key_value_heads": 4},
    "qwen3_moe": {"norm_topk_prob": True},
}
"""Settings of tiny models whose defaults llama.cpp does not compute, by model type."""


def save(kind: str, folder: Path, settings: Mapping[str, Any] = {}) -> Path:
    """A tiny model of a type whose norms and biases differ from each other, with a byte tokenizer."""
    config = config_of(kind).to_dict() | NEEDS.get(kind, {}) | settings
    config.pop("layer_types", None)
    model = with_large_weights(AutoModelForCausalLM, type(config_of(kind))(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_tokenizer(adds_start=kind.startswith("gemma")).save_pretrained(folder)
    return folder


def unquantized(folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """The checkpoint of a model of which nothing is planned."""
    source = locate_model(str(folder))
    dense = {name: tensor.to(dtype) for name, tensor in source.tensors()}
    return Checkpoint(Plan.__new__(Plan), {}, {}, {}, dense, source.config(), "gguf", {}, source.folder)


def written(checkpoint: Checkpoint, folder: Path, kind: type[GgufExporter] = GgufExporter) -> Path:
    """The file of a checkpoint, which has the bytes that were promised from shapes alone."""
    exporter = kind()
    outline = replace(checkpoint, dense={name: tensor.to("meta") for name, tensor in checkpoint.dense.items()})
    promise = exporter.file_bytes(outline)
    folder.mkdir()
    exporter.export(checkpoint, folder)
    files = exporter.files(folder)
    assert promise == sum(file.stat().st_size for file in files) and len(list(folder.iterdir())) == len(files)
    for name, read in exporter.dense(folder, outline).items():
        torch.testing.assert_close(read().to(checkpoint.dense[name].dtype), checkpoint.dense[name], rtol=0.0, atol=3e-7)
    return files[0]


def linears_of(model: Path) -> list[LinearSpec]:
    """The linears of a model, head and embedding last."""
    skeleton = locate_model(str(model)).skeleton()
    layers = layers_of(skeleton, "linear") + end_layers(skeleton)[::-1]
    return [linear for layer in layers for linear in layer.linears]


def write_gguf(file: Path, linears: list[LinearSpec], types: dict[str, str], architecture: str = "llama",
               blocks: int = 4, names: str = "llama") -> Path:
    """A GGUF file with these tensors, all zero, and the least metadata."""
    writer = GGUFWriter(file, architecture)
    writer.add_block_count(blocks)
    places = gguf_places(names, blocks, [f"{linear.name}.weight" for linear in linears])
    for linear in linears:
        kind = TYPES[types[linear.name]]
        row = linear.columns // kind.block * kind.nbytes
        writer.add_tensor(places[f"{linear.name}.weight"].name, np.zeros((linear.rows, row), dtype=np.uint8),
                          raw_dtype=GGMLQuantizationType[kind.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
