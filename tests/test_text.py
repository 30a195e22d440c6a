from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from impq_core.config import TextConfig
from impq_core.errors import ImpqError
from impq_core.model.text import check_source, draw_windows, refuse_overlap
from impq_core.testing.tiny import byte_tokenizer

PLAIN, WITH_START = byte_tokenizer(), byte_tokenizer(adds_start=True)


def _draw(path: Path, windows: int = 3, length: int = 16, seed: int = 0, tokenizer: object = PLAIN) -> np.ndarray:
    return draw_windows(TextConfig(str(path), windows, length, seed), "calibration", tokenizer, 259).ids


def test_windows_are_disjoint_pieces_of_the_text(tmp_path: Path) -> None:
    text = "".join(f"{i:04d}" for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    ids = _draw(tmp_path / "a.txt", windows=20)
    pieces = [PLAIN.decode(row) for row in ids]
    assert all(piece in text and text.index(piece) % 16 == 0 for piece in pieces) and len(set(pieces)) == 20
    np.testing.assert_array_equal(ids, _draw(tmp_path / "a.txt", windows=20))
    assert (ids != _draw(tmp_path / "a.txt", windows=20, seed=1)).any()


def test_a_start_token_where_the_model_wants_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 20)
    with_start = _draw(tmp_path / "a.txt", tokenizer=WITH_START)
    assert (with_start[:, 0] == 256).all() and (with_start[:, 1:] < 256).all() and with_start.shape == (3, 16)
    assert (_draw(tmp_path / "a.txt") < 256).all()


def test_all_kinds_of_files(tmp_path: Path) -> None:
    rows = ["first row of text", "second row of text"]
    (tmp_path / "a.txt").write_text("\n\n".join(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    expected = _draw(tmp_path / "a.txt", windows=2)
    for kind in ("jsonl", "parquet"):
        np.testing.assert_array_equal(_draw(tmp_path / f"a.{kind}", windows=2), expected)


@pytest.mark.parametrize(("name", "content", "reason"), [
    ("a.txt", "short", "enough for 0 windows of 16, not 3"),
    ("a.txt", "  \n ", "empty"),
    ("a.txt", b"\xff\xfe\x00bad", "cannot be read"),
    ("a.jsonl", '{"content": "x"}', "cannot be read"),
    ("a.jsonl", "not json", "cannot be read"),
    ("a.parquet", "no parquet", "cannot be read"),
])
def test_unusable_texts(name: str, content: str | bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ImpqError, match=reason) as error:
        _draw(path)
    assert "\n" not in str(error.value)


def test_what_can_be_refused_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    for source, reason in (("empty.txt", "empty"), ("none.txt", "no such file"), ("a.docx", "only .txt")):
        with pytest.raises(ImpqError, match=reason):
            check_source(str(tmp_path / source))
    check_source("demo")
    check_source("wikitext:wikitext-2-raw-v1:test")


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("z" * 100)
    with pytest.raises(ImpqError, match="do not match"):
        draw_windows(TextConfig(str(tmp_path / "a.txt"), 2, 16), "calibration", PLAIN, 50)


def test_overlap_is_refused_whatever_the_files_are_called(texts: tuple[Path, Path], tmp_path: Path) -> None:
    def windows(path: Path, seed: int = 0) -> object:
        return draw_windows(TextConfig(str(path), 40, 64, seed), "calibration", PLAIN, 259)
    refuse_overlap(windows(texts[0]), windows(texts[1]))  # type: ignore[arg-type]
    copy = tmp_path / "copy.txt"
    copy.write_text("xyz" + texts[0].read_text())  # shifted against the window grid
    with pytest.raises(ImpqError, match="overlap"):
        refuse_overlap(windows(texts[0], 1), windows(copy, 1))  # type: ignore[arg-type]
