"""llama.cpp's tokenizer, called through ctypes: what llama.cpp will make of a text with the vocabulary of a file."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from impq_core.errors import ImpqError
from impq_gguf.library import library

_ERROR = 4
"""llama.cpp's level of log lines that report an error."""

_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class ModelParams(ctypes.Structure):
    """``struct llama_model_params`` as far as it is known, and room for fields that later releases append."""

    _fields_: ClassVar[Any] = (
        ("devices", ctypes.c_void_p), ("tensor_buft_overrides", ctypes.c_void_p), ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int32), ("load_mode", ctypes.c_int32), ("lazy_mode", ctypes.c_int32),
        ("main_gpu", ctypes.c_int32), ("tensor_split", ctypes.c_void_p), ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p), ("kv_overrides", ctypes.c_void_p),
        ("vocab_only", ctypes.c_bool), ("check_tensors", ctypes.c_bool), ("use_extra_bufts", ctypes.c_bool),
        ("no_host", ctypes.c_bool), ("no_alloc", ctypes.c_bool), ("load_mtp", ctypes.c_bool),
        ("rest", ctypes.c_char * 176))


_SYMBOLS = {
    "llama_backend_init": (None,),
    "llama_log_set": (None, _LOG, ctypes.c_void_p),
    "llama_model_default_params": (ModelParams,),
    "llama_model_load_from_file": (ctypes.c_void_p, ctypes.c_char_p, ModelParams),
    "llama_model_free": (None, ctypes.c_void_p),
    "llama_model_get_vocab": (ctypes.c_void_p, ctypes.c_void_p),
    "llama_vocab_n_tokens": (ctypes.c_int32, ctypes.c_void_p),
    "llama_tokenize": (ctypes.c_int32, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32,
                       ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_bool, ctypes.c_bool),
}
"""Result and arguments of each C function that is used."""


@functools.cache
def llama() -> ctypes.CDLL:
    """The library with the types of the functions of ``llama.h``.

    Raises:
        ImpqError: it lacks one, or has other fields in ``struct llama_model_params``.
    """
    found = library()
    declare(found, _SYMBOLS)
    found.llama_backend_init()
    params = found.llama_model_default_params()
    flags = [getattr(params, name) for name, kind in params._fields_ if kind is ctypes.c_bool]
    if (params.n_gpu_layers, params.main_gpu, params.tensor_split, flags) != (-1, 0, None, [0, 0, 1, 0, 0, 0]):
        raise ImpqError("format gguf does not know this release of xllamacpp: install the one that impq[gguf] asks for")
    return found


def declare(found: ctypes.CDLL, symbols: dict[str, tuple[Any, ...]]) -> None:
    """Give functions of a library their types: for each name the result's, then the arguments'.

    Raises:
        ImpqError: the library lacks a function.
    """
    for name, (result, *arguments) in symbols.items():
        try:
            function = getattr(found, name)
        except AttributeError as error:
            raise ImpqError(f"xllamacpp lacks {name}: install the release that impq[gguf] asks for") from error
        function.restype, function.argtypes = result, arguments


@contextmanager
def errors_logged() -> Iterator[list[str]]:
    """Keep llama.cpp silent; yields the errors that it reports."""
    lines: list[str] = []

    def note(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            lines.append(text.decode(errors="replace").strip())

    kept = _LOG(note)
    llama().llama_log_set(kept, None)
    try:
        yield lines
    finally:
        llama().llama_log_set(_LOG(), None)


def check_loads(file: Path) -> None:
    """Let llama.cpp read the metadata of a file, and the names, types and shapes of its tensors, but no data.

    Args:
        file: a GGUF file, or the first of its parts. Its data may be a hole.

    Raises:
        ImpqError: llama.cpp does not load it; the message has llama.cpp's reason.
    """
    params = llama().llama_model_default_params()
    params.no_alloc, params.load_mode = True, 0
    llama().llama_model_free(_load(file, params))


def _load(file: Path, params: ModelParams) -> int:
    with errors_logged() as errors:
        model = llama().llama_model_load_from_file(str(file).encode(), params)
    if not model:
        reason = errors[0].rpartition("error loading model: ")[2] if errors else "it gives no reason"
        raise ImpqError(f"llama.cpp does not load such a file: {reason}")
    return int(model)


class Vocabulary:
    """The vocabulary of a GGUF file, in llama.cpp. A context manager.

    Args:
        file: a GGUF file; one without tensors will do.

    Raises:
        ImpqError: llama.cpp does not load it; the message has llama.cpp's reason.
    """

    def __init__(self, file: Path) -> None:
        params = llama().llama_model_default_params()
        params.vocab_only = True
        self._model = _load(file, params)
        self._vocabulary = llama().llama_model_get_vocab(self._model)

    def __enter__(self) -> Vocabulary:
        return self

    def __exit__(self, *error: object) -> None:
        llama().llama_model_free(self._model)

    def __len__(self) -> int:
        return int(llama().llama_vocab_n_tokens(self._vocabulary))

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text.

        Args:
            text: the text.
            special: add the tokens that the file says every text begins and ends with.
        """
        data = text.encode()
        room = len(data) + 16
        tokens = (ctypes.c_int32 * room)()
        count = llama().llama_tokenize(self._vocabulary, data, len(data), tokens, room, special, True)
        assert count >= 0
        return list(tokens[:count])
