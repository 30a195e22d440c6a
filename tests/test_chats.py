"""Chats through a chat template: tokens of the assistant, and losses on them alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from impq_core.config import TextConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.evaluate import Evaluator
from impq_core.game.model_game import ModelGame
from impq_core.game.probe import ModelProbe
from impq_core.model.text import SHARED_RUN, Windows, check_source, check_texts, draw_windows, refuse_overlap
from impq_core.statistics import standard_error
from impq_core.testing.tiny import TinyTable, byte_tokenizer

TEMPLATE = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")
FORGETS = ("{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' and loop.last %}[thought]{% endif %}"
           "{{ m['content'] }}</>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
"""Writes something in front of the last answer only, as templates of reasoning models do."""


def _tokenizer(template: str = TEMPLATE) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def _chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


def _write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def _draw(path: Path, tokenizer: Any, scored: str = "assistant", windows: int = 2, length: int = 20) -> Windows:
    return draw_windows(TextConfig(str(path), windows, length, scored=scored), "evaluation", tokenizer, 259)


CHATS = [_chat(f"What is {n}?", f"It is {n * n}, é.", "And so?", f"So {n}.") for n in range(30)]


def test_the_assistants_tokens_are_those_between_its_marks(tmp_path: Path) -> None:
    path = _write(tmp_path / "chats.jsonl", [*CHATS, {"messages": None}])
    tokenizer = _tokenizer()
    windows = _draw(path, tokenizer, windows=8, length=64)
    text = "".join(f"<{m['role']}>{m['content']}</>\n" for chat in CHATS for m in chat["messages"])
    data, told, inside = text.encode(), list[bool](), False
    tokens = tokenizer(text)["input_ids"]  # one a byte
    for place in range(len(data)):
        inside = inside or data[:place].endswith(b"<assistant>")
        told.append(inside)
        inside = inside and not data[:place + 1].endswith(b"</>\n")
    assert windows.answers is not None and windows.masked
    for ids, answers in zip(windows.ids, windows.answers, strict=True):
        assert any(tokens[i * 64:(i + 1) * 64] == ids.tolist() and told[i * 64:(i + 1) * 64] == answers.tolist()
                   for i in range(len(data) // 64))
    assert windows.scored_tokens == windows.answers[:, 1:].sum() < 8 * 63
    everything = _draw(path, tokenizer, "all", 8, 64)
    assert everything.scored is None and everything.scored_tokens == 8 * 63
    # The same windows here: what is scored is part of a digest, and not of the digest of the tokens.
    assert (windows.ids == everything.ids).all()
    assert windows.digest != everything.digest == windows.token_digest


def test_windows_without_an_answer_are_not_drawn(tmp_path: Path) -> None:
    path = _write(tmp_path / "chats.jsonl", [_chat("long " * 40, "yes") for _ in range(10)])
    windows = _draw(path, _tokenizer(), windows=8, length=16)
    assert windows.scored is not None and windows.scored.any(axis=1).all()
    with pytest.raises(ImpqError, match="with tokens of the assistant"):
        _draw(path, _tokenizer(), windows=60, length=16)
    assert len(_draw(path, _tokenizer(), "all", windows=60, length=16).ids) == 60


def test_a_template_that_changes_earlier_answers(tmp_path: Path) -> None:
    path = _write(tmp_path / "chats.jsonl", CHATS)
    tokenizer = _tokenizer(FORGETS)
    with pytest.raises(ImpqError, match=r"chats.jsonl, line 1: .*template changes.*--evaluation-scored"):
        _draw(path, tokenizer)
    assert _draw(path, tokenizer, "all").answers is None
    single = _write(tmp_path / "single.jsonl", [_chat(f"What is {n}?", f"It is {n * n}.") for n in range(30)])
    assert _draw(single, tokenizer).answers is not None


def test_the_date_in_a_template_does_not_change_the_text(tmp_path: Path) -> None:
    path = _write(tmp_path / "chats.jsonl", CHATS)
    tokenizer = _tokenizer("{{ strftime_now('%d %b %Y') }}" + TEMPLATE)
    windows = _draw(path, tokenizer, windows=20, length=64)
    assert any("26 Jul 2024<user>" in tokenizer.decode(ids) for ids in windows.ids)


@pytest.mark.parametrize(("rows", "problem"), [
    ([_chat("a", "b"), {"messages": []}], "line 2: has no list of 'messages'"),
    ([_chat("a", "b"), {"body": "a"}], "line 2: has no list of 'messages'"),
    ([_chat("a", "b"), "a"], "line 2: has no list of 'messages'"),
    ([_chat("a", "b"), {"messages": [{"role": "user", "content": None}]}], "line 2: message 1 has no 'content'"),
    ([_chat("a", "b"), {"messages": [{"content": "a"}]}], "line 2: message 1 has no 'role'"),
    ([_chat("a", "\ud800")], "line 1: message 2 holds half of a surrogate pair")])
def test_rows_that_are_no_chats(rows: list[object], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ImpqError, match=problem):
        check_source(str(_write(tmp_path / "chats.jsonl", rows)), "calibration")


def test_models_and_texts_without_chats(tmp_path: Path) -> None:
    path = _write(tmp_path / "chats.jsonl", CHATS)
    check_texts(TextConfig(str(path), scored="assistant"), "evaluation")
    with pytest.raises(ImpqError, match=r"chats.jsonl has chats, .* no chat template"):
        _draw(path, byte_tokenizer())
    with pytest.raises(ImpqError, match=r"line 1: is refused by the model's chat template .*no user"):
        _draw(path, _tokenizer("{{ raise_exception('no user') }}"))
    slow = _tokenizer()
    slow.__class__ = type("Slow", (type(slow),), {"is_fast": False})
    with pytest.raises(ImpqError, match="does not say where its tokens are"):
        _draw(path, slow)
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(UsageError, match=r"a.txt is no chat.*--evaluation-scored"):
        check_texts(TextConfig(str(tmp_path / "a.txt"), scored="assistant"), "evaluation")


def test_common_instructions_are_no_overlap_and_common_answers_are() -> None:
    rng = np.random.default_rng(0)

    def windows(answer: np.ndarray) -> Windows:
        ids = np.concatenate([np.arange(2 * SHARED_RUN), answer])[None]
        return Windows(ids, "a", "", answers=(np.arange(ids.size) >= 2 * SHARED_RUN)[None])

    first, second = windows(rng.integers(300, 900, 40)), windows(rng.integers(300, 900, 40))
    refuse_overlap(first, second)
    with pytest.raises(ImpqError, match="overlap"):
        refuse_overlap(first, windows(first.ids[0, -40:]))


def _masked(count: int = 4, length: int = 24) -> Windows:
    """Windows of a mixture: two of a text of which some tokens are scored, and others of which all are."""
    rng = np.random.default_rng(1)
    answers = np.ones((count, length), bool)
    answers[:2] = rng.random((2, length)) < 0.3
    answers[0, 5] = answers[1, 7:12] = True
    texts = (np.arange(count) >= 2).astype(np.int64)
    return Windows(rng.integers(0, 256, (count, length)), "mixture", "random bytes", 0, "mixture", answers, True, texts)


@torch.inference_mode()
def _token_losses(table: TinyTable, windows: Windows) -> np.ndarray:
    logits = table._runner.forward(torch.from_numpy(windows.ids))[:, :-1].float()
    targets = torch.from_numpy(windows.ids[:, 1:])
    return functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").double().numpy()


def _by_hand(losses: np.ndarray, windows: Windows) -> float:
    """Half of the mean over the scored tokens of each text, because each has half of the windows."""
    assert windows.answers is not None
    scored = windows.answers[:, 1:]
    return float(np.mean([losses[rows][scored[rows]].mean() for rows in (slice(0, 2), slice(2, 4))]))


def test_the_games_loss_is_that_of_the_scored_tokens() -> None:
    table, windows = TinyTable((2, 4), granularity="block"), _masked()
    game = ModelGame(table.space, table._bank, table._runner, windows, spare=windows)
    pick = table.space.uniform(1)
    loss, reference = game.loss(pick), game.reference_loss
    assert game.tokens == windows.scored_tokens
    for choice, expected in ((0, reference), (1, reference + loss)):
        table._bank.apply(table.space.assignment(table.space.uniform(choice)))
        assert _by_hand(_token_losses(table, windows), windows) == pytest.approx(expected, rel=1e-5)
    assert game.window_losses(pick).mean() == pytest.approx(reference + loss)
    assert game.redraw(1) == 1 and game.loss(pick) == pytest.approx(loss)


@pytest.mark.parametrize("value", ["nll", "kl"])
def test_slopes_are_those_of_the_games_loss(value: str) -> None:
    table, windows = TinyTable((2, 4), granularity="block"), _masked()
    probe = ModelProbe(table.space, table._bank, table._runner, windows, value)
    n, ends = len(table.space), list[float]()
    slopes = probe.slopes(np.array([0.5, 0.5])).mean(axis=0)[0]
    game = ModelGame(table.space, table._bank, table._runner, windows, value=value)
    table._bank.apply([None] * len(table._bank.layers))
    reference = table._runner.run_all(table._runner.embed(windows.ids))
    for step in (-1e-2, 1e-2):
        shares = np.tile([0.5, 0.5], (n, 1))
        shares[0] = [0.5 - step, 0.5 + step]
        probe._blend(shares)
        hidden = table._runner.run_all(table._runner.embed(windows.ids))
        losses = (table._runner.nll(hidden, windows.ids) if value == "nll"
                  else table._runner.compare([hidden], windows.ids, reference)[0].kl)
        ends.append(_by_hand(losses, windows))
    assert slopes[1] - slopes[0] == pytest.approx((ends[1] - ends[0]) / 2e-2, rel=2e-2)
    assert game.loss(table.space.uniform(1)) != 0


def test_squares_are_means_over_the_scored_tokens() -> None:
    """A text all of whose tokens are scored, and the same as half of a text of which the other half has none."""
    table = TinyTable((2, 4), granularity="group")
    rng = np.random.default_rng(2)
    whole = Windows(rng.integers(0, 256, (2, 24)), "a", "a")
    answers = np.ones((2, 24), bool)
    masked = Windows(whole.ids, "a", "a", answers=answers, masked=True)
    half = Windows(whole.ids, "a", "a", answers=np.arange(24)[None].repeat(2, 0) < 12, masked=True)
    short = Windows(whole.ids[:, :12], "a", "a")
    found = [ModelProbe(table.space, table._bank, table._runner, windows).token_squares().mean(axis=0)
             for windows in (whole, masked, half, short)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    np.testing.assert_allclose(found[2], found[3], rtol=1e-4)
    curvatures = [dict(ModelProbe(table.space, table._bank, table._runner, windows).output_curvature())
                  for windows in (half, short)]
    for linear, matrix in curvatures[0].items():
        torch.testing.assert_close(matrix, curvatures[1][linear], rtol=1e-3, atol=1e-7)
    counts = [ModelProbe(table.space, table._bank, table._runner, windows).window_tokens for windows in (whole, half)]
    assert counts == [23, 11]


def test_scores_are_of_the_scored_tokens() -> None:
    table, windows = TinyTable((2, 4), granularity="block"), _masked()
    one_text = Windows(windows.ids, "a", "a", answers=windows.answers, masked=True)
    plain = Windows(windows.ids[:3, :17], "b", "b")
    evaluator = Evaluator(table._runner, table._bank, [plain, one_text])
    assignment = table.space.assignment(table.space.uniform(1))
    [(first, second)] = evaluator.scores_of_texts([assignment])
    table._bank.apply(assignment)
    losses = _token_losses(table, windows)
    assert windows.answers is not None
    scored = windows.answers[:, 1:]
    assert second.nll == pytest.approx(losses[scored].mean(), rel=1e-5)
    np.testing.assert_allclose(second.window_nll, [row[told].mean() for row, told in zip(losses, scored, strict=True)],
                               rtol=1e-5)
    table._bank.apply([None] * len(table._bank.layers))
    alone = Evaluator(table._runner, table._bank, plain).score(assignment)
    assert alone.to_dict() == first.to_dict()
    # The error of a ratio, as resampled windows have it.
    rng = np.random.default_rng(0)
    values, tokens = rng.normal(3, 1, 400), rng.integers(1, 60, 400)
    draws = [np.average(values[some], weights=tokens[some]) for some in rng.integers(0, 400, (2000, 400))]
    assert standard_error(values, tokens) == pytest.approx(np.std(draws), rel=0.1)
    assert standard_error(values, np.full(400, 7)) == pytest.approx(standard_error(values))
