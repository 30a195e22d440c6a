"""Windows of tokens: what is drawn from a text, and which evaluation windows overlap with calibration windows."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impq_core.config import TextConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.model.text import SHARED_RUN, Windows, check_source, draw_windows, refuse_overlap
from impq_core.testing import made_text
from impq_core.testing.tiny import byte_tokenizer

PLAIN, WITH_START = byte_tokenizer(), byte_tokenizer(adds_start=True)


def _draw(path: Path | str, windows: int = 3, length: int = 16, seed: int = 0, tokenizer: object = PLAIN) -> Windows:
    return draw_windows(TextConfig(str(path), windows, length, seed), "calibration", tokenizer, 259)


def test_windows_are_disjoint_pieces_of_the_text(tmp_path: Path) -> None:
    text = "".join(f"{i:04d}" for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    ids = _draw(tmp_path / "a.txt", windows=20).ids
    pieces = [PLAIN.decode(row) for row in ids]
    assert all(piece in text and text.index(piece) % 16 == 0 for piece in pieces) and len(set(pieces)) == 20
    np.testing.assert_array_equal(ids, _draw(tmp_path / "a.txt", windows=20).ids)
    assert (ids != _draw(tmp_path / "a.txt", windows=20, seed=1).ids).any()


def test_a_start_token_if_the_tokenizer_adds_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 20)
    with_start = _draw(tmp_path / "a.txt", tokenizer=WITH_START)
    assert (with_start.ids[:, 0] == 256).all() and (with_start.ids[:, 1:] < 256).all()
    assert with_start.ids.shape == (3, 16) and with_start.prefix == with_start.part(1, 3).prefix == 1
    plain = _draw(tmp_path / "a.txt")
    assert (plain.ids < 256).all() and plain.prefix == 0


ROWS = [f"Row {n} of the table, squared {n * n}.\r\nIt has é and 中." for n in range(40)] + ["", "last"]


@pytest.mark.parametrize(("kind", "plain", "with_start", "form"), [
    ("txt", "35c315e4353962c4", "c5addfb6e37f34d9", "a.txt as it stands"),
    ("jsonl", "197959ff13705089", "6697580beafad557", "the text fields of a.jsonl, joined by blank lines"),
    ("parquet", "197959ff13705089", "6697580beafad557", "the text column of a.parquet, joined by blank lines"),
])
def test_windows_of_a_file_do_not_change_between_versions(kind: str, plain: str, with_start: str, form: str,
                                                          tmp_path: Path) -> None:
    """Digests of impq 0.1: runs that were made with it must be resumable, and their figures comparable."""
    path = tmp_path / f"a.{kind}"
    if kind == "txt":
        path.write_bytes("\n".join(ROWS).encode())
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": row}) for row in ROWS))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": ROWS}), path)
    windows = _draw(path, 12, 24, 3)
    assert (windows.digest, windows.form) == (plain, form)
    assert _draw(path, 12, 24, 3, WITH_START).digest == with_start


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("z" * 100)
    with pytest.raises(ImpqError, match="do not match"):
        draw_windows(TextConfig(str(tmp_path / "a.txt"), 2, 16), "calibration", PLAIN, 50)


def test_a_short_text_is_refused_with_its_length(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    check_source(str(tmp_path / "a.txt"), "calibration")
    with pytest.raises(ImpqError, match="has 5 tokens: enough for 0 windows of 16, not 3"):
        _draw(tmp_path / "a.txt")


def test_texts_that_are_not_files_are_not_read_early() -> None:
    for source in ("demo", "wikitext:wikitext-2-raw-v1:test", "owner/name"):
        check_source(source, "calibration")


@pytest.mark.parametrize(("rows", "problem"), [
    ([{"body": "x", "id": 1}], "no column 'text', only 'body', 'id'"),
    ([{"text": "a"}, {"text": 3}], "row 2: column 'text' holds a number"),
    ([{"text": None}], "is empty"),
    ([{"text": "hello " * 20}, {"text": None}, {"text": "x"}], ""),
])
def test_rows_of_a_dataset(rows: list[dict[str, object]], problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: iter(rows))
    if problem:
        with pytest.raises(ImpqError, match=problem) as error:
            _draw("owner/name:part:test")
        assert "\n" not in str(error.value)
    else:
        assert _draw("owner/name:part:test", 7).ids.shape == (7, 16)


def test_a_dataset_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no\nhub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ImpqError, match=r"calibration text owner/name is neither .* \(ConnectionError: no hub\)"):
        _draw("owner/name")
    for read in (_draw, lambda source: check_source(source, "calibration")):
        with pytest.raises(UsageError, match="path:config:split"):
            read("a:b:c:d")


def _random(rng: np.random.Generator, first: int, windows: int, length: int) -> np.ndarray:
    return rng.integers(first, first + 500, (windows, length))


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 4), st.integers(SHARED_RUN, 90),
       st.integers(SHARED_RUN, 90), st.integers(0, 1), st.data())
def test_a_shared_run_is_found_at_any_position(seed: int, count: int, other_count: int, length: int, other_length: int,
                                               prefix: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    calibration = _random(rng, 0, count, length)
    evaluation = _random(rng, 1000, other_count, other_length)  # of other tokens: only what is planted is shared
    run = _random(rng, 0, 1, SHARED_RUN)[0]
    for ids in (calibration, evaluation):
        start = data.draw(st.integers(0, ids.shape[1] - SHARED_RUN))
        ids[data.draw(st.integers(0, len(ids) - 1)), start:start + SHARED_RUN] = run

    def windows(ids: np.ndarray) -> Windows:
        starts = np.full((len(ids), prefix), 7)
        return Windows(np.concatenate([starts, ids], axis=1), "a text", "as it stands", prefix)

    with pytest.raises(ImpqError, match=rf"1 of {other_count} evaluation windows share a run of {SHARED_RUN} tokens"):
        refuse_overlap(windows(calibration), windows(evaluation))
    evaluation[evaluation == run[SHARED_RUN // 2]] = 999  # every shared run is shorter now
    refuse_overlap(windows(calibration), windows(evaluation))


def test_start_tokens_neither_make_nor_hide_an_overlap() -> None:
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 200, SHARED_RUN - 1)

    def windows(first: int, tokens: np.ndarray) -> Windows:
        ids = np.concatenate([[256], tokens, rng.integers(first, first + 500, 60 - len(tokens))])[None]
        return Windows(ids, "a text", "as it stands", 1)

    refuse_overlap(windows(300, shared), windows(1000, shared))  # 32 equal tokens, one of them no text
    with pytest.raises(ImpqError, match="overlap"):
        refuse_overlap(windows(300, np.append(shared, 5)), windows(1000, np.append(shared, 5)))
    short = rng.integers(0, 200, (3, 8))
    with_start = np.concatenate([np.full((3, 1), 256), short], axis=1)
    with pytest.raises(ImpqError, match="1 of 1 evaluation windows share a run of 8 tokens"):
        refuse_overlap(Windows(with_start, "a", "", 1), Windows(with_start[1:2], "b", "", 1))


def test_runs_do_not_cross_from_one_window_to_the_next() -> None:
    rng = np.random.default_rng(0)
    run = rng.integers(0, 200, SHARED_RUN)
    calibration, evaluation = _random(rng, 300, 2, 40), _random(rng, 1000, 2, 40)
    calibration[0, -16:], calibration[1, :16] = run[:16], run[16:]
    evaluation[0, :SHARED_RUN] = run
    refuse_overlap(Windows(calibration, "a", ""), Windows(evaluation, "b", ""))


def test_many_long_windows_are_compared_in_no_time() -> None:
    rng = np.random.default_rng(0)
    calibration, evaluation = _random(rng, 0, 64, 2048), _random(rng, 0, 64, 2048)
    start = time.process_time()
    refuse_overlap(Windows(calibration, "a", ""), Windows(evaluation, "b", ""))
    assert time.process_time() - start < 5  # 0.2 s on a quiet core; comparing run by run takes minutes
    evaluation[63, -SHARED_RUN:] = calibration[0, :SHARED_RUN]
    with pytest.raises(ImpqError, match="1 of 64"):
        refuse_overlap(Windows(calibration, "a", ""), Windows(evaluation, "b", ""))


def test_overlap_is_refused_whatever_the_files_are_called(texts: tuple[Path, Path], tmp_path: Path) -> None:
    refuse_overlap(_draw(texts[0], 40, 64), _draw(texts[1], 40, 64))
    copy = tmp_path / "copy.txt"
    copy.write_text("xyz" + texts[0].read_text())  # shifted against the window grid
    with pytest.raises(ImpqError, match="overlap"):
        refuse_overlap(_draw(texts[0], 40, 64, 1), _draw(copy, 40, 64, 1))


def test_made_texts_are_the_same_everywhere_and_share_no_run() -> None:
    texts = [made_text(seed, 100_000) for seed in range(4)]
    assert all(len(text) == 100_000 and text.isascii() for text in texts)
    assert hashlib.sha256(texts[1].encode()).hexdigest().startswith("5921c70e6e5a9356")
    assert made_text(1, 1000) == texts[1][:1000]
    whole = [Windows(np.frombuffer(text.encode(), np.uint8).astype(np.int64)[None], "a", "b") for text in texts]
    for number, windows in enumerate(whole):
        for other in whole[:number]:
            refuse_overlap(windows, other)
