"""Prompts from the command line and from files. Nothing here imports torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from impq_core.errors import ImpqError, UsageError


@dataclass(frozen=True)
class Prompt:
    """A text, or the messages of a chat; one of them is empty.

    Args:
        text: the prompt.
        messages: role and content of each message.
    """

    text: str = ""
    messages: tuple[Mapping[str, str], ...] = ()


def read_prompts(texts: Sequence[str], file: Path | None) -> list[Prompt]:
    """The prompts of the command line, and behind them those of a file.

    Raises:
        UsageError: there is none, or one is blank.
        ImpqError: the file is missing, or a line of it is no prompt.
    """
    if not all(text.strip() for text in texts):
        raise UsageError("a prompt is blank")
    prompts = [Prompt(text) for text in texts]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise ImpqError(f"{file}: {error.strerror.lower() if error.strerror else 'cannot be read'}") from error
        except UnicodeDecodeError as error:
            raise ImpqError(f"{file} is not UTF-8: write it again in UTF-8") from error
        numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        prompts += [_parsed(file, *one) if file.suffix == ".jsonl" else Prompt(one[1]) for one in numbered]
    if not prompts:
        raise UsageError("no prompt is given: write one behind the folder, or give a file with --prompts")
    return prompts


def _parsed(file: Path, number: int, line: str) -> Prompt:
    def wrong(problem: str) -> ImpqError:
        return ImpqError(f"{file}, line {number}: {problem}; a line is {{\"prompt\": \"...\"}} or {{\"messages\": "
                         "[{\"role\": \"user\", \"content\": \"...\"}]}")

    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise wrong("is not valid JSON") from error
    if not isinstance(row, dict) or not {"prompt", "messages"} & set(row):
        raise wrong("has no field 'prompt' or 'messages'")
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            raise wrong("'prompt' is no text")
        return Prompt(row["prompt"])
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise wrong("'messages' is no list of messages with a role and a text as content")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]  # as in a training file: the answer that is asked for
        if not messages:
            raise wrong("'messages' has nothing in front of the assistant's answer")
    return Prompt(messages=tuple({"role": turn["role"], "content": turn["content"]} for turn in messages))


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(name), str) for name in ("role", "content"))
