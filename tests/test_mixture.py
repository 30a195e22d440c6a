"""Names, weights and order of several texts, and the windows of a mixture of them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from impq_core.config import RunConfig, TextConfig, override, read_toml
from impq_core.errors import UsageError
from impq_core.mixture import NamedText, interleaved
from impq_core.model.text import draw_each, draw_windows
from impq_core.testing.tiny import byte_tokenizer

WEIGHTS = st.lists(st.fractions(Fraction(1, 50), 50, max_denominator=100), min_size=1, max_size=6)


@given(WEIGHTS, st.integers(1, 120))
def test_any_first_windows_of_a_mixture_have_its_proportions(weights: list[Fraction], count: int) -> None:
    order = interleaved(weights, count)
    assert len(order) == count
    for first in range(1, count + 1):
        for text, weight in enumerate(weights):
            assert abs(order[:first].count(text) - first * weight / sum(weights)) < 1
    assert order == interleaved([3 * weight for weight in weights], count)
    assert order[:count // 2] == interleaved(weights, count // 2)


@pytest.mark.parametrize(("text", "name", "source", "weight"), [
    ("demo", "demo", "demo", 1), ("chat=a/b.jsonl", "chat", "a/b.jsonl", 1), ("a/b.jsonl=3", "b", "a/b.jsonl", 3),
    ("chat=b.jsonl=0.25", "chat", "b.jsonl", Fraction(1, 4)), ("owner/set:part:test", "set", "owner/set:part:test", 1),
    ("wiki=owner/set:part:test=2", "wiki", "owner/set:part:test", 2), ("C:\\texts\\b.txt", "b", "C:\\texts\\b.txt", 1),
    ("./a=b.txt", "a-b", "./a=b.txt", 1), ("a b.txt", "a-b", "a b.txt", 1), ("owner/x=y", "x-y", "owner/x=y", 1)])
def test_names_and_weights(text: str, name: str, source: str, weight: Fraction) -> None:
    found = NamedText.parse(text)
    assert (found.name, found.source, found.weight) == (name, source, weight)
    assert found.at(source) == text
    assert NamedText.parse(found.at("/other.txt")).weight == weight


def test_a_file_with_an_equals_sign_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert NamedText.parse("a=b.txt").source == "b.txt"
    (tmp_path / "a=b.txt").write_text("x")
    assert NamedText.parse("a=b.txt") == NamedText("a-b", "a=b.txt")


@pytest.mark.parametrize(("changes", "problem"), [
    ({"evaluation": TextConfig(("a.txt", "b/a.txt"))}, "both named 'a'"),
    ({"evaluation": TextConfig("a.txt=2")}, "a.txt has a weight"),
    ({"calibration": TextConfig(("a.txt=100", "b.txt"))}, "none of the 8 windows of the game .* b.txt")])
def test_texts_that_make_no_table_and_no_mixture(changes: dict[str, TextConfig], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        RunConfig(**changes)


@pytest.mark.parametrize("sources", [("a.txt", "a.txt"), ("a.txt", "x=a.txt"), ("=3",) * 2, ("a=0",),
                                     (), ("",), ("a", "")])
def test_sources_that_name_no_texts(sources: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        TextConfig(sources)


def test_several_texts_survive_their_file_and_the_command_line(tmp_path: Path) -> None:
    config = RunConfig(calibration=TextConfig(("chat.jsonl=3", "wiki.txt"), scored="assistant"),
                       evaluation=TextConfig(("wiki=w.txt", "chat=c.jsonl")))
    (tmp_path / "impq.toml").write_text(config.to_toml())
    assert read_toml(tmp_path / "impq.toml") == config
    assert hash(config.calibration) == hash(read_toml(tmp_path / "impq.toml").calibration)
    assert override(RunConfig(), evaluation=("wiki=w.txt", "chat=c.jsonl"), calibration=("chat.jsonl=3", "wiki.txt"),
                    calibration_scored="assistant") == config
    (tmp_path / "impq.toml").write_text('evaluation = ["wiki=w.txt", "chat=c.jsonl"]\ncalibration = "a.txt"')
    short = read_toml(tmp_path / "impq.toml")
    assert short.evaluation == config.evaluation and short.calibration == TextConfig("a.txt")
    assert TextConfig(("a.txt",)) == TextConfig("a.txt") == TextConfig(Path("a.txt"))  # type: ignore[arg-type]


def test_windows_of_a_mixture_are_those_of_its_texts(texts: tuple[Path, Path]) -> None:
    tokenizer, (one, other) = byte_tokenizer(), map(str, texts)
    mixed = draw_windows(TextConfig((f"{one}=3", other), 24, 16), "calibration", tokenizer, 259)
    parts = [draw_windows(TextConfig(source, count, 16), "calibration", tokenizer, 259).ids
             for source, count in ((one, 18), (other, 6))]
    assert mixed.texts is not None and mixed.ids.shape == (24, 16)
    for number, ids in enumerate(parts):
        np.testing.assert_array_equal(mixed.ids[mixed.texts == number], ids)
    assert mixed.first(8).texts is not None and np.bincount(mixed.first(8).texts).tolist() == [6, 2]
    each = draw_each(TextConfig((one, f"b={other}"), 5, 16), "evaluation", tokenizer, 259)
    assert [windows.name for windows in each] == ["calibration", "b"]
    for windows, source in zip(each, (one, other), strict=True):
        np.testing.assert_array_equal(
            windows.ids, draw_windows(TextConfig(source, 5, 16), "evaluation", tokenizer, 259).ids)
