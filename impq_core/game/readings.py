"""The log of what was read by backward passes, and the workers that read it in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from impq_core.errors import ImpqError
from impq_core.interfaces import CarryOut
from impq_core.ledger import Ledger
from impq_core.model.backward import BATCH_TOKENS

BATCHES = 4
"""Batches of windows in a part: what an interruption loses, and a task of a worker. Each part unpacks all variants
once."""

Part = tuple[int, int]
"""The first window of a part, and the one behind its last."""

_ABSENT = object()


@dataclass(frozen=True)
class Readings:
    """Readings of windows as plain data, one entry for each window. Each part of the windows is in the log before the
    next is read.

    Args:
        log: readings are written to it before they are returned, and those of an earlier process are read from it; None
            keeps none.
        carry_out: workers that read parts of the windows for the log; None for none.
        reach: called with the number of windows that the parts so far have.
    """

    log: Ledger | None
    carry_out: CarryOut | None
    reach: Callable[[int], None] = lambda windows: None

    def read(self, name: str, key: Any, shape: tuple[int, ...], read_windows: Callable[[int, int], list[Any]]) -> (
            list[Any]):
        """A reading of all windows.

        Args:
            name: of the reading.
            key: what else decides it.
            shape: number and length of the windows.
            read_windows: reads the windows from one to another (excluded), here.

        Raises:
            ImpqError: a line of the log is no reading.
        """
        if self.log is None:
            return read_windows(0, shape[0])
        try:
            found: dict[Part, list[Any]] = {(row["windows"][0], row["windows"][1]): row["found"]
                                            for row in self.log.rows if row.get(name, _ABSENT) == key}
        except (KeyError, TypeError, IndexError) as error:
            raise ImpqError(f"{self.log.path} has a line that is no reading ({type(error).__name__}: {error}): start a "
                            "new run") from error
        parts = parts_of(*shape)
        for part, result in self._read_parts(name, key, [part for part in parts if part not in found], read_windows):
            self.log.append({name: key, "windows": [*part], "found": result})
            self.log.sync()
            found[part] = result
            self.reach(sum(map(len, found.values())))
        return [window for part in parts for window in found[part]]

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
