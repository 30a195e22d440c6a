"""Whole files or none: everything is written to a temporary name and renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    try:
        _write(path, write)
    except OSError as error:  # a user knows the file by the name it was to have
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to ``path``, whole or not at all."""
    _replace(Path(path), lambda file: file.write(text.encode()))


def replace_file(path: Path, data: bytes) -> None:
    """Write bytes to ``path``, whole or not at all."""
    _replace(Path(path), lambda file: file.write(data))


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write numpy arrays to ``path``, whole or not at all, without pickle."""
    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise TypeError(f"array '{name}' holds Python objects and would need pickle")
    _replace(Path(path), lambda file: np.savez_compressed(file, **arrays))
