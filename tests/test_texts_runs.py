"""Runs with several held-out texts, mixtures and chats."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

from impq_core.cli import cli
from impq_core.compare.read import gather
from impq_core.config import RunConfig, TextConfig
from impq_core.errors import UsageError
from impq_core.exports.export import evaluate_folder, export_run
from impq_core.plugins import Plugins
from impq_core.results import Evaluation, RunResult
from impq_core.runs.forecast import forecast_run
from impq_core.runs.pipeline import resume, run
from impq_core.runs.prepare import prepare
from impq_core.terminal import evaluation_rows
from impq_core.testing import made_text
from impq_core.tracking.pages import run_note, run_numbers, run_params, text_inputs

TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("chats")
    for seed, name in ((5, "train.jsonl"), (6, "test.jsonl")):
        text, rows = made_text(seed, 20_000), []
        for first in range(0, len(text), 200):
            messages = [{"role": "system", "content": "You answer questions as briefly as you can, always in English."},
                        {"role": "user", "content": text[first:first + 60]},
                        {"role": "assistant", "content": text[first + 60:first + 200]}]
            rows.append(json.dumps({"messages": messages}))
        (folder / name).write_text("\n".join(rows))
    return folder / "train.jsonl", folder / "test.jsonl"


@pytest.fixture(scope="module")
def config(tiny_llama: Path, texts: tuple[Path, Path], chats: tuple[Path, Path],
           tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run on a mixture of a text and chats, scored on both."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(tiny_llama, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    return RunConfig(
        model=str(folder / "model"), backend="quanto", bits=(2, 4), estimator="aumann-shapley", granularity="block",
        calibration=TextConfig((f"{chats[0]}=3", str(texts[0])), 8, 48, scored="assistant"), game_windows=4,
        evaluation=TextConfig((str(texts[1]), f"chat={chats[1]}"), 6, 48, scored="assistant"), dtype="float32",
        output=str(folder / "runs"), tracking_uri="none", cache=False)


@pytest.fixture(scope="module")
def result(config: RunConfig) -> RunResult:
    return run(config)


def test_each_text_has_its_table(result: RunResult, config: RunConfig, chats: tuple[Path, Path]) -> None:
    evaluation = result.evaluation
    assert evaluation is not None and [text.name for text in evaluation.texts] == ["evaluation", "chat"]
    first, second = evaluation.texts
    alone = run(replace(config, evaluation=replace(config.evaluation, source=config.evaluation.texts[0].source,
                                                   scored="all"))).evaluation
    assert alone is not None and "others" not in alone.to_dict()
    assert [row.to_dict() for row in alone.rows] == [row.to_dict() for row in first.rows]
    assert second.tokens < first.tokens == 6 * 47 and "assistant" in second.text
    stored = json.loads((result.folder / "evaluation.json").read_text())
    again = Evaluation.from_dict(stored)
    assert again.to_dict() == stored == evaluation.to_dict()
    for row, same in zip(second.rows, again.others[0].rows, strict=True):
        assert (row.nll, row.stderr) == pytest.approx((same.nll, same.stderr))
        difference = second.against_plan(row)
        assert (difference is None) == (row.name == "plan")
    header, cells = evaluation_rows(evaluation)
    assert [name for name in header if name.startswith("NLL")] == ["NLL evaluation", "NLL chat"]
    assert all(len(row) == len(header) for row in cells)
    assert f"{second.plan.nll:.3f}" in cells[0][header.index("NLL chat")]
    lines = (result.folder / "scores.jsonl").read_text().splitlines()[1:]
    assert all(len(json.loads(line)["others"]) == 1 for line in lines)


def test_a_run_that_was_cut_short_ends_the_same(result: RunResult, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(result.folder, folder)
    before = (folder / "evaluation.json").read_bytes()
    (folder / "evaluation.json").unlink()
    scores = (folder / "scores.jsonl").read_text().splitlines(keepends=True)
    (folder / "scores.jsonl").write_text("".join(scores[:4]) + scores[4][:30])
    (folder / "gradients.jsonl").write_text((folder / "gradients.jsonl").read_text().splitlines(keepends=True)[0])
    with pytest.warns(RuntimeWarning, match="the last line is incomplete"):
        resume(folder)
    assert (folder / "evaluation.json").read_bytes() == before
    assert "".join(scores) == (folder / "scores.jsonl").read_text()


def test_what_is_scored_decides_the_estimate(result: RunResult, config: RunConfig) -> None:
    other = run(replace(config, calibration=replace(config.calibration, scored="all")), only_estimate=True)
    assert other.estimate is not None and result.estimate is not None
    assert not np.allclose(other.estimate.linear, result.estimate.linear)
    keys = [json.loads((folder / "provenance.json").read_text())["losses"] for folder in (other.folder, result.folder)]
    assert keys[0]["game"]["tokens"] != keys[1]["game"]["tokens"]


def test_runs_are_compared_on_the_texts_they_share(result: RunResult, config: RunConfig) -> None:
    other = run(replace(config, budget="2.5bits", evaluation=replace(
        config.evaluation, source=config.evaluation.texts[1].source)))
    contests, notes = gather([result.folder, other.folder])
    found = [({run.folder for run in contest.contestants}, "assistant" in contest.text) for contest in contests]
    assert found == [({result.folder}, False), ({result.folder, other.folder}, True)] and not notes


def test_numbers_and_texts_of_each(result: RunResult) -> None:
    numbers, evaluation = run_numbers(result), result.evaluation
    assert evaluation is not None
    assert numbers["nll"] == evaluation.plan.nll and numbers["nll/chat"] == evaluation.others[0].plan.nll
    assert {"kl/chat", "top1_agreement/chat", "perplexity/chat", "nll_stderr/chat"} <= set(numbers)
    inputs = text_inputs(result)
    assert [each.dataset.name for each in inputs] == ["train.jsonl, calibration.txt", "evaluation.txt", "test.jsonl"]
    assert len({each.dataset.digest for each in inputs}) == 3
    assert "train.jsonl=3, " in dict(run_params(result.config))["calibration.source"]
    assert "NLL chat" in run_note(result)


def test_an_export_is_scored_on_each_text(result: RunResult, tmp_path: Path) -> None:
    exported = export_run(result.folder, "quanto", tmp_path / "export", Plugins())
    again = evaluate_folder(tmp_path / "export")
    evaluation = result.evaluation
    assert evaluation is not None and exported.score is not None and again.score is not None
    assert exported.score.nll == pytest.approx(again.score.nll, rel=1e-5)  # to rounding
    assert exported.others["chat"].nll == pytest.approx(again.others["chat"].nll, rel=1e-5)
    assert exported.others["chat"].nll == pytest.approx(evaluation.others[0].plan.nll, rel=1e-3)
    assert again.others["chat"].window_tokens is not None


def test_a_forecast_counts_every_text(config: RunConfig) -> None:
    one = replace(config, evaluation=replace(config.evaluation, source=config.evaluation.texts[0].source, scored="all"))
    two = [forecast_run(each).searches[0].forwards["evaluate"] for each in (one, config)]
    assert two[0] is not None and two[1] == pytest.approx(2 * two[0])


def test_the_command_line(config: RunConfig, texts: tuple[Path, Path], chats: tuple[Path, Path],
                          monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", "--model", config.model, "--backend", "quanto", "--bits", "2,4", "--dry-run",
             "--calibration", f"{chats[0]}=3", "--calibration", str(texts[0]), "--calibration-scored", "assistant"]
    answer = CliRunner().invoke(cli, [*words, "--evaluation", str(texts[1]), "--evaluation", f"chat={chats[1]}"])
    assert answer.exit_code == 0, answer.output
    answer = CliRunner().invoke(cli, [*words, "--evaluation", str(texts[1]), "--evaluation-scored", "assistant"])
    assert isinstance(answer.exception, UsageError) and "is no chat" in str(answer.exception)


def test_a_backend_that_weighs_tokens_by_gradients_needs_all_of_them(config: RunConfig) -> None:
    guided = replace(config, backend="gptq", options={"backend": {"hessian": "guided", "drift": "none"}})
    with pytest.raises(UsageError, match="backend 'gptq' weighs"):
        forecast_run(guided)


def test_in_the_test_of_the_plan_a_text_of_a_mixture_counts_by_its_windows(config: RunConfig) -> None:
    mixture = replace(config, calibration=replace(config.calibration, windows=16))
    found, prepared = run(mixture), prepare(mixture, Plugins())
    windows, test = prepared.held_back, found.uniform_test
    assert windows is not None and windows.texts is not None and test is not None
    scores = [json.loads(line) for line in (found.folder / "held-back.jsonl").read_text().splitlines()[1:]]
    apart = np.array(scores[0]["window_nll"]) - np.array(scores[1]["window_nll"])
    tokens = windows.window_tokens
    by_text = {number: np.average(apart[windows.texts == number], weights=tokens[windows.texts == number])
               for number in (0, 1)}
    assert np.bincount(windows.texts).tolist() == [3, 1] and tokens[windows.texts == 0].sum() < 3 * 47
    assert test.minus_uniform == pytest.approx((3 * by_text[0] + by_text[1]) / 4)


def test_windows_of_a_mixture_are_shuffled_within_their_text(config: RunConfig) -> None:
    prepared = prepare(config, Plugins())
    assert prepared.calibration is not None and prepared.shuffled is not None
    np.testing.assert_array_equal(prepared.shuffled.texts, prepared.calibration.texts)
    for number in (0, 1):
        before, after = (np.unique(windows.ids[windows.texts == number], axis=0)
                         for windows in (prepared.calibration, prepared.shuffled))
        np.testing.assert_array_equal(before, after)
