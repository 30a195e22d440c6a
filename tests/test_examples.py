"""The examples, on a tiny model: they write the files that they describe, and print the numbers that were measured."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from impq_core import ImpqError, gather
from impq_core.config import RunConfig
from impq_core.exports.export import export_run
from impq_core.runs.pipeline import run

EXAMPLES = Path(__file__).parents[1] / "examples"
NUMBER = re.compile(r"[+-]?\d+\.\d+")

Example = Callable[..., str]


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
            capsys: pytest.CaptureFixture[str]) -> Example:
    """A function that runs an example by its name, in its own folder, and returns its output."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *more: str, text: str = "--calibration") -> str:
        load(name).main(["--model", str(tiny_llama), text, str(texts[0]), "--evaluation", str(texts[1]),
                         "--windows", "4", "--length", "32", "--output", "out", *more])
        return capsys.readouterr().out

    return call


def rows(out: str, *first: str) -> list[list[float]]:
    """The numbers in the lines of a table that begin with these words."""
    lines = [line.split() for line in out.splitlines()]
    found = [[float(number) for number in NUMBER.findall(" ".join(words[len(first):]))] for words in lines
             if words[:len(first)] == list(first) and NUMBER.fullmatch(*words[len(first):][:1] or [""])]
    assert all(math.isfinite(number) for row in found for number in row)
    return found


def run_folder() -> Path:
    """The only run."""
    [file] = Path("out").glob("*/evaluation.json")
    return file.parent


def test_estimators_are_compared(example: Example) -> None:
    out = example("compare_estimators", "--estimators", "isolated,zscore")
    [page] = Path("out").glob("*/compare.html")
    assert str(page.absolute()) in out
    [contest], _ = gather(["out"])
    assert contest.tokens == 4 * 31
    contestants = {run.config.estimator: run for run in contest.contestants}
    assert contestants.keys() == {"isolated", "zscore"}
    [[free, *_]], [[forwards, nll, _, difference, _]] = rows(out, "zscore"), rows(out, "isolated")
    assert free == 0 < forwards
    assert nll == pytest.approx(contestants["isolated"].plan.nll, abs=1e-4)
    assert difference == pytest.approx(nll - contestants["zscore"].plan.nll, abs=2e-4)


def test_a_sweep_is_read_back(example: Example) -> None:
    out = example("sweep_from_python", "--budgets", "2.5bits,3bits")
    [contest], _ = gather(["out"])
    assert len(contest.contestants) == 4
    for contestant in contest.contestants:
        [[_, *rest]] = rows(out, contestant.budget, contestant.config.allocator)
        predicted = json.loads((contestant.folder / "plan.json").read_text())["predicted_loss"]
        assert rest[0] == pytest.approx(predicted, abs=1e-4)
        assert any(number == pytest.approx(contestant.plan.nll, abs=1e-4) for number in rest)


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_a_checkpoint_for_vllm_is_what_was_measured(example: Example, form: str) -> None:
    out = example("plan_for_vllm", "--format", form)
    folder = run_folder() / form
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert all(f"{file.stat().st_size:,}" in out for file in folder.iterdir())
    assert f"vllm serve {folder.absolute()}" in out
    [[written, _]], [[again, _]] = rows(out, "NLL", "at", "export"), rows(out, "NLL", "from", "files")
    assert written == pytest.approx(again, abs=1e-4)
    layers = json.loads((folder / "plan.json").read_text())["layers"]
    assert len(layers) == 4 * 4  # fused groups
    if form == "gptq":
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        for name, choice in layers.items():  # vLLM looks for qkv and gate_up by their fused names
            module = name if name.endswith("_proj") else f"{name}_proj"
            rules = [rule for key, rule in config["dynamic"].items() if re.match(key.removeprefix("+:"), module)]
            assert (rules or [config])[0]["bits"] == choice["bits"]


def test_a_recipe_for_llama_cpp_names_every_tensor(example: Example) -> None:
    out = example("plan_for_llama_cpp", "--bits", "Q8_0,Q5_1,IQ4_NL")
    file = run_folder().absolute() / "recipe-llama.cpp" / "tensor-types.txt"
    lines = file.read_text().splitlines()
    assert len(lines) == 4 * 7
    assert all(re.fullmatch(r"\^blk\\\.\d\\\.\w+\\\.weight\$=(q8_0|q5_1|iq4_nl)", line) for line in lines)
    assert f"--tensor-type-file {file}" in out
    planned = [choice["name"].lower() for choice in json.loads((file.parents[1] / "plan.json").read_text())["layers"]
               .values()]
    for name in ("q8_0", "q5_1", "iq4_nl"):
        count = planned.count(name)
        assert (f"{count} tensors {name}" in out) == (count > 0)


def test_a_conversation_needs_nothing_but_the_file(tiny_config: RunConfig, tmp_path: Path) -> None:
    result = run(replace(tiny_config, backend="gguf", bits=("Q8_0", "Q4_0"), estimator="random", options={}))
    folder = export_run(result.folder, "gguf", tmp_path / "gguf").folder
    program = [sys.executable, str(EXAMPLES / "chat_with_gguf.py"), str(folder), "Hello", "--tokens", "4"]
    done = subprocess.run(program, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert subprocess.run([*program[:2], str(tmp_path)], capture_output=True, timeout=300).returncode == 1


def test_a_text_of_ones_own_makes_another_plan(example: Example) -> None:
    mine = [file for file in sorted((EXAMPLES.parent / "docs").glob("*.md")) if file.name != "errors.md"]
    out = example("custom_calibration", "--text", *map(str, mine), text="--other")
    lines = Path("out/calibration.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == [file.read_text() for file in mine]
    found = [rows(out, *words)[-1] for words in (("own", "own"), ("other", "other"), ("own", "other"))]
    assert [len(row) for row in found] == [4, 2, 4]
    [contest], _ = gather(["out"])
    runs = sorted(contest.contestants, key=lambda run: run.folder.name)
    assert sorted(row[0] for row in found) == pytest.approx(sorted(run.plan.nll for run in runs), abs=1e-4)
    [given] = [run for run in runs if run.config.plan]
    [own] = [run for run in runs if run.config.calibration.source.endswith("calibration.jsonl")]
    [other] = [run for run in runs if run not in (given, own)]
    assert given.widths == own.widths
    changed = {name for name in own.widths if own.widths[name] != other.widths[name]}
    assert bool(changed) == (" -> " in out)


def test_a_text_that_is_not_there_is_said(example: Example) -> None:
    with pytest.raises(ImpqError, match=r"none\.txt: no such file"):
        example("custom_calibration", "--text", "none.txt", text="--other")


def test_every_machine_has_docstrings() -> None:
    found = list(load("custom_calibration").docstrings())
    assert len(found) > 50 and all(isinstance(text, str) for text in found)
    assert sum(map(len, found)) > 500_000  # enough for 64 windows of 256 tokens, thrice over


def test_every_example_is_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text()
    for file in EXAMPLES.glob("*.*"):
        assert file.name == "README.md" or f"| [{file.name}]({file.name}) |" in table
