"""Find and load a causal language model, and name its blocks, its linears and its layers (the players)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from impq_core.demo import demo_model
from impq_core.errors import ImpqError
from impq_core.interfaces import Backend
from impq_core.types import Choice, LayerSpec, LinearSpec, SearchSpace

FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Linears that inference engines fuse, and so must share a width below block level."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are: a folder or a hub name, and what the user called it."""

    name: str
    location: str
    trust_remote_code: bool = False

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: shapes and names, no weights.

        Raises:
            ImpqError: transformers does not know the architecture or cannot read the configuration.
        """
        try:
            config = AutoConfig.from_pretrained(self.location, trust_remote_code=self.trust_remote_code)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # a configuration can be wrong in any way
            raise ImpqError(f"model {self.name} is no causal language model that transformers can load: "
                            f"{_brief(error)}") from error

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model with its weights, on the CPU, ready for inference.

        Raises:
            ImpqError: the weights cannot be read, or some are missing from the file.
        """
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                self.location, dtype=dtype, trust_remote_code=self.trust_remote_code, use_safetensors=True,
                output_loading_info=True)
        except Exception as error:  # safetensors, the hub and transformers each raise their own
            raise ImpqError(f"the weights of model {self.name} cannot be loaded: {_brief(error)}") from error
        if missing := sorted(report["missing_keys"]):
            raise ImpqError(f"the weights of model {self.name} lack {len(missing)} tensors (first: {missing[0]}); "
                            "they would be random")
        return model.eval().requires_grad_(False)

    def tokenizer(self) -> Any:
        """The model's tokenizer; raises ImpqError where there is none."""
        try:
            return AutoTokenizer.from_pretrained(self.location, trust_remote_code=self.trust_remote_code)
        except Exception as error:
            raise ImpqError(f"model {self.name} has no tokenizer that can be loaded: {_brief(error)}") from error


def locate_model(name: str, trust_remote_code: bool = False) -> ModelSource:
    """Resolve ``demo``, a folder or a hub name; a folder's files are looked at, not read.

    Raises:
        ImpqError: the folder is missing, or has no configuration, no weights, or only pickled ones.
    """
    if name == "demo":
        return ModelSource(name, str(demo_model()), trust_remote_code)
    folder = Path(name).expanduser()
    if not folder.exists():
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
            return ModelSource(name, name, trust_remote_code)
        raise ImpqError(f"model {name}: no such folder (a hub name has the form owner/name; 'demo' is built in)")
    if not (folder / "config.json").is_file():
        raise ImpqError(f"model {name} has no config.json")
    if not any(folder.glob("*.safetensors")):
        if any(file.suffix in (".bin", ".pt", ".pth", ".ckpt") for file in folder.iterdir()):
            raise ImpqError(f"model {name} has only pickled weights, which impq does not read; "
                            "save it with save_pretrained(..., safe_serialization=True)")
        raise ImpqError(f"model {name} has no .safetensors weights")
    return ModelSource(name, str(folder), trust_remote_code)


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


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
