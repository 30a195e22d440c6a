"""A complete GGUF file: metadata, tokenizer, and every tensor, for llama.cpp and the programs that contain it."""

from __future__ import annotations

import functools
import math
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from impq_core.interfaces import Checkpoint, Exporter, Variant
from impq_gguf.layout import Layout
from impq_gguf.llama import check_loads
from impq_gguf.metadata import add_architecture, add_general
from impq_gguf.reader import Reader
from impq_gguf.tokenizer import read_tokenizer

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter

NAME = "model.gguf"
"""The file, or the beginning of the names of its parts: model-00001-of-00002.gguf ..."""


class GgufExporter(Exporter):
    """``model.gguf``, in parts above 2 GB.

    Quantized linears are stored as the plan has them; other matrices in the dtype of the run, and vectors and routers
    in float32. A tied head is not repeated. The folder has no copies of tokenizer and configuration, which are in the
    file. Of a multimodal model, the file holds the language model.
    """

    backends = frozenset({"gguf"})
    holds_ends = True
    alignment = 32
    copies = ("LICENSE*", "LICENCE*", "NOTICE*", "README*", "USE_POLICY*")
    part_bytes: ClassVar[int] = 2 * 10**9
    """Bytes of tensors in a part of the file; a file of at most so many is not split."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._tokenizer = functools.cache(read_tokenizer)  # proven once for the sizes of many plans
        self._tokenizer_bytes: dict[tuple[Path, int], int] = {}

    def file_bytes(self, checkpoint: Checkpoint) -> int:
        """The exact bytes of the file, all parts together.

        The first time, llama.cpp loads a file of these sizes, without data. A large vocabulary takes seconds to write,
        so it is written once for the sizes of many plans.

        Raises:
            ImpqError: llama.cpp does not know the architecture, a tensor or the tokenizer, or does not load such a
                file, or the experts of a block have several types.
        """
        layout = Layout.of(checkpoint)
        key = checkpoint.files, layout.config.vocab_size
        parts = self._sizes(checkpoint, layout, tokenizer=False)
        if key not in self._tokenizer_bytes:
            self._tokenizer_bytes[key] = self._sizes(checkpoint, layout, tokenizer=True)[0][0] - parts[0][0]
        more = [self._tokenizer_bytes[key], *[0] * (len(parts) - 1)]
        return sum(_padded(header + extra) + data for (header, data), extra in zip(parts, more, strict=True))

    def _sizes(self, checkpoint: Checkpoint, layout: Layout, tokenizer: bool) -> list[tuple[int, int]]:
        """Bytes of the header and of the data of each part; with a tokenizer, llama.cpp has loaded such a file."""
        with tempfile.TemporaryDirectory() as folder:
            with self._begun(checkpoint, layout, Path(folder), tokenizer) as writer:
                data = [sum(_padded(info.nbytes) for info in part.values()) for part in writer.tensors]
            files = self.files(Path(folder))
            headers = [file.stat().st_size for file in files]
            if tokenizer:
                for file, header, nbytes in zip(files, headers, data, strict=True):
                    os.truncate(file, _padded(header) + nbytes)  # a hole in place of the data
                check_loads(files[0])
            return list(zip(headers, data, strict=True))

    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write the file or its parts. Warns if encoders of a multimodal model are left out."""
        layout = Layout.of(checkpoint)
        if layout.others:
            warnings.warn(f"format gguf holds the language model alone: {len(layout.others)} tensors of other parts "
                          f"are left out (first: {layout.others[0]}); llama.cpp reads encoders from another file",
                          RuntimeWarning, stacklevel=2)
        with self._begun(checkpoint, layout, folder) as writer:
            for values in layout.constants.values():
                writer.write_tensor_data(values)
            for tensor in layout.tensors:
                writer.write_tensor_data(layout.data(tensor, checkpoint))

    @contextmanager
    def _begun(self, checkpoint: Checkpoint, layout: Layout, folder: Path,
               tokenizer: bool = True) -> Iterator[GGUFWriter]:
        """Yields a writer whose file has everything but the data of the tensors, and perhaps the tokenizer."""
        from gguf import GGMLQuantizationType, GGUFWriter

        limit = self.part_bytes
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
        if tokenizer:
            self._tokenizer(checkpoint.files, layout.config.vocab_size).add_to(writer)
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
        """Map the packed linears; raises ImpqError if the file is damaged, or not that of the plan."""
        read = Reader(self.files(folder), Layout.of(checkpoint))
        return {name: Variant(choice, {"data": read.packed(f"{name}.weight")})
                for name, choice in checkpoint.widths.items() if choice is not None}

    def dense(self, folder: Path, checkpoint: Checkpoint) -> Mapping[str, Callable[[], torch.Tensor]]:
        """Functions that read a tensor of the file."""
        layout = Layout.of(checkpoint)
        read = Reader(self.files(folder), layout)
        return {name: partial(read.dense, name) for name in checkpoint.dense if name in layout.places}


def _padded(nbytes: int) -> int:
    from gguf import GGUF_DEFAULT_ALIGNMENT

    return math.ceil(nbytes / GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT
