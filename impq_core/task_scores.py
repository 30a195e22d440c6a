"""Scores of models on tasks, as plain data; ``tasks.json`` holds them. Nothing here imports lm-eval or torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from impq_core.errors import ImpqError, one_line
from impq_core.files import write_text
from impq_core.space import FloatArray
from impq_core.statistics import standard_error
from impq_core.window_losses import Difference

FORMAT = "impq-tasks/1"

FILE = "tasks.json"
"""The file in a run folder or an exported folder."""

UNQUANTIZED = "unquantized"


@dataclass(frozen=True)
class TaskScore:
    """The value of one metric of a task for one model.

    Args:
        row: the model, as the run's table names it: ``unquantized``, ``plan``, ``uniform 3`` ...
        bytes: stored bytes of its quantizable weights; None for the unquantized model.
        task: name of the task, or of a group of tasks.
        metric: as lm-eval calls it: ``acc``, ``acc_norm``, ``perplexity`` ...
        filter: what lm-eval does with the answers in front of the metric; ``none`` for nothing.
        value: as lm-eval reports it.
        stderr: its standard error, as lm-eval reports it; NaN if it reports none.
        n: number of documents.
        higher_is_better: None if lm-eval does not say.
        aggregation: ``mean`` or ``perplexity`` of the documents' values; empty for anything else.
        documents: the value of each document, of which ``value`` is the aggregation; empty for anything else.
        limit: the most documents that were asked for; None for all.
        fewshot: number of examples in each prompt.
        chat: whether prompts went through the model's chat template.
        batch_size: of the forwards.
        lm_eval: version of lm-eval.
        key: digest of all that decides the value (``TaskKey``).
    """

    row: str
    bytes: int | None
    task: str
    metric: str
    filter: str
    value: float
    stderr: float
    n: int
    higher_is_better: bool | None
    aggregation: str
    documents: tuple[float, ...]
    limit: int | None
    fewshot: int
    chat: bool
    batch_size: int
    lm_eval: str
    key: str

    @property
    def name(self) -> str:
        """Task and metric, with the filter if there is one."""
        return f"{self.task} {self.metric}" + ("" if self.filter == "none" else f" ({self.filter})")

    def minus(self, other: TaskScore) -> Difference | None:
        """This value minus another of the same documents, with its standard error paired over documents (of a
        perplexity by the delta method; NaN without documents). None if they were not measured alike."""
        alike = ("task", "metric", "filter", "n", "limit", "fewshot", "chat", "batch_size", "lm_eval", "aggregation")
        if any(getattr(self, name) != getattr(other, name) for name in alike):
            return None
        if len(self.documents) != len(other.documents) or not self.documents:
            return Difference(self.value - other.value, math.nan)
        return Difference(self.value - other.value, standard_error(self._slopes() - other._slopes()))

    def _slopes(self) -> FloatArray:
        """Each document's value times the derivative of ``value`` in their mean."""
        slope = -self.value if self.aggregation == "perplexity" else 1.0
        values: FloatArray = slope * np.array(self.documents)
        return values

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a number that is not finite is null."""
        return {name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskScore:
        """Read the data of ``to_dict``; raises KeyError, TypeError or ValueError if it is something else."""
        values = {entry.name: data[entry.name] for entry in fields(cls)}
        values |= {name: math.nan if values[name] is None else float(values[name]) for name in ("value", "stderr")}
        return cls(**values | {"documents": tuple(float(value) for value in values["documents"])})


@dataclass(frozen=True)
class TaskTable:
    """The scores of a run or an exported folder.

    Args:
        scores: at most one of each model, task, metric and filter.
    """

    scores: tuple[TaskScore, ...] = ()

    def with_scores(self, new: Sequence[TaskScore]) -> TaskTable:
        """The table with further scores, which take the place of those of the same model, task, metric and filter."""
        def where(score: TaskScore) -> tuple[str, ...]:
            return score.row, score.task, score.metric, score.filter

        places = set(map(where, new))
        return replace(self, scores=(*(score for score in self.scores if where(score) not in places), *new))

    def of_key(self, key: str) -> list[TaskScore]:
        """The scores of a key, each metric and filter once: rows with the same weights share it."""
        found = {(score.task, score.metric, score.filter): score for score in self.scores if score.key == key}
        return [*found.values()]

    def against_unquantized(self, score: TaskScore) -> Difference | None:
        """A score minus that of the unquantized model; None for its own, and if it was not measured alike."""
        if score.row == UNQUANTIZED:
            return None
        others = (other for other in self.scores if other.row == UNQUANTIZED)
        return next((found for other in others if (found := score.minus(other)) is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the differences to the unquantized model for other programs."""
        rows = []
        for score in self.scores:
            data = score.to_dict()
            if difference := self.against_unquantized(score):
                data |= {"minus_unquantized": difference.mean, "minus_unquantized_stderr":
                         None if math.isnan(difference.stderr) else difference.stderr}
            rows.append(data)
        return {"format": FORMAT, "scores": rows}

    def save(self, path: Path) -> None:
        """Write tasks.json, whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> TaskTable:
        """Read tasks.json; raises ImpqError if it cannot be read, or is something else."""
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
            return cls(tuple(map(TaskScore.from_dict, data["scores"])))
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ImpqError(f"{path} cannot be used: {one_line(error)}; delete it, and the tasks are measured "
                            "again") from error
