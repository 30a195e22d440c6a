"""llama.cpp's mixes: the type that llama-quantize gives each tensor of a file that is called Q4_K_M, IQ3_M and so on.

The rules are those of ``llama_tensor_get_type`` in llama.cpp's src/llama-quant.cpp (November 2026) for all
architectures but Falcon. They go by the tensor's role, its place among the tensors of that role, and the model's
numbers of query heads for each key head and of experts. Shapes that a type does not fit are the backend's
business (``stored_as``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from impq_core.space import LinearSpec
from impq_gguf.types import TYPES

BASE: Mapping[str, str] = MappingProxyType({
    **{name: name for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ3_S", "IQ4_XS", "IQ4_NL",
                               "Q2_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
    **{f"{name}_{size}": name for name, sizes in (("Q3_K", "SML"), ("Q4_K", "SM"), ("Q5_K", "SM")) for size in sizes},
    "Q2_K_S": "Q2_K", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S",
})
"""The mixes, and the type of the tensors that no rule names."""

_SMALLEST = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"})
"""Mixes with rules of their own."""


@dataclass(frozen=True)
class _Place:
    """What the rules ask of a tensor.

    Args:
        index: place among the tensors of its role; of feed-forward tensors in a mixture of experts, its block.
        count: number of attention values, or of blocks for feed-forward tensors.
        order: place among the tensors of its role.
        shared: whether four or more query heads share a key head.
        experts: number of experts; 0 for a dense model.
        large: whether llama.cpp counts the model as one of 70 billion weights.
        importance: whether there is an importance matrix.
    """

    index: int
    count: int
    order: int
    shared: bool
    experts: int
    large: bool
    importance: bool

    @property
    def first(self) -> bool:
        """In the first eighth."""
        return self.index < self.count // 8

    @property
    def important(self) -> bool:
        """In the first or last eighth, or a third one between."""
        first, last = self.count // 8, 7 * self.count // 8
        return self.index < first or self.index >= last or (self.index - first) % 3 == 2


Rule = Callable[[_Place], str | None]
"""The type of a tensor; None for that of the tensors that no rule names."""


def _always(kind: str) -> Rule:
    return lambda place: kind


def _shared(kind: str) -> Rule:
    return lambda place: kind if place.shared else None


def _important(kind: str) -> Rule:
    return lambda place: kind if place.important else None


_VALUES: Mapping[str, Rule] = MappingProxyType({
    "Q2_K": lambda place: "Q4_K" if place.shared else "Q3_K",
    "Q2_K_S": _shared("Q4_K"), "IQ3_XS": _shared("Q4_K"), "IQ3_S": _shared("Q4_K"),
    "IQ3_XXS": lambda place: "Q4_K" if place.shared else None if place.importance else "IQ3_S",
    "IQ3_M": _always("Q4_K"), "Q3_K_L": _always("Q5_K"),
    "Q3_K_M": lambda place: "Q5_K" if place.index < 2 else "Q4_K",
    "IQ4_NL": _shared("Q5_K"), "IQ4_XS": _shared("Q5_K"),
    "Q4_K_M": _important("Q6_K"), "Q5_K_M": _important("Q6_K"),
    "Q4_K_S": lambda place: "Q5_K" if place.index < 4 else None,
})

_DOWNS: Mapping[str, Rule] = MappingProxyType({
    "Q2_K": _always("Q3_K"), "Q3_K_L": _always("Q5_K"),
    "Q2_K_S": lambda place: "Q4_K" if place.first else None,
    "IQ3_XXS": lambda place: None if place.importance else "Q4_K" if place.first else "Q3_K",
    "Q3_K_M": lambda place: "Q5_K" if place.index < place.count // 16 else "Q4_K",
    "IQ3_M": lambda place: "Q4_K" if place.first or (place.experts == 8 and place.important) else None,
    "Q4_K_M": _important("Q6_K"), "Q5_K_M": _important("Q6_K"),
    "IQ4_NL": lambda place: "Q5_K" if place.first and not place.importance else None,
    "IQ4_XS": lambda place: "Q5_K" if place.first and not place.importance else None,
    "Q4_K_S": lambda place: "Q5_K" if place.first else None,
    "Q4_0": lambda place: "Q4_1" if place.first and place.importance else None,
    "Q5_0": lambda place: "Q5_1" if place.first and place.importance else None,
})

_OUTPUTS: Mapping[str, str] = MappingProxyType(
    {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"})

_OUTPUTS_OF_EIGHT = frozenset({"Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S",
                               "IQ3_M", "IQ4_XS"})
"""Mixes whose attention outputs are Q5_K in a mixture of eight experts."""


def _values(mix: str, place: _Place) -> str | None:
    kind = _VALUES.get(mix, _always(""))(place) or BASE[mix]
    if place.large and kind in ("Q3_K", "Q4_K"):
        kind = "Q5_K"
    return "Q8_0" if place.experts == 8 else kind


def _keys(mix: str, place: _Place) -> str | None:
    return "Q8_0" if place.experts == 8 else _queries(mix, place)


def _queries(mix: str, place: _Place) -> str | None:
    return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mix)


def _outputs(mix: str, place: _Place) -> str | None:
    if place.experts == 8:
        return "Q5_K" if mix in _OUTPUTS_OF_EIGHT else None
    return _OUTPUTS.get(mix)


def _gates(mix: str, place: _Place) -> str | None:
    middle = not place.first and place.index < 7 * place.count // 8
    return "IQ3_XXS" if mix == "IQ3_XS" and middle else None


def _downs(mix: str, place: _Place) -> str | None:
    return _DOWNS.get(mix, _always(""))(place)


_RULES: Mapping[str, Callable[[str, _Place], str | None]] = MappingProxyType(
    {"v": _values, "k": _keys, "q": _queries, "output": _outputs, "gate": _gates, "up": _gates, "down": _downs})


def _of_smallest(mix: str, role: str, place: _Place) -> str | None:
    """The rules of the mixes in ``_SMALLEST``."""
    better = "IQ3_S" if mix in ("IQ2_S", "IQ2_M") else "Q2_K"
    if role == "v":
        return "Q4_K" if place.shared or place.experts >= 4 else better
    if role == "k" and place.experts == 8:
        return "Q4_K"
    if role == "down":
        return better if place.order < place.count // 8 else None
    if role == "output":
        if place.experts == 8:
            return "Q5_K"
        return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(mix)
    return None


def _of_vocabulary(mix: str, head: bool, columns: int) -> str:
    """The type of the head, or of embeddings that are also the head, or of embeddings that are not."""
    if not head:
        return {**dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), "Q2_K"),
                **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S")}.get(mix, BASE[mix])
    if columns % TYPES[BASE[mix]].block or mix == "Q8_0":
        return "Q8_0"
    return "Q5_K" if mix in _SMALLEST or mix == "IQ3_XXS" else "Q6_K"


@dataclass(frozen=True, order=True)
class _Tensor:
    """A tensor of llama.cpp, in the order in which llama-quantize meets them. Experts of a block are one tensor.

    Args:
        block: number of the block; -1 outside the blocks.
        name: llama.cpp's, within the block.
    """

    block: int
    name: str

    @property
    def role(self) -> str:
        """As the rules name it; empty if none does."""
        found = re.match(r"attn_(?:(q|k|v|output)$|(qkv|kv_b)$)|ffn_(gate|up|down)(?:_exps|_shexp)?$", self.name)
        return ("v" if found[2] else found[1] or found[3]) if found else ""


def deal(mix: str, linears: Sequence[LinearSpec], importance: bool = True) -> dict[str, str]:
    """The types of a mix, before stand-ins.

    Args:
        mix: one of ``BASE``.
        linears: all linears of a model's blocks. Embeddings and head may be among them; embeddings are taken as the
            head's own if there is no head.
        importance: whether there is an importance matrix.

    Returns:
        The name of the type of each linear, by its name.
    """
    tensors = {linear.name: _tensor(linear.name) for linear in linears}
    columns = {tensors[linear.name]: linear.columns for linear in linears}
    inside = [tensor for tensor in columns if tensor.block >= 0]
    blocks = 1 + max((tensor.block for tensor in inside), default=0)
    experts = len({match[1] for name in tensors if (match := _EXPERT.search(name))})
    per_key = _heads_per_key(linears, tensors)
    values = sum(tensor.role == "v" for tensor in inside)
    met: dict[str, int] = {}
    types: dict[_Tensor, str] = {}
    for tensor in sorted(columns):
        if tensor.block < 0:
            head = tensor.name == "output" or _Tensor(-1, "output") not in columns
            types[tensor] = _of_vocabulary(mix, head, columns[tensor])
            continue
        role = tensor.role
        order = met[role] = met.get(role, -1) + 1
        index = tensor.block if experts > 1 and role in ("gate", "up", "down") else order
        place = _Place(index, values if role == "v" else blocks, order, per_key >= 4, experts,
                       blocks == 80 and per_key != 1, importance)
        kind = _of_smallest(mix, role, place) if mix in _SMALLEST else _RULES[role](mix, place) if role else None
        types[tensor] = "F16" if tensor.name == "ffn_gate_inp" else kind or BASE[mix]
    return {name: types[tensor] for name, tensor in tensors.items()}


_EXPERT = re.compile(r"\bexperts\.(\d+)\.")


def _tensor(name: str) -> _Tensor:
    """llama.cpp's tensor of a linear; one of an unknown linear has the linear's own name."""
    found = re.search(r"(?:^|\.)(?:h|layers|blocks)\.(\d+)\.(.+)$", name)
    if not found:
        return _Tensor(-1, "output" if name.rpartition(".")[2] in ("lm_head", "embed_out", "output") else "token_embd")
    part = _EXPERT.sub("experts.", found[2])
    return _Tensor(int(found[1]), _parts().get(part, part))


@functools.cache
def _parts() -> Mapping[str, str]:
    """llama.cpp's name of a tensor in a block, by the linear's name there, from the tables of the ``gguf`` package.
    Where architectures differ, attention and feed-forward come first, and those of all experts before shared ones."""
    from gguf import TENSOR_NAMES
    from gguf.tensor_mapping import TensorNameMap

    places: dict[str, list[str]] = {}
    for tensor, names in TensorNameMap.block_mappings_cfg.items():
        for name in names:
            _, inside, part = name.partition("{bid}.")
            if inside:
                places.setdefault(part, []).append(TENSOR_NAMES[tensor].rpartition(".")[2])
    return {part: min(names, key=_rank) for part, names in places.items()}


def _rank(name: str) -> int:
    order = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    return order.index(name) if name in order else len(order)


def _heads_per_key(linears: Sequence[LinearSpec], tensors: Mapping[str, _Tensor]) -> int:
    """Query heads for each key head in the first block with attention, from its shapes."""
    shapes: dict[int, dict[str, LinearSpec]] = {}
    for linear in linears:
        tensor = tensors[linear.name]
        shapes.setdefault(tensor.block, {})[tensor.name] = linear
    for _, found in sorted(shapes.items()):
        if "attn_output" in found and ("attn_v" in found or "attn_qkv" in found):
            inputs = found["attn_output"].columns
            values = found["attn_v"].rows if "attn_v" in found else (found["attn_qkv"].rows - inputs) // 2
            return inputs // max(1, values)
    return 1
