"""The log of gradients: each part is kept before the next is read."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from impq_core.errors import ImpqError
from impq_core.game.readings import Readings, parts_of
from impq_core.keys import TextKey
from impq_core.ledger import Ledger

WINDOWS, LENGTH = 40, 256


def open_log(folder: Path) -> Ledger:
    return Ledger(folder / "gradients.jsonl", "impq-gradients/2", TextKey("text"))


class Reader:
    """Reads three times the number of each window, until it stops."""

    def __init__(self, stops_at: int = WINDOWS) -> None:
        self.read, self._stops_at = list[int](), stops_at

    def __call__(self, first: int, stop: int) -> list[int]:
        for window in range(first, stop):
            if window == self._stops_at:
                raise KeyboardInterrupt
            self.read.append(window)
        return [3 * window for window in range(first, stop)]


def test_an_interruption_loses_one_part(tmp_path: Path) -> None:
    parts, reached = parts_of(WINDOWS, LENGTH), list[int]()
    assert len(parts) == 3
    with closing(open_log(tmp_path)) as log, pytest.raises(KeyboardInterrupt):
        Readings(log, None).read("at", [0.5], (WINDOWS, LENGTH), Reader(stops_at=parts[1][0] + 1))
    with closing(open_log(tmp_path)) as log:
        other, rest = Reader(), Reader()
        expected = [3 * window for window in range(WINDOWS)]
        assert Readings(log, None).read("at", [0.25], (WINDOWS, LENGTH), other) == expected
        assert Readings(log, None, reached.append).read("at", [0.5], (WINDOWS, LENGTH), rest) == expected
    assert other.read == [*range(WINDOWS)] and rest.read == [*range(parts[1][0], WINDOWS)]
    assert reached == [parts[1][1], WINDOWS]


def test_a_line_that_is_no_reading_is_named(tmp_path: Path) -> None:
    with closing(open_log(tmp_path)) as log:
        log.append({"at": None, "found": [1.0]})
    with closing(open_log(tmp_path)) as log, pytest.raises(ImpqError, match="gradients"):
        Readings(log, None).read("at", None, (WINDOWS, LENGTH), Reader())
