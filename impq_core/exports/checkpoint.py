"""The two files every exported checkpoint has: model.safetensors and config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impq_core.errors import ImpqError
from impq_core.files import write_text
from impq_core.interfaces import Checkpoint, Variant
from impq_core.space import Choice

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
"""The file that holds every tensor."""

_EXPERT = re.compile(r".+\.\d+\.(gate_up_proj|gate_proj|up_proj|down_proj)")
"""Names, in the model, of linears of experts."""


def write_model(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write a model's tensors by name, and its configuration; raises ImpqError if they cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS,
                  metadata={"format": "pt"})
    except SafetensorError as error:
        raise ImpqError(f"{WEIGHTS} cannot be written: {error}") from error
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def module_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Names of the modules that transformers makes of the linears, by the linears' names in the files. They differ in
    architectures whose tensors transformers renames, most multimodal ones among them. An expert that transformers fuses
    with others is no module: it has its name in the files."""
    return {name: name if _EXPERT.fullmatch(spec.name) else spec.name for name, spec in checkpoint.specs.items()}


def require_module_names(checkpoint: Checkpoint, exporter: str) -> None:
    """For a format whose software looks for tensors under the names of modules: raises ImpqError if the files have
    other names.

    Args:
        checkpoint: the checkpoint.
        exporter: name of the format.
    """
    for name, module in module_names(checkpoint).items():
        if name != module:
            raise ImpqError(f"format '{exporter}' is loaded by the names of modules, but the files of this model have "
                            f"other names ({name} for {module}): gptq and compressed-tensors hold such a model")


def read_variants(folder: Path, widths: Mapping[str, Choice | None],
                  suffixes: Callable[[Choice], Mapping[str, str]]) -> dict[str, Variant]:
    """The variant of every quantized linear, by its name in the file.

    Args:
        folder: an exported folder.
        widths: choices by names in the file; None for a linear that stays unquantized.
        suffixes: for a choice, what follows the linear's name in the file, by the name of the variant's tensor.

    Raises:
        ImpqError: the file lacks a tensor.
    """
    with read_model(folder) as tensor:
        return {name: Variant(choice, {part: tensor(f"{name}.{suffix}") for part, suffix in suffixes(choice).items()})
                for name, choice in widths.items() if choice is not None}


@contextmanager
def read_model(folder: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """Yields a function that returns a tensor of the file by its name, and raises ImpqError if the file lacks it."""
    with _opened(folder) as file:
        yield file.get_tensor


def tensor_names(folder: Path) -> set[str]:
    """Names of the tensors in the file; raises ImpqError if it cannot be read."""
    with _opened(folder) as file:
        return set(file.keys())


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ImpqError(f"{folder / WEIGHTS} cannot be read: {error}") from error
