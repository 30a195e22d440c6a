"""Answers of two models to the same prompts, as plain data; ``answers.json`` holds them. Nothing here imports torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from impq_core.errors import ImpqError, one_line
from impq_core.files import write_text

FORMAT = "impq-answers/1"

FILE = "answers.json"
"""The file in a run folder or an exported folder."""


@dataclass(frozen=True)
class Split:
    """Where two answers first differ.

    Args:
        token: number of tokens that are the same in front of it.
        common: the text of those tokens.
        unquantized: the next token of the unquantized model, as text.
        plan: that of the quantized model.
        kl: KL divergence of the quantized model's distribution of that token from the unquantized model's, nats.
    """

    token: int
    common: str
    unquantized: str
    plan: str
    kl: float


@dataclass(frozen=True)
class Answer:
    """The answers to a prompt.

    Args:
        prompt: the prompt; empty if there are messages.
        messages: role and content of each message in front of the answer.
        chat: whether the prompt went through the model's chat template.
        limit: the most tokens of an answer.
        unquantized: the unquantized model's answer.
        plan: the quantized model's answer.
        unquantized_tokens, plan_tokens: number of tokens of the answers, with the one that ended it.
        split: None if the answers are the same.
        key: digest of all that decides the answers (``AnswerKey``).
    """

    prompt: str
    messages: tuple[Mapping[str, str], ...]
    chat: bool
    limit: int
    unquantized: str
    plan: str
    unquantized_tokens: int
    plan_tokens: int
    split: Split | None
    key: str

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Answer:
        """Read the data of ``dataclasses.asdict``; raises KeyError, TypeError or ValueError if it is something
        else."""
        values = {entry.name: data[entry.name] for entry in fields(cls)}
        split = values["split"]
        if split is not None:
            split = Split(**split | {"kl": math.nan if split["kl"] is None else float(split["kl"])})
        return cls(**values | {"messages": tuple(map(dict, values["messages"])), "split": split})


@dataclass(frozen=True)
class AnswerTable:
    """The answers of a run or an exported folder.

    Args:
        answers: at most one for each key.
    """

    answers: tuple[Answer, ...] = ()

    def with_answers(self, new: Sequence[Answer]) -> AnswerTable:
        """The table with further answers; those to the same prompt of earlier settings or models are dropped."""
        asked = {(answer.prompt, repr(answer.messages)) for answer in new}
        kept = (old for old in self.answers if (old.prompt, repr(old.messages)) not in asked)
        return replace(self, answers=(*kept, *new))

    def save(self, path: Path) -> None:
        """Write answers.json, whole or not at all; a KL divergence that is not finite is null."""
        rows = [asdict(answer) for answer in self.answers]
        for row in rows:
            if row["split"] is not None and not math.isfinite(row["split"]["kl"]):
                row["split"]["kl"] = None
        write_text(path, json.dumps({"format": FORMAT, "answers": rows}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> AnswerTable:
        """Read answers.json; raises ImpqError if it cannot be read, or is something else."""
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
            return cls(tuple(map(Answer.from_dict, data["answers"])))
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ImpqError(f"{path} cannot be used: {one_line(error)}; delete it, and the prompts are asked "
                            "again") from error
