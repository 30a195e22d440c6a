"""Chats: rows of messages, through a model's own chat template, as tokens of which some are the assistant's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from impq_core.errors import ImpqError, one_line
from impq_core.model.documents import MOST_CHARACTERS, TextFile, first_surrogate
from impq_core.space import BoolArray, IntArray

ASSISTANT = "assistant"
"""The role whose tokens can be scored alone."""

DAY = date(2024, 7, 26)
"""Today, for templates that write the date: else a text would have other tokens tomorrow. It is the date that templates
of Llama 3 write by default."""

_CODES = ("%Y", "%y", "%m", "%B", "%b", "%d", "%A", "%a", "%H", "%M", "%S")

Message = Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Rendered:
    """A text as tokens.

    Args:
        tokens: int64 (tokens,).
        answers: bool (tokens,): those of the assistant; None if the text is no chat, or if its template does not tell.
    """

    tokens: IntArray
    answers: BoolArray | None = None


@dataclass(frozen=True)
class Chat:
    """A chat and the number of its line in the file."""

    line: int
    messages: tuple[Message, ...]


class ChatFile(TextFile):
    """A .jsonl file whose rows have ``messages``, a list of objects with ``role`` and ``content``."""

    def read_chats(self) -> Iterator[Chat]:
        """The chats; of all together at most ``MOST_CHARACTERS``, and the rest of the chat that reaches this limit.
        Rows in which ``messages`` is null are skipped.

        Raises:
            ImpqError: a row has no messages, or a message has another form.
        """
        left = MOST_CHARACTERS
        for number, line in self.lines():
            row = self.json_row(line, f"line {number}")
            messages: Any = row.get("messages", "") if isinstance(row, dict) else ""
            if messages is None:
                continue
            if problem := _problem(messages):
                raise self._error(f"line {number}", problem, "correct or delete the line")
            chat = Chat(number, tuple(messages))
            left -= sum(len(message["content"]) for message in chat.messages)
            yield chat
            if left <= 0:
                return

    def check(self) -> None:
        """Read the part of the file that windows are drawn from; raises ImpqError as ``read_chats``, or if there is no
        chat."""
        if not any([True for _ in self.read_chats()]):
            raise ImpqError(f"{self.role} text {self.source} is empty")

    def error_in(self, chat: Chat, problem: str, cure: str) -> ImpqError:
        """The error of a chat."""
        return self._error(f"line {chat.line}", problem, cure)


def _problem(messages: Any) -> str:
    """The reason why a value is no list of messages; '' if it is one."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return "has no list of 'messages', as the first line has"
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, dict) else None
            if not isinstance(value, str):
                return f"message {number} has no '{key}' that is text"
            if first_surrogate(value) >= 0:
                return f"message {number} holds half of a surrogate pair, which is no character"
    return ""


def is_chat(source: str, role: str) -> bool:
    """Whether the first row of a .jsonl file has ``messages`` and no ``text``. A file that cannot be read is none."""
    path = Path(os.path.expanduser(source))
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            first = next((line for line in islice(file, 1000) if line.strip()), "")
        row = json.loads(first)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "text" not in row and _has_turns(row.get("messages"))


def _has_turns(messages: Any) -> bool:
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], dict) and "role" in messages[0]


def tokenized(file: ChatFile, tokenizer: Any, only_answers: bool) -> Rendered:
    """The chats of a file in a row, each through the tokenizer's chat template.

    The template itself tells what the assistant wrote: the text of a chat begins with the text of the messages in front
    of an answer, and goes on with the answer. This is checked for every answer.

    Args:
        file: the chats.
        tokenizer: a transformers tokenizer.
        only_answers: whether the assistant's tokens must be known.

    Raises:
        ImpqError: the tokenizer has no chat template; the template refuses a chat; or the assistant's tokens must be
            known, and the template changes earlier messages when later ones follow, or the tokenizer does not say where
            its tokens are in the text.
    """
    label = f"{file.role} text {file.source}"
    if not getattr(tokenizer, "chat_template", None):
        raise ImpqError(f"{label} has chats, and the model's tokenizer has no chat template: take the chat model "
                        "(often named -Instruct or -it), or write each chat as one 'text'")
    fast = bool(getattr(tokenizer, "is_fast", False))
    if only_answers and not fast:
        raise ImpqError(f"{label}: the tokenizer of this model does not say where its tokens are in the text, so the "
                        f"assistant's are unknown: leave out --{file.role}-scored")
    texts, spans = list[str](), list[list[tuple[int, int]] | None]()
    for chat in file.read_chats():
        text = _render(tokenizer, file, chat, len(chat.messages))
        found = _answers(tokenizer, file, chat, text) if fast else None
        if found is None and only_answers:
            raise file.error_in(chat, "has an answer that the model's chat template changes when later messages "
                                "follow, so the assistant's tokens are unknown", f"leave out --{file.role}-scored, or "
                                "write a chat for each answer")
        texts.append(text)
        spans.append(found)
    if not texts:
        raise ImpqError(f"{label} is empty")
    tokens, answers = list[IntArray](), list[BoolArray]()
    for text, found in zip(texts, spans, strict=True):
        read = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=fast)
        ids = np.array(read["input_ids"], np.int64)
        tokens.append(ids)
        if found is not None:
            starts = np.array([start for start, _ in read["offset_mapping"]], np.int64)
            answers.append(np.any([(starts >= first) & (starts < end) for first, end in found] or
                                  [np.zeros(len(ids), bool)], axis=0))
    known = all(found is not None for found in spans)
    return Rendered(np.concatenate(tokens), np.concatenate(answers) if known else None)


def _answers(tokenizer: Any, file: ChatFile, chat: Chat, text: str) -> list[tuple[int, int]] | None:
    """Begin and end of each answer in the text of a chat; None if the text does not go on as that of its first messages
    does."""
    found = []
    for number, message in enumerate(chat.messages):
        if message["role"] != ASSISTANT:
            continue
        before = _render(tokenizer, file, chat, number, asks=True) if number else ""
        whole = text if number + 1 == len(chat.messages) else _render(tokenizer, file, chat, number + 1)
        if not text.startswith(whole) or not whole.startswith(before):
            return None
        found.append((len(before), len(whole)))
    return found


def _render(tokenizer: Any, file: ChatFile, chat: Chat, count: int, asks: bool = False) -> str:
    """The text of the first ``count`` messages of a chat; with ``asks``, with what stands in front of an answer."""
    try:
        text: str = tokenizer.apply_chat_template(
            list(chat.messages[:count]), tokenize=False, add_generation_prompt=asks,
            chat_template=_dated(tokenizer.get_chat_template()))
    except Exception as error:  # of the template: jinja2's, or whatever its own code raises
        raise file.error_in(chat, f"is refused by the model's chat template ({one_line(error, 120)})",
                            "correct or delete the line") from error
    return text


def _dated(template: str) -> str:
    """A template whose function for the time gives ``DAY``; transformers takes no other function in its place."""
    if "strftime_now" not in template:
        return template
    written = "".join(f".replace('{code}', '{DAY.strftime(code)}')" for code in _CODES)
    return f"{{% macro strftime_now(format) %}}{{{{ format{written} }}}}{{% endmacro %}}{template}"
