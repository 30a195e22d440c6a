"""Text files of users: each is read, or refused in one line with file, place and cure."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from impq_core.config import TextConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.model.documents import LONGEST_ROW, MOST_CHARACTERS, TextFile
from impq_core.model.text import check_source, draw_windows
from impq_core.testing.tiny import byte_tokenizer

SMILEY, CHINESE, ARABIC = "\N{GRINNING FACE}", "层与层相互作用。", "تتفاعل الطبقات."


def _write(path: Path, content: str | bytes | pyarrow.Table) -> Path:
    if isinstance(content, pyarrow.Table):
        pyarrow.parquet.write_table(content, path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _text(path: Path) -> str:
    return TextFile(str(path), "calibration").read()[0]


def _strings(kind: pyarrow.DataType) -> pyarrow.Table:
    return pyarrow.table({"id": [1, 2, 3], "text": pyarrow.array(["a", None, "b"], kind)})


@pytest.mark.parametrize(("name", "content", "text"), [
    ("a.txt", "\ufeffwith a byte-order mark", "with a byte-order mark"),
    ("a.txt", "one\r\ntwo\rthree\n", "one\ntwo\nthree\n"),
    ("A.TXT", CHINESE + ARABIC + SMILEY, CHINESE + ARABIC + SMILEY),
    ("a.txt", "x", "x"),
    ("a.jsonl", '\ufeff{"text": "a"}\r\n\r\n{"text": "b", "id": 3}', "a\n\nb"),
    ("a.jsonl", '{"text": "a"}\n{"text": null}\n{"text": "b"}\n', "a\n\nb"),
    ("a.jsonl", json.dumps({"text": SMILEY + CHINESE}), SMILEY + CHINESE),
    ("a.jsonl", '{"text": "a", "meta": {"text": {"text": 1}}}', "a"),
    ("a.jsonl", "\n".join(f'{{"text": "{n}"}}' for n in range(300)), "\n\n".join(map(str, range(300)))),
    ("a.parquet", _strings(pyarrow.string()), "a\n\nb"),
    ("a.parquet", _strings(pyarrow.large_string()), "a\n\nb"),
    ("a.parquet", _strings(pyarrow.string_view()), "a\n\nb"),
    ("a.parquet", _strings(pyarrow.dictionary(pyarrow.int32(), pyarrow.string())), "a\n\nb"),
    ("a.parquet", pyarrow.table({"meta": [{"text": "no"}], "text": [ARABIC]}), ARABIC),
])
def test_files_that_are_read(name: str, content: str | pyarrow.Table, text: str, tmp_path: Path) -> None:
    assert _text(_write(tmp_path / name, content)) == text


CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]


@pytest.mark.parametrize(("name", "content", "place", "problem", "cure"), [
    ("a.txt", "hello".encode("utf-16"), "", "is UTF-16", "iconv -f UTF-16 -t UTF-8"),
    ("a.txt", "hello".encode("utf-32"), "", "is UTF-32", "iconv -f UTF-32 -t UTF-8"),
    ("a.txt", "hello".encode("utf-16-le"), "line 1", "NUL", "iconv -f UTF-16LE"),
    ("a.txt", "hello".encode("utf-16-be"), "line 1", "NUL", "iconv -f UTF-16BE"),
    ("a.txt", b"one\ntwo\r\ncaf\xe9", "line 3", "byte 0xe9 is not UTF-8", "iconv -f LATIN1 -t UTF-8"),
    ("a.txt", "cut in a character: é".encode()[:-1], "line 1", "byte 0xc3", "iconv"),
    ("a.txt", gzip.compress(b"hello", mtime=0), "", "is compressed with gzip", "zcat"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2", "byte 0xe9", "iconv"),
    ("a.jsonl", '{"text": "a"}\n{"id": 3}\n', "line 2", "no field 'text', only 'id'", "add a field 'text'"),
    ("a.jsonl", "{}", "line 1", "no field 'text', and no other", "add a field 'text'"),
    ("a.jsonl", '{"a\\nb": 1, "' + "c" * 999 + '": 2}', "line 1", r"only 'a\nb', 'ccc", "add a field"),
    ("a.jsonl", '{"' + "c" * 999 + '": "d"}', "line 1", "no field 'text', only 'ccc", "add a field"),
    ("a.jsonl", '{"text": "a"}\n\n{"text": 3}\n', "line 3", "holds a number", "correct or delete"),
    ("a.jsonl", '{"text": ["a"]}', "line 1", "holds a list", "correct or delete"),
    ("a.jsonl", '{"text": "a"}\n{"text": "b', "line 2", "not valid JSON", "correct or delete"),
    ("a.jsonl", '{"text": "a", "text": "b"}', "line 1", "several fields 'text'", "correct or delete"),
    ("a.jsonl", '{"text": "a"}\n{"text": "x \\ud800 y"}', "line 2", "half of a surrogate pair", "correct or delete"),
    ("a.jsonl", "[" * 100_000, "line 1", "not valid JSON", "correct or delete"),
    ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "line 1", "not valid JSON", "correct or delete"),
    ("a.parquet", pyarrow.table({"id": [1], "body": ["x"]}), "", "no column 'text', only 'id', 'body'",
     "rename the column with the text, such as 'body'"),
    ("a.parquet", pyarrow.table({"text": [{"a": "x"}]}), "", "of type struct", "write the text as strings"),
    ("a.parquet", pyarrow.table({"text": [b"x"]}), "", "of type binary", "write the text as strings"),
    ("a.parquet", pyarrow.table({"messages": [CHAT]}), "", "has chat records", "write each chat as one 'text'"),
    ("a.parquet", pyarrow.table({"meta": [{"text": "x"}]}), "", "no column 'text', only 'meta'", "add a column"),
    ("a.parquet", pyarrow.table({}), "", "no column 'text', and no other", "add a column"),
    ("a.parquet", pyarrow.table([["a"], ["b"]], names=["text", "text"]), "", "several columns 'text'", "rename"),
    ("a.parquet", pyarrow.table({"text": pyarrow.array([b"ok", b"caf\xe9"]).view(pyarrow.string())}), "row 2",
     "not UTF-8", "write the table again"),
    ("a.parquet", "{", "", "not a Parquet file", "make it again"),
    ("a.parquet", "", "", "not a Parquet file", "make it again"),
])
def test_files_that_are_refused(name: str, content: str | bytes | pyarrow.Table, place: str, problem: str, cure: str,
                                tmp_path: Path) -> None:
    path = _write(tmp_path / name, content)
    with pytest.raises(ImpqError) as error:
        check_source(str(path), "evaluation")
    message = str(error.value)
    start = f"evaluation text {path}, {place}: " if place else f"evaluation text {path} "
    assert message.startswith(start) and "\n" not in message, message
    said, _, advice = message.removeprefix(start).partition("; ")
    assert problem in said and cure in advice and len(message) < len(str(path)) + 400, message
    with pytest.raises(ImpqError) as later:
        draw_windows(TextConfig(str(path), 1, 2), "evaluation", byte_tokenizer(), 259)
    assert str(later.value) == message


@pytest.mark.parametrize(("name", "content"), [
    ("a.txt", ""), ("a.txt", " \n\t\u3000"), ("a.jsonl", "\n"), ("a.jsonl", '{"text": null}\n{"text": " "}\n'),
    ("a.parquet", pyarrow.table({"text": pyarrow.nulls(3)})),
    ("a.parquet", pyarrow.table({"text": pyarrow.array([], pyarrow.string())})),
])
def test_files_without_text(name: str, content: str | pyarrow.Table, tmp_path: Path) -> None:
    with pytest.raises(ImpqError, match=r"calibration text .* is empty"):
        check_source(str(_write(tmp_path / name, content)), "calibration")


def test_text_that_begins_far_down_is_not_taken_for_empty(tmp_path: Path) -> None:
    check_source(str(_write(tmp_path / "a.txt", "\n" * 20_000 + "text")), "calibration")


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed")
@pytest.mark.parametrize(("content", "text"), [
    (json.dumps({"id": "7", "my 文 \"text\"": "hello"}), "hello"),
    (json.dumps({"conversations": [{"from": "human", "value": "hello"}]}), "hello"),
    (json.dumps([{"text": "a"}, {"text": "b"}]), "a\n\nb"),
    (json.dumps([{"text": "a"}, {"text": "b"}], indent=1), "a\n\nb"),
    (json.dumps({"text": "a"}, indent=1), "a"),
    ('"hello"', "hello"),
])
def test_the_command_in_a_message_cures_the_file(content: str, text: str, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "it's my data.jsonl"
    _write(Path(name), content)
    with pytest.raises(ImpqError, match="line 1") as error:
        check_source(name, "calibration")
    command = str(error.value)[str(error.value).index("(jq ") + 1:-1]
    subprocess.run(command, shell=True, check=True)
    assert _text(Path("it's my data-text.jsonl")) == text


@pytest.mark.parametrize(("name", "content", "text"), [
    ("a.txt", "café 中".encode("utf-16"), "café 中"), ("a.txt", "café 1".encode("utf-16-le"), "café 1"),
    ("a.txt", "café".encode("latin-1"), "café"), ("a.txt", gzip.compress(b"hello", mtime=0), "hello"),
    ("a.jsonl", '{"text": "café"}'.encode("utf-16"), "café"),
])
def test_the_command_for_another_encoding_cures_the_file(name: str, content: bytes, text: str, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImpqError) as error:
        check_source(str(_write(Path(name), content)), "calibration")
    command = str(error.value).rpartition("(")[2].rstrip(")")
    assert shutil.which(shlex.split(command)[0]), command
    subprocess.run(command, shell=True, check=True)
    assert _text(Path(command.rpartition("> ")[2])) == text


@pytest.mark.parametrize(("name", "kind", "reason"), [
    ("none.txt", ImpqError, "no such file"), ("tale.txt", ImpqError, r"no such file \(did you mean 'tales.txt'\?\)"),
    ("folder", ImpqError, "is a folder"), ("pipe.txt", ImpqError, "is not a regular file"),
    ("x" * 5000 + ".txt", ImpqError, "no such file|cannot be read"), ("rows.jsonl.gz", UsageError, "gunzip -k"),
    ("rows.json", UsageError, r"jq -c '\.\[\]'"), ("a.docx", UsageError, "only .txt, .jsonl, .parquet files are read"),
])
def test_names_that_are_refused(name: str, kind: type[ImpqError], reason: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "tales.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(kind, match=reason) as error:
        check_source(str(tmp_path / name), "calibration")
    assert type(error.value) is kind and "\n" not in str(error.value)


@pytest.mark.parametrize("folder", [".", "it's \"quoted\"", "数据 [1] {a} #2", "a:b", "$HOME `x` & ;"])
@pytest.mark.parametrize("name", ["a.txt", "训练 'x' [0].txt", "~a.txt", "#.txt"])
def test_odd_names_work(folder: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = Path(folder) / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("some text, long enough")
    for source in (str(path), f"./{path}", f"~/{path}", str(path.absolute())):
        windows = draw_windows(TextConfig(source, 2, 8), "calibration", byte_tokenizer(), 259)
        assert windows.source == source and windows.form == f"{name} as it stands"


PIECE = "".join(f"Sentence {number} of the piece. " for number in range(40_000))  # about a megabyte
BROKEN = b"\xff\xff\n{ no row\n"


def _peak_of_check(path: Path) -> int:
    """Peak memory in bytes that Python and pyarrow allocate for the check of a file, in a process of its own."""
    script = ("import sys, tracemalloc, pyarrow.parquet\nfrom impq_core.model.text import check_source\n"
              "tracemalloc.start()\ncheck_source(sys.argv[1], 'calibration')\n"
              "print(tracemalloc.get_traced_memory()[1] + pyarrow.default_memory_pool().max_memory())")
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("kind", ["lines.txt", "line.txt", "wide.txt", "rows.jsonl"])
def test_only_the_beginning_of_a_large_file_is_read(kind: str, tmp_path: Path) -> None:
    rows = [json.dumps({"text": PIECE[start:start + 4000]}) + "\n" for start in range(0, len(PIECE), 4000)]
    piece = {"lines.txt": PIECE.replace(". ", ".\n"), "line.txt": PIECE, "rows.jsonl": "".join(rows),
             "wide.txt": PIECE + SMILEY}[kind].encode()
    path = tmp_path / kind
    with path.open("wb") as file:
        for _ in range(1 + MOST_CHARACTERS // len(PIECE)):
            file.write(piece)
        file.write(BROKEN)
        for _ in range(150):
            file.write(piece)
    assert path.stat().st_size > 150_000_000
    assert _peak_of_check(path) < 80_000_000
    assert len(_text(path)) < MOST_CHARACTERS + 10_000


def test_a_row_of_gigabytes_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(150):
            file.write(PIECE.encode())
    tracemalloc.start()
    try:
        with pytest.raises(ImpqError, match=f"line 2: is longer than {LONGEST_ROW // 10**6} million characters"):
            check_source(str(path), "calibration")
        assert tracemalloc.get_traced_memory()[1] < 80_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("row_groups", [1, 40])
def test_a_large_table_is_read_in_batches_of_one_column(row_groups: int, tmp_path: Path) -> None:
    rows = [f"{number} {PIECE[number % 1000:number % 1000 + 4000]}" for number in range(20_000)]
    table = pyarrow.table({"text": rows, "other": rows})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=len(rows) // row_groups, compression="none",
                                use_dictionary=False)
    del table, rows
    assert path.stat().st_size > 150_000_000
    with path.open("r+b") as file:  # the second half of the data is damaged, the footer is not
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 70_000_000)
    assert _peak_of_check(path) < 80_000_000


def test_a_table_with_a_document_of_many_megabytes_in_each_row_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.parquet", pyarrow.table({"text": [PIECE * (1 + LONGEST_ROW // len(PIECE))]}))
    with pytest.raises(ImpqError, match=r"row 1: begins documents of \d+ MB on average; split them"):
        check_source(str(path), "calibration")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_read_or_refused_in_one_line(name: str, data: st.DataObject, tmp_path: Path) -> None:
    whole = {"a.txt": f"one\n{CHINESE}\ntwo\n".encode(), "a.jsonl": b'{"text": "a", "n": [1, {"x": null}]}\n' * 3}
    if name == "a.parquet":
        path = _write(tmp_path / "b.parquet", pyarrow.table({"text": [f"row {n}" for n in range(30)], "n": range(30)}))
        whole[name] = path.read_bytes()
    damaged = bytearray(whole[name])
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = _write(tmp_path / name, bytes(damaged[:data.draw(st.integers(0, len(damaged)))]))
    try:
        check_source(str(path), "calibration")
    except ImpqError as error:
        assert str(error).startswith(f"calibration text {path}") and "\n" not in str(error)
    else:
        assert _text(path).encode()
