"""Tensors of a GGUF file in the form that the model's files have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from impq_core.errors import ImpqError, one_line
from impq_gguf.layout import Layout

if TYPE_CHECKING:
    import torch


def open_file(file: Path) -> Any:
    """The fields and tensors of a GGUF file, all of whose bytes are there.

    Raises:
        ImpqError: the file is missing, truncated, damaged, or no GGUF.
    """
    from gguf import GGUFReader

    try:
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ImpqError(f"{file} is no GGUF file")
        return GGUFReader(file, "c")
    except OSError as error:
        raise ImpqError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise ImpqError(f"{file} is truncated or damaged: {one_line(error, 80)}") from error


class Reader:
    """A GGUF file that ``GgufExporter`` wrote, mapped into memory.

    Args:
        files: the file, or its parts.
        layout: of the model that was written.

    Raises:
        ImpqError: a file is missing or damaged, or lacks a tensor of the layout, or has it in another type or shape.
    """

    def __init__(self, files: Sequence[Path], layout: Layout) -> None:
        self._layout = layout
        self._tensors = {tensor.name: tensor for file in files for tensor in open_file(file).tensors}
        for tensor in layout.tensors:
            if tensor.name not in self._tensors:
                raise ImpqError(f"{files[0]} lacks the tensor {tensor.name}")
            found = self._tensors[tensor.name]
            kind, shape = found.tensor_type.name, tuple(int(size) for size in reversed(found.shape))
            if (kind, shape) != (tensor.kind, tensor.shape):
                raise ImpqError(f"{files[0]} is not the file of this plan: {tensor.name} is {_described(kind, shape)} "
                                f"in it, not {_described(tensor.kind, tensor.shape)}")

    def packed(self, name: str) -> torch.Tensor:
        """The bytes uint8 (rows, bytes of a row) of a weight of the model."""
        import torch

        return torch.from_numpy(self._rows(name))

    def dense(self, name: str) -> torch.Tensor:
        """An unquantized tensor of the model."""
        import torch

        kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        stored = self._layout.places[name].name
        values = torch.from_numpy(self._rows(name)).view(kinds[self._tensors[stored].tensor_type.name])
        if len(self._tensors[stored].shape) == 1:
            values = values[0]
        return values - 1 if self._layout.is_shifted(stored) else values

    def _rows(self, name: str) -> NDArray[np.uint8]:
        """The bytes (rows, bytes of a row) of a tensor of the model, a vector as one row."""
        place = self._layout.places[name]
        tensor = self._tensors[place.name]
        rows = int(np.prod(tensor.shape[1:]))
        data = np.asarray(tensor.data).reshape(-1).view(np.uint8).reshape(rows, -1)
        if place.expert is not None:
            data = data.reshape(int(tensor.shape[2]), int(tensor.shape[1]), -1)[place.expert]
        if heads := self._layout.rotated_heads(name):
            vector = len(data) == 1
            if vector:
                data = data.reshape(-1, tensor.n_bytes // tensor.n_elements)
            pairs = data.reshape(heads, len(data) // heads // 2, 2, -1)
            data = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(len(data), -1)
            data = data.reshape(1, -1) if vector else data
        return data


def _described(kind: str, shape: Sequence[int]) -> str:
    return f"{kind} of {' x '.join(map(str, shape))}"
