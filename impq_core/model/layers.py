"""The blocks of a model, their linears, and the layers to which a plan assigns widths."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from impq_core.errors import ImpqError, UsageError
from impq_core.interfaces import Backend
from impq_core.space import FUSED, Choice, LayerSpec, LinearSpec, Pinned, SearchSpace, in_bits

_GROUPS = {part: fused.removesuffix("_proj") for fused, parts in FUSED.items() for part in parts}
"""Names of the layers that hold fused linears, by the last part of a linear's name."""


def blocks_of(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The decoder blocks in order, with their module names: the modules of the list that holds the most weights, lists
    inside of lists not counted. In a multimodal model it is a list of the text decoder. Whether a forward calls them
    once each, in order, is seen when there are weights.

    Args:
        model: with weights or on the meta device.

    Raises:
        ImpqError: the model has no list of modules.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if (isinstance(module, nn.ModuleList) and len(module)
                and not any(name.startswith(f"{outer}.") for outer in lists)):
            lists[name] = module
    inside = set(model.get_decoder().modules())
    lists = {name: module for name, module in lists.items() if module in inside} or lists
    if not lists:
        raise ImpqError(f"{type(model).__name__} has no list of blocks: its architecture is not supported")
    name = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    return [(f"{name}.{index}", block) for index, block in enumerate(lists[name])]


def layers_of(model: PreTrainedModel, granularity: str) -> tuple[LayerSpec, ...]:
    """The layers at a granularity: whole blocks, groups of linears that engines fuse, experts, or single linears.

    Linears of the same name in numbered modules of a block are those of experts. Engines fuse all gates and ups of a
    block's experts, and all their downs, so these are groups. At ``expert``, all linears of an expert are a layer, and
    other linears are in their groups.

    Embeddings, the head and all else outside the blocks are never quantized, nor are linears that do not return one
    tensor (the routers of some mixtures of experts).

    Args:
        model: the model, with weights or on the meta device, after ``to_linears``.
        granularity: ``block``, ``group``, ``expert`` or ``linear``.

    Raises:
        ImpqError: no blocks are found, or none of them has linears.
    """
    layers, seen = [], set()
    for index, (block_name, block) in enumerate(blocks_of(model)):
        groups: dict[str, list[LinearSpec]] = {}
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and module not in seen and _returns_a_tensor(module):
                seen.add(module)  # a linear that several blocks share belongs to the first of them
                groups.setdefault(_layer(name, granularity), []).append(
                    LinearSpec(f"{block_name}.{name}", module.out_features, module.in_features))
        layers += [LayerSpec(f"{block_name}.{key}".rstrip("."), index, tuple(linears))
                   for key, linears in groups.items()]
    if not layers:
        raise ImpqError(f"the blocks of {type(model).__name__} have no linears to quantize")
    return tuple(layers)


def _layer(name: str, granularity: str) -> str:
    """The name, within its block, of the layer that a linear belongs to."""
    if granularity in ("block", "linear"):
        return "" if granularity == "block" else name
    parent, _, leaf = name.rpartition(".")
    parts = parent.split(".") if parent else []
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    if numbers and granularity == "expert":
        return ".".join(parts[:numbers[0] + 1])
    return ".".join([*(part for part in parts if not part.isdigit()), _GROUPS.get(leaf, leaf)])


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
    """The share of the weights in a model's blocks that can be quantized. Weights are parameters of two or more
    dimensions; biases and norms do not count.

    Args:
        share: from 0 to 1.
        uncovered: name of the largest parameter that cannot be quantized; empty if there is none.
    """

    share: float
    uncovered: str

    def require(self, model: str, reasons: Mapping[str, str] = MappingProxyType({})) -> None:
        """Raises ImpqError if less than half of the weights can be quantized.

        Args:
            model: the model's name.
            reasons: as ``unstorable`` returns them.
        """
        if self.share < 0.5:
            reason = reasons.get(self.uncovered.removesuffix(".weight"))
            why = f" ({reason})" if reason else ""
            raise ImpqError(f"model {model}: only {100 * self.share:.0f}% of the weights in its blocks can be "
                            f"quantized; the rest, such as {self.uncovered}, would stay at 16 bits{why}; --partial "
                            "continues anyway")


def coverage(model: PreTrainedModel, layers: Sequence[LayerSpec], dense: Collection[str] = ()) -> Coverage:
    """The share of the weights in a model's blocks that can be quantized.

    Args:
        model: the model, with weights or on the meta device.
        layers: its layers at any granularity.
        dense: names of linears in them that stay unquantized.
    """
    covered = {f"{linear.name}.weight" for layer in layers for linear in layer.linears if linear.name not in dense}
    sizes = {f"{block}.{name}": parameter.numel() for block, module in blocks_of(model)
             for name, parameter in module.named_parameters() if parameter.dim() >= 2}
    uncovered = {name: size for name, size in sizes.items() if name not in covered}
    return Coverage(1.0 - sum(uncovered.values()) / max(1, sum(sizes.values())),
                    max(uncovered, key=uncovered.__getitem__, default=""))


def unstorable(layers: Sequence[LayerSpec], backend: Backend, choices: Sequence[Choice]) -> dict[str, str]:
    """Why a backend cannot store a linear, by the linear's name, for each linear that it cannot store at one of the
    choices or more: odd shapes, such as gates of one row."""
    reasons: dict[str, str] = {}
    for linear in (linear for layer in layers for linear in layer.linears):
        try:
            for choice in choices:
                backend.check(linear, backend.stand_in(linear, choice))
        except ImpqError as error:
            reasons[linear.name] = str(error)
    return reasons


def rest_parameters(model: PreTrainedModel, layers: Sequence[LayerSpec]) -> int:
    """The number of parameters outside the layers' weights: embeddings, head (once if tied), norms, biases."""
    return int(sum(parameter.numel() for parameter in model.parameters())) - sum(layer.parameters for layer in layers)


def by_size(layers: Sequence[LayerSpec], backend: Backend, choices: Sequence[Choice],
            dense: Collection[str]) -> tuple[Choice, ...]:
    """Choices in the order of the bytes of all layers, then of their bits, the widest first. Of choices that are stored
    alike in every linear, the first stays.

    Args:
        layers: all layers.
        backend: the backend, which gives the sizes.
        choices: the choices.
        dense: names of linears that stay unquantized.
    """
    linears = _stored(layers, dense)
    stored = {choice: _forms(linears, backend, choice) for choice in choices}
    sizes = {choice: sum(map(backend.nbytes, linears, found)) for choice, found in stored.items()}
    ordered = sorted(choices, key=lambda choice: (-sizes[choice], -choice.bits))
    return tuple({stored[choice]: choice for choice in reversed(ordered)}.values())[::-1]


def further_choices(layers: Sequence[LayerSpec], backend: Backend, menu: Sequence[Choice], choices: Sequence[Choice],
                    dense: Collection[str]) -> list[Choice]:
    """The first of ``choices`` that are stored alike in every linear, without those that are stored like one of the
    menu.

    Args:
        layers: all layers.
        backend: the backend.
        menu: other choices.
        choices: the choices.
        dense: names of linears that stay unquantized.
    """
    linears = _stored(layers, dense)
    forms = {_forms(linears, backend, choice): choice for choice in reversed((*menu, *choices))}
    return [choice for choice in choices if choice in forms.values() and choice not in menu]


def _stored(layers: Sequence[LayerSpec], dense: Collection[str]) -> list[LinearSpec]:
    return [linear for layer in layers for linear in layer.linears if linear.name not in dense]


def _forms(linears: Sequence[LinearSpec], backend: Backend, choice: Choice) -> tuple[Choice, ...]:
    """What a backend stores for each linear."""
    return tuple(backend.stand_in(linear, choice) for linear in linears)


def search_space(layers: tuple[LayerSpec, ...], backend: Backend, choices: tuple[Choice, ...],
                 pins: Mapping[str, str] = MappingProxyType({}), exclude: Sequence[str] = (),
                 dense: Collection[str] = ()) -> SearchSpace:
    """The space of a backend's choices over layers.

    Args:
        layers: all layers, pinned and excluded ones included.
        backend: the backend, which gives the sizes.
        choices: the menu, widest first.
        pins: name of a choice by pattern; a pattern matches layers or all linears of a layer, with ``*`` and ``?``.
        exclude: patterns of layers or linears that stay unquantized; they count 16 bits a weight. If only some linears
            of a layer are excluded, these become layers of their own.
        dense: names of linears that also stay unquantized, unless a pin gives them a width.

    Raises:
        ImpqError: the backend refuses a linear's shape (the message names the linear and how to exclude it).
        UsageError: a pattern matches no layer, a pin matches only part of a layer, or every layer is pinned or
            excluded.
    """
    layers = tuple(part for layer in layers for part in _apart(layer, exclude, dense))
    fixed: dict[str, Choice | None] = {}
    for pattern, name in [*pins.items(), *((pattern, "") for pattern in exclude)]:
        width = backend.choice(name) if name else None
        if name and width is None:
            raise UsageError(f"pin {pattern}={name}: {type(backend).__name__} has no {in_bits(name)}")
        matched = [layer.name for layer in layers if _matches(pattern, layer)]
        if not matched:
            raise UsageError(f"the pattern '{pattern}' matches no layer (the first layer is {layers[0].name})")
        for name in matched:
            if fixed.setdefault(name, width) != width:
                raise UsageError(f"layer {name} is pinned or excluded in two ways")
    fixed = {**{layer.name: None for layer in layers if all(linear.name in dense for linear in layer.linears)}, **fixed}

    def size(layer: LayerSpec, choice: Choice) -> int:
        for linear in layer.linears:
            try:
                backend.check(linear, backend.stand_in(linear, choice))
            except ImpqError as error:
                leaf = linear.name.rpartition(".")[2]
                raise type(error)(f"{error}; --exclude '*.{leaf}' leaves such linears at 16 bits") from error
        return sum(backend.nbytes(linear, backend.stand_in(linear, choice)) for linear in layer.linears)

    def bits(layer: LayerSpec, choice: Choice) -> float:
        return sum(linear.parameters * backend.stand_in(linear, choice).bits
                   for linear in layer.linears) / layer.parameters

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
    widths = np.array([[bits(layer, choice) for choice in choices] for layer in free])
    return SearchSpace(free, choices, nbytes, tuple(pinned), widths)


def _apart(layer: LayerSpec, exclude: Sequence[str], dense: Collection[str]) -> Iterator[LayerSpec]:
    """The layer, or, if only some of its linears are excluded, the layer without them and each of them alone."""
    def excluded(name: str) -> bool:
        return name in dense or any(fnmatchcase(name, pattern) for pattern in exclude)

    kept = tuple(linear for linear in layer.linears if not excluded(linear.name))
    whole = any(fnmatchcase(layer.name, pattern) for pattern in exclude)
    if whole or len(kept) in (0, len(layer.linears)):
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
