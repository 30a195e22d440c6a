"""The types of a GGUF file, whoever made it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from impq_core.errors import ImpqError
from impq_core.space import LinearSpec
from impq_gguf.names import gguf_places
from impq_gguf.reader import open_file
from impq_gguf.types import TYPES

_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


def read_types(file: Path, linears: Sequence[LinearSpec]) -> dict[str, str]:
    """The type of each linear of a model in a GGUF file; of a file in parts, any part.

    Args:
        file: a GGUF file of the model.
        linears: all linears of the model.

    Raises:
        ImpqError: the file is missing, truncated or no GGUF, is of another model or of an architecture that the
            ``gguf`` package does not know, or has a type that the backend does not have.
    """
    from gguf import MODEL_ARCH_NAMES

    fields: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for part in _parts(file):
        reader = open_file(part)
        fields |= reader.fields
        tensors |= {tensor.name: tensor for tensor in reader.tensors}
    architecture = _value(file, fields, "general.architecture")
    if architecture not in MODEL_ARCH_NAMES.values():
        raise ImpqError(f"{file}: the gguf package does not know the architecture '{architecture}' of this file; a "
                        "newer one may (pip install -U gguf)")
    blocks = int(_value(file, fields, f"{architecture}.block_count"))
    further = fields.get(f"{architecture}.nextn_predict_layers")  # blocks that predict further tokens come last
    own = len({match[0] for linear in linears if (match := re.search(r"\.\d+\.", linear.name))})
    if own != blocks - (int(further.contents()) if further else 0):
        raise ImpqError(f"{file} is of another model: it has {blocks} blocks, the model has {own}")
    places = gguf_places(architecture, blocks, [f"{linear.name}.weight" for linear in linears])
    types = {}
    for linear in linears:
        place = places[f"{linear.name}.weight"]
        tensor = tensors.get(place.name)
        if tensor is None:
            raise ImpqError(f"{file} is of another model: it has no tensor {place.name}, the model's {linear.name}")
        shape = tuple(int(size) for size in tensor.shape)
        if shape[:2] != (linear.columns, linear.rows) or (place.expert or 0) >= (*shape, 1)[2]:
            raise ImpqError(f"{file} is of another model: {place.name} is {' x '.join(map(str, shape[::-1]))}, the "
                            f"model's {linear.name} is {linear.rows} x {linear.columns}")
        if tensor.tensor_type.name not in TYPES:
            raise ImpqError(f"{file}: {place.name} is stored as {tensor.tensor_type.name}, which backend gguf does not "
                            "have")
        types[linear.name] = tensor.tensor_type.name
    return types


def _parts(file: Path) -> list[Path]:
    """All parts of a file that is split, in order; else the file."""
    match = _PART.fullmatch(file.name)
    if not match:
        return [file]
    return [file.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf")
            for number in range(1, int(match["count"]) + 1)]


def _value(file: Path, fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise ImpqError(f"{file} is truncated or no language model: it has no {name}")
    return fields[name].contents()
