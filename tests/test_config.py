from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impq_core.budget import Budget
from impq_core.config import RunConfig, TextConfig, override, read_toml
from impq_core.errors import UsageError
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.testing import planted_space


def test_a_configuration_survives_its_own_file(tmp_path: Path) -> None:
    config = RunConfig(bits=(2, 4), budget="3bits", calibration=TextConfig("a.txt", 3, 9, 1), game_windows=2,
                       pins={"model.layers.0": 4}, exclude=("*.o_proj",), options={"estimator": {"permutations": 4}})
    (tmp_path / "impq.toml").write_text(config.to_toml())
    assert read_toml(tmp_path / "impq.toml") == config


@pytest.mark.parametrize(("toml", "reason"), [
    ("estimater = 'spqe'", "unknown key 'estimater' .*did you mean 'estimator'"),
    ("[calibration]\nwindow = 3", r"\[calibration\]: unknown key 'window' .*did you mean 'windows'"),
    ("seed = 'one'", "'seed' takes a whole number"),
    ("seed = true", "'seed' takes a whole number"),
    ("bits = 4", "'bits' takes a list of numbers"),
    ("options = 3", "'options' takes a table for each role"),
    ("exclude = [3]", "'exclude' takes a list of patterns"),
    ("[pins]\na = 'four'", "'pins' takes a table of widths"),
    ("calibration = 3", "'calibration' takes a text name or table"),
    ("model = [", "cannot read"),
    ("granularity = 'blok'", "did you mean 'block'"),
    ("game_windows = 100", "game_windows must be 1 to the 64"),
    ("bits = [2, 2]", "twice"),
])
def test_a_wrong_file_is_answered_in_one_line(toml: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "impq.toml").write_text(toml)
    with pytest.raises(UsageError, match=reason) as error:
        read_toml(tmp_path / "impq.toml")
    assert "\n" not in str(error.value)


def test_the_example_configuration_is_valid() -> None:
    config = read_toml(Path(__file__).parents[1] / "examples" / "impq.toml")
    assert config.options["estimator"]["permutations"] == 8
    assert Parts.build(config, Plugins()).budget == Budget(3.0, "bits")


def test_flags_win_over_the_file() -> None:
    config = override(RunConfig(model="a", seed=3), model="b", seed=None, calibration="c.txt", calibration_windows=16)
    assert (config.model, config.seed) == ("b", 3)
    assert config.calibration == TextConfig("c.txt", 16)
    assert tomllib.loads(config.to_toml())["calibration"]["windows"] == 16


def test_budgets_in_every_unit() -> None:
    space = planted_space(4)
    assert Budget.parse("4bits").resolve(space) == space.high_bytes
    assert Budget.parse("2.0 bits").resolve(space) == space.low_bytes
    middle = (space.low_bytes + space.high_bytes) // 2
    for text in ("3bits", "3.0bpw", "75%", f"{middle}B", f"{middle / 1e3}KB", f"{middle / 1024}kib"):
        assert Budget.parse(text).resolve(space) == pytest.approx(middle, abs=1), text
    assert Budget.parse("100%").resolve(space) == space.high_bytes


@pytest.mark.parametrize("text", ["", "three bits", "-3bits", "0bits", "3", "3 bit", "1e3MB", "4GiBs", "3.0.0bits",
                                  "nan%"])
def test_nonsense_budgets(text: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        Budget.parse(text)


@pytest.mark.parametrize(("text", "reason"), [
    ("5bits", "2bits to 4bits"), ("1.9bits", "2bits to 4bits"), ("101%", r"50\.0% to 100\.0%"),
    ("9bpw", "2.000bpw to 4.000bpw"), ("1GB", "GB"), ("10%", "50.0% to 100.0%")])
def test_budgets_out_of_reach_name_the_range(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Budget.parse(text).resolve(planted_space(4))


@given(st.floats(2, 4), st.integers(1, 9))
def test_a_nominal_budget_is_its_own_nominal_bits(bits: float, layers: int) -> None:
    space = planted_space(layers)
    nbytes = Budget(bits, "bits").resolve(space)
    assert space.low_bytes <= nbytes <= space.high_bytes
    assert space.nominal_bits(nbytes) == pytest.approx(bits, abs=2 / (space.high_bytes - space.low_bytes))


@pytest.mark.parametrize(("estimator", "granularity"), [
    ("spqe", "block"), ("isolated", "block"), ("aumann-shapley", "group"), ("zscore", "group")])
def test_what_plays_does_it_over_blocks_unless_told_otherwise(estimator: str, granularity: str) -> None:
    assert Parts.build(RunConfig(estimator=estimator), Plugins()).granularity == granularity
    assert Parts.build(RunConfig(estimator=estimator, granularity="linear"), Plugins()).granularity == "linear"
