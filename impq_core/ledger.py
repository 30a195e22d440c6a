"""Facts that were expensive to find, a JSON line each, in files that are only ever appended to."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from impq_core.errors import ImpqError
from impq_core.space import FloatArray, IntArray


class Ledger:
    """A file of facts; its first line says what they are facts of.

    One that is there already is gone on with. A last line that the death of a process tore is taken out again.

    Args:
        path: the file.
        kind: what kind of facts: the header's ``format``.
        header: what they were found on; those of another model, text, backend or code are not gone on with.

    Raises:
        ImpqError: the file is of another kind, damaged before its last line, or of something else than ``header``.
    """

    def __init__(self, path: Path, kind: str, header: Mapping[str, Any]) -> None:
        header = json.loads(json.dumps({"format": kind, **header}))
        self.known: list[dict[str, Any]] = []
        whole = 0
        if path.exists():
            lines, whole = _read(path)
            if lines:
                found, *self.known = lines
                refuse_changes(found, header, str(path))
            if whole < path.stat().st_size:
                warnings.warn(f"{path}: its last line was not written to the end and is taken out", RuntimeWarning,
                              stacklevel=2)
                os.truncate(path, whole)
        self._file = path.open("a", encoding="utf-8")
        if not whole:
            self.append(header)
            self.sync()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a fact. It survives the death of the process at once, and that of the machine after ``sync``."""
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:  # of a full disk Python does not tell which file it met it in
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def sync(self) -> None:
        """Wait until everything appended is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()


class MeasurementLog(Ledger):
    """Measured losses.

    Attributes:
        losses: what an earlier process measured: absolute losses (windows,), nats per token, by the number of the set
            of windows and the bytes of the pick.
    """

    FORMAT = "impq-measurements/1"

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        super().__init__(path, self.FORMAT, header)
        try:
            self.losses: dict[tuple[int, bytes], FloatArray] = {
                (int(row.get("set", 0)), np.array(row["pick"], np.int64).tobytes()): np.array(row["windows"], float)
                for row in self.known}
        except (KeyError, TypeError, ValueError) as error:
            self.close()
            raise ImpqError(f"{path} holds a line that is no measurement ({type(error).__name__}: {error})") from error

    def add(self, pick: IntArray, windows: FloatArray, number: int = 0) -> None:
        """Add the absolute losses (windows,) of a pick on the set of windows of that number, nats per token."""
        more = {"set": number} if number else {}
        self.append({"pick": pick.tolist(), "loss": float(windows.mean()), "windows": windows.tolist(), **more})

    @classmethod
    def read(cls, path: Path) -> tuple[dict[str, Any], list[tuple[tuple[int, ...], float]]]:
        """Header and (pick, absolute loss) rows, without writing; a torn last line is left out.

        Raises:
            ImpqError: the file is no measurement log, or is damaged before its last line.
        """
        lines, _ = _read(path)
        if not lines or lines[0].get("format") != cls.FORMAT:
            raise ImpqError(f"{path} is not a measurement log")
        return lines[0], [(tuple(row["pick"]), float(row["loss"])) for row in lines[1:]]


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raises ImpqError that names what is another than it was, and how to go on, where anything is."""
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        was, became = (json.dumps(facts.get(name)) for facts in (before, now))
        if isinstance(before.get(name), dict) and isinstance(now.get(name), dict):
            inner = next(key for key in {**before[name], **now[name]} if before[name].get(key) != now[name].get(key))
            was, became = (json.dumps(facts[name].get(inner)) for facts in (before, now))
            name = f"{name}.{inner}"
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ImpqError(f"{where} cannot be gone on with: {name.replace('_', ' ')} was {was[:80]} and is "
                        f"{became[:80]} now{more}; start a new run, or bring back what was there")


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Whole lines, and how many bytes they take.

    Raises:
        ImpqError: a line before the last is no JSON object.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            rows.append(json.loads(line))
            if not isinstance(rows[-1], dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            raise ImpqError(f"{path}, line {number}: not a fact that impq wrote") from error
    return rows, whole
