"""A complete GGUF file: metadata, tokenizer, and every tensor, for llama.cpp and the programs that contain it."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from impq_core.errors import ImpqError
from impq_core.interfaces import Checkpoint, Exporter, Variant
from impq_gguf.metadata import add_architecture, add_general, rotary_tensors
from impq_gguf.names import Architecture, architecture_of, gguf_places
from impq_gguf.tokenizer import read_tokenizer

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter

NAME = "model.gguf"
"""The file, or the beginning of the names of its parts: model-00001-of-00002.gguf ..."""

SINGLE = frozenset({"ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight"})
"""Ends of names of matrices that llama.cpp wants in single precision: routers."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file.

    Args:
        name: in the file.
        kind: name of its ggml type.
        shape: as in Hugging Face files, or (experts, rows, columns).
        sources: the checkpoint's names of what it holds: one tensor, or that of each expert.
        heads: attention heads whose rows are stored in the order of rotary pairs; 0 for none.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    heads: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return math.prod(self.shape) // block * size


@dataclass(frozen=True)
class Options:
    """Options of the format.

    Args:
        split_mb: megabytes of a part of the file; a file of at most so many is not split.
    """

    split_mb: int = 2000

    def __post_init__(self) -> None:
        if self.split_mb < 1:
            raise ValueError("split_mb must be at least 1")


class GgufExporter(Exporter):
    """``model.gguf``, in parts above 2 GB.

    Quantized linears are stored as the plan has them; other matrices in the dtype of the run, and vectors and routers
    in float32. A tied head is not repeated. The folder has no copies of tokenizer and configuration, which are in the
    file.
    """

    Options = Options
    backends = frozenset({"gguf"})
    copies = ("LICENSE*", "LICENCE*", "NOTICE*", "README*", "USE_POLICY*")

    def file_bytes(self, checkpoint: Checkpoint) -> int:
        """The exact bytes of the file, all parts together.

        Raises:
            ImpqError: llama.cpp does not know the architecture, a tensor or the tokenizer, or the experts of a block
                have several types.
        """
        with tempfile.TemporaryDirectory() as folder:
            layout = Layout.of(checkpoint)
            with self._begun(checkpoint, layout, Path(folder)) as writer:
                nbytes = sum(_padded(tensor.nbytes) for tensor in layout.tensors)
                nbytes += sum(_padded(values.nbytes) for values in layout.constants.values())
                writer.flush()
                return nbytes + sum(_padded(file.tell()) for file in writer.fout or ())

    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write the file or its parts."""
        layout = Layout.of(checkpoint)
        with self._begun(checkpoint, layout, folder) as writer:
            for values in layout.constants.values():
                writer.write_tensor_data(values)
            for tensor in layout.tensors:
                writer.write_tensor_data(_data(tensor, checkpoint))

    @contextmanager
    def _begun(self, checkpoint: Checkpoint, layout: Layout, folder: Path) -> Iterator[GGUFWriter]:
        """Yields a writer whose file has everything but the data of the tensors."""
        from gguf import GGMLQuantizationType, GGUFWriter

        limit = self.options.split_mb * 10**6
        whole = sum(tensor.nbytes for tensor in layout.tensors)
        writer = GGUFWriter(folder / NAME, layout.architecture.name, split_max_size=limit if whole > limit else 0)
        kinds: Counter[str] = Counter()
        for name, values in layout.constants.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for tensor in layout.tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes,
                                   GGMLQuantizationType[tensor.kind])
            kinds[tensor.kind] += math.prod(tensor.shape)
        add_general(writer, checkpoint, kinds)
        add_architecture(writer, layout.config, layout.architecture)
        read_tokenizer(checkpoint.files, layout.config.vocab_size).add_to(writer)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            yield writer
        finally:
            writer.close()

    def files(self, folder: Path) -> Sequence[Path]:
        """The file or its parts, in order."""
        stem, suffix = NAME.split(".")
        return sorted(folder.glob(f"{stem}-*-of-*.{suffix}")) or [folder / NAME]

    def restore(self, folder: Path, checkpoint: Checkpoint) -> Mapping[str, Variant]:
        """Map the packed linears; raises ImpqError if the file lacks one."""
        read = _Reader(self.files(folder))
        return {name: Variant(choice, {"data": read.packed(f"{name}.weight", checkpoint)})
                for name, choice in checkpoint.widths.items() if choice is not None}

    def dense(self, folder: Path, checkpoint: Checkpoint) -> Mapping[str, Callable[[], torch.Tensor]]:
        """Functions that read a tensor of the file."""
        read = _Reader(self.files(folder))
        return {name: partial(read.dense, name, checkpoint) for name in checkpoint.dense
                if name in Layout.of(checkpoint).places}
