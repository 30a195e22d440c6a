"""Exporters, which write files that other software loads, and what they are given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from impq_core.errors import ImpqError
from impq_core.interfaces.backend import Variant
from impq_core.interfaces.part import Part
from impq_core.space import Choice, LinearSpec
from impq_core.types import Plan

if TYPE_CHECKING:
    import torch


EVERY_BACKEND = frozenset({"*"})
"""``Exporter.backends`` of a format that holds the variants of any backend."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A quantized model for an exporter.

    The keys of ``widths``, ``specs`` and ``variants`` are the names of weights in the model's files without
    ``.weight``. ``plan`` has the names of modules in the model; for most architectures the two are the same.

    Args:
        plan: the plan.
        widths: the choice of every linear; None for those that stay unquantized.
        specs: name in the model and shape of every linear.
        variants: the packed form of every quantized linear; empty except in ``Exporter.export``, and if the exporter is
            not ``packed``.
        dense: every other tensor of the model's files, by its name there; on the meta device except in
            ``Exporter.export``, and empty if the exporter has no ``backends`` (a recipe). If the exporter is not
            ``packed``, also the weights of quantized linears, with the quantized values at 16 bits, in the form that
            they have in the model's files.
        config: the model's configuration, as its config.json has it.
        backend: name of the backend that made the variants.
        options: that backend's options.
        files: the folder with the model's files: tokenizer, generation settings ...
    """

    plan: Plan
    widths: Mapping[str, Choice | None]
    specs: Mapping[str, LinearSpec]
    variants: Mapping[str, Variant]
    dense: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    backend: str
    options: Mapping[str, Any]
    files: Path


class Exporter(Part, ABC):
    """Writes a checkpoint in a format that other software reads.

    Formats whose tensors are in one safetensors file derive from ``exports.checkpoint.SafetensorsExporter``, which has
    ``file_bytes``, ``files`` and ``dense``. A recipe needs ``export`` alone.

    Class attributes:
        backends: names of the backends whose variants it writes; EVERY_BACKEND if the format holds those of any; empty
            for a recipe, which needs the widths alone.
        packed: whether its files hold the packed variants. If not, they hold unpacked weights with the quantized
            values, and are not what ``--whole`` bounds.
        alignment: tensors in its files begin at a multiple of this many bytes.
        holds_ends: whether it holds a quantized embedding and head.
        copies: patterns (glob) of the names of the model's files that are copied into the folder before ``export``.
    """

    backends: ClassVar[frozenset[str]] = frozenset()
    packed: ClassVar[bool] = True
    holds_ends: ClassVar[bool] = False
    alignment: ClassVar[int] = 1
    copies: ClassVar[tuple[str, ...]] = ("*",)

    def check(self, options: Mapping[str, Any]) -> None:
        """Raises ImpqError if the format cannot hold the variants of a backend with these options."""

    def file_bytes(self, checkpoint: Checkpoint) -> int:
        """The most bytes of the ``files`` that ``export`` writes for a checkpoint, from shapes and types alone. Called
        before anything is quantized.

        Raises:
            ImpqError: the format cannot hold this model, or it holds no weights.
        """
        raise ImpqError(f"{type(self).__name__} writes a recipe, not weights: there is no file to measure")

    @abstractmethod
    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write the files into an existing folder, which has the files of ``copies`` already if the format holds
        weights."""

    def files(self, folder: Path) -> Sequence[Path]:
        """The files with tensors that ``export`` wrote; none for a recipe."""
        return ()

    def restore(self, folder: Path, checkpoint: Checkpoint) -> Mapping[str, Variant]:
        """The variants that ``export`` wrote, by the names of ``checkpoint``; none if the exporter is not ``packed``.

        Raises:
            ImpqError: the format holds no weights, or the file lacks a tensor.
        """
        raise ImpqError(f"{type(self).__name__} writes a recipe, not weights: there is nothing to load")

    def dense(self, folder: Path, checkpoint: Checkpoint) -> Mapping[str, Callable[[], torch.Tensor]]:
        """Functions that read the tensors of ``checkpoint.dense`` which ``export`` wrote one to one, by their names in
        the model's files, and in the form that they have there.

        Raises:
            ImpqError: the format holds no weights, or the file is missing or damaged.
        """
        raise ImpqError(f"{type(self).__name__} writes a recipe, not weights: there is nothing to load")
