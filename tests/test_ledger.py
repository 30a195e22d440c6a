"""Files of facts that are only ever appended to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from impq_core.errors import ImpqError
from impq_core.ledger import Ledger, MeasurementLog

HEADER = {"model": "tiny", "versions": {"torch": "2", "numpy": "2"}}


def ledger(path: Path, header: dict[str, object] | None = None) -> Ledger:
    return Ledger(path, "impq-test/1", HEADER if header is None else header)


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
        with pytest.warns(RuntimeWarning, match="not written to the end"):
            again = ledger(path)
    else:
        again = ledger(path)
    assert [row["number"] for row in again.known] == list(range(kept))
    for number in range(kept, rows):
        again.append({"number": number})
    again.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("header, told", [
    ({**HEADER, "model": "other"}, 'model was "tiny" and is "other" now'),
    ({**HEADER, "versions": {"torch": "3", "numpy": "2"}}, 'versions.torch was "2" and is "3" now'),
    ({**HEADER, "text": "more"}, 'text was null and is "more" now'),
    ({"model": "other", "versions": {}}, "(and 1 more)")])
def test_facts_of_something_else_are_refused(header: dict[str, object], told: str, tmp_path: Path) -> None:
    ledger(tmp_path / "facts.jsonl").close()
    before = (tmp_path / "facts.jsonl").read_bytes()
    with pytest.raises(ImpqError) as error:
        ledger(tmp_path / "facts.jsonl", header)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "facts.jsonl").read_bytes() == before


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
    log = MeasurementLog(path, HEADER)
    pick, losses = np.array([0, 1, 2]), np.array([0.1, 1 / 3, np.nan])
    log.add(pick, losses)
    log.add(pick, -losses, number=2)
    log.close()
    again = MeasurementLog(path, HEADER)
    np.testing.assert_array_equal(again.losses[0, pick.tobytes()], losses)
    np.testing.assert_array_equal(again.losses[2, pick.tobytes()], -losses)
    again.append({"pick": "none"})
    with pytest.raises(ImpqError, match="no measurement"):
        MeasurementLog(path, HEADER)
    path.write_text(json.dumps({"format": "impq-scores/1"}) + "\n")
    with pytest.raises(ImpqError, match="not a measurement log"):
        MeasurementLog.read(path)
