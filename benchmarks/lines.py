"""Files of JSON lines that a benchmark keeps its measurements in, each on disk before the next is measured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from impq_core.errors import ImpqError

KEPT = Path(__file__).parent / "kept"
"""The folder of what benchmarks keep."""


class Lines:
    """A file of objects that one process appends to.

    Args:
        path: the file; created with its folder if it is missing. A line that a killed process left incomplete is
            removed.

    Attributes:
        path: the file.
        rows: its objects.

    Raises:
        ImpqError: a line is no object.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            data = path.read_bytes()
            if not data.endswith(b"\n"):
                os.truncate(path, data.rfind(b"\n") + 1)
        self.path, self.rows = path, read_lines(path)
        self._file = path.open("a", encoding="utf-8")

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Append objects and write them to the disk."""
        for row in rows:
            self._file.write(json.dumps(row) + "\n")
            self.rows.append({**row})
        self._file.flush()
        os.fsync(self._file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file. A missing file has none, and an incomplete last line is left out.

    Raises:
        ImpqError: a line is no object.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found: list[dict[str, Any]] = []
    for number, line in enumerate(text[:text.rfind("\n") + 1].splitlines(), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise ImpqError(f"{path}, line {number} is damaged ({error}): delete the line") from error
        found.append(row)
    return found
