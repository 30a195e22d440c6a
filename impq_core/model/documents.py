"""Local text files (plain text, JSON rows, Parquet tables), read only as far as windows are drawn from them."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from impq_core.errors import ImpqError, UsageError, nearest

MOST_CHARACTERS = 8_000_000
"""Windows are drawn from the first eight million characters of a text; more would only cost tokenizing time."""

LONGEST_ROW = 2 * MOST_CHARACTERS
"""Limit of a line of a .jsonl file, in characters, and of the mean document of a Parquet row group, in bytes."""

KINDS = (".txt", ".jsonl", ".parquet")
"""Suffixes of the files that are read."""

_BATCH_BYTES = 2**22
"""Bytes of text in a batch of rows of a Parquet table."""

_UNPACK = {".gz": "gunzip -k", ".bz2": "bunzip2 -k", ".xz": "unxz -k", ".zst": "unzstd", ".zip": "unzip"}

_SIGNATURES = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
               b"\x1f\x8b": "gzip"}
"""First bytes of files that are not UTF-8 text; the first entry that matches counts."""


def is_file_name(source: str) -> bool:
    """True if the name of a text is a path that exists, or has the form of a path; else it names a dataset."""
    if source.startswith((".", "/", "~")) or os.path.exists(source):
        return True
    return ":" not in source and re.search(r"\.[A-Za-z]\w{1,7}$", source) is not None


@dataclass(frozen=True)
class TextFile:
    """A local file with text. Errors are one line: ``{role} text {file}, line N: {problem}; {cure}``.

    Args:
        source: the path as the user wrote it; ``~`` is the home folder.
        role: ``calibration`` or ``evaluation``.
    """

    source: str
    role: str

    @property
    def path(self) -> Path:
        """The path of the file."""
        return Path(os.path.expanduser(self.source))

    def read(self) -> tuple[str, str]:
        """Read the first ``MOST_CHARACTERS`` characters, and the rest of the document that reaches this limit.

        A row of a .jsonl or .parquet file is one document; documents are joined by blank lines, and rows in which
        ``text`` is null are skipped. A .txt file is read up to the limit exactly. Text behind the limit is neither read
        nor checked.

        Returns:
            the text, and its form: how the file was read, to be named with every perplexity.

        Raises:
            UsageError: the file is of a kind that is not read.
            ImpqError: the file is missing or cannot be read as text; the message has the line and a cure.
        """
        name, kind = self.path.name, self.path.suffix.lower()
        try:
            self._check_name()
            if kind == ".txt":
                return self._plain(), f"{name} as it stands"
            if kind == ".jsonl":
                return joined(self._json_rows()), f"the text fields of {name}, joined by blank lines"
            return joined(self._parquet_rows()), f"the text column of {name}, joined by blank lines"
        except OSError as error:
            raise self._error("", f"cannot be read ({_one_line(error)})", "check its name and permissions") from error

    def _check_name(self) -> None:
        path, label = self.path, f"{self.role} text {self.source}"
        kind = path.suffix.lower()
        if path.is_dir():
            raise ImpqError(f"{label} is a folder: name one {', '.join(KINDS)} file in it")
        if kind in _UNPACK:
            raise UsageError(f"{label} is compressed: unpack it first ({_UNPACK[kind]} {shlex.quote(self.source)})")
        if kind == ".json":
            raise UsageError(f"{label}: only {', '.join(KINDS)} files are read; write one object a line "
                             f"({self._jq('.[]')})")
        if kind not in KINDS:
            raise UsageError(f"{label}: only {', '.join(KINDS)} files are read; convert it to one of these, or "
                             "rename it to .txt if it is plain text")
        if not os.path.lexists(path):
            siblings = os.listdir(path.parent) if path.parent.is_dir() else []
            close = nearest(path.name, difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.85))
            raise ImpqError(f"{label}: no such file{close}")
        if not path.is_file():
            raise ImpqError(f"{label} is not a regular file: save the text to a file first, it is read more than once")

    def _error(self, place: str, problem: str, cure: str) -> ImpqError:
        subject = f"{self.role} text {self.source}" + (f", {place}:" if place else "")
        return ImpqError(f"{subject} {problem}; {cure}")

    def _jq(self, program: str) -> str:
        target = shlex.quote(f"{self.path.stem}-text.jsonl")
        return f"jq -c {shlex.quote(program)} {shlex.quote(self.source)} > {target}"

    def _plain(self) -> str:
        self._check_signature()
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            text = file.read(MOST_CHARACTERS)
        self._check_characters(text, 1)
        return text

    def _check_signature(self) -> None:
        with self.path.open("rb") as file:
            start = file.read(4)
        encoding = next((name for mark, name in _SIGNATURES.items() if start.startswith(mark)), None)
        if encoding == "gzip":
            target = shlex.quote(f"{self.path.stem}-unpacked{self.path.suffix}")
            raise self._error("", "is compressed with gzip", f"unpack it (zcat {shlex.quote(self.source)} > {target})")
        if encoding:
            raise self._error("", f"is {encoding}", self._iconv(encoding))

    def _iconv(self, encoding: str) -> str:
        target = shlex.quote(f"{self.path.stem}-utf8{self.path.suffix}")
        return f"convert it to UTF-8 (iconv -f {encoding} -t UTF-8 {shlex.quote(self.source)} > {target})"

    def _check_characters(self, text: str, first_line: int) -> None:
        """Refuse NUL characters, and bytes that are not UTF-8, which were decoded to surrogates."""
        for position in (text.find("\0"), first_surrogate(text)):
            if position >= 0:
                line = first_line + text.count("\n", 0, position)
                if text[position] == "\0":
                    order = "UTF-16BE" if text.startswith("\0") else "UTF-16LE"
                    raise self._error(f"line {line}", "holds a NUL character, which is not text",
                                      f"delete it; or, if the file is UTF-16, {self._iconv(order)}")
                raise self._error(f"line {line}", f"byte 0x{ord(text[position]) - 0xdc00:02x} is not UTF-8",
                                  f"if the file is text in another encoding, {self._iconv('LATIN1')}")

    def lines(self) -> Iterator[tuple[int, str]]:
        """The lines of a .jsonl file that are not blank, with their numbers.

        Raises:
            ImpqError: the file is no UTF-8 text, or a line is too long.
        """
        self._check_signature()
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            number = 0
            while line := file.readline(LONGEST_ROW):
                number += 1
                self._check_characters(line, number)
                if len(line) == LONGEST_ROW and not line.endswith("\n"):
                    raise self._error(f"line {number}", f"is longer than {LONGEST_ROW // 10**6} million characters",
                                      "split it into several rows, or convert the file to .txt")
                if line.strip():
                    yield number, line

    def _json_rows(self) -> Iterator[str]:
        for number, line in self.lines():
            text = self._json_text(line, f"line {number}")
            if text is not None:
                yield text

    def json_row(self, line: str, place: str) -> Any:
        """The value of a line; raises ImpqError if it is no JSON."""
        try:
            return json.loads(line, object_pairs_hook=_fields)
        except (ValueError, RecursionError) as error:
            reason = _one_line(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
            cures = {"[": f"write one object a line ({self._jq('.[]')})",
                     "{": f"write each object in one line ({self._jq('.')})"}
            raise self._error(place, f"is not valid JSON ({reason})",
                              cures.get(line.strip(), "correct or delete the line")) from error

    def _json_text(self, line: str, place: str) -> str | None:
        row = self.json_row(line, place)
        if not isinstance(row, dict):
            cure = self._jq(".[]" if isinstance(row, list) else "{text: .}")
            raise self._error(place, f"is {_kind(row)}, not an object with a field 'text'",
                              f"write one object a line ({cure})")
        if "text" not in row:
            longest_first = sorted(row, key=lambda name: -len(row[name]) if isinstance(row[name], str) else 0)
            kinds = {name: _kind(row[name]) for name in longest_first}
            problem, cure, name = _without_text(kinds, "field")
            field = "." + json.dumps(name, ensure_ascii=not name.isprintable())
            program = f"{{text: {field}}}"
            if name and kinds[name] == _CHAT:
                program = f'{{text: [{field}[] | .content // .value] | join("\\n\\n")}}'
            raise self._error(place, problem, f"{cure} ({self._jq(program)})" if name else cure)
        problem = problem_of(row["text"], "field")
        if problem:
            raise self._error(place, problem, "correct or delete the line")
        return row["text"]  # type: ignore[no-any-return]  # checked just above

    def _parquet_rows(self) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path, buffer_size=2**20, pre_buffer=False) as table:
                self._check_columns(table.schema_arrow)
                for number, cell in enumerate(self._cells(table), start=1):
                    text = self._cell_text(cell, f"row {number}")
                    if text is not None:
                        yield text
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # from the file system, not from pyarrow
                raise
            raise self._error("", f"is not a Parquet file, or is damaged or cut short ({_one_line(error)})",
                              "make it again") from error

    def _check_columns(self, schema: Any) -> None:
        import pyarrow.types

        kinds = {field.name: _column_kind(field.type) for field in schema}
        if schema.names.count("text") > 1:
            raise self._error("", "has several columns 'text'", "rename all but one")
        if "text" not in kinds:
            problem, cure, _ = _without_text(kinds, "column")
            raise self._error("", problem, cure)
        kind = schema.field("text").type
        if kinds["text"] != _TEXT and not pyarrow.types.is_null(kind):
            raise self._error("", f"has a column 'text' of type {' '.join(str(kind).split())[:80]}, not of strings",
                              "write the text as strings")

    def _cells(self, table: Any) -> Iterator[Any]:
        """The values of column ``text``, read in batches of about ``_BATCH_BYTES`` bytes."""
        metadata = table.metadata
        column = next(i for i in range(metadata.num_columns) if table.schema.column(i).path == "text")
        first_row = 1
        for group in range(table.num_row_groups):
            about = metadata.row_group(group)
            mean = about.column(column).total_uncompressed_size // max(1, about.num_rows)
            if mean > LONGEST_ROW:
                raise self._error(f"row {first_row}", f"begins documents of {mean // 10**6} MB on average",
                                  "split them into several rows")
            rows = max(1, min(1024, _BATCH_BYTES // max(1, mean)))
            for batch in table.iter_batches(rows, row_groups=[group], columns=["text"], use_threads=False):
                yield from batch.column(0)
            first_row += about.num_rows

    def _cell_text(self, cell: Any, place: str) -> str | None:
        try:
            text: str | None = cell.as_py()
        except UnicodeDecodeError as error:
            raise self._error(place, "holds bytes that are not UTF-8", "write the table again in UTF-8") from error
        return text


_CHAT, _TEXT = "a chat", "text"

_SPEAKER = {"role", "from"}
"""Fields of which each turn of a chat has one."""


def problem_of(text: Any, noun: str) -> str:
    """The reason why a value cannot be a document; '' if it is text or null. ``noun`` is ``field`` or ``column``."""
    if text is None:
        return ""
    if not isinstance(text, str):
        return f"{noun} 'text' holds {_kind(text)}, not text"
    position = first_surrogate(text)
    if position >= 0:
        return f"{noun} 'text' holds \\u{ord(text[position]):04x}, half of a surrogate pair, which is no character"
    return ""


def joined(documents: Iterable[str]) -> str:
    """The first documents, joined by blank lines, until they have ``MOST_CHARACTERS`` characters together.

    No further document is asked for. At most ``MOST_CHARACTERS`` documents are taken, if most of them are empty.
    """
    pieces: list[str] = []
    size = 0
    for document in islice(documents, MOST_CHARACTERS):
        pieces.append(document)
        size += len(document)
        if size >= MOST_CHARACTERS:
            break
    return "\n\n".join(pieces)


def listed(names: Iterable[str]) -> str:
    """The first eight names, quoted, in one line."""
    *first, last = [repr(name[:40]) for name in islice(names, 9)]
    return ", ".join([*first, last if len(first) < 8 else "..."])


def _without_text(kinds: Mapping[str, str], noun: str) -> tuple[str, str, str]:
    """Problem, cure and the name of the field or column to convert ('' if there is none) of a row without ``text``.

    Args:
        kinds: kind of each field or column, by name.
        noun: ``field`` or ``column``.
    """
    chat = next((name for name, kind in kinds.items() if kind == _CHAT and len(name) <= 40), "")
    if chat:
        return (f"has chat records ({chat!r}), which are not read", "write each chat as one 'text', or all chats to a "
                ".jsonl file as 'messages' with 'role' and 'content'", chat)
    texts = [name for name, kind in kinds.items() if kind == _TEXT and len(name) <= 40]  # shorter than a message
    problem = f"has no {noun} 'text', " + (f"only {listed(kinds)}" if kinds else "and no other")
    if not texts:
        return problem, f"add a {noun} 'text', with null for rows to skip", ""
    return problem, f"rename the {noun} with the text, such as {texts[0]!r}, to 'text'", texts[0]


def _kind(value: Any) -> str:
    """The kind of a JSON value, as messages name it."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) and _SPEAKER & set(turn) for turn in value):
        return _CHAT
    if isinstance(value, str):
        return _TEXT
    if value is None:
        return "null"
    return {bool: "true or false", list: "a list", dict: "an object"}.get(type(value), "a number")


def _column_kind(column: Any) -> str:
    """The content of a column of an Arrow type, as messages name it: text, a chat, or the name of the type."""
    from pyarrow import types

    if types.is_dictionary(column):
        column = column.value_type
    if types.is_string(column) or types.is_large_string(column) or types.is_string_view(column):
        return _TEXT
    if (types.is_list(column) or types.is_large_list(column)) and types.is_struct(column.value_type):
        turns = column.value_type
        if _SPEAKER & {turns.field(i).name for i in range(turns.num_fields)}:
            return _CHAT
    return str(column)


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs) and [name for name, _ in pairs].count("text") > 1:
        raise ValueError("several fields 'text'")
    return fields


def first_surrogate(text: str) -> int:
    """Position of the first surrogate, which UTF-8 cannot hold; -1 if there is none."""
    match = None if text.isascii() else re.search("[\ud800-\udfff]", text)
    return match.start() if match else -1


def _one_line(error: BaseException) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:160]
