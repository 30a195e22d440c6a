"""Windows of tokens drawn from a named text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from impq_core.config import TextConfig
from impq_core.errors import ImpqError, UsageError, one_line
from impq_core.mixture import NamedText, interleaved
from impq_core.model.chats import ChatFile, Rendered, is_chat, tokenized
from impq_core.model.demo import demo_text
from impq_core.model.documents import TextFile, is_file_name, joined, listed, problem_of
from impq_core.space import BoolArray, FloatArray, IntArray

SHARED_RUN = 32
"""Calibration and evaluation windows that share a run of this many tokens are taken to overlap."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows of one text, or of a mixture.

    Args:
        ids: int64 (windows, length).
        source: the text as the user named it.
        form: how the text was read, to be named with every perplexity.
        prefix: number of beginning-of-sequence tokens in front of the text of each window.
        name: of the text among several.
        answers: bool (windows, length): tokens of the assistant, and all of what is no chat; None if there is no chat,
            or if its template does not tell.
        masked: whether only ``answers`` are scored.
        texts: int64 (windows,): the number of each window's text in a mixture; None for one text.
    """

    ids: IntArray
    source: str
    form: str
    prefix: int = 0
    name: str = ""
    answers: BoolArray | None = None
    masked: bool = False
    texts: IntArray | None = None

    @property
    def digest(self) -> str:
        """Hex digest of the tokens, and of what is scored if that is not all."""
        found = hashlib.sha256(np.ascontiguousarray(self.ids).tobytes())
        if self.weights is not None:
            found.update(self.weights.tobytes())
        return found.hexdigest()[:16]

    @property
    def token_digest(self) -> str:
        """Hex digest of the tokens alone, for statistics, which read all of them."""
        return replace(self, masked=False).digest

    @property
    def scored(self) -> BoolArray | None:
        """Bool (windows, length - 1): the predicted tokens that are scored; None for all."""
        return self.answers[:, 1:] if self.masked and self.answers is not None else None

    @cached_property
    def weights(self) -> FloatArray | None:
        """Float64 (windows, length - 1): the weight of each predicted token in a loss, 0 if it is not scored; None if
        all are scored. The mean over the windows of each text is 1: a loss is the mean over the scored tokens of a
        text, and in a mixture a text counts as its number of windows says, however many of its tokens are scored."""
        if (scored := self.scored) is None:
            return None
        texts: IntArray = np.zeros(len(scored), np.int64) if self.texts is None else self.texts
        weights = scored.astype(np.float64)
        for number in np.unique(texts):
            weights[texts == number] /= weights[texts == number].mean()
        return weights

    @property
    def scored_tokens(self) -> int:
        """Number of scored tokens: all but the first of each window, or those of the assistant among them."""
        if self.scored is not None:
            return int(self.scored.sum())
        return int(self.ids.shape[0] * (self.ids.shape[1] - 1))

    @property
    def window_tokens(self) -> IntArray | None:
        """Int64 (windows,): scored tokens of each window; None if all are scored."""
        return None if self.scored is None else self.scored.sum(axis=1)

    def window_losses(self, losses: FloatArray) -> FloatArray:
        """The loss (windows,) of each window from those of its predicted tokens (windows, length - 1): their mean, or
        their weighted mean. The mean over windows is the loss of the text or mixture."""
        if self.weights is None:
            return losses.mean(axis=1)  # type: ignore[no-any-return]
        return np.where(self.weights > 0, losses * self.weights, 0.0).mean(axis=1)  # type: ignore[no-any-return]

    def first(self, count: int) -> Windows:
        """The first ``count`` windows."""
        return self.part(0, count)

    def part(self, start: int, stop: int) -> Windows:
        """The windows from ``start`` up to, not including, ``stop``."""
        return self.take(np.arange(len(self.ids))[start:stop])

    def take(self, windows: IntArray) -> Windows:
        """The windows with some numbers, in this order."""
        return replace(self, ids=self.ids[windows], answers=None if self.answers is None else self.answers[windows],
                       texts=None if self.texts is None else self.texts[windows])

    def __str__(self) -> str:
        count, length = self.ids.shape
        return f"{count} windows of {length} tokens of {self.form}"


def check_texts(config: TextConfig, role: str) -> None:
    """``check_source`` of all texts of an option, and whether one is a chat if only the assistant's tokens are scored.

    Raises:
        UsageError, ImpqError: as ``check_source``; or no text is a chat.
    """
    for text in config.texts:
        check_source(text.source, role)
    if config.scored == "assistant" and not any(is_chat(text.source, role) for text in config.texts):
        raise UsageError(f"{role} text {config.shown} is no chat, so it has no tokens of an assistant to score: leave "
                         f"out --{role}-scored, or give a .jsonl file with 'messages'")


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
    if is_chat(source, role):
        ChatFile(source, role).check()
    elif is_file_name(source) and source != "demo":
        read_text(source, role)
    else:
        _parts_of_name(source, role)


def draw_windows(config: TextConfig, role: str, tokenizer: Any, vocabulary: int) -> Windows:
    """Tokenize a text and draw disjoint windows from it; of several texts, one set of windows in the proportions of
    their weights, in which the texts follow each other as ``interleaved`` says.

    Each window begins with the beginning-of-sequence token if the tokenizer adds one by itself.

    Args:
        config: the text or texts, and the number, length and seed of the windows.
        role: ``calibration`` or ``evaluation``; selects the demo text and is named in errors.
        tokenizer: a transformers tokenizer.
        vocabulary: rows of the model's embedding; a token id beyond it is refused.

    Raises:
        ImpqError: a text cannot be read, is shorter than the windows asked for, or does not fit the model.
    """
    texts = config.texts
    order = np.array(interleaved([text.weight for text in texts], config.windows))
    counts = np.bincount(order, minlength=len(texts)).tolist()
    drawn = [_draw(text, count, config, role, tokenizer, vocabulary)
             for text, count in zip(texts, counts, strict=True) if count]
    return drawn[0] if len(texts) == 1 else _mixed(drawn, order, config.shown)


def draw_each(config: TextConfig, role: str, tokenizer: Any, vocabulary: int) -> tuple[Windows, ...]:
    """As ``draw_windows``, but the windows of each text by themselves."""
    return tuple(_draw(text, config.windows, config, role, tokenizer, vocabulary) for text in config.texts)


def _mixed(drawn: list[Windows], order: IntArray, source: str) -> Windows:
    """Windows of several texts in one set, in the order of the texts' numbers ``order`` (windows,)."""
    counts = [len(windows.ids) for windows in drawn]
    place = np.argsort(np.argsort(order, kind="stable"))  # of each window of the mixture among those of all texts
    answers = None
    if any(windows.answers is not None for windows in drawn):
        answers = np.concatenate([np.ones(windows.ids.shape, bool) if windows.answers is None else windows.answers
                                  for windows in drawn])
    form = " and ".join(f"{count} of {windows.form}" for count, windows in zip(counts, drawn, strict=True))
    whole = Windows(np.concatenate([windows.ids for windows in drawn]), source, f"a mixture: {form}", drawn[0].prefix,
                    "mixture", answers, any(windows.masked for windows in drawn),
                    np.repeat(np.arange(len(drawn)), counts))
    return whole.take(place)


def _draw(text: NamedText, count: int, config: TextConfig, role: str, tokenizer: Any, vocabulary: int) -> Windows:
    """``count`` windows of one text."""
    only_answers = config.scored == "assistant" and is_chat(text.source, role)
    rendered, form = _tokens(text.source, role, tokenizer, only_answers)
    tokens = rendered.tokens
    if len(tokens) and tokens.max() >= vocabulary:
        raise ImpqError(f"the tokenizer gives token {tokens.max()}, the model knows {vocabulary}: they do not match; "
                         "take the tokenizer that belongs to the model")
    start = tokenizer("a")["input_ids"][:1]
    prefix = start if start and start[0] == tokenizer.bos_token_id else []
    body = config.length - len(prefix)
    available: IntArray = np.arange(len(tokens) // body)
    if only_answers:  # of the others, no token is scored
        assert rendered.answers is not None
        told = rendered.answers[:len(available) * body].reshape(-1, body)
        available = available[told[:, 1 - len(prefix):].any(axis=1)]
    if len(available) < count:
        raise ImpqError(f"{role} text {text.source} has {len(tokens)} tokens: enough for {len(available)} windows of "
                        f"{config.length}{' with tokens of the assistant' * only_answers}, not {count} (see "
                        f"--{role}-windows, --{role}-length)")
    rng = np.random.default_rng(config.seed)
    chosen = available[np.sort(rng.choice(len(available), size=count, replace=False))]
    ids = np.stack([np.concatenate([prefix, tokens[i * body:(i + 1) * body]]) for i in chosen]).astype(np.int64)
    answers = None
    if rendered.answers is not None:
        answers = np.stack([np.concatenate([np.zeros(len(prefix), bool), rendered.answers[i * body:(i + 1) * body]])
                            for i in chosen])
    return Windows(ids, text.source, form, len(prefix), text.name, answers, only_answers)


def _tokens(source: str, role: str, tokenizer: Any, only_answers: bool) -> tuple[Rendered, str]:
    """The tokens of a text, and the form in which it was read."""
    if is_chat(source, role):
        file = ChatFile(source, role)
        return (tokenized(file, tokenizer, only_answers),
                f"the chats of {file.path.name} in the model's chat template"
                + ", the assistant's tokens scored" * only_answers)
    text, form = read_text(source, role)
    return Rendered(np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)), form


def refuse_overlap(calibration: Windows, evaluation: Windows) -> None:
    """Refuse evaluation windows that hold calibration text.

    Two windows overlap if they share a run of ``SHARED_RUN`` tokens at any position in either, or all the text of a
    shorter window. Beginning-of-sequence tokens are not counted. All runs are compared, exactly; of chats, those at
    least half of which are the assistant's, because many chats begin with the same instructions.

    Raises:
        ImpqError: at least one evaluation window overlaps with a calibration window.
    """
    bodies = [windows.ids[:, windows.prefix:] for windows in (calibration, evaluation)]
    run = min(SHARED_RUN, *(body.shape[1] for body in bodies))
    names = _name_runs(np.concatenate([body.ravel() for body in bodies]), run)
    # Position of the first token of every run that lies within a window: (windows, length - run + 1).
    starts = [np.arange(len(body))[:, None] * body.shape[1] + np.arange(body.shape[1] - run + 1) for body in bodies]
    counted = [_counted(windows, run) for windows in (calibration, evaluation)]
    shared = (np.isin(names[bodies[0].size + starts[1]], names[starts[0]][counted[0]]) & counted[1]).any(axis=1)
    if shared.any():
        raise ImpqError(f"calibration text {calibration.source} and evaluation text {evaluation.source} overlap "
                        f"({shared.sum()} of {shared.size} evaluation windows share a run of {run} tokens with the "
                        "calibration windows): evaluate on text the plan has not seen")


def _counted(windows: Windows, run: int) -> BoolArray:
    """(windows, length - run + 1): whether at least half of the tokens of a run are the assistant's, or no chat's."""
    body = windows.ids[:, windows.prefix:]
    if windows.answers is None:
        return np.ones((len(body), body.shape[1] - run + 1), bool)
    sums = np.cumsum(np.pad(windows.answers[:, windows.prefix:], ((0, 0), (1, 0))), axis=1)
    counted: BoolArray = np.greater_equal((sums[:, run:] - sums[:, :-run]) * 2, run)
    return counted


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


def read_text(source: str, role: str) -> tuple[str, str]:
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
