"""Tasks on models as workers measure them: what passes between the leader and a worker, as plain data."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from impq_core import interfaces
from impq_core.errors import ImpqError
from impq_core.exports.models import Models, models_in
from impq_core.runs.session import Session
from impq_core.tasks import harness
from impq_core.tasks.harness import Settings, Task, Value, Word
from impq_core.tasks.items import Questions
from impq_core.trust import Trust


def order_of(models: Models, name: str, word: Word, task: Task, settings: Settings) -> interfaces.Task:
    """A task on a model, for a worker."""
    told = asdict(word) if isinstance(word, Questions) else str(word.absolute() if isinstance(word, Path) else word)
    return {"kind": "tasks", "folder": str(models.folder), "model": name, "word": told, "digest": task.digest,
            "settings": asdict(settings)}


def values_of(answer: interfaces.Answer) -> list[Value]:
    """The values that a worker found."""
    return [Value(**{**value, "documents": tuple(value["documents"])}) for value in answer["values"]]


class Measurer:
    """Measures tasks on the models of a folder for a leader. It keeps the last model and the tasks.

    Args:
        session: the model of the folder's run. Those of an exported folder take its weights' place.
        trust: what the leader permits.
    """

    def __init__(self, session: Session, trust: Trust) -> None:
        self._session, self._trust, self._stack = session, trust, ExitStack()
        self._models: Models | None = None
        self._name = ""  # of the model at hand
        self._tasks: dict[tuple[str, Settings], Task] = {}  # by digest

    def measure(self, order: interfaces.Task) -> interfaces.Answer:
        """The values of a task on a model, as ``order_of`` gives them.

        Raises:
            ImpqError: the model or the task cannot be loaded or measured, or the task is not the leader's.
        """
        settings = Settings(**order["settings"])
        task = self._load(order["word"], settings, order["digest"])
        if self._models is None:
            self._models = models_in(Path(order["folder"]), (), self._session.prepared, self._session.plugins,
                                     self._session)
        if order["model"] != self._name:
            self.close()
            self._model = self._stack.enter_context(self._models.model(order["model"]))
            self._name = order["model"]
        return {"values": [asdict(value) for value in harness.measure(self._model, self._models.tokenizer, task,
                                                                      settings)]}

    def _load(self, told: str | Mapping[str, Any], settings: Settings, digest: str) -> Task:
        if (digest, settings) not in self._tasks:
            words = harness.read_words([told], self._trust) if isinstance(told, str) else [Questions(**told)]
            [task] = harness.load_tasks(words, settings)
            if task.digest != digest:
                raise ImpqError(f"the worker on {socket.gethostname()} cannot take part: its documents or definition "
                                f"of task '{task.name}' are not those of this process")
            self._tasks[digest, settings] = task
        return self._tasks[digest, settings]

    def close(self) -> None:
        """Let the model at hand go; that of a run has its unquantized weights then."""
        self._stack.close()
        self._name = ""
