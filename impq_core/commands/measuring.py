"""What a plan costs as its users feel it: tasks ('impq evaluate --tasks') and answers side by side ('impq ask')."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import click

from impq_core.commands.common import place_options, plugin_option, trust_option, workers_options
from impq_core.commands.output import Answer, answers
from impq_core.config import RunConfig
from impq_core.errors import UsageError
from impq_core.plugins import Plugins
from impq_core.trust import Trust


@dataclass(frozen=True)
class TaskOptions:
    """The options of 'impq evaluate' about tasks, as they are given."""

    tasks: str | None
    limit: int | None
    fewshot: int | None
    batch_size: int | None
    chat: bool
    rows: tuple[str, ...]
    workers: str | None
    threads: int | None


def task_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--tasks`` and what goes with it; the command takes them as ``asked``. Without ``--tasks`` the others are
    refused."""
    @wraps(command)
    def with_asked(**given: Any) -> Any:
        asked = TaskOptions(**{entry.name: given.pop(entry.name) for entry in fields(TaskOptions)})
        if asked.tasks is None:
            for name in ("limit", "fewshot", "batch_size", "chat", "rows", "workers", "threads"):
                if getattr(asked, name) not in (None, False, ()):
                    flag = {"batch_size": "batch-size", "rows": "row"}.get(name, name)
                    raise UsageError(f"--{flag} goes with --tasks")
        return command(asked=asked, **given)

    options: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
        click.option("--tasks", help="Tasks, separated by commas: names of lm-eval such as lambada_openai, .jsonl "
                                     "files of questions, .yaml task files of lm-eval."),
        click.option("--limit", type=int, help="Ask the first LIMIT documents of each task only."),
        click.option("--fewshot", type=int, help="Examples in each prompt [what the task says, or 0]."),
        click.option("--batch-size", type=int, help="Prompts in a forward [1]; values depend on it in their last "
                                                    "digits."),
        click.option("--chat", is_flag=True, help="Send prompts through the model's chat template."),
        click.option("--row", "rows", multiple=True, metavar="ROW",
                     help="Row of the run's table to measure, such as plan or 'uniform 3' [unquantized, plan, and the "
                          "references of its size]."),
        workers_options("the run's; none for an export", "the run's"),
    ]
    decorated: Callable[..., Any] = with_asked
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


def show_tasks(path: str, asked: TaskOptions, plugins: Plugins, trust: Trust, device: str | None,
               memory: str | None) -> Answer:
    """Measure tasks on a run or an exported folder, and print a table for each; raises ImpqError."""
    from impq_core.exports.manifest import folder_of
    from impq_core.parts import load_crew
    from impq_core.tasks.harness import Settings, read_words

    folder = folder_of(path)
    load_crew(RunConfig(workers=asked.workers or ""), plugins)
    assert asked.tasks is not None
    words = read_words([word.strip() for word in asked.tasks.split(",")], trust)
    settings = Settings(asked.limit, asked.fewshot, asked.chat, 1 if asked.batch_size is None else asked.batch_size)
    observe(plugins)
    from impq_core.exports.models import models_of
    from impq_core.task_scores import FILE
    from impq_core.tasks.measure import measure_tasks
    from impq_core.tasks.table import task_tables
    from impq_core.terminal import make_console

    models = models_of(folder, asked.rows, plugins, trust, device, memory, asked.workers, asked.threads)
    table = measure_tasks(models, words, settings, trust)
    console = make_console()
    for one in task_tables(table):
        console.print(one)
    lines = [f"scores in {models.folder / FILE}"]
    click.echo(lines[0])
    from impq_core.documents.measured import TasksDocument

    return Answer(TasksDocument.of(models.folder, table), lines)


def observe(plugins: Plugins) -> None:
    """Let the terminal show progress, and MLflow keep the results in the run's MLflow run."""
    from impq_core.terminal import ConsoleReporter, make_console, quiet_libraries
    from impq_core.tracking.measured import MeasuredTracker

    quiet_libraries()
    plugins.watch(MeasuredTracker())
    plugins.watch(ConsoleReporter(make_console()))


@click.command()
@click.argument("path")
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("--prompts", "file", type=click.Path(path_type=Path),
              help="File of prompts: one a line, or a .jsonl with a field 'prompt' or 'messages' a line.")
@click.option("--tokens", type=int, default=64, show_default=True, help="Most tokens of an answer.")
@click.option("--chat/--no-chat", default=None, help="Send prompts through the model's chat template [if it has one].")
@place_options
@trust_option
@plugin_option
@answers
def ask(path: str, prompts: tuple[str, ...], file: Path | None, tokens: int, chat: bool | None, device: str | None,
        memory: str | None, trust: bool, plugin_files: tuple[Path, ...]) -> Answer:
    """Show the greedy answers of the unquantized and the quantized model of a run or an export (its folder) beside each
    other, and where they first differ."""
    from impq_core.answers.prompts import read_prompts
    from impq_core.exports.manifest import folder_of

    folder = folder_of(path)
    asked = read_prompts(prompts, file)
    if tokens < 1:
        raise UsageError(f"--tokens takes a number from 1 on, not {tokens}")
    plugins = Plugins(plugin_files)
    observe(plugins)
    from impq_core.answers.ask import ask_models
    from impq_core.answers.table import answer_tables
    from impq_core.exports.models import models_of
    from impq_core.paired_answers import FILE
    from impq_core.terminal import make_console

    models = models_of(folder, (), plugins, Trust(trust), device, memory)
    found = ask_models(models, asked, tokens, chat)
    console = make_console()
    for one in answer_tables(found):
        console.print(one)
    lines = [f"answers in {models.folder / FILE}"]
    click.echo(lines[0])
    from impq_core.documents.measured import AnswersDocument

    return Answer(AnswersDocument.of(models.folder, found), lines)
