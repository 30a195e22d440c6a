"""The time that llama.cpp's kernels take for a product with one token, measured through ctypes on this processor.

As in generation, weights are read from memory: each is there in several copies, so that between two uses of a copy as
many bytes are read as between two uses of a weight of the model. As llama.cpp does when it loads a file, weights are
put into the first buffer type of the processor, such as the one with interleaved rows, that supports the product.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from impq_core.errors import ImpqError
from impq_core.space import FloatArray
from impq_gguf.library import library, number, quantize
from impq_gguf.llama import declare, errors_logged

CACHES = 512 * 10**6
"""Bytes that are read between two uses of a copy at most; the caches of a processor hold fewer."""

ROWS = 64 * 10**6
"""Bytes of a weight that is measured whole; of a larger one, such as a head, some rows are measured, and the time is
taken in proportion."""

GRAPH = 4 * 10**6
"""Least bytes of the copies of a weight, which are multiplied in one graph: what a graph takes to start is then small
beside its products, as in that of a model."""

_PATTERN = 8
"""Rows of a weight that are quantized; the others repeat them."""

_F32 = 0
"""ggml's number of type F32."""


class _InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SYMBOLS = {
    "ggml_init": (_POINTER, _InitParams),
    "ggml_free": (None, _POINTER),
    "ggml_tensor_overhead": (ctypes.c_size_t,),
    "ggml_graph_overhead_custom": (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_bool),
    "ggml_new_tensor_1d": (_POINTER, _POINTER, _INT, _LONG),
    "ggml_new_tensor_2d": (_POINTER, _POINTER, _INT, _LONG, _LONG),
    "ggml_mul_mat": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_new_graph_custom": (_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_bool),
    "ggml_build_forward_expand": (None, _POINTER, _POINTER),
    "ggml_backend_cpu_init": (_POINTER,),
    "ggml_backend_cpu_set_n_threads": (None, _POINTER, _INT),
    "ggml_backend_free": (None, _POINTER),
    "ggml_backend_cpu_reg": (_POINTER,),
    "ggml_backend_cpu_buffer_type": (_POINTER,),
    "ggml_backend_reg_dev_get": (_POINTER, _POINTER, ctypes.c_size_t),
    "ggml_backend_reg_get_proc_address": (_POINTER, _POINTER, ctypes.c_char_p),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, _POINTER, _POINTER),
    "ggml_backend_alloc_ctx_tensors": (_POINTER, _POINTER, _POINTER),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, _POINTER, _POINTER),
    "ggml_backend_buffer_free": (None, _POINTER),
    "ggml_backend_tensor_set": (None, _POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t),
    "ggml_backend_graph_compute": (_INT, _POINTER, _POINTER),
}
"""Result and arguments of each C function that is used."""


@dataclass(frozen=True)
class Kernel:
    """A product of a weight with the hidden state of one token.

    Args:
        rows: of the weight.
        columns: of the weight; the type's block divides them.
        kind: name of the weight's type.
    """

    rows: int
    columns: int
    kind: str

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return self.rows * self.columns // block * size

    @property
    def measured(self) -> Kernel:
        """The kernel over at most ``ROWS`` bytes of rows."""
        row = self.nbytes // self.rows
        return Kernel(min(self.rows, max(_PATTERN, ROWS // row // _PATTERN * _PATTERN)), self.columns, self.kind)


@dataclass(frozen=True, eq=False)
class Times:
    """Milliseconds of kernels: medians (kernels,) over repetitions, and their standard errors."""

    medians: FloatArray
    stderr: FloatArray


def time_kernels(kernels: Sequence[Kernel], threads: int, repeats: int, model_bytes: int,
                 progress: Callable[[int, int], None]) -> Times:
    """Time kernels, interleaved: each repetition runs every kernel on all its copies, in an order of its own, so that a
    slow moment of the machine hits all types alike.

    Args:
        kernels: different ones.
        threads: of llama.cpp.
        repeats: repetitions; one more comes before them and is not counted.
        model_bytes: of the weights that a token reads.
        progress: called with finished and all repetitions.

    Raises:
        ImpqError: the library lacks a function or a type, or cannot compute a product.
    """
    declare(library(), _SYMBOLS)
    measured = [kernel.measured for kernel in kernels]
    passes = math.ceil(min(model_bytes, CACHES) / sum(kernel.nbytes for kernel in measured))
    copies = np.array([max(1, passes, math.ceil(GRAPH / kernel.nbytes)) for kernel in measured])
    seconds = np.zeros((repeats + 1, len(kernels)))
    random = np.random.default_rng(0)
    with errors_logged(), _processor(threads) as backend, ExitStack() as stack:
        graphs = [stack.enter_context(_graph(backend, kernel, count))
                  for kernel, count in zip(measured, copies.tolist(), strict=True)]
        for repeat in range(repeats + 1):
            progress(repeat, repeats + 1)
            for at in random.permutation(len(graphs)):
                start = time.perf_counter()
                status = library().ggml_backend_graph_compute(backend, graphs[at])
                seconds[repeat, at] = time.perf_counter() - start
                if status != 0:
                    raise ImpqError(f"llama.cpp cannot compute a product with a weight of type {kernels[at].kind}")
    progress(repeats + 1, repeats + 1)
    scale = np.array([whole.rows / part.rows for whole, part in zip(kernels, measured, strict=True)])
    found = 1e3 * seconds[1:] / copies * scale
    medians = np.median(found, axis=0)
    spread = 1.4826 * np.median(np.abs(found - medians), axis=0)  # a standard deviation, for normal errors
    return Times(medians, 1.2533 * spread / math.sqrt(repeats))


@contextmanager
def _processor(threads: int) -> Iterator[int]:
    ggml = library()
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, threads)
    try:
        yield backend
    finally:
        ggml.ggml_backend_free(backend)


@contextmanager
def _context(tensors: int, graph: int = 0) -> Iterator[int]:
    """A context for that many tensors without data, and a graph of that many nodes."""
    ggml = library()
    size = (tensors + 1) * ggml.ggml_tensor_overhead() + (ggml.ggml_graph_overhead_custom(graph, False) if graph else 0)
    context = ggml.ggml_init(_InitParams(size, None, True))
    if not context:
        raise ImpqError("llama.cpp has no memory for the kernels that are measured")
    try:
        yield context
    finally:
        ggml.ggml_free(context)


@contextmanager
def _buffer(found: int | None) -> Iterator[None]:
    if not found:
        raise ImpqError("llama.cpp has no memory for the weights that are measured")
    try:
        yield
    finally:
        library().ggml_backend_buffer_free(found)


@contextmanager
def _graph(backend: int, kernel: Kernel, copies: int) -> Iterator[int]:
    """A graph with a product for each copy of a kernel's weight."""
    ggml = library()
    kind = _F32 if kernel.kind == "F32" else number(kernel.kind)
    with _context(copies) as weights, _context(copies + 1, copies + 1) as products:
        tensors = [ggml.ggml_new_tensor_2d(weights, kind, kernel.columns, kernel.rows) for _ in range(copies)]
        place = _place_for(kernel, kind)
        with _buffer(ggml.ggml_backend_alloc_ctx_tensors_from_buft(weights, place)):
            data = _data(kernel)
            for tensor in tensors:
                ggml.ggml_backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
            state = ggml.ggml_new_tensor_1d(products, _F32, kernel.columns)
            graph = ggml.ggml_new_graph_custom(products, copies + 1, False)
            for tensor in tensors:
                ggml.ggml_build_forward_expand(graph, ggml.ggml_mul_mat(products, tensor, state))
            with _buffer(ggml.ggml_backend_alloc_ctx_tensors(products, backend)):
                values = np.random.default_rng(1).normal(size=kernel.columns).astype(np.float32)
                ggml.ggml_backend_tensor_set(state, values.ctypes.data, 0, values.nbytes)
                yield graph


def _place_for(kernel: Kernel, kind: int) -> int:
    """The buffer type in which llama.cpp keeps a weight: the first of the processor's own that supports the product."""
    ggml = library()
    registry = ggml.ggml_backend_cpu_reg()
    device = ggml.ggml_backend_reg_dev_get(registry, 0)
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    extra: Any = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)(device) if address else None
    for at in range(16):
        if not extra or not extra[at]:
            break
        with _context(3) as context:
            weight = ggml.ggml_new_tensor_2d(context, kind, kernel.columns, kernel.rows)
            with _buffer(ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, extra[at])):
                states = ggml.ggml_new_tensor_2d(context, _F32, kernel.columns, 512)
                if ggml.ggml_backend_dev_supports_op(device, ggml.ggml_mul_mat(context, weight, states)):
                    return int(extra[at])
    return int(ggml.ggml_backend_cpu_buffer_type())


def _data(kernel: Kernel) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a random weight; its rows repeat a few."""
    import torch

    values = torch.randn(_PATTERN, kernel.columns, generator=torch.Generator().manual_seed(0))
    packed = (values.view(torch.uint8) if kernel.kind == "F32"
              else quantize(values, kernel.kind, torch.ones(kernel.columns)))
    times = math.ceil(kernel.rows / _PATTERN)
    return np.ascontiguousarray(np.tile(packed.numpy().reshape(_PATTERN, -1), (times, 1))[:kernel.rows])
