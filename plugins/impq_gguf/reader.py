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


class Reader:
    """A GGUF file, mapped into memory.

    Args:
        files: the file, or its parts.

    Raises:
        ImpqError: a file is missing or damaged.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        from gguf import GGUFReader

        self._file = files[0]
        self._tensors: dict[str, Any] = {}
        for file in files:
            try:
                self._tensors |= {tensor.name: tensor for tensor in GGUFReader(file, "c").tensors}
            except (OSError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
                raise ImpqError(f"{file} cannot be read: {one_line(error)}") from error

    def packed(self, layout: Layout, name: str) -> torch.Tensor:
        """The bytes uint8 (rows, bytes of a row) of a weight of the model; raises ImpqError if the file lacks it."""
        import torch

        return torch.from_numpy(self._rows(layout, name))

    def dense(self, layout: Layout, name: str) -> torch.Tensor:
        """An unquantized tensor of the model; raises ImpqError if the file lacks it, or has codes in its place."""
        import torch

        kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        stored = layout.places[name].name
        rows = torch.from_numpy(self._rows(layout, name))
        kind = kinds.get(self._tensors[stored].tensor_type.name)
        if kind is None:
            raise ImpqError(f"{self._file} is not the file of this plan: {stored} is quantized in it")
        values = rows.view(kind)
        if len(self._tensors[stored].shape) == 1:
            values = values[0]
        return values - 1 if layout.is_shifted(stored) else values

    def _rows(self, layout: Layout, name: str) -> NDArray[np.uint8]:
        """The bytes (rows, bytes of a row) of a tensor of the model, a vector as one row."""
        place = layout.places[name]
        if place.name not in self._tensors:
            raise ImpqError(f"{self._file} lacks the tensor {place.name}")
        tensor = self._tensors[place.name]
        rows = int(np.prod(tensor.shape[1:]))
        data = np.asarray(tensor.data).reshape(-1).view(np.uint8).reshape(rows, -1)
        if place.expert is not None:
            data = data.reshape(int(tensor.shape[2]), int(tensor.shape[1]), -1)[place.expert]
        if heads := layout.rotated_heads(name):
            vector = len(data) == 1
            if vector:
                data = data.reshape(-1, tensor.n_bytes // tensor.n_elements)
            pairs = data.reshape(heads, len(data) // heads // 2, 2, -1)
            data = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(len(data), -1)
            data = data.reshape(1, -1) if vector else data
        return data
