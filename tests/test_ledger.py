"""Append-only files of measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from impq_core.errors import ImpqError
from impq_core.keys import Key
from impq_core.ledger import Ledger, MeasurementLog


@dataclass(frozen=True)
class AKey(Key):
    model: str = "tiny"
    versions: Mapping[str, str] = field(default_factory=lambda: {"torch": "2", "numpy": "2"})
    text: str | None = None


KEY = AKey()


def ledger(path: Path, key: Key = KEY) -> Ledger:
    return Ledger(path, "impq-test/1", key)


@given(cut=st.integers(0, 400), rows=st.integers(0, 6))
def test_a_file_that_is_cut_anywhere_is_gone_on_with(cut: int, rows: int,
                                                    tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "facts.jsonl"
    first = ledger(path)
    for number in range(rows):
        first.append({"number": number})
    first.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    kept = max(0, whole[:cut].count(b"\n") - 1)
    torn = not whole[:cut].endswith(b"\n") and cut > 0
    if torn:
        with pytest.warns(RuntimeWarning, match="incomplete"):
            again = ledger(path)
    else:
        again = ledger(path)
    assert [row["number"] for row in again.rows] == list(range(kept))
    for number in range(kept, rows):
        again.append({"number": number})
    again.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize(("key", "message"), [
    (replace(KEY, model="other"), 'model was "tiny" and is now "other"'),
    (replace(KEY, versions={"torch": "3", "numpy": "2"}), 'versions.torch was "2" and is now "3"'),
    (replace(KEY, text="more"), 'text was null and is now "more"'),
    (replace(KEY, model="other", versions={"torch": "2"}), "(and 1 more)")])
def test_rows_of_another_key_are_refused(key: AKey, message: str, tmp_path: Path) -> None:
    ledger(tmp_path / "facts.jsonl").close()
    before = (tmp_path / "facts.jsonl").read_bytes()
    with pytest.raises(ImpqError) as error:
        ledger(tmp_path / "facts.jsonl", key)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "facts.jsonl").read_bytes() == before


def test_rows_of_another_format_are_refused(tmp_path: Path) -> None:
    Ledger(tmp_path / "facts.jsonl", "impq-test/0", KEY).close()
    with pytest.raises(ImpqError, match="is of format impq-test/0"):
        ledger(tmp_path / "facts.jsonl")


@pytest.mark.parametrize("line", ["[1, 2]", "{\"pick\": [0,", "nothing", ""])
def test_damage_before_the_last_line_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    log = ledger(path)
    log.append({"number": 1})
    log.close()
    header, row = path.read_text().splitlines()
    path.write_text(f"{header}\n{line}\n{row}\n")
    with pytest.raises(ImpqError, match="line 2"):
        ledger(path)


def test_losses_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    log = MeasurementLog(path, KEY)
    pick, losses = np.array([0, 1, 2]), np.array([0.1, 1 / 3, np.nan])
    log.add(pick, losses)
    log.add(pick, -losses, number=2)
    log.close()
    again = MeasurementLog(path, KEY)
    np.testing.assert_array_equal(again.losses[0, pick.tobytes()], losses)
    np.testing.assert_array_equal(again.losses[2, pick.tobytes()], -losses)
    again.append({"pick": "none"})
    with pytest.raises(ImpqError, match="no measurement"):
        MeasurementLog(path, KEY)
    path.write_text(json.dumps({"format": "impq-scores/1"}) + "\n")
    with pytest.raises(ImpqError, match="not a measurement log"):
        MeasurementLog.read(path)
