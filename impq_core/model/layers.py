"""The blocks of a model, their linears, and the layers to which a plan assigns widths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from impq_core.errors import ImpqError, UsageError
from impq_core.interfaces import Backend
from impq_core.space import FUSED, Choice, LayerSpec, LinearSpec, Pinned, SearchSpace

_GROUPS = {part: fused.removesuffix("_proj") for fused, parts in FUSED.items() for part in parts}
"""Names of the layers that hold fused linears, by the last part of a linear's name."""


def blocks_of(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The decoder blocks in order, with their module names.

    Raises:
        ImpqError: no list of modules of one class has the length ``num_hidden_layers`` of the configuration.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(m) for m in module}) == 1:
            return [(f"{name}.{i}", block) for i, block in enumerate(module)]
    raise ImpqError(f"no list of {count} blocks found in {type(model).__name__}: its architecture is not supported")


def layers_of(model: PreTrainedModel, granularity: str) -> tuple[LayerSpec, ...]:
    """The layers at a granularity: whole blocks, groups of linears that engines fuse, or single linears.

    Embeddings, the head and all else outside the blocks are never quantized, nor are linears that do not return one
    tensor (the routers of some mixtures of experts).

    Args:
        model: the model, with weights or on the meta device.
        granularity: ``block``, ``group`` or ``linear``.

    Raises:
        ImpqError: no blocks are found, or a block has no linears.
    """
    layers = []
    for index, (block_name, block) in enumerate(blocks_of(model)):
        groups: dict[str, list[LinearSpec]] = {}
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and _returns_a_tensor(module):
                parent, _, leaf = name.rpartition(".")
                key = {"block": "", "group": f"{parent}.{_GROUPS.get(leaf, leaf)}", "linear": name}[granularity]
                groups.setdefault(key, []).append(
                    LinearSpec(f"{block_name}.{name}", module.out_features, module.in_features))
        if not groups:
            raise ImpqError(f"block {block_name} has no linears to quantize")
        layers += [LayerSpec(f"{block_name}.{key}".rstrip("."), index, tuple(linears))
                   for key, linears in groups.items()]
    return tuple(layers)


def _returns_a_tensor(linear: nn.Linear) -> bool:
    """Whether a linear, or a subclass with its own forward, maps (1, columns) to (1, rows)."""
    if type(linear).forward is nn.Linear.forward:
        return True
    weight = linear.weight
    try:
        with torch.no_grad():
            output = linear(torch.zeros(1, linear.in_features, dtype=weight.dtype, device=weight.device))
    except Exception:  # the forward of a subclass may raise anything for this input
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, linear.out_features)


@dataclass(frozen=True)
class Coverage:
    """The share of the weights in a model's blocks that are in layers. Weights are parameters of two or more
    dimensions; biases and norms do not count.

    Args:
        share: from 0 to 1.
        uncovered: name of the largest weight that is in no layer; empty if there is none.
    """

    share: float
    uncovered: str

    def require(self, model: str) -> None:
        """Raises ImpqError if less than half of the weights can be quantized."""
        if self.share < 0.5:
            raise ImpqError(f"model {model}: only {100 * self.share:.0f}% of the weights in its blocks are in linears, "
                            f"which can be quantized; the rest, such as {self.uncovered}, would stay at 16 bits; "
                            "--partial continues anyway")


def coverage(model: PreTrainedModel, layers: Sequence[LayerSpec]) -> Coverage:
    """The share of the weights in a model's blocks that are in layers.

    Args:
        model: the model, with weights or on the meta device.
        layers: its layers at any granularity.
    """
    covered = {f"{linear.name}.weight" for layer in layers for linear in layer.linears}
    sizes = {f"{block}.{name}": parameter.numel() for block, module in blocks_of(model)
             for name, parameter in module.named_parameters() if parameter.dim() >= 2}
    uncovered = {name: size for name, size in sizes.items() if name not in covered}
    return Coverage(1.0 - sum(uncovered.values()) / max(1, sum(sizes.values())),
                    max(uncovered, key=uncovered.__getitem__, default=""))


def rest_parameters(model: PreTrainedModel, layers: Sequence[LayerSpec]) -> int:
    """The number of parameters outside the layers' weights: embeddings, head (once if tied), norms, biases."""
    return int(sum(parameter.numel() for parameter in model.parameters())) - sum(layer.parameters for layer in layers)


def search_space(layers: tuple[LayerSpec, ...], backend: Backend, choices: tuple[Choice, ...],
                 pins: Mapping[str, float] = MappingProxyType({}), exclude: Sequence[str] = ()) -> SearchSpace:
    """The space of a backend's choices over layers.

    Args:
        layers: all layers, pinned and excluded ones included.
        backend: the backend, which gives the sizes.
        choices: the menu, widest first.
        pins: width by pattern; a pattern matches layers or all linears of a layer, with ``*`` and ``?``.
        exclude: patterns of layers or linears that stay unquantized; they count 16 bits a weight. If only some linears
            of a layer are excluded, these become layers of their own.

    Raises:
        ImpqError: the backend refuses a linear's shape (the message names the linear and how to exclude it).
        UsageError: a pattern matches no layer, a pin matches only part of a layer, or every layer is pinned or
            excluded.
    """
    layers = tuple(part for layer in layers for part in _apart(layer, exclude))
    offered = {choice.bits: choice for choice in backend.choices()}
    fixed: dict[str, Choice | None] = {}
    for pattern, bits in [*pins.items(), *((pattern, None) for pattern in exclude)]:
        if bits is not None and bits not in offered:
            raise UsageError(f"pin {pattern}={bits:g}: {type(backend).__name__} has no {bits:g} bits")
        matched = [layer.name for layer in layers if _matches(pattern, layer)]
        if not matched:
            raise UsageError(f"the pattern '{pattern}' matches no layer (the first layer is {layers[0].name})")
        for name in matched:
            if fixed.get(name, offered[bits] if bits else None) != (offered[bits] if bits else None):
                raise UsageError(f"layer {name} is pinned or excluded in two ways")
            fixed[name] = offered[bits] if bits else None

    def size(layer: LayerSpec, choice: Choice) -> int:
        for linear in layer.linears:
            try:
                backend.check(linear, choice)
            except ImpqError as error:
                leaf = linear.name.rpartition(".")[2]
                raise type(error)(f"{error}; --exclude '*.{leaf}' leaves such linears at 16 bits") from error
        return sum(backend.nbytes(linear, choice) for linear in layer.linears)

    free = tuple(layer for layer in layers if layer.name not in fixed)
    if not free:
        raise UsageError("every layer is pinned or excluded: leave at least one to the plan")
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


def _apart(layer: LayerSpec, exclude: Sequence[str]) -> Iterator[LayerSpec]:
    """The layer, or, if only some of its linears are excluded, the layer without them and each of them alone."""
    def excluded(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in exclude)

    kept = tuple(linear for linear in layer.linears if not excluded(linear.name))
    if excluded(layer.name) or len(kept) in (0, len(layer.linears)):
        yield layer
        return
    yield replace(layer, linears=kept)
    yield from (LayerSpec(linear.name, layer.block, (linear,)) for linear in layer.linears if linear not in kept)


def _matches(pattern: str, layer: LayerSpec) -> bool:
    """Whether a pattern names a layer or all its linears; raises UsageError if it names only some of them."""
    if fnmatchcase(layer.name, pattern):
        return True
    hits = [fnmatchcase(linear.name, pattern) for linear in layer.linears]
    if any(hits) and not all(hits):
        raise UsageError(f"the pattern '{pattern}' matches only part of layer {layer.name}: use a finer --granularity")
    return all(hits)


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype of the forwards. ``auto`` is bfloat16 on processors that multiply it twice as fast as float32:
    processors with AMX, and AMD processors with AVX-512. On Intel's AVX-512 a bfloat16 linear takes 1.8 times as long
    (measured)."""
    if name == "auto":
        able = torch.cpu.get_capabilities()
        fast = able.get("amx_tile") or (able.get("avx512_bf16") and "AMD" in able.get("cpu_name", ""))
        name = "bfloat16" if fast else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
