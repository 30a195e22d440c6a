"""Files of weights, checked while their digest is taken. torch is imported only to read weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from impq_core.errors import ImpqError

if TYPE_CHECKING:
    import torch

MAPPED = 2**27
"""Bytes of a file of weights that are mapped at a time while it is checked."""


def file_digest(file: Path) -> bytes:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def checked_digest(file: Path, model: str, quantized: bool) -> bytes:
    """SHA-256 of a safetensors file, every tensor of which is checked while it is read.

    Args:
        file: the file.
        model: name of the model in messages.
        quantized: whether the configuration says how codes are dequantized.

    Raises:
        ImpqError: the file is damaged, a weight holds codes that the configuration does not explain, or a number is not
            finite.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    found = hashlib.sha256()
    try:
        with safe_open(file, framework="pt") as stored:
            names = stored.offset_keys()  # in the order of the file
        with file.open("rb") as stream:
            size = stream.read(8)
            found.update(size + stream.read(int.from_bytes(size, "little")))
        while names:  # what is mapped takes memory until its file is closed
            with safe_open(file, framework="pt") as stored:
                mapped = 0
                while names and mapped < MAPPED:
                    tensor = stored.get_tensor(name := names.pop(0))
                    found.update(tensor.flatten().view(torch.uint8).numpy())
                    _check_tensor(model, name, tensor, quantized)
                    mapped += tensor.numel() * tensor.element_size()
                del tensor
    except (OSError, SafetensorError) as error:
        raise ImpqError(f"model {model}: {file.name} is damaged or cut short ({error}); fetch or save it "
                        "again") from error
    return found.digest()


def _check_tensor(model: str, name: str, tensor: torch.Tensor, quantized: bool) -> None:
    import torch

    if not quantized and name.endswith("weight") and (tensor.dtype.itemsize == 1 or not tensor.is_floating_point()):
        raise ImpqError(f"model {model}: its weight {name} holds {str(tensor.dtype).removeprefix('torch.')} "
                        "codes, so the model is quantized already, but its config.json does not say how: give the "
                        "unquantized model that it was made from")
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
        tensor = tensor.float()  # 8-bit floats have no aminmax
    if tensor.is_floating_point() and tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise ImpqError(f"model {model}: its weight {name} holds NaN or infinity; take a sound copy of the model")
