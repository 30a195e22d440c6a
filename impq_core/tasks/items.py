"""Files of questions: a JSON object a line. Nothing here imports lm-eval or torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from impq_core.errors import ImpqError

PROMPT = "Question: {{question}}\nAnswer:"
"""The template of a prompt, in Jinja."""

EXAMPLE = '{"question": "...", "choices": ["...", "..."], "answer": 0} or {"question": "...", "answer": "..."}'
"""The two forms of a line."""


@dataclass(frozen=True, eq=False)
class Questions:
    """The questions of a file.

    Args:
        name: of the task: the file's name without its suffix.
        rows: the questions; each has ``question``, ``answer`` and, if ``multiple_choice``, ``choices``.
        multiple_choice: whether an answer is the number of a choice, counted from 0; else it is a text.
        digest: of the rows.
    """

    name: str
    rows: tuple[Mapping[str, Any], ...]
    multiple_choice: bool
    digest: str

    def config(self, chat: bool) -> dict[str, Any]:
        """The task of lm-eval, without the place of its documents, which are the split ``test``.

        A choice or answer follows its prompt behind a space, as in lm-eval's tasks; behind a chat template's
        generation prompt without one.
        """
        config: dict[str, Any] = {"task": self.name, "test_split": "test", "doc_to_text": PROMPT}
        if self.multiple_choice:
            return config | {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
        # By the field's name, not as a template, behind a chat template: lm-eval takes the template of "[1, 2]" for a
        # list. It puts no space in front of a text that is not one of several choices.
        return config | {"output_type": "loglikelihood", "doc_to_target": "answer" if chat else " {{answer}}",
                         "process_results": _scored, "metric_list": [
                             {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                             {"metric": "nll", "aggregation": "mean", "higher_is_better": False}]}


def _scored(row: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """The metrics of a short answer: whether greedy decoding gives it, and its negative log-likelihood, nats."""
    [(loglikelihood, greedy)] = results
    return {"acc": float(greedy), "nll": -loglikelihood}


def read_questions(path: Path) -> Questions:
    """Read and check a file of questions.

    Raises:
        ImpqError: the file is missing or empty, or a line is no question; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ImpqError(f"{path}: {error.strerror.lower() if error.strerror else 'cannot be read'}") from error
    except UnicodeDecodeError as error:
        raise ImpqError(f"{path} is not UTF-8: write it again in UTF-8") from error
    rows = [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise ImpqError(f"{path} has no questions: write one a line, {EXAMPLE}")
    several = ["choices" in row for row in rows]
    if len(set(several)) > 1:
        raise ImpqError(f"{path} has questions with choices and without: make a file of each")
    name = re.sub(r"[^\w.-]+", "-", path.stem)
    return Questions(name, tuple(rows), several[0],
                     hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:20])


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    def wrong(problem: str) -> ImpqError:
        return ImpqError(f"{path}, line {number}: {problem}; a line is {EXAMPLE}")

    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise wrong("is not valid JSON") from error
    if not isinstance(row, dict):
        raise wrong("is no object")
    for field in ("question", "answer"):
        if field not in row:
            raise wrong(f"has no field '{field}'")
    if not _is_text(row["question"]):
        raise wrong("'question' is no text")
    answer = row["answer"]
    if "choices" not in row:
        if not _is_text(answer):
            raise wrong("'answer' is no text, and there are no 'choices'")
        return {"question": row["question"], "answer": answer}
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise wrong("'choices' is no list of at least two texts")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise wrong(f"'answer' is not the number of a choice, 0 to {len(choices) - 1}")
    return {"question": row["question"], "choices": choices, "answer": answer}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
