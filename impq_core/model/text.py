"""Windows of tokens drawn from a named text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from impq_core.config import TextConfig
from impq_core.errors import ImpqError, UsageError, one_line
from impq_core.model.demo import demo_text
from impq_core.model.documents import TextFile, is_file_name, joined, listed, problem_of
from impq_core.space import IntArray

SHARED_RUN = 32
"""Calibration and evaluation windows that share a run of this many tokens are taken to overlap."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows of one text.

    Args:
        ids: int64 (windows, length).
        source: the text as the user named it.
        form: how the text was read, to be named with every perplexity.
        prefix: number of beginning-of-sequence tokens in front of the text of each window.
    """

    ids: IntArray
    source: str
    form: str
    prefix: int = 0

    @property
    def digest(self) -> str:
        """Hex digest of the tokens."""
        return hashlib.sha256(np.ascontiguousarray(self.ids).tobytes()).hexdigest()[:16]

    @property
    def scored_tokens(self) -> int:
        """Number of predicted tokens: all but the first of each window."""
        return int(self.ids.shape[0] * (self.ids.shape[1] - 1))

    def first(self, count: int) -> Windows:
        """The first ``count`` windows."""
        return self.part(0, count)

    def part(self, start: int, stop: int) -> Windows:
        """The windows from ``start`` up to, not including, ``stop``."""
        return replace(self, ids=self.ids[start:stop])

    def __str__(self) -> str:
        count, length = self.ids.shape
        return f"{count} windows of {length} tokens of {self.form}"


def check_source(source: str, role: str) -> None:
    """Refuse a local file that cannot be read as text, before anything heavy is imported.

    The part of the file that windows would be drawn from is read and checked. Of a ``datasets`` text only the form of
    the name is checked.

    Args:
        source: ``demo``, a file, or a ``datasets`` name.
        role: ``calibration`` or ``evaluation``, to be named in errors.

    Raises:
        UsageError: the file is of a kind that is not read, or the name is malformed.
        ImpqError: the file is missing, empty, or cannot be read as text.
    """
    if is_file_name(source) and source != "demo":
        _read(source, role)
    else:
        _parts_of_name(source, role)


def draw_windows(config: TextConfig, role: str, tokenizer: Any, vocabulary: int) -> Windows:
    """Tokenize a text and draw disjoint windows from it.

    Each window begins with the beginning-of-sequence token if the tokenizer adds one by itself.

    Args:
        config: the text, and the number, length and seed of the windows.
        role: ``calibration`` or ``evaluation``; selects the demo text and is named in errors.
        tokenizer: a transformers tokenizer.
        vocabulary: rows of the model's embedding; a token id beyond it is refused.

    Raises:
        ImpqError: the text cannot be read, is shorter than the windows asked for, or does not fit the model.
    """
    text, form = _read(config.source, role)
    tokens = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    if len(tokens) and tokens.max() >= vocabulary:
        raise ImpqError(f"the tokenizer gives token {tokens.max()}, the model knows {vocabulary}: they do not match; "
                         "take the tokenizer that belongs to the model")
    start = tokenizer("a")["input_ids"][:1]
    prefix = start if start and start[0] == tokenizer.bos_token_id else []
    body = config.length - len(prefix)
    available = len(tokens) // body
    if available < config.windows:
        raise ImpqError(f"{role} text {config.source} has {len(tokens)} tokens: enough for {available} windows of "
                        f"{config.length}, not {config.windows} (see --{role}-windows, --{role}-length)")
    rng = np.random.default_rng(config.seed)
    chosen = np.sort(rng.choice(available, size=config.windows, replace=False))
    ids = np.stack([np.concatenate([prefix, tokens[i * body:(i + 1) * body]]) for i in chosen]).astype(np.int64)
    return Windows(ids, config.source, form, len(prefix))


def refuse_overlap(calibration: Windows, evaluation: Windows) -> None:
    """Refuse evaluation windows that hold calibration text.

    Two windows overlap if they share a run of ``SHARED_RUN`` tokens at any position in either, or all the text of a
    shorter window. Beginning-of-sequence tokens are not counted. All runs are compared, exactly.

    Raises:
        ImpqError: at least one evaluation window overlaps with a calibration window.
    """
    bodies = [windows.ids[:, windows.prefix:] for windows in (calibration, evaluation)]
    run = min(SHARED_RUN, *(body.shape[1] for body in bodies))
    names = _name_runs(np.concatenate([body.ravel() for body in bodies]), run)
    # Position of the first token of every run that lies within a window: (windows, length - run + 1).
    starts = [np.arange(len(body))[:, None] * body.shape[1] + np.arange(body.shape[1] - run + 1) for body in bodies]
    shared = np.isin(names[bodies[0].size + starts[1]], names[starts[0]]).any(axis=1)
    if shared.any():
        raise ImpqError(f"calibration text {calibration.source} and evaluation text {evaluation.source} overlap "
                        f"({shared.sum()} of {shared.size} evaluation windows share a run of {run} tokens with the "
                        "calibration windows): evaluate on text the plan has not seen")


def _name_runs(tokens: IntArray, run: int) -> IntArray:
    """A number for each run of ``run`` tokens, (tokens - run + 1,): equal if and only if the runs are equal.

    The length of the named runs is doubled until it is ``run``: a run of twice the length is a pair of named runs, and
    the pairs are numbered anew.
    """
    names, size = np.unique(tokens, return_inverse=True)[1].astype(np.int64), 1
    while size < run:
        step = min(size, run - size)
        pairs = names[:-step] * (names.max() + 1) + names[step:]
        names, size = np.unique(pairs, return_inverse=True)[1].astype(np.int64), size + step
    return names


def _read(source: str, role: str) -> tuple[str, str]:
    """A text that is not blank, and the form in which it was read."""
    if source == "demo":
        text, form = _from_demo(role)
    elif is_file_name(source):
        text, form = TextFile(source, role).read()
    else:
        text, form = _from_datasets(source, role)
    if not text.strip():
        raise ImpqError(f"{role} text {source} is empty")
    return text, form


def _from_demo(role: str) -> tuple[str, str]:
    path = demo_text(role)
    text = path.read_text(encoding="utf-8")
    if role == "evaluation":
        text = re.sub(r"(?m)^</?doc.*\n?", "", text)
        return text, f"{path.name} of the demo texts, document marks stripped"
    return text, f"{path.name} of the demo texts"


def _from_datasets(source: str, role: str) -> tuple[str, str]:
    import datasets

    path, config, split = _parts_of_name(source, role)
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
        text = joined(_texts(rows, f"{role} text {source}"))
    except ImpqError:
        raise
    except Exception as error:  # datasets raises exceptions of many classes
        raise ImpqError(f"{role} text {source} is neither a file here nor a dataset that can be loaded "
                        f"({one_line(error)})") from error
    return text, f"{source} from datasets, rows joined by blank lines"


def _parts_of_name(source: str, role: str) -> tuple[str, str, str]:
    """Path, configuration and split in the name of a dataset; '' if not given."""
    path, config, split, *rest = [*source.split(":"), "", ""]
    if any(rest):
        raise UsageError(f"{role} text {source}: a datasets name is path, path:config or path:config:split")
    return path, config, split


def _texts(rows: Iterable[dict[str, Any]], label: str) -> Iterator[str]:
    """The ``text`` of each row of a dataset; rows in which it is null are skipped."""
    for number, row in enumerate(rows, start=1):
        if "text" not in row:
            raise ImpqError(f"{label} has no column 'text', only {listed(row)}; save it as a .jsonl file with a "
                            "field 'text' in each row")
        if problem := problem_of(row["text"], "column"):
            raise ImpqError(f"{label}, row {number}: {problem}; save it as a .jsonl file with this corrected")
        if row["text"] is not None:
            yield row["text"]
