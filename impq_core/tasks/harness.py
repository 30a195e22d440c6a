"""lm-eval as a library: tasks by name or file, and scores of a model in memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from impq_core.errors import ImpqError, UsageError, nearest, one_line
from impq_core.keys import digest_of
from impq_core.tasks.items import Questions, read_questions
from impq_core.trust import Trust

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEEDS = (0, 1234, 1234, 1234)
"""lm-eval's default seeds: of random, numpy, torch, and the examples of prompts."""

BOOTSTRAPS = 100_000
"""lm-eval's default number of draws for the standard errors that have no closed form."""

CODE = "!function", "class:", "include:"
"""What a task file runs code with, or may include it with."""

LOCAL = ("json", "csv", "text", "parquet", "arrow")
"""Builders of ``datasets`` that read files."""


Word = str | Path | Questions
"""A task as ``--tasks`` names it: a name of lm-eval's, a task file of lm-eval, or the questions of a file."""


@dataclass(frozen=True)
class Settings:
    """How tasks are asked.

    Args:
        limit: the most documents of each task; None for all.
        fewshot: number of examples in each prompt; None for what the task says.
        chat: send prompts through the model's chat template.
        batch_size: of the forwards. Batches are padded, so that values depend on it in their last digits.

    Raises:
        UsageError: a number is out of range.
    """

    limit: int | None = None
    fewshot: int | None = None
    chat: bool = False
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("fewshot", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} takes a number from {least} on, not {value}")


@dataclass(frozen=True, eq=False)
class Task:
    """A task, or a group of tasks, with its documents.

    Args:
        name: as the user gave it.
        loaded: what lm-eval made of it: its tasks and groups by their names.
        digest: of the definitions and documents.
    """

    name: str
    loaded: Any
    digest: str


@dataclass(frozen=True)
class Value:
    """A metric of a task, as lm-eval reports it; see ``TaskScore``."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float
    n: int
    higher_is_better: bool | None
    aggregation: str
    documents: tuple[float, ...]
    fewshot: int


def read_words(words: Sequence[str], trust: Trust) -> list[Word]:
    """The names and files that ``--tasks`` lists, checked as far as that takes no lm-eval: names stay text, lm-eval's
    own task files are paths.

    Raises:
        UsageError: a word is empty or given twice, or names a file of another kind.
        ImpqError: a file is missing or wrong, or runs code that the command line does not permit, or lm-eval is not
            installed.
    """
    found: list[Word] = []
    if not words or not all(words):
        raise UsageError("--tasks takes names of lm-eval tasks and files of questions, separated by commas, such as "
                         "lambada_openai,mine.jsonl")
    for word in words:
        path = Path(os.path.expanduser(word))
        if path.suffix in (".yaml", ".yml"):
            _check_file(path, trust)
            found.append(path)
        elif path.suffix == ".jsonl":
            found.append(read_questions(path))
        elif "/" in word or path.is_file():
            raise UsageError(f"--tasks {word}: a file of tasks is a .jsonl of questions, or a .yaml of lm-eval")
        else:
            found.append(word)
    names = [_name(word) for word in found]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"--tasks has two tasks named '{doubled}': rename a file, or leave one out")
    if importlib.util.find_spec("lm_eval") is None:
        raise ImpqError("tasks need lm_eval, which is not installed: pip install 'impq[tasks]'")
    return found


def _name(word: Word) -> str:
    return word if isinstance(word, str) else word.stem if isinstance(word, Path) else word.name


def _check_file(path: Path, trust: Trust) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ImpqError(f"task file {path} cannot be read: {one_line(error)}") from error
    if not trust.remote_code and any(mark in text for mark in CODE):
        raise ImpqError(f"task file {path} runs or includes code of its folder, which only the command line may "
                        "permit: give --trust-remote-code if it is trusted")


def version() -> str:
    """The version of lm-eval."""
    return importlib.metadata.version("lm_eval")


def load_tasks(words: Sequence[Word], settings: Settings) -> list[Task]:
    """The tasks with their documents, which lm-eval reads from ``datasets``' cache or fetches.

    Args:
        words: of ``read_words``.
        settings: how they will be asked.

    Raises:
        UsageError: lm-eval knows no task of a name.
        ImpqError: a task cannot be fetched or loaded, runs code that a model writes, or needs more than text.
    """
    with _quiet():
        from lm_eval.tasks import TaskManager

        # The index of lm-eval's own fifteen thousand names takes seconds.
        manager = TaskManager(include_defaults=any(isinstance(word, str) for word in words))
        for word in words:
            if isinstance(word, str) and word not in manager.all_tasks:
                raise UsageError(f"--tasks: lm-eval has no task '{word}'{_similar(word, manager.all_tasks)}; 'lm-eval "
                                 "ls tasks' lists them, and a file of questions ends in .jsonl")
        return [_load(manager, word, settings) for word in words]


def _similar(word: str, names: Sequence[str]) -> str:
    """``nearest``, without the list of all names if none is similar."""
    hint = nearest(word, names)
    return hint if hint.startswith(" (did") else ""


def _load(manager: Any, word: Word, settings: Settings) -> Task:
    spec: Any = str(word) if isinstance(word, Path) else word
    if isinstance(word, Questions):
        spec = word.config(settings.chat) | {"custom_dataset": _documents(word)}
    name = _name(word)
    try:
        loaded = manager.load([spec])
    except OSError as error:  # of the network, the hub or a file
        path = _data_of(manager, word)
        if path in LOCAL:
            raise ImpqError(f"task '{name}': its data files cannot be read ({one_line(error, 160)}): correct "
                            "data_files in its file") from error
        raise ImpqError(f"task '{name}' cannot be fetched: its data set {path} is not in the cache of datasets, and "
                        f"the hub did not give it ({one_line(error, 120)}); run this once with network access, or give "
                        "a task whose data are here, such as a .jsonl of questions") from error
    except Exception as error:  # definitions, data and libraries of tasks can be wrong in any way
        raise ImpqError(f"task '{name}' cannot be loaded by lm-eval: {one_line(error, 260)}") from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise ImpqError(f"task '{name}' runs the code that a model writes, which impq does not: leave it out")
        if getattr(task, "MULTIMODAL", False):
            raise ImpqError(f"task '{name}' needs more than text, and impq measures language models: leave it out")
        if settings.fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=settings.fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    digests = [word.digest] if isinstance(word, Questions) else [
        digest_of([json.dumps(task.dump_config(), sort_keys=True, default=str), task.VERSION,
                   getattr(task.eval_docs, "_fingerprint", "")]) for task in loaded["tasks"].values()]
    return Task(name, loaded, digest_of(digests))


def _documents(questions: Questions) -> Any:
    def load(**_: Any) -> Any:
        from datasets import Dataset

        return {"test": Dataset.from_list([dict(row) for row in questions.rows])}
    return load


def _data_of(manager: Any, word: Word) -> str:
    """The data set of a task, as its definition names it; of a group, nothing."""
    from lm_eval.tasks._yaml_loader import load_yaml

    path = word if isinstance(word, Path) else getattr(manager.task_index.get(word), "yaml_path", None)
    config = load_yaml(path, resolve_func=False) if path else {}
    return str(config.get("dataset_path", "of one of its tasks"))


class _Counter:
    """Counts the requests that a model has answered, in the place of lm-eval's hook for a cache of answers."""

    def __init__(self, task: Task, progress: Callable[[int, int], None]) -> None:
        self._task, self._progress, self._done = task, progress, 0

    def add_partial(self, *_: Any) -> None:
        """Called by lm-eval with each answer."""
        self._done += 1
        self._progress(self._done, sum(len(one.instances) for one in self._task.loaded["tasks"].values()))


def measure(model: PreTrainedModel, tokenizer: Any, task: Task, settings: Settings,
            progress: Callable[[int, int], None] = lambda done, total: None) -> list[Value]:
    """The metrics of a task for a model in memory, as ``lm_eval --model hf`` reports them with the same settings.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        task: one of ``load_tasks``.
        settings: how it is asked.
        progress: called with the number of answered requests and that of all requests.

    Raises:
        ImpqError: the task fails.
    """
    import torch

    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    torch.manual_seed(SEEDS[2])
    for one in task.loaded["tasks"].values():
        one.set_fewshot_seed(seed=SEEDS[3])
    with _quiet():
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=settings.batch_size)
        lm.cache_hook = _Counter(task, progress)
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, kind, partial(getattr(lm, kind), disable_tqdm=True))
        try:
            results = evaluate(lm=lm, task_dict=task.loaded, limit=settings.limit, bootstrap_iters=BOOTSTRAPS,
                               log_samples=True, apply_chat_template=settings.chat, fewshot_as_multiturn=settings.chat)
        except (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the code of tasks raises its own
            raise ImpqError(f"task '{task.name}' cannot be measured by lm-eval: {one_line(error, 260)}") from error
    return _values(task, results)


def _values(task: Task, results: Any) -> list[Value]:
    found = []
    for name, numbers in results["results"].items():
        for key, value in numbers.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = numbers.get(f"{metric}_stderr,{kind}")
            aggregation, documents = _documented(task, results, name, metric, kind)
            better = results["higher_is_better"].get(name, {}).get(metric)
            found.append(Value(name, metric, kind, float(value), float(stderr) if isinstance(
                stderr, (int, float)) else math.nan, int(numbers.get("sample_len") or len(documents)), better,
                aggregation, documents, int(results["n-shot"].get(name) or 0)))
    return found


def _documented(task: Task, results: Any, name: str, metric: str, kind: str) -> tuple[str, tuple[float, ...]]:
    """How the values of documents make a metric's value, and those values; nothing if it is another way."""
    from lm_eval.api import metrics

    if name not in task.loaded["tasks"]:
        return "", ()
    known = {metrics.mean: "mean", metrics.perplexity: "perplexity"}
    aggregation = known.get(task.loaded["tasks"][name].aggregation().get(metric), "")
    values = [sample[metric] for sample in results["samples"][name] if sample["filter"] == kind and metric in sample]
    if not aggregation or not all(isinstance(value, (int, float, np.number)) for value in values):
        return "", ()
    return aggregation, tuple(map(float, values))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The context in which lm-eval and ``datasets`` print and log nothing. That lm-eval cuts a prompt which is longer
    than the model's context becomes a warning, once."""
    class Cuts(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "runcat" in (text := record.getMessage()):
                cut.append(" ".join(text.split()))

    import datasets

    cut: list[str] = []
    logger, handler = logging.getLogger("lm_eval"), Cuts()
    before = logger.propagate, logger.level, list(logger.handlers)
    logger.propagate, logger.handlers = False, [handler]
    logger.setLevel(logging.WARNING)
    reader, bars = logging.getLogger("datasets"), datasets.are_progress_bars_disabled()
    level = reader.level
    reader.setLevel(logging.CRITICAL)  # what it logs as an error, it raises as well
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.propagate, logger.handlers = before[0], before[2]
        logger.setLevel(before[1])
        reader.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
    if cut:
        warnings.warn(f"lm-eval cut {len(cut)} prompts, the first: {cut[0][:200]}", RuntimeWarning, stacklevel=3)
