"""Tasks of lm-eval and files of questions on the models of a run and of its exports."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stopped import Dies

from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.exports import models as models_module
from impq_core.exports.export import export_run
from impq_core.exports.models import Models, choose, models_of
from impq_core.plugins import Plugins
from impq_core.results import Evaluation, Row, Score
from impq_core.runs import orders
from impq_core.runs.pipeline import run
from impq_core.statistics import standard_error
from impq_core.task_scores import TaskScore, TaskTable
from impq_core.tasks import harness
from impq_core.tasks.harness import Settings, load_tasks, read_words
from impq_core.tasks.items import PROMPT
from impq_core.tasks.measure import measure_tasks
from impq_core.tasks.shared import order_of
from impq_core.testing.crew import InProcess, InProcessPlugin
from impq_core.tracking.measured import MeasuredTracker
from impq_core.trust import NO_TRUST, Trust
from impq_core.worker import Worker

CHOICES = [{"question": f"Which is it, {word}?", "choices": [f"{word}{end}" for end in "abc"], "answer": number % 3}
           for number, word in enumerate(("a horse", "the sea", "x", "nobody", "two or three", "it", "light"))]
ANSWERS = [{"question": "Six times seven?", "answer": "42"}, {"question": "A list?", "answer": "[1, 2]"}]


@pytest.fixture(scope="module")
def config(tiny_llama: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return RunConfig(model=str(tiny_llama), backend="hqq", bits=(2, 4), estimator="random", allocator="greedy",
                     granularity="block", calibration=TextConfig(str(texts[0]), 8, 48), game_windows=4,
                     evaluation=TextConfig(str(texts[1]), 6, 48), dtype="float32", tracking_uri="none", cache=False,
                     output=str(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def finished(config: RunConfig) -> Path:
    return run(config).folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("questions")
    for name, rows in (("choices", CHOICES), ("answers", ANSWERS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "choices.jsonl"), str(folder / "answers.jsonl")


def measured(folder: Path, words: Sequence[str], rows: Sequence[str] = (),
             settings: Settings | None = None) -> TaskTable:
    return measure_tasks(models_of(folder, rows, Plugins()), read_words(words, NO_TRUST), settings or Settings())


def found(table: TaskTable, row: str, task: str, metric: str) -> TaskScore:
    [score] = [score for score in table.scores if (score.row, score.task, score.metric) == (row, task, metric)]
    return score


def log_likelihood(models: Models, model: torch.nn.Module, prompt: str, continuation: str) -> float:
    """Of the bytes of a continuation, one forward for each."""
    ids, total = models.tokenizer(prompt)["input_ids"], 0.0
    for token in models.tokenizer(continuation)["input_ids"]:
        with torch.no_grad():
            total += float(model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)[token])
        ids = [*ids, token]
    return total


def test_scores_are_those_of_log_likelihoods_by_hand(copied: Path, files: tuple[str, str]) -> None:
    table = measured(copied, files, ("unquantized", "plan"))
    models = models_of(copied, ("unquantized", "plan"), Plugins())
    for name in models.names:
        with models.model(name) as model:
            right, normed, nll = [], [], []
            for row in CHOICES:
                prompt = PROMPT.replace("{{question}}", str(row["question"]))
                likely = np.array([log_likelihood(models, model, prompt, f" {choice}") for choice in row["choices"]])
                right.append(float(likely.argmax() == row["answer"]))
                normed.append(float((likely / list(map(len, row["choices"]))).argmax() == row["answer"]))
            for row in ANSWERS:
                prompt = PROMPT.replace("{{question}}", row["question"])
                nll.append(-log_likelihood(models, model, prompt, f" {row['answer']}"))
        assert found(table, name, "choices", "acc").documents == tuple(right)
        assert found(table, name, "choices", "acc_norm").documents == tuple(normed)
        assert found(table, name, "choices", "acc").value == np.mean(right)
        assert found(table, name, "answers", "nll").documents == pytest.approx(nll, rel=1e-4)
    assert len({found(table, name, "answers", "nll").value for name in models.names}) == 2


def test_lm_eval_alone_reports_the_same_numbers_for_the_exported_folder(
        config: RunConfig, files: tuple[str, str], tmp_path: Path) -> None:
    """In bfloat16, in which an export of any format holds the weights of the model in memory."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    half = run(replace(config, dtype="bfloat16")).folder
    dense = export_run(half, "dense").folder
    task = local_task(tmp_path, files[0], "choices", "Question: {{question}}")
    alone = simple_evaluate(model="hf", model_args=f"pretrained={dense},dtype=bfloat16", tasks=[str(task)],
                            device="cpu", task_manager=TaskManager(include_defaults=False))
    of_run, of_export = (measured(folder, files[:1], ("unquantized", "plan")) for folder in (half, dense))
    for metric in ("acc", "acc_norm"):
        own, exported = (found(table, "plan", "choices", metric) for table in (of_run, of_export))
        numbers = alone["results"]["choices"]
        assert (own.value, own.stderr) == (numbers[f"{metric},none"], numbers[f"{metric}_stderr,none"])
        assert own.documents == tuple(sample[metric] for sample in alone["samples"]["choices"])
        assert (exported.value, exported.documents) == (own.value, own.documents)
        assert found(of_run, "unquantized", "choices", metric) == found(of_export, "unquantized", "choices", metric)
    by_file = measured(dense, [str(task)], ("plan",))  # lm-eval's own form of the same task
    assert found(by_file, "plan", "choices", "acc_norm").documents == own.documents


def test_what_is_measured_is_on_disk_and_is_not_measured_again(
        copied: Path, files: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    own = harness.measure

    def counted(model: Any, tokenizer: Any, task: Any, settings: Any, progress: Any) -> Any:
        if len(calls) == 3:
            raise ImpqError("stopped")
        calls.append(task.name)
        return own(model, tokenizer, task, settings, progress)

    monkeypatch.setattr(harness, "measure", counted)
    with pytest.raises(ImpqError, match="stopped"):
        measured(copied, files, ("unquantized", "plan"))
    kept = TaskTable.load(copied / "tasks.json")
    assert {(score.row, score.task) for score in kept.scores} == {
        ("unquantized", "choices"), ("unquantized", "answers"), ("plan", "choices")}
    calls.clear()
    table = measured(copied, files, ("unquantized", "plan"))
    assert calls == ["answers"]
    assert [score for score in table.scores if (score.row, score.task) != ("plan", "answers")] == list(kept.scores)
    monkeypatch.setattr(models_module.Models, "model", lambda *_: pytest.fail("a model is loaded"))
    assert measured(copied, files, ("unquantized", "plan")) == table
    assert TaskTable.load(copied / "tasks.json") == table


ROWS = ("unquantized", "plan", "uniform 2")


def by_workers(folder: Path, words: Sequence[str], workers: str, *observers: object) -> TaskTable:
    plugins = Plugins()
    for observer in (InProcessPlugin(), *observers):
        plugins.watch(observer)
    rows = ROWS if (folder / "evaluation.json").exists() else ()
    return measure_tasks(models_of(folder, rows, plugins, workers=workers, threads=torch.get_num_threads()),
                         read_words(words, NO_TRUST), Settings())


@pytest.mark.parametrize("exported", [False, True])
def test_workers_find_the_same_values(exported: bool, copied: Path, files: tuple[str, str], tmp_path: Path) -> None:
    words = [*files, str(local_task(tmp_path, files[0]))]
    folder = export_run(copied, "impq").folder if exported else copied
    alone = by_workers(folder, words, "0")
    kept = (folder / "tasks.json").read_bytes()
    for count in (1, 2):
        (folder / "tasks.json").unlink()
        InProcess.carried.clear()
        assert by_workers(folder, words, f"inprocess://{count}") == alone
        assert dict(InProcess.carried) == {"tasks": 6 if exported else 9}
        assert (folder / "tasks.json").read_bytes() == kept
    InProcess.carried.clear()
    by_workers(folder, words, "inprocess://2")
    assert not InProcess.carried  # and no worker is started for what is known


def test_what_workers_found_before_they_were_gone_is_kept(copied: Path, files: tuple[str, str]) -> None:
    alone = by_workers(copied, files, "0")
    kept = (copied / "tasks.json").read_bytes()
    (copied / "tasks.json").unlink()
    with pytest.raises(ImpqError, match="gone"):
        by_workers(copied, files, "dies://2", Dies(2))
    assert len({(score.row, score.task) for score in TaskTable.load(copied / "tasks.json").scores}) == 2
    InProcess.carried.clear()
    assert by_workers(copied, files, "inprocess://3") == alone
    assert dict(InProcess.carried) == {"tasks": 4} and (copied / "tasks.json").read_bytes() == kept


def test_a_worker_with_other_documents_is_refused(copied: Path, files: tuple[str, str], tmp_path: Path) -> None:
    """Its file is not the leader's."""
    file = local_task(tmp_path, files[0])
    models, settings = models_of(copied, (), Plugins(), workers="inprocess://1"), Settings()
    [word] = read_words([str(file)], NO_TRUST)
    [task] = load_tasks([word], settings)
    order = order_of(models, "plan", word, task, settings)
    file.write_text(file.read_text().replace("Answer:", "It is:"))
    with pytest.raises(ImpqError, match="'local'") as refused:
        Worker().carry_out(orders.order_of(models.prepared, Plugins(), NO_TRUST), order)
    assert "\n" not in str(refused.value)


def local_task(folder: Path, data: str, name: str = "local", text: str = "{{question}}") -> Path:
    """A task file of lm-eval with questions of a file."""
    path = folder / f"{name}.yaml"
    path.write_text(f"""task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{text}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
""")
    return path


def test_other_documents_are_measured_again(copied: Path, files: tuple[str, str], tmp_path: Path) -> None:
    rows = ("unquantized", "plan")
    few = measured(copied, files[:1], rows, Settings(limit=3))
    assert {score.n for score in few.scores} == {3} and {score.limit for score in few.scores} == {3}
    other = tmp_path / "choices.jsonl"
    other.write_text(json.dumps({**CHOICES[0], "answer": 1}) + "\n")
    changed = measured(copied, [str(other)], rows)
    assert {score.n for score in changed.scores} == {1}
    # One score of each metric and model; those of one document have no error, and NaN is unlike itself.
    assert repr(TaskTable.load(copied / "tasks.json")) == repr(changed)
    assert all(changed.against_unquantized(score) is not None for score in changed.scores if score.row == "plan")


def test_blocks_that_are_unpacked_while_they_work_give_the_same_numbers(
        copied: Path, files: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = measured(copied, files, ("plan",))
    (copied / "tasks.json").unlink()
    monkeypatch.setattr(models_module, "_room", lambda session: False)
    assert measured(copied, files, ("plan",)) == at_once
    assert measured(copied, files[:1], ("plan",), Settings(limit=2)).scores[0].documents == (
        at_once.scores[0].documents[:2])


def task_file(folder: Path, more: str = "") -> Path:
    path = folder / "local.yaml"
    path.write_text("task: local\ndataset_path: owner/none\ntest_split: test\noutput_type: multiple_choice\n"
                    f"doc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: answer\n{more}")
    return path


def test_a_task_that_cannot_be_fetched_is_named_before_a_model_is_loaded(
        copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.setattr(models_module.Models, "model", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(ImpqError, match=r"task 'local' .*owner/none.*ConnectionError: no route to the hub") as raised:
        measured(copied, [str(task_file(tmp_path))])
    assert "\n" not in str(raised.value)
    assert not (copied / "tasks.json").exists()


def test_names_are_those_of_lm_eval(files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    task_file(tmp_path)
    monkeypatch.setattr("lm_eval.tasks.TaskManager",
                        lambda include_defaults: TaskManager(include_defaults=False, include_path=str(tmp_path)))
    rows = [dict(row) for row in CHOICES]
    from datasets import Dataset

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {"test": Dataset.from_list(rows)})
    [task] = load_tasks(["local"], Settings())
    assert [dict(document) for document in task.loaded["tasks"]["local"].eval_docs] == rows
    with pytest.raises(UsageError, match="'local'"):
        load_tasks(["locl"], Settings())
    with pytest.raises(UsageError, match="'choices'"):
        read_words([files[0], "choices"], NO_TRUST)


def test_a_task_file_runs_no_code_without_permission(tmp_path: Path) -> None:
    path = task_file(tmp_path, "process_docs: !function mine.docs\n")
    with pytest.raises(ImpqError, match="--trust-remote-code"):
        read_words([str(path)], NO_TRUST)
    assert read_words([str(path)], Trust(True)) == [path]


def test_code_that_a_model_writes_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {"test": Dataset.from_list(CHOICES)})
    with pytest.raises(ImpqError, match="'local' runs the code"):
        load_tasks([task_file(tmp_path, "unsafe_code: true\n")], Settings())


def test_the_message_without_lm_eval_names_the_extra(files: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImpqError, match=r"pip install 'impq\[tasks\]'"):
        read_words(files, NO_TRUST)


def score(row: str, documents: Sequence[float], aggregation: str = "mean") -> TaskScore:
    mean = float(np.mean(documents))
    return TaskScore(row, None, "task", "metric", "none", math.exp(-mean) if aggregation == "perplexity" else mean, 0.1,
                     len(documents), True, aggregation, tuple(map(float, documents)), None, 0, False, 1, "0", "key")


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=20))
def test_differences_are_paired_over_documents(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = (np.array(column) for column in zip(*pairs, strict=True))
    difference = score("plan", ours.tolist()).minus(score("unquantized", theirs.tolist()))
    assert difference is not None
    assert difference.mean == pytest.approx(float(np.mean(ours - theirs)), abs=1e-9)
    assert difference.stderr == pytest.approx(standard_error(ours - theirs), abs=1e-9)


def test_the_error_of_a_difference_of_perplexities_is_that_of_many_draws() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.normal(-2, 0.5, 400)
    ours = theirs - 0.2 + rng.normal(0, 0.1, 400)
    difference = score("plan", ours.tolist(), "perplexity").minus(score("unquantized", theirs.tolist(), "perplexity"))
    draws = rng.integers(0, 400, (4000, 400))
    spread = (np.exp(-ours[draws].mean(axis=1)) - np.exp(-theirs[draws].mean(axis=1))).std()
    assert difference is not None and difference.stderr == pytest.approx(spread, rel=0.1)


def test_scores_that_were_measured_otherwise_are_not_subtracted() -> None:
    ours, theirs = score("plan", [0, 1]), score("unquantized", [1, 1])
    for other in (replace(theirs, limit=2), replace(theirs, chat=True), replace(theirs, lm_eval="1")):
        assert TaskTable((other, ours)).against_unquantized(ours) is None
    difference = TaskTable((theirs, ours)).against_unquantized(ours)
    assert difference is not None and difference.mean == -0.5


def test_a_table_is_its_file(tmp_path: Path) -> None:
    table = TaskTable((score("unquantized", [0, 1]), replace(score("plan", [1, 1]), stderr=math.nan)))
    table.save(tmp_path / "tasks.json")
    assert repr(TaskTable.load(tmp_path / "tasks.json")) == repr(table)  # NaN is unlike itself
    data = json.loads((tmp_path / "tasks.json").read_text())
    assert data["scores"][1]["stderr"] is None and data["scores"][1]["minus_unquantized"] == 0.5


def evaluation(sizes: dict[str, int | None], losses: dict[str, float]) -> Evaluation:
    rows = []
    for name, size in sizes.items():
        windows = np.full(2, losses.get(name, 3.0))
        rows.append(Row(name, windows, size, 3.0, 3.0, Score(windows, 0.0, 1.0)))
    return Evaluation(tuple(rows), "text", 10)


def test_a_plan_is_compared_with_its_neighbours_in_size() -> None:
    sizes = {"plan": 30, "unquantized": None, "uniform 8": 80, "uniform 4": 40, "uniform 2": 20, "uniform 1": 10,
             "first/last high": 29, "random 1": 30, "random 2": 28, "random 3": 30, "mix A": 12, "mix B": 33}
    table = evaluation(sizes, {"random 2": 2.5})
    assert choose(table, ()) == ("unquantized", "plan", "uniform 4", "uniform 2", "mix B", "first/last high",
                                 "random 2")
    assert choose(evaluation({"plan": 40, "unquantized": None, "uniform 4": 40, "uniform 2": 20}, {}), ()) == (
        "unquantized", "plan", "uniform 4")
    assert choose(table, ("random 3", "plan", "random 3")) == ("plan", "random 3")
    with pytest.raises(UsageError, match="'uniform 4'"):
        choose(table, ("uniform 44",))


def test_scores_are_in_the_run_of_mlflow(tmp_path: Path, empty_store: Callable[[Path], None]) -> None:
    from mlflow import MlflowClient

    empty_store(tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    tracked = client.create_run(client.create_experiment("tasks", artifact_location=(tmp_path / "files").as_uri()))
    run_id = tracked.info.run_id
    (tmp_path / "mlflow.json").write_text(json.dumps({"uri": uri, "run_id": run_id}))
    table = TaskTable((score("unquantized", [1, 1]), score("plan", [0, 1]), score("uniform 3", [0, 0])))
    table.save(tmp_path / "tasks.json")
    MeasuredTracker().impq_tasks_measured(table, tmp_path)
    assert client.get_run(run_id).data.metrics == {
        "task/task.metric": 0.5, "task_minus_unquantized/task.metric": -0.5,
        "reference_task/unquantized/task.metric": 1.0, "reference_task/uniform_3/task.metric": 0.0}
    assert [file.path for file in client.list_artifacts(run_id)] == ["tasks.json"]
