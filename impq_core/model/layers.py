"""What a model is made of: its blocks, its linears, and its layers (the players)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from impq_core.errors import ImpqError, UsageError
from impq_core.interfaces import Backend
from impq_core.space import Choice, LayerSpec, LinearSpec, Pinned, SearchSpace

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


def rest_parameters(model: PreTrainedModel, layers: Sequence[LayerSpec]) -> int:
    """Parameters outside the layers' weights: embeddings, head (once where they are tied), norms, biases."""
    return int(sum(parameter.numel() for parameter in model.parameters())) - sum(layer.parameters for layer in layers)


def search_space(layers: tuple[LayerSpec, ...], backend: Backend, choices: tuple[Choice, ...],
                 pins: Mapping[str, float] = MappingProxyType({}), exclude: Sequence[str] = ()) -> SearchSpace:
    """The space of a backend's choices over layers.

    Args:
        layers: the players, before pins take some out.
        backend: whose sizes count.
        choices: the menu, widest first.
        pins: width by pattern; a pattern names layers or all the linears of a layer, with ``*`` and ``?``.
        exclude: patterns of layers that stay unquantized; they count with 16 bits a weight.

    Raises:
        ImpqError: a shape is refused (the linear is named), or a pattern matches nothing, or only part of a layer.
    """
    offered = {choice.bits: choice for choice in backend.choices()}
    fixed: dict[str, Choice | None] = {}
    for pattern, bits in [*pins.items(), *((pattern, None) for pattern in exclude)]:
        if bits is not None and bits not in offered:
            raise UsageError(f"pin {pattern}={bits:g}: {type(backend).__name__} has no {bits:g} bits")
        matched = [layer.name for layer in layers if _matches(pattern, layer)]
        if not matched:
            raise UsageError(f"the pattern '{pattern}' matches no layer (layers are called like {layers[0].name})")
        for name in matched:
            if fixed.get(name, offered[bits] if bits else None) != (offered[bits] if bits else None):
                raise UsageError(f"layer {name} is pinned or excluded in two ways")
            fixed[name] = offered[bits] if bits else None

    def size(layer: LayerSpec, choice: Choice) -> int:
        for linear in layer.linears:
            backend.check(linear, choice)
        return sum(backend.nbytes(linear, choice) for linear in layer.linears)

    free = tuple(layer for layer in layers if layer.name not in fixed)
    if not free:
        raise UsageError("every layer is pinned or excluded: nothing is left to plan")
    pinned = []
    for layer in layers:
        if layer.name in fixed:
            choice = fixed[layer.name]
            if choice is None:
                pinned.append(Pinned(layer, None, *[2 * layer.parameters] * 3))
            else:
                pinned.append(Pinned(layer, choice, size(layer, choice), size(layer, choices[-1]),
                                     size(layer, choices[0])))
    nbytes = np.array([[size(layer, choice) for choice in choices] for layer in free], dtype=np.int64)
    return SearchSpace(free, choices, nbytes, tuple(pinned))


def _matches(pattern: str, layer: LayerSpec) -> bool:
    """Whether a pattern names a layer or all its linears; raises UsageError where it names only some."""
    if fnmatchcase(layer.name, pattern):
        return True
    hits = [fnmatchcase(linear.name, pattern) for linear in layer.linears]
    if any(hits) and not all(hits):
        raise UsageError(f"the pattern '{pattern}' matches only part of layer {layer.name}: use a finer --granularity")
    return all(hits)


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype of the forwards: ``auto`` is bfloat16 where the processor multiplies it twice as fast as float32: in
    tiles (AMX), or with the AVX-512 of AMD. With that of Intel a linear was measured to take 1.8 times as long."""
    if name == "auto":
        able = torch.cpu.get_capabilities()
        fast = able.get("amx_tile") or (able.get("avx512_bf16") and "AMD" in able.get("cpu_name", ""))
        name = "bfloat16" if fast else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
