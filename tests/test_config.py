from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impq_core.budget import Budget
from impq_core.config import RunConfig, TextConfig, override, read_toml
from impq_core.errors import UsageError
from impq_core.files import write_text
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.testing import planted_space


def test_a_configuration_survives_its_own_file(tmp_path: Path) -> None:
    config = RunConfig(bits=(2, 4), budget="3bits", calibration=TextConfig("a.txt", 3, 9, 1), game_windows=2,
                       pins={"model.layers.0": 4}, exclude=("*.o_proj",), options={"estimator": {"permutations": 4}})
    (tmp_path / "impq.toml").write_text(config.to_toml())
    assert read_toml(tmp_path / "impq.toml") == config


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
WIDTHS = st.one_of(st.integers(1, 16).map(float), st.floats(0.01, 64, allow_nan=False))
OPTIONS = st.one_of(st.booleans(), st.integers(-2**62, 2**62), st.floats(allow_nan=False, allow_infinity=False), NAMES)
TEXTS = st.builds(TextConfig, NAMES, st.integers(2, 10**6), st.integers(2, 10**6), st.integers(0, 2**62))
CONFIGS = st.builds(
    RunConfig, model=NAMES, backend=NAMES, estimate_with=st.one_of(st.just(""), NAMES), estimator=NAMES,
    surrogate=NAMES, allocator=NAMES, refiner=NAMES, refine=st.integers(0, 0), budget=st.one_of(st.just(""), NAMES),
    bits=st.lists(WIDTHS, unique=True, max_size=4).map(tuple), granularity=st.sampled_from(["auto", "block", "linear"]),
    meters=st.lists(NAMES, unique=True, max_size=2).map(tuple), limits=st.dictionaries(NAMES, NAMES, max_size=2),
    pins=st.dictionaries(NAMES, WIDTHS, max_size=3), exclude=st.lists(NAMES, max_size=3).map(tuple), calibration=TEXTS,
    game_windows=st.integers(1, 2), probe_windows=st.integers(0, 2), value=st.sampled_from(["nll", "kl"]),
    evaluation=TEXTS, dtype=st.sampled_from(["auto", "float32", "bfloat16"]), seed=st.integers(0, 2**62), plan=NAMES,
    output=NAMES, tracking_uri=NAMES, experiment=NAMES, cache=st.booleans(),
    options=st.dictionaries(NAMES, st.dictionaries(NAMES, OPTIONS, max_size=3), max_size=3))


@given(config=CONFIGS)
def test_every_configuration_is_read_as_it_was_written(config: RunConfig,
                                                       tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("written") / "impq.toml"
    write_text(path, config.to_toml())
    assert read_toml(path) == config


@pytest.mark.parametrize("name", ["model", "output", "experiment", "plan", "tracking_uri"])
def test_text_that_no_file_holds_is_refused_at_once(name: str) -> None:
    for text in ("a\0b", os.fsdecode(b"caf\xe9")):
        with pytest.raises(UsageError, match=f"{name} holds a character that no UTF-8 file can hold"):
            RunConfig(**{name: text})


@pytest.mark.parametrize("change", [{"bits": (2.0, float("inf"))}, {"bits": (float("nan"), 4.0)}, {"bits": (0.0, 4.0)},
                                    {"pins": {"a": -1.0}}])
def test_a_width_is_a_positive_number(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="positive number of bits"):
        RunConfig(**change)


@pytest.mark.parametrize(("toml", "reason"), [
    ("estimater = 'spqe'", "unknown key 'estimater' .*did you mean 'estimator'"),
    ("[calibration]\nwindow = 3", r"\[calibration\]: unknown key 'window' .*did you mean 'windows'"),
    ("seed = 'one'", "'seed' takes a whole number"),
    ("seed = true", "'seed' takes a whole number"),
    ("bits = 4", "'bits' takes a list of widths"),
    ("options = 3", "'options' takes a table for each role"),
    ("exclude = [3]", "'exclude' takes a list of patterns"),
    ("[pins]\na = true", "'pins' takes a table of widths"),
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


@given(amount=st.one_of(st.decimals(min_value="0.001", max_value="99999999999999", places=3),
                        st.integers(1, 2**53)),
       unit=st.sampled_from(["bits", "bpw", "%", "B", "KB", "MB", "GiB", " MB", "mib"]))
def test_a_budget_survives_being_written_down(amount: object, unit: str) -> None:
    text = f"{amount}{unit}"
    budget = Budget.parse(text)
    assert str(budget) == text and Budget.parse(str(budget)) == budget
    made = Budget(budget.amount, budget.unit)  # without the user's text, every digit is kept all the same
    assert Budget.parse(str(made)) == budget


def test_bytes_of_a_budget_are_exact() -> None:
    space = planted_space(40, columns=4096)
    low = space.low_bytes
    for nbytes in range(low, low + 50):
        assert Budget.parse(f"{nbytes}B").resolve(space) == nbytes
        assert Budget.parse(f"{nbytes / 1e6:.6f}MB").resolve(space) == nbytes


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
