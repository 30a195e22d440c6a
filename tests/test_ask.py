"""Answers of the unquantized and the quantized model beside each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional

from impq_core.answers.ask import ask_models
from impq_core.answers.prompts import Prompt, read_prompts
from impq_core.cli import cli
from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.exports import models as models_module
from impq_core.exports.export import export_run
from impq_core.exports.models import Models, models_of
from impq_core.paired_answers import AnswerTable
from impq_core.plugins import Plugins
from impq_core.runs.pipeline import run
from impq_core.testing import tiny_model
from impq_core.testing.tiny import byte_tokenizer

TEMPLATE = ("{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")
TOKENS = 12


@pytest.fixture(scope="module")
def finished(texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    tiny_model(folder / "model", blocks=2)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    config = RunConfig(model=str(folder / "model"), backend="hqq", bits=(2, 4), estimator="random", allocator="greedy",
                       granularity="block", calibration=TextConfig(str(texts[0]), 8, 48), game_windows=4,
                       evaluation=TextConfig(str(texts[1]), 6, 48), dtype="float32", tracking_uri="none", cache=False,
                       output=str(folder / "runs"))
    return run(config).folder


def greedy(model: torch.nn.Module, ids: list[int]) -> tuple[list[int], list[torch.Tensor]]:
    """The most likely tokens, and the log-probabilities of each, by a whole forward for each."""
    answer, distributions = list[int](), []
    while len(answer) < TOKENS and 257 not in answer:
        with torch.no_grad():
            distributions.append(model(torch.tensor([ids + answer])).logits[0, -1].log_softmax(-1))
        answer.append(int(distributions[-1].argmax()))
    return answer, distributions


def test_answers_and_divergence_are_those_by_hand(copied: Path) -> None:
    prompts = [Prompt("the sea"), Prompt("It is a horse?"), Prompt("7")]
    models = models_of(copied, (), Plugins())
    table = ask_models(models, prompts, TOKENS, chat=False)
    answers: dict[str, list[Any]] = {}
    for name in ("unquantized", "plan"):
        with models.model(name) as model:
            answers[name] = [greedy(model, models.tokenizer(prompt.text)["input_ids"]) for prompt in prompts]
    decode = models.tokenizer.decode
    for answer, prompt, (ours, reference), (theirs, other) in zip(
            table.answers, prompts, answers["unquantized"], answers["plan"], strict=True):
        assert (answer.prompt, answer.chat, answer.limit) == (prompt.text, False, TOKENS)
        assert (answer.unquantized, answer.plan) == tuple(
            decode(tokens, skip_special_tokens=True) for tokens in (ours, theirs))
        assert (answer.unquantized_tokens, answer.plan_tokens) == (len(ours), len(theirs))
        assert ours != theirs and answer.split is not None
        first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        divergence = functional.kl_div(other[first], reference[first], reduction="sum", log_target=True)
        assert answer.split.token == first and answer.split.kl == pytest.approx(float(divergence), rel=1e-4)
        assert (answer.split.unquantized, answer.split.plan) == (decode([ours[first]]), decode([theirs[first]]))
        assert answer.split.common == decode(ours[:first], skip_special_tokens=True)


def test_an_export_answers_as_its_run(copied: Path) -> None:
    prompts = [Prompt("the sea"), Prompt("7")]
    of_run = ask_models(models_of(copied, (), Plugins()), prompts, TOKENS, None)
    exported = export_run(copied, "hqq").folder
    of_export = ask_models(models_of(exported / "model.safetensors", (), Plugins()), prompts, TOKENS, None)
    for ours, theirs in zip(of_run.answers, of_export.answers, strict=True):
        assert (ours.unquantized, ours.plan) == (theirs.unquantized, theirs.plan)
        assert ours.split is not None and theirs.split is not None
        assert ours.split.kl == pytest.approx(theirs.split.kl, rel=1e-2)  # the export's norms have 16 bits
    assert (exported / "answers.json").is_file()


def test_known_answers_are_not_asked_again(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = models_of(copied, (), Plugins())
    both = ask_models(models, [Prompt("the sea"), Prompt("7")], TOKENS, None)
    asked: list[str] = []
    own = models_module.Models.model

    @contextmanager
    def counted(self: Models, name: str) -> Iterator[Any]:
        asked.append(name)
        with own(self, name) as model:
            yield model

    monkeypatch.setattr(models_module.Models, "model", counted)
    again = models_of(copied, (), Plugins())
    assert ask_models(again, [Prompt("7"), Prompt("the sea")], TOKENS, None).answers == both.answers[::-1]
    assert not asked
    more = ask_models(again, [Prompt("7"), Prompt("a horse")], TOKENS, None)
    assert asked and more.answers[0] == both.answers[1]
    kept = AnswerTable.load(copied / "answers.json")
    assert {answer.prompt for answer in kept.answers} == {"the sea", "7", "a horse"} and len(kept.answers) == 3
    ask_models(again, [Prompt("7")], TOKENS - 1, None)
    assert [answer.limit for answer in AnswerTable.load(copied / "answers.json").answers
            if answer.prompt == "7"] == [TOKENS - 1]


def test_equal_answers_do_not_part(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = models_of(copied, (), Plugins())
    own = models_module.Models.model
    monkeypatch.setattr(models_module.Models, "model", lambda self, name: own(self, "unquantized"))
    [answer] = ask_models(models, [Prompt("the sea")], TOKENS, None).answers
    assert answer.split is None and answer.unquantized == answer.plan


def test_prompts_go_through_the_chat_template(copied: Path) -> None:
    models = models_of(copied, (), Plugins())
    turns = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "the sea"})
    plain, chat, messages = (
        ask_models(models, [prompt], TOKENS, choice).answers[0]
        for prompt, choice in ((Prompt("<user>the sea<assistant>"), False), (Prompt("the sea"), None),
                               (Prompt(messages=turns), None)))
    assert (chat.unquantized, chat.plan) == (plain.unquantized, plain.plan)
    assert (plain.chat, chat.chat, messages.chat) == (False, True, True)
    assert messages.messages == turns and messages.unquantized != chat.unquantized


def test_without_a_template_messages_are_refused(copied: Path, tmp_path: Path) -> None:
    models = models_of(copied, (), Plugins())
    models.tokenizer.chat_template = None
    for prompt, chat in ((Prompt(messages=({"role": "user", "content": "7"},)), None), (Prompt("7"), True)):
        with pytest.raises(ImpqError, match="no chat template"):
            ask_models(models, [prompt], TOKENS, chat)
    with pytest.raises(ImpqError, match="context of 512"):
        ask_models(models, [Prompt("7")], 512, None)


def test_files_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\n\n two \n")
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "one"}\n{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}\n')
    assert read_prompts(["zero"], tmp_path / "lines.txt") == [Prompt("zero"), Prompt("one"), Prompt(" two ")]
    user = ({"role": "user", "content": "u"},)
    assert read_prompts([], tmp_path / "rows.jsonl") == [Prompt("one"), Prompt(messages=user)]
    with pytest.raises(UsageError):
        read_prompts([], None)


def test_the_command_shows_both_answers(copied: Path) -> None:
    result = CliRunner().invoke(cli, ["ask", str(copied), "the sea", "--tokens", "3"], catch_exceptions=False)
    [answer] = AnswerTable.load(copied / "answers.json").answers
    assert result.exit_code == 0 and answer.split is not None
    assert "the sea" in result.output and f"{answer.split.kl:.4f}" in result.output
    assert json.loads((copied / "answers.json").read_text())["format"] == "impq-answers/1"
