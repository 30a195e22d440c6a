"""Formats with a safetensors file and a config.json."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from impq_core.errors import ImpqError
from impq_core.files import write_text
from impq_core.interfaces import Checkpoint, Exporter, Variant
from impq_core.space import Choice

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
"""The file that holds every tensor, unless a format gives it another name."""

_EXPERT = re.compile(r".+\.\d+\.(gate_up_proj|gate_proj|up_proj|down_proj)")
"""Names, in the model, of linears of experts."""


def write_model(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any],
                weights: str = WEIGHTS) -> None:
    """Write a model's tensors by name, and its configuration; raises ImpqError if they cannot be written.

    Args:
        folder: to write to.
        tensors: by name.
        config: the content of config.json.
        weights: name of the file for the tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / weights,
                  metadata={"format": "pt"})
    except SafetensorError as error:
        raise ImpqError(f"{weights} cannot be written: {error}") from error
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


class SafetensorsExporter(Exporter):
    """Base class of formats whose tensors are in one file: the variants', and the others under their own names.

    Class attributes:
        weights: name of the file.
    """

    weights: ClassVar[str] = WEIGHTS

    @abstractmethod
    def parts(self, choice: Choice) -> Mapping[str, str]:
        """For a choice, what follows the linear's name in the file, by the name of the variant's tensor."""

    more_parts: ClassVar[tuple[str, ...]] = ()
    """What follows a linear's name in the file in the names of further small tensors, of at most 16 bytes each, if
    its own tensors are not enough."""

    def variant_bytes(self, checkpoint: Checkpoint) -> int:
        """Bytes of the tensors of all variants in the file; those of the plan, if the format does not change them."""
        plan = checkpoint.plan
        return plan.nbytes - sum(pin.nbytes for pin in plan.space.pinned if pin.choice is None)

    def file_bytes(self, checkpoint: Checkpoint) -> int:
        """Bytes of variants and dense tensors, and the most bytes of the header."""
        names = {name: choice for name, choice in checkpoint.widths.items() if choice is not None}
        keys = [f"{name}.{part}" for name, choice in names.items()
                for part in (*self.parts(choice).values(), *self.more_parts)]
        nbytes = (self.variant_bytes(checkpoint) + 16 * len(names) * len(self.more_parts)
                  + sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.dense.values()))
        entry = {"dtype": "F8_E4M3", "shape": [10**9] * 2, "data_offsets": [nbytes] * 2}
        header = json.dumps({key: entry for key in (*keys, *checkpoint.dense)} | {"__metadata__": {"format": "pt"}})
        return nbytes + len(header) + 16

    def files(self, folder: Path) -> Sequence[Path]:
        """The file."""
        return (folder / self.weights,)

    def restore(self, folder: Path, checkpoint: Checkpoint) -> Mapping[str, Variant]:
        """Read the packed linears; raises ImpqError if the file lacks one."""
        with read_model(folder, self.weights) as tensor:
            return {name: Variant(choice, {part: tensor(f"{name}.{stored}")
                                           for part, stored in self.parts(choice).items()})
                    for name, choice in checkpoint.widths.items() if choice is not None}

    def dense(self, folder: Path, checkpoint: Checkpoint) -> Mapping[str, Callable[[], torch.Tensor]]:
        """Functions that map a tensor of the file."""
        with open_model(folder, self.weights) as file:
            stored = set(file.keys())
        return {name: partial(_read, folder, self.weights, name) for name in checkpoint.dense if name in stored}


def _read(folder: Path, weights: str, name: str) -> torch.Tensor:
    with read_model(folder, weights) as tensor:
        return tensor(name)


@contextmanager
def read_model(folder: Path, weights: str = WEIGHTS) -> Iterator[Callable[[str], torch.Tensor]]:
    """Yields a function that returns a tensor of the file by its name, and raises ImpqError if the file lacks it."""
    with open_model(folder, weights) as file:
        yield file.get_tensor


@contextmanager
def open_model(folder: Path, weights: str = WEIGHTS) -> Iterator[Any]:
    """Yields the open safetensors file; raises ImpqError if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / weights, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ImpqError(f"{folder / weights} cannot be read: {error}") from error
