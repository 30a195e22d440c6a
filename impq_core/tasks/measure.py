"""Tasks on the models of a run or an exported folder; what was measured before is not measured again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from impq_core.errors import ImpqError
from impq_core.exports.models import Models, models_of
from impq_core.keys import TaskKey, versions
from impq_core.plugins import Plugins
from impq_core.task_scores import FILE, TaskScore, TaskTable
from impq_core.tasks import harness
from impq_core.tasks.harness import Settings, Task, Value
from impq_core.tasks.items import Questions
from impq_core.trust import NO_TRUST, Trust


def evaluate_tasks(path: str | Path, tasks: Sequence[str], rows: Sequence[str] = (), limit: int | None = None,
                   fewshot: int | None = None, chat: bool = False, batch_size: int = 1, plugins: Plugins | None = None,
                   trust: Trust = NO_TRUST, device: str | None = None, memory: str | None = None) -> TaskTable:
    """Measure the models of a run or an exported folder on tasks.

    Args:
        path: a run folder, an exported folder, or a file in one.
        tasks: names of lm-eval's tasks, ``.jsonl`` files of questions, ``.yaml`` task files of lm-eval.
        rows: of the run's table; the unquantized model, the plan and the references of its size by default.
        limit, fewshot, chat, batch_size: see ``harness.Settings``.
        plugins: parts and observers; the installed plugins by default.
        trust: what the caller permits.
        device: where blocks compute; the run's, or ``auto`` for an exported folder, by default.
        memory: what this may take.

    Raises:
        ImpqError: an error that the user can correct.
    """
    words, settings = harness.read_words(tasks, trust), Settings(limit, fewshot, chat, batch_size)
    return measure_tasks(models_of(path, rows, plugins or Plugins(), trust, device, memory), words, settings)


def measure_tasks(models: Models, words: Sequence[str | Path | Questions], settings: Settings) -> TaskTable:
    """Measure tasks on models, and keep the scores of each task and model in ``tasks.json`` of the models' folder
    before the next is measured.

    Args:
        models: of a run or an exported folder.
        words: of ``harness.read_words``.
        settings: how the tasks are asked.

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

    for name in models.names:
        missing = []
        for task in tasks:
            known = {(score.task, score.metric, score.filter): replace(score, row=name, bytes=models.nbytes(name))
                     for score in table.scores if score.key == keys[name, task]}  # of any row with the same weights
            table = table.with_scores([*known.values()])
            missing += [] if known else [task]
        if missing:
            with models.model(name) as model:
                for task in missing:
                    def report(done: int, total: int, stage: str = f"{name}, {task.name}") -> None:
                        models.plugins.notify("impq_progress", stage=stage, done=done, total=total)

                    values = harness.measure(model, models.tokenizer, task, settings, report)
                    scores = [_score(value, name, models.nbytes(name), settings, keys[name, task]) for value in values]
                    table = table.with_scores(scores)
                    table.save(file)
    table.save(file)
    found = TaskTable(tuple(score for place, key in keys.items() for score in table.scores
                            if (score.row, score.key) == (place[0], key)))
    models.plugins.notify("impq_tasks_measured", tasks=found, folder=models.folder)
    return found


def _key(models: Models, name: str, task: Task, settings: Settings) -> str:
    software = versions(("lm_eval", "datasets", "tokenizers"))
    return TaskKey(models.key(name), task.digest, **asdict(settings), versions=software).digest


def _score(value: Value, name: str, nbytes: int | None, settings: Settings, key: str) -> TaskScore:
    facts: dict[str, Any] = {**asdict(value), "documents": value.documents}
    return TaskScore(row=name, bytes=nbytes, **facts, limit=settings.limit, chat=settings.chat,
                     batch_size=settings.batch_size, lm_eval=harness.version(), key=key)
