"""Scores of tasks beside the losses of measured plans: lm-eval's tasks, files of questions, and two made from a text.

``continuation``: which of four stretches of text follows a passage; the others are from the text around it.
``last-word``: the last word of a passage that has the word before. Both need no data but the held-out text.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import plus_minus, table
from rows import UNIFORM, UNQUANTIZED, PlanRow, Problem

from impq_core.errors import ImpqError
from impq_core.model.bank import Assignment
from impq_core.model.text import read_text
from impq_core.runs.session import Session
from impq_core.statistics import standard_error
from impq_core.tasks import harness
from impq_core.tasks.harness import Settings, Task
from impq_core.trust import NO_TRUST

PASSAGE, ENDING, CHOICES = 32, 10, 4
"""Words of a passage and of what follows it, and the number of choices."""

DOCUMENTS = 200
"""The most documents of a task that is made from a text."""

ASKED: Mapping[str, Any] = {
    "test_split": "test", "dataset_path": "json", "doc_to_text": "{{passage}}"}
"""Fields of lm-eval's configuration that both tasks share."""


@dataclass(frozen=True)
class TaskColumns:
    """The tasks of a benchmark.

    Args:
        tasks: as lm-eval has loaded them.
        limit: the most documents of each.
    """

    tasks: Sequence[Task] = ()
    limit: int = 0

    @classmethod
    def read(cls, words: str, limit: int, text: str, folder: Path) -> TaskColumns:
        """The tasks of a command line.

        Args:
            words: names and files, with , between; empty for none.
            limit: the most documents of each.
            text: the held-out text.
            folder: where the tasks are written that are made from the text.

        Raises:
            UsageError, ImpqError: a word is wrong, or a text is too short.
        """
        if not words:
            return cls()
        settings = Settings(limit)
        found = [str(write_task(word, text, folder)) if word in MAKERS else word for word in words.split(",")]
        return cls(harness.load_tasks(harness.read_words(found, NO_TRUST), settings), limit)

    def missing(self, row: PlanRow) -> list[Task]:
        """The tasks that the model of a row was not asked, or with another number of documents."""
        return [task for task in self.tasks if not any(
            name.startswith(f"{task.name} ") and len(values) == self._documents(task)
            for name, values in row.tasks.items())]

    def _documents(self, task: Task) -> int:
        return min(self.limit, *(len(one.eval_docs) for one in task.loaded["tasks"].values()))

    def measure(self, session: Session, assignment: Assignment, tasks: Sequence[Task]) -> dict[str, list[float]]:
        """The value of each document by task and metric, with the variants of a session at an allocation."""
        session.bank.apply(assignment)
        found = {}
        try:
            with session.runner.whole(at_once=not session.runner.placement.streamed) as model:
                tokenizer = session.prepared.source.tokenizer()
                for task in tasks:
                    for value in harness.measure(model, tokenizer, task, Settings(self.limit)):
                        if value.documents and value.filter == "none":
                            metric = "ll" if value.metric == "perplexity" else value.metric
                            found[f"{task.name} {metric}"] = [*value.documents]
        finally:
            session.bank.apply([None] * len(session.bank.layers))
        return found


def write_task(name: str, text: str, folder: Path) -> Path:
    """Write a task that is made from a held-out text, as lm-eval reads it; returns its file.

    Raises:
        ImpqError: the text is too short.
    """
    words = read_text(text, "evaluation")[0].split()
    documents = [*MAKERS[name](words)]
    if len(documents) < 2:
        raise ImpqError(f"--tasks {name}: text {text} is too short to make questions from")
    random.Random(0).shuffle(documents)  # the first ones are of the whole text
    place = folder / re.sub(r"\W+", "-", text).strip("-")
    place.mkdir(parents=True, exist_ok=True)
    data, task = place.absolute() / f"{name}.jsonl", place / f"{name}.yaml"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    asked = {**ASKED, "task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}, **FORMS[name]}
    task.write_text(json.dumps(asked, indent=1) + "\n")  # JSON is YAML
    return task


def continuations(words: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Passages with what follows them among what follows the passages around."""
    size = PASSAGE + ENDING
    stretches = [words[first:first + size] for first in range(0, len(words) - size + 1, size)]
    step = max(CHOICES, len(stretches) // DOCUMENTS)
    rng = random.Random(0)
    for first in range(0, len(stretches) - CHOICES + 1, step):
        endings = [" ".join(stretch[PASSAGE:]) for stretch in stretches[first:first + CHOICES]]
        order = rng.sample(range(CHOICES), CHOICES)
        yield {"passage": " ".join(stretches[first][:PASSAGE]), "choices": [endings[place] for place in order],
               "answer": order.index(0)}


def last_words(words: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Passages without their last word, which has five letters or more and was there before."""
    step = max(PASSAGE, len(words) // DOCUMENTS)
    for first in range(PASSAGE, len(words), step):
        for end in range(first, min(first + step, len(words))):
            if re.fullmatch("[a-z]{5,}", words[end]) and words[end] in words[end - PASSAGE:end]:
                yield {"passage": " ".join(words[end - PASSAGE:end]), "word": words[end]}
                break


MAKERS: Mapping[str, Callable[[Sequence[str]], Iterator[dict[str, Any]]]] = {
    "continuation": continuations, "last-word": last_words}
FORMS: Mapping[str, Mapping[str, Any]] = {
    "continuation": {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer",
                     "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]},
    "last-word": {"output_type": "loglikelihood", "doc_to_target": " {{word}}",
                  "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                                  # of each document, it is the log-likelihood
                                  {"metric": "perplexity", "aggregation": "mean", "higher_is_better": True}]}}


def task_table(problem: Problem) -> list[str]:
    """The scores of a problem's rows on tasks, beside their losses; nothing if no row has any."""
    rows = [row for row in problem.rows if row.tasks]
    columns = list(dict.fromkeys((name, len(values)) for row in rows for name, values in row.tasks.items()))
    if not columns:
        return []
    exact = problem.unquantized.tasks if problem.unquantized else {}
    groups = {(row.budget, row.method, ""): [row] for row in rows if row.method in (UNIFORM, UNQUANTIZED)}
    cells = []
    for (budget, method, granularity), alike in sorted({**groups, **problem.methods}.items(), key=lambda item: (
            -item[0][0], *item[0][1:])):
        losses = np.mean([row.nll for row in alike], axis=0)
        cell = [f"{budget:g}", method, granularity, str(len(alike)), plus_minus(losses.mean(), standard_error(losses))]
        for name, count in columns:
            values = [np.array(row.tasks[name]) for row in alike if len(row.tasks.get(name, ())) == count]
            cell.append(shown(np.mean(values, axis=0), exact.get(name)) if len(values) == len(alike) else "")
        if any(cell[5:]):
            cells.append(cell)
    return ["Scores on tasks, means over seeds; the head of a column has the number of documents. In brackets minus "
            "the unquantized model, paired over documents. *continuation*: which of four stretches of the held-out "
            "text follows a passage. *last-word*: the last word of a passage, by greedy decoding (acc), and the "
            "log-likelihood of that word in nats (ll).", "",
            *table(["bits", "method", "layers", "seeds", "NLL", *(f"{name} ({count})" for name, count in columns)],
                   cells)]


def shown(values: Any, exact: Sequence[float] | None) -> str:
    """The mean of documents' values (documents,), and its difference to the unquantized model's."""
    text = f"{values.mean():.3f}"
    if exact is None or len(exact) != len(values):
        return text
    apart = values - np.array(exact)
    return f"{text} ({plus_minus(apart.mean(), standard_error(apart), sign=True)})" if apart.any() else text
