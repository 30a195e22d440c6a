"""llama.cpp's quantizers, called through ctypes in the shared object of ``xllamacpp``."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impq_core.errors import ImpqError

if TYPE_CHECKING:
    import torch


class _Traits(ctypes.Structure):
    """``struct ggml_type_traits``."""

    _fields_ = (("type_name", ctypes.c_char_p), ("blck_size", ctypes.c_int64), ("blck_size_interleave", ctypes.c_int64),
                ("type_size", ctypes.c_size_t), ("is_quantized", ctypes.c_bool), ("to_float", ctypes.c_void_p),
                ("from_float_ref", ctypes.c_void_p))


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)

_SYMBOLS = {
    "ggml_blck_size": (ctypes.c_int64, ctypes.c_int),
    "ggml_type_size": (ctypes.c_size_t, ctypes.c_int),
    "ggml_get_type_traits": (ctypes.POINTER(_Traits), ctypes.c_int),
    "ggml_quantize_init": (None, ctypes.c_int),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, ctypes.c_int),
    "ggml_quantize_chunk": (ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64,
                            ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    "ggml_validate_row_data": (ctypes.c_bool, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t),
}
"""Result and arguments of each C function that is used."""


@functools.cache
def library() -> ctypes.CDLL:
    """The shared object of ``xllamacpp``, which exports llama.cpp's C API. The Python package is not imported.

    Raises:
        ImpqError: xllamacpp is not installed, or lacks a function.
    """
    spec = importlib.util.find_spec("xllamacpp")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    files = [folder / f"xllamacpp{suffix}" for folder in folders for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ImpqError("backend gguf needs xllamacpp (pip install 'impq[gguf]')")
    try:
        found = ctypes.CDLL(str(file))
        for name, (result, *arguments) in _SYMBOLS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise ImpqError(f"backend gguf cannot use xllamacpp's {file.name}: {error}; install the release that "
                        "impq[gguf] asks for") from error
    return found


@functools.cache
def number(name: str) -> int:
    """llama.cpp's number of a type, by its name; its quantizer is ready afterwards.

    Raises:
        ImpqError: the library has no such type, or has it with other blocks than the ``gguf`` package.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind, ggml = GGMLQuantizationType[name], library()
    sizes = (ggml.ggml_blck_size(kind), ggml.ggml_type_size(kind))
    traits = ggml.ggml_get_type_traits(kind).contents
    if sizes != GGML_QUANT_SIZES[kind] or sizes != (traits.blck_size, traits.type_size) or not traits.to_float:
        raise ImpqError(f"xllamacpp and gguf do not agree on type {name}: install the releases that impq[gguf] asks "
                        "for")
    ggml.ggml_quantize_init(kind)
    return int(kind)


def quantize(weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:
    """A weight in a type.

    Args:
        weight: float32 (rows, columns), contiguous, finite, in host memory; the type's block divides the columns.
        name: of the type.
        importance: float32 (columns,), contiguous: the weight of each column's squared error; None for none.

    Returns:
        uint8 (rows, bytes of a row), as a GGUF file holds it.

    Raises:
        ImpqError: the values do not fit the type's 16-bit scales.
    """
    import torch

    kind, ggml = number(name), library()
    rows, columns = weight.shape
    width = columns // ggml.ggml_blck_size(kind) * ggml.ggml_type_size(kind)
    packed = torch.empty(rows, width, dtype=torch.uint8)
    ggml.ggml_quantize_chunk(kind, weight.data_ptr(), packed.data_ptr(), 0, rows, columns,
                             importance.data_ptr() if importance is not None else None)
    if not ggml.ggml_validate_row_data(kind, packed.data_ptr(), packed.numel()):
        raise ImpqError(f"weights overflow the 16-bit scales of type {name}")
    return packed


def dequantize(packed: torch.Tensor, name: str, columns: int) -> torch.Tensor:
    """The weight float32 (rows, columns) of bytes uint8 (rows, bytes of a row), contiguous, in host memory."""
    import torch

    values = torch.empty(len(packed), columns)
    _to_float(name)(packed.data_ptr(), values.data_ptr(), values.numel())
    return values


@functools.cache
def _to_float(name: str) -> Any:
    return _TO_FLOAT(library().ggml_get_type_traits(number(name)).contents.to_float)
