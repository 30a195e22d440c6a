"""The two files every exported checkpoint has: model.safetensors and config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impq_core.errors import ImpqError
from impq_core.files import write_text

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
"""The file that holds every tensor."""


def write_model(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write a model's tensors by name, and its configuration."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS,
              metadata={"format": "pt"})
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


@contextmanager
def read_model(folder: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """Give out the tensors that ``write_model`` wrote, by name; raises ImpqError where the file lacks one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            yield file.get_tensor
    except (OSError, SafetensorError) as error:
        raise ImpqError(f"{folder / WEIGHTS} cannot be read: {error}") from error


def tensor_names(folder: Path) -> set[str]:
    """Names of the tensors in the file; raises ImpqError where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ImpqError(f"{folder / WEIGHTS} cannot be read: {error}") from error
