"""Tasks on the models of a run or an exported folder; what was measured before is not measured again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from impq_core.errors import ImpqError
from impq_core.exports.models import Models, models_of
from impq_core.keys import TaskKey, versions
from impq_core.plugins import Plugins
from impq_core.runs.orders import workers_of
from impq_core.task_scores import FILE, TaskScore, TaskTable
from impq_core.tasks import harness
from impq_core.tasks.harness import Settings, Task, Value, Word
from impq_core.tasks.shared import order_of, values_of
from impq_core.trust import NO_TRUST, Trust

Place = tuple[str, Task]
"""A model's name and a task."""


def evaluate_tasks(path: str | Path, tasks: Sequence[str], rows: Sequence[str] = (), limit: int | None = None,
                   fewshot: int | None = None, chat: bool = False, batch_size: int = 1, plugins: Plugins | None = None,
                   trust: Trust = NO_TRUST, device: str | None = None, memory: str | None = None,
                   workers: str | None = None, threads: int | None = None) -> TaskTable:
    """Measure the models of a run or an exported folder on tasks.

    Args:
        path: a run folder, an exported folder, or a file in one.
        tasks: names of lm-eval's tasks, ``.jsonl`` files of questions, ``.yaml`` task files of lm-eval.
        rows: of the run's table; the unquantized model, the plan and the references of its size by default.
        limit, fewshot, chat, batch_size: see ``harness.Settings``.
        plugins: parts and observers; the installed plugins by default.
        trust: what the caller permits.
        device: where blocks compute; the run's, or ``auto`` for an exported folder, by default.
        memory, workers, threads: see ``models_of``.

    Raises:
        ImpqError: an error that the user can correct.
    """
    words, settings = harness.read_words(tasks, trust), Settings(limit, fewshot, chat, batch_size)
    models = models_of(path, rows, plugins or Plugins(), trust, device, memory, workers, threads)
    return measure_tasks(models, words, settings, trust)


def measure_tasks(models: Models, words: Sequence[Word], settings: Settings, trust: Trust = NO_TRUST) -> TaskTable:
    """Measure tasks on models, and keep the scores of each task and model in ``tasks.json`` of the models' folder
    before the next is measured. Workers of the models' configuration share the tasks; no value depends on them.

    Args:
        models: of a run or an exported folder.
        words: of ``harness.read_words``.
        settings: how the tasks are asked.
        trust: what the caller permits.

    Returns:
        The scores of these models on these tasks, in the order of both.

    Raises:
        ImpqError: a task cannot be loaded or measured, or a model cannot be loaded.
    """
    file = models.folder / FILE
    table = TaskTable.load(file) if file.is_file() else TaskTable()
    if settings.chat and not models.tokenizer.chat_template:
        raise ImpqError(f"model {models.prepared.source.name} has no chat template: leave out --chat")
    tasks = harness.load_tasks(words, settings)
    keys = {(name, task): _key(models, name, task, settings) for name in models.names for task in tasks}
    scores = {key: known for key in keys.values() if (known := table.of_key(key))}  # of any row with the same weights
    missing = dict[str, Place]()
    for place, key in keys.items():
        if key not in scores:
            missing.setdefault(key, place)
    named = dict(zip(tasks, words, strict=True))
    for (name, task), values in _measured(models, [*missing.values()], named, settings, trust):
        key = keys[name, task]
        scores[key] = [_score(value, name, models.nbytes(name), settings, key) for value in values]
        table = table.with_scores(scores[key])
        table.save(file)
    found = TaskTable(tuple(replace(score, row=name, bytes=models.nbytes(name))
                            for (name, _), key in keys.items() for score in scores[key]))
    table.with_scores(found.scores).save(file)
    models.plugins.notify("impq_tasks_measured", tasks=found, folder=models.folder)
    return found


def _measured(models: Models, places: Sequence[Place], words: Mapping[Task, Word], settings: Settings,
              trust: Trust) -> Iterator[tuple[Place, list[Value]]]:
    """The values of tasks on models as soon as they are there, from workers or measured here."""
    def report(stage: str, done: int, total: int) -> None:
        models.plugins.notify("impq_progress", stage=stage, done=done, total=total)

    if not places:
        return
    with workers_of(models.prepared.config, models.plugins, trust) as share:
        if share:
            of = {(name, task.digest): (name, task) for name, task in places}
            orders = [order_of(models, name, words[task], task, settings) for name, task in places]
            report("tasks", 0, len(places))
            for done, (order, answer) in enumerate(share(models.prepared)(orders), start=1):
                yield of[order["model"], order["digest"]], values_of(answer)
                report("tasks", done, len(places))
            return
        for name, group in groupby(places, key=lambda place: place[0]):
            with models.model(name) as model:
                for _, task in group:
                    stage = f"{name}, {task.name}"
                    yield (name, task), harness.measure(model, models.tokenizer, task, settings, partial(report, stage))


def _key(models: Models, name: str, task: Task, settings: Settings) -> str:
    software = versions(("lm_eval", "datasets", "tokenizers"))
    return TaskKey(models.key(name), task.digest, **asdict(settings), versions=software).digest


def _score(value: Value, name: str, nbytes: int | None, settings: Settings, key: str) -> TaskScore:
    facts: dict[str, Any] = {**asdict(value), "documents": value.documents}
    return TaskScore(row=name, bytes=nbytes, **facts, limit=settings.limit, chat=settings.chat,
                     batch_size=settings.batch_size, lm_eval=harness.version(), key=key)
