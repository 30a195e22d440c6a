"""Append-only files of measurements, one JSON object per line."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from impq_core.errors import ImpqError
from impq_core.keys import Key
from impq_core.space import FloatArray, IntArray


class Ledger:
    """A file of rows. Its first line, the header, holds the format and the key of the measurements.

    An existing file is continued. If its last line is incomplete because a process died, the line is removed.

    Args:
        path: the file.
        format: name and version of the format.
        key: identity of the measurements.

    Attributes:
        path: the file.
        rows: the rows of an existing file.

    Raises:
        ImpqError: the file has another format or key, or is damaged before its last line.
    """

    def __init__(self, path: Path, format: str, key: Key) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        size = 0
        if path.exists():
            lines, size = _read(path)
            if lines:
                header, *self.rows = lines
                if header.get("format") != format:
                    raise ImpqError(f"{path} is of format {header.get('format')}; this impq continues {format}: "
                                    "start a new run")
                key.require({name: value for name, value in header.items() if name != "format"}, str(path))
            if size < path.stat().st_size:
                warnings.warn(f"{path}: the last line is incomplete and is removed", RuntimeWarning, stacklevel=2)
                os.truncate(path, size)
        self._file = path.open("a", encoding="utf-8")
        if not size:
            self.append({"format": format, **key.to_dict()})
            self.sync()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row. It is safe from the end of the process at once, and from a power failure after ``sync``."""
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:  # Python names no file if the disk is full
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def sync(self) -> None:
        """Write every row to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()


class MeasurementLog(Ledger):
    """Measured losses.

    Attributes:
        losses: absolute losses (windows,), nats per token, by the number of the set of windows and the bytes of the
            pick.
    """

    FORMAT = "impq-measurements/2"

    def __init__(self, path: Path, key: Key) -> None:
        super().__init__(path, self.FORMAT, key)
        try:
            self.losses: dict[tuple[int, bytes], FloatArray] = {
                (int(row.get("set", 0)), np.array(row["pick"], np.int64).tobytes()): np.array(row["windows"], float)
                for row in self.rows}
        except (KeyError, TypeError, ValueError) as error:
            self.close()
            raise ImpqError(f"{path} has a line that is no measurement ({type(error).__name__}: {error}): start a new "
                            "run") from error

    def add(self, pick: IntArray, windows: FloatArray, number: int = 0) -> None:
        """Add the absolute losses (windows,) of a pick on the set of windows of that number, nats per token."""
        set_number = {"set": number} if number else {}
        self.append({"pick": pick.tolist(), "loss": float(windows.mean()), "windows": windows.tolist(), **set_number})
        self.losses[number, pick.tobytes()] = windows

    @classmethod
    def read(cls, path: Path) -> tuple[dict[str, Any], list[tuple[tuple[int, ...], float]]]:
        """Header and (pick, absolute loss) rows, without writing to the file; an incomplete last line is skipped.

        Raises:
            ImpqError: the file is no measurement log, or is damaged before its last line.
        """
        lines, _ = _read(path)
        if not lines or lines[0].get("format") != cls.FORMAT:
            raise ImpqError(f"{path} is not a measurement log")
        return lines[0], [(tuple(row["pick"]), float(row["loss"])) for row in lines[1:]]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The complete lines, and their size in bytes.

    Raises:
        ImpqError: a line before the last is no JSON object.
    """
    data = path.read_bytes()
    size = data.rfind(b"\n") + 1
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(data[:size].splitlines(), start=1):
        try:
            rows.append(json.loads(line))
            if not isinstance(rows[-1], dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            raise ImpqError(f"{path}, line {number} is damaged: start a new run") from error
    return rows, size
