"""Atomic writing of files and folders, and the temporary ones of processes that died.

Everything is written under a temporary name first and then renamed. Temporary names are hidden and end in
``UNFINISHED``. Temporary folders also have a marker file and a lock, by which ``abandoned`` recognises them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

UNFINISHED = ".impq-unfinished"
"""Suffix of every temporary file and folder, and name of the marker file in a temporary folder."""

ABANDONED_SECONDS = 3600.0
"""Seconds without a write after which a temporary file counts as abandoned."""

_LOCK = ".lock"
_MADE_BY = "impq"


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    try:
        _write(path, write)
    except OSError as error:  # name the final file, not the temporary one
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path.name), suffix=UNFINISHED)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)  # the umask can only be read by setting it
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _prefix(name: str) -> str:
    """Prefix of a temporary name, short enough for any file system."""
    return f".{name.encode()[:100].decode(errors='ignore')}."


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


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A hidden temporary folder in ``parent``, deleted at the end of the context.

    Results are made inside it and then renamed to their final places. The folder has a marker file and a lock, which is
    held until the context ends. If the process is killed, the system frees the lock: a folder with the marker and a
    free lock is ``abandoned``.

    Args:
        parent: an existing folder, on the same disk as the result.
        name: name of the result, for the folder's name and marker.
    """
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=_prefix(name), suffix=UNFINISHED))
    try:
        with FileLock(folder / _LOCK, timeout=0):
            (folder / UNFINISHED).write_text(json.dumps({"made_by": _MADE_BY, "for": name}) + "\n")
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def abandoned(folder: Path) -> list[Path]:
    """Temporary files and folders of dead impq processes directly in ``folder``, sorted by name.

    These are regular files with the suffix ``UNFINISHED`` without a write for ``ABANDONED_SECONDS``, and folders with
    impq's marker and a free lock. Symbolic links are not followed. Empty if the folder cannot be read.
    """
    try:
        return sorted(path for path in folder.glob(".*") if _is_abandoned(path))
    except OSError:
        return []


def discard(path: Path) -> None:
    """Delete a path of ``abandoned``, if it is still abandoned.

    Raises:
        OSError: it cannot be deleted.
    """
    if not _is_abandoned(path):
        return
    if path.is_dir():
        with FileLock(path / _LOCK, timeout=0):
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    if path.is_symlink():
        return False
    try:
        if path.is_file():
            return path.name.endswith(UNFINISHED) and path.stat().st_mtime < time.time() - ABANDONED_SECONDS
        marker = path / UNFINISHED
        if marker.is_symlink() or not marker.is_file() or json.loads(marker.read_text()).get("made_by") != _MADE_BY:
            return False
        with FileLock(path / _LOCK, timeout=0):
            return True
    except (OSError, ValueError, AttributeError, RecursionError, Timeout):  # unreadable, without marker, or in use
        return False
