"""From a name of a text to windows of tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from impq_core.config import TextConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.model.demo import demo_text
from impq_core.space import IntArray

MOST_CHARACTERS = 8_000_000
"""Windows are drawn from the first eight million characters of a text; more would only cost tokenizing time."""

SHARED_RUN = 32
"""Two texts that share a run of this many tokens are taken to overlap."""

_KINDS = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows of one text.

    Args:
        ids: int64 (windows, length).
        source: the text as the user named it.
        form: how the text was read, to be named with every perplexity.
    """

    ids: IntArray
    source: str
    form: str

    @property
    def digest(self) -> str:
        """Hex digest of the tokens."""
        return hashlib.sha256(np.ascontiguousarray(self.ids).tobytes()).hexdigest()[:16]

    @property
    def scored_tokens(self) -> int:
        """Tokens that are predicted: all but the first of each window."""
        return int(self.ids.shape[0] * (self.ids.shape[1] - 1))

    def first(self, count: int) -> Windows:
        """The first ``count`` of them."""
        return self.part(0, count)

    def part(self, start: int, stop: int) -> Windows:
        """Some of them, by their numbers."""
        return Windows(self.ids[start:stop], self.source, self.form)

    def __str__(self) -> str:
        count, length = self.ids.shape
        return f"{count} windows of {length} tokens of {self.form}"


def check_source(source: str) -> None:
    """Refuse a text that cannot be there, before anything heavy is imported.

    Raises:
        ImpqError: a local file is missing, empty, or of a kind that is not read.
    """
    if source == "demo" or not _is_file_name(source):
        return
    path = Path(source).expanduser()
    if path.suffix not in _KINDS:
        raise UsageError(f"text {source}: only {', '.join(_KINDS)} files are read")
    if not path.is_file():
        raise ImpqError(f"text {source}: no such file")
    if path.suffix != ".parquet" and not path.read_text(errors="replace")[:10_000].strip():
        raise ImpqError(f"text {source} is empty")


def draw_windows(config: TextConfig, role: str, tokenizer: Any, vocabulary: int) -> Windows:
    """Tokenize a text and draw disjoint windows from it.

    Each window begins with the beginning-of-sequence token where the model's tokenizer adds one by itself.

    Args:
        config: the text and the size of the draw.
        role: ``calibration`` or ``evaluation``; decides which demo text is meant.
        tokenizer: a transformers tokenizer.
        vocabulary: size of the model's embedding; a larger token id is refused.

    Raises:
        ImpqError: the text cannot be read, is shorter than the windows asked for, or does not fit the model.
    """
    text, form = _read(config.source, role)
    if not text.strip():
        raise ImpqError(f"{role} text {config.source} is empty")
    tokens = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    if len(tokens) and tokens.max() >= vocabulary:
        raise ImpqError(f"the tokenizer gives token {tokens.max()}, the model knows {vocabulary}: they do not match; "
                         "take the tokenizer that belongs to the model")
    start = tokenizer("a")["input_ids"][:1]
    prefix = start if start and start[0] == tokenizer.bos_token_id else []
    room = config.length - len(prefix)
    available = len(tokens) // room
    if available < config.windows:
        raise ImpqError(f"{role} text {config.source} has {len(tokens)} tokens: enough for {available} windows of "
                        f"{config.length}, not {config.windows} (see --{role}-windows, --{role}-length)")
    rng = np.random.default_rng(config.seed)
    chosen = np.sort(rng.choice(available, size=config.windows, replace=False))
    ids = np.stack([np.concatenate([prefix, tokens[i * room:(i + 1) * room]]) for i in chosen]).astype(np.int64)
    return Windows(ids, config.source, form)


def refuse_overlap(calibration: Windows, evaluation: Windows) -> None:
    """Raises ImpqError where the two share a run of ``SHARED_RUN`` tokens (or of a whole shorter window)."""
    run = min(SHARED_RUN, calibration.ids.shape[1] - 1, evaluation.ids.shape[1] - 1)

    def runs(windows: Windows, stride: int) -> Iterator[bytes]:
        for row in windows.ids:
            for start in range(0, len(row) - run + 1, stride):
                yield row[start:start + run].tobytes()

    known = set(runs(calibration, 1))
    shared = sum(1 for piece in runs(evaluation, run) if piece in known)
    if shared:
        raise ImpqError(f"calibration text {calibration.source} and evaluation text {evaluation.source} overlap "
                        f"({shared} runs of {run} tokens are in both): evaluate on text the plan has not seen")


def _is_file_name(source: str) -> bool:
    ends_like_one = re.search(r"\.[A-Za-z]\w{1,7}$", source) and ":" not in source
    return bool(ends_like_one) or source.startswith((".", "/", "~")) or Path(source).exists()


def _read(source: str, role: str) -> tuple[str, str]:
    """A text and the form it was read in."""
    if source == "demo":
        path = demo_text(role)
        text = path.read_text()
        if role == "evaluation":
            text = re.sub(r"(?m)^</?doc.*\n?", "", text)
            return text, f"{path.name} of the demo texts, document marks stripped"
        return text, f"{path.name} of the demo texts"
    try:
        if not _is_file_name(source):
            return _from_datasets(source)
        path = Path(source).expanduser()
        if path.suffix == ".txt":
            with path.open(encoding="utf-8") as file:
                return file.read(MOST_CHARACTERS), f"{path.name} as it stands"
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                return _join(_json_texts(file)), f"the text fields of {path.name}, joined by blank lines"
        import pyarrow.parquet

        column = pyarrow.parquet.read_table(path, columns=["text"])["text"]
        return _join(iter(column.to_pylist())), f"the text column of {path.name}, joined by blank lines"
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ImpqError(f"{role} text {source} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _json_texts(lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f"line {number} has no field 'text' that holds text")
            yield row["text"]


def _join(rows: Iterator[str]) -> str:
    pieces: list[str] = []
    size = 0
    for row in rows:
        if size >= MOST_CHARACTERS:
            break
        pieces.append(row)
        size += len(row)
    return "\n\n".join(pieces)


def _from_datasets(source: str) -> tuple[str, str]:
    import datasets

    name, config, split, *rest = [*source.split(":"), "", ""]
    if any(rest):
        raise UsageError(f"text '{source}': a datasets name is path, path:config or path:config:split")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        text = _join(row["text"] for row in islice(rows, MOST_CHARACTERS))
    except Exception as error:  # datasets raises many kinds; each means that the text is not to be had
        reason = " ".join(str(error).split())[:160]
        raise ImpqError(f"text '{source}' is neither a file here nor a dataset that can be loaded "
                        f"({type(error).__name__}: {reason})") from error
    return text, f"{source} from datasets, rows joined by blank lines"
