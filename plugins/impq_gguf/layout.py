"""The tensors of a GGUF file: their names, types and shapes, and how their data follows from the model's."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from impq_core.errors import ImpqError
from impq_core.interfaces import Checkpoint
from impq_gguf.metadata import rotary_tensors
from impq_gguf.names import Architecture, Place, architecture_of, gguf_places, text_config, text_name

if TYPE_CHECKING:
    import torch

_SINGLE = (".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight")
"""Ends of names of matrices that llama.cpp wants in single precision: routers."""

_LEFT_OUT = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that follow from the configuration."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file.

    Args:
        name: in the file.
        kind: name of its ggml type.
        shape: as in Hugging Face files, or (experts, rows, columns).
        sources: names, in the model's files, of what it holds: one tensor, or that of each expert.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return math.prod(self.shape) // block * size


@dataclass(frozen=True)
class Layout:
    """The tensors of the file of a model.

    Args:
        architecture: llama.cpp's.
        config: transformers' configuration.
        places: where each tensor of the model's files is.
        tensors: in the order of the file, after ``constants``.
        constants: tensors that follow from the configuration, by name.
        others: names of tensors of a multimodal model that are not in its language model, nor in the file.
    """

    architecture: Architecture
    config: Any
    places: Mapping[str, Place]
    tensors: Sequence[Tensor]
    constants: Mapping[str, NDArray[np.float32]]
    others: Sequence[str] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Layout:
        """The layout of a checkpoint, of which no data is read.

        Raises:
            ImpqError: llama.cpp does not know the architecture or a tensor, or the experts of a block have several
                types.
        """
        from transformers import CONFIG_MAPPING

        settings = text_config(checkpoint.config)
        architecture_of(settings)
        config = CONFIG_MAPPING[settings["model_type"]].from_dict(dict(settings))
        architecture = architecture_of(config.to_dict())
        planned = {f"{name}.weight": choice for name, choice in checkpoint.widths.items() if choice is not None}
        everything = {name: text_name(name) if settings is not checkpoint.config else name
                      for name in (*planned, *checkpoint.dense)}
        names = {name: text for name, text in everything.items() if text and not text.endswith(_LEFT_OUT)
                 and not (config.tie_word_embeddings and text == "lm_head.weight")}
        by_text = gguf_places(architecture.name, config.num_hidden_layers, names.values())
        places = {name: by_text[text] for name, text in names.items()}
        parts: dict[str, dict[int | None, str]] = {}
        for name, place in places.items():
            parts.setdefault(place.name, {})[place.expert] = name
        tensors = []
        for stored, sources in parts.items():
            if None in sources and len(sources) > 1:
                raise ImpqError(f"format gguf does not hold this model: {sources[None]} is beside single experts")
            ordered = tuple(sources[number] for number in sorted(sources, key=lambda number: number or 0))
            kinds = {planned[name].name if name in planned else _kind(stored, checkpoint.dense[name])
                     for name in ordered}
            shape = _shape(checkpoint, ordered[0])
            shape = shape if None in sources else (len(ordered), *shape)
            tensors.append(Tensor(stored, one_type(stored, kinds), shape, ordered))
        tensors.sort(key=lambda tensor: _order(tensor.name))
        others = tuple(name for name, text in everything.items() if text is None)
        return cls(architecture, config, places, tensors, rotary_tensors(config), others)

    def data(self, tensor: Tensor, checkpoint: Checkpoint) -> NDArray[Any]:
        """The data of a tensor, for a checkpoint with weights."""
        parts = [self._rows(name, self._one(tensor, name, checkpoint)) for name in tensor.sources]
        return parts[0] if len(parts) == 1 else np.stack(parts)

    def _one(self, tensor: Tensor, name: str, checkpoint: Checkpoint) -> NDArray[Any]:
        import torch

        if variant := checkpoint.variants.get(name.removesuffix(".weight")):
            return variant.tensors["data"].numpy()
        dense = checkpoint.dense[name]
        if tensor.kind == "BF16":
            return dense.contiguous().view(torch.int16).numpy()
        if tensor.kind == "F16":
            return dense.numpy()
        return dense.float().numpy() + np.float32(self.is_shifted(tensor.name))

    def is_shifted(self, stored: str) -> bool:
        """Whether the values of a tensor are those of the model, plus 1."""
        return self.architecture.shifted and stored.endswith("norm.weight")

    def _rows(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        """Rows of q and k of a rotated architecture in the order of rotary pairs."""
        if heads := self.rotated_heads(name):
            pairs = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
            return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        return values

    def rotated_heads(self, name: str) -> int:
        """Heads of a tensor of the model whose rows are stored in the order of rotary pairs; 0 for other tensors."""
        if not self.architecture.rotated:
            return 0
        if ".q_proj." in name:
            return int(self.config.num_attention_heads)
        return int(self.config.num_key_value_heads) if ".k_proj." in name else 0


def one_type(stored: str, kinds: Collection[str]) -> str:
    """The type of a tensor of the file; raises ImpqError if there are several, as a plan can have for experts."""
    if len(kinds) > 1:
        raise ImpqError(f"a GGUF file has one type for all experts of a block, but the plan has "
                        f"{', '.join(sorted(kinds))} for {stored}: plan with --granularity group or block")
    return next(iter(kinds))


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    if name in checkpoint.dense:
        return tuple(checkpoint.dense[name].shape)
    spec = checkpoint.specs[name.removesuffix(".weight")]
    return spec.rows, spec.columns


def _kind(stored: str, tensor: torch.Tensor) -> str:
    import torch

    if tensor.dim() < 2 or stored.endswith(_SINGLE):
        return "F32"
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    if tensor.dtype not in kinds:
        raise ImpqError(f"format gguf does not hold this model: {stored} is of type {tensor.dtype}")
    return kinds[tensor.dtype]


def _order(stored: str) -> tuple[int, str]:
    """Embedding, blocks in order, head."""
    first, _, rest = stored.partition(".")
    if first == "blk":
        return int(rest.partition(".")[0]), stored
    return (-1 if first == "token_embd" else 10**6), stored
