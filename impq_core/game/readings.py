"""The log of what was read by backward passes, and the workers that read it in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from impq_core.interfaces import CarryOut
from impq_core.ledger import Ledger
from impq_core.model.backward import BATCH_TOKENS

BATCHES = 4
"""Batches of windows in a task of a worker. Each task unpacks all variants once."""

Part = tuple[int, int]
"""The first window of a part, and the one behind its last."""

_ABSENT = object()


@dataclass(frozen=True)
class Readings:
    """Readings of windows as plain data, one entry for each window.

    Args:
        log: readings are written to it before they are returned, and those of an earlier process are read from it; None
            keeps none.
        carry_out: workers that read parts of the windows for the log; None for none.
    """

    log: Ledger | None
    carry_out: CarryOut | None

    def read(self, name: str, key: Any, shape: tuple[int, ...], read_windows: Callable[[int, int], list[Any]]) -> (
            list[Any]):
        """A reading of all windows.

        Args:
            name: of the reading.
            key: what else decides it.
            shape: number and length of the windows.
            read_windows: reads the windows from one to another (excluded), here.
        """
        rows = [row for row in self.log.rows if row.get(name, _ABSENT) == key] if self.log else []
        if whole := next((row["found"] for row in rows if "windows" not in row), None):
            return list(whole)
        found: dict[Part, list[Any]] = {(row["windows"][0], row["windows"][1]): row["found"]
                                        for row in rows if "windows" in row}
        if self.log is None or not (self.carry_out or found):
            result = read_windows(0, shape[0])
            if self.log:
                self._keep({name: key, "found": result})
            return result
        parts = parts_of(*shape)
        for part, result in self._read_parts(name, key, [part for part in parts if part not in found], read_windows):
            self._keep({name: key, "windows": [*part], "found": result})
            found[part] = result
        return [window for part in parts for window in found[part]]

    def _keep(self, row: dict[str, Any]) -> None:
        assert self.log is not None
        self.log.append(row)
        self.log.sync()

    def _read_parts(self, name: str, key: Any, parts: Sequence[Part],
                    read_windows: Callable[[int, int], list[Any]]) -> Iterator[tuple[Part, list[Any]]]:
        if not self.carry_out:
            yield from ((part, read_windows(*part)) for part in parts)
            return
        tasks = [{"kind": "gradients", "reading": name, "key": key, "windows": [*part]} for part in parts]
        for task, answer in self.carry_out(tasks) if tasks else ():
            first, stop = task["windows"]
            yield (first, stop), answer["found"]


def parts_of(windows: int, length: int) -> list[Part]:
    """The parts of windows of some length: whole batches of backward passes, so that no number depends on what else is
    read."""
    step = BATCHES * max(1, BATCH_TOKENS // length)
    return [(first, min(first + step, windows)) for first in range(0, windows, step)]
