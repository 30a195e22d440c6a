"""Interrupted and resumed runs, and the cache of variants."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stopped import cut, outcome

from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.evaluate import Evaluator
from impq_core.files import write_text
from impq_core.interfaces import Statistics, Variant
from impq_core.model.bank import Assignment
from impq_core.model.cache import shelves
from impq_core.plugins import Plugins
from impq_core.results import RunResult, Score
from impq_core.runs import pipeline
from impq_core.runs.folder import RunFolder
from impq_core.runs.pipeline import resume, run
from impq_core.space import Choice, LinearSpec
from impq_core.testing import tiny_model
from impq_core.tracking.store import experiments
from impq_core.tracking.tracker import Tracker


def tracked(config: RunConfig) -> Plugins:
    found = Plugins()
    found.watch(Tracker(config.tracking_uri, config.experiment))
    return found


SPQE = {"estimator": {"permutations": 4}}
CASES = {
    "spqe": {"options": SPQE},
    "fresh": {"options": SPQE, "game_windows": 2, "value": "kl", "surrogate": "covariance"},
    "gradients": {"estimator": "aumann-shapley", "granularity": "group", "backend": "gptq",
                  "options": {"backend": {"grid": "min-max"}}},
    "traces": {"estimator": "hawq", "options": {}},
    "refined": {"estimator": "isolated", "refine": 6, "granularity": "group", "options": {}},
    "another's": {"estimate_with": "quanto", "options": {"estimate_with": {"group_size": 32}},
                  "estimator": "isolated"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_cut_anywhere_ends_as_if_it_had_not_been(case: str, tiny_config: RunConfig,
                                                                cache: Path) -> None:
    config = replace(tiny_config, cache=case != "spqe", **{"backend": "hqq", **CASES[case]})
    uncut = run(config)
    whole = outcome(uncut.folder)
    stages = [("quantize", 2), ("estimate", 3), ("evaluate", 3)]
    if config.refine:
        stages += [("refine", 3)]
    if config.estimator in ("aumann-shapley", "hawq"):
        stages.remove(("estimate", 3))
    for stage, done in stages:
        for score in cache.rglob("score-*.json"):  # or there would be nothing to cut
            score.unlink()
        folder = cut(config, stage, done)
        assert (folder / "error.txt").exists()
        result = resume(folder)
        assert outcome(folder) == whole, stage
        assert result.forwards == uncut.forwards == json.loads((folder / "cost.json").read_text())["forwards"]
        assert not (folder / "error.txt").exists()
    again = resume(folder)  # a finished run gives its result once more
    assert outcome(folder) == whole and again.plan is not None


@pytest.mark.usefixtures("variants")
def test_the_mlflow_run_goes_on_too(tiny_config: RunConfig) -> None:
    from mlflow import MlflowClient

    folder = cut(tiny_config, "estimate", 9, Tracker(tiny_config.tracking_uri, tiny_config.experiment))
    client = MlflowClient(tiny_config.tracking_uri)
    [experiment] = experiments(tiny_config.tracking_uri).values()
    [killed] = client.search_runs([experiment])
    assert killed.info.status == "KILLED"
    resume(folder, tracked(tiny_config))
    [kept] = client.search_runs([experiment])
    assert kept.info.status == "FINISHED" and kept.info.run_id == killed.info.run_id
    steps = [point.step for point in client.get_metric_history(kept.info.run_id, "measured_loss")]
    assert sorted(steps) == list(range(4 * 5 + 1))


@pytest.mark.usefixtures("variants")
def test_an_estimate_is_gone_on_with_to_the_end(tiny_config: RunConfig) -> None:
    whole = outcome(run(tiny_config).folder)
    estimated = run(tiny_config, only_estimate=True)
    assert estimated.plan is None and estimated.evaluation is None and estimated.estimate is not None
    assert not (estimated.folder / "plan.json").exists()
    resume(estimated.folder)
    assert outcome(estimated.folder) == whole


def change_model(folder: Path, config: RunConfig) -> None:
    path = next(Path(config.model).glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_text(folder: Path, config: RunConfig) -> None:
    path = Path(config.calibration.source)
    path.write_text(path.read_text().replace("e", "a"))


def change_backend(folder: Path, config: RunConfig) -> None:
    text = (folder / "impq.toml").read_text()
    (folder / "impq.toml").write_text(text.replace("group_size = 64", "group_size = 32"))


def change_code(folder: Path, config: RunConfig) -> None:
    facts = json.loads((folder / "provenance.json").read_text())
    write_text(folder / "provenance.json", json.dumps({**facts, "code": "0" * 16}))


def change_library(folder: Path, config: RunConfig) -> None:
    facts = json.loads((folder / "provenance.json").read_text())
    facts["deployed"]["versions"]["gptqmodel"] = "1.0"
    write_text(folder / "provenance.json", json.dumps(facts))


@pytest.mark.parametrize("change, message", [
    (change_model, "model digest"), (change_text, "game.tokens"), (change_backend, "budget bytes"),
    (change_code, "code"), (change_library, "versions.gptqmodel")])
def test_what_has_changed_is_refused(change: object, message: str, tiny_config: RunConfig, texts: tuple[Path, Path],
                                     tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama", blocks=2)
    text = tmp_path / "calibration.txt"
    text.write_text(texts[0].read_text())
    config = replace(tiny_config, model=str(model), calibration=replace(tiny_config.calibration, source=str(text)))
    folder = cut(config, "estimate", 3)
    before = outcome(folder)
    change(folder, config)  # type: ignore[operator]
    with pytest.raises(ImpqError) as error:
        resume(folder)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert outcome(folder) == before


@pytest.mark.usefixtures("variants")
def test_two_processes_do_not_work_in_one_run(tiny_config: RunConfig) -> None:
    folder = cut(tiny_config, "estimate", 3)
    with RunFolder(folder).locked(), pytest.raises(ImpqError, match="another process"):
        resume(folder)
    resume(folder)


@pytest.mark.usefixtures("variants")
def test_a_torn_line_is_taken_out_and_said(tiny_config: RunConfig) -> None:
    whole = outcome(run(tiny_config).folder)
    folder = cut(tiny_config, "estimate", 6)
    for name in ("measurements.jsonl", "scores.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"format": "impq-sc' if name.startswith("s") else '{"pick": [0, 1')
    with pytest.warns(RuntimeWarning, match="the last line is incomplete"):
        resume(folder)
    assert outcome(folder) == whole


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Choice]]:
    """Every variant that is made from now on."""
    from impq_gptq.backend import Gptq

    made: list[tuple[str, Choice]] = []
    plain = Gptq.quantize_together

    def quantize(self: Gptq, weights: Mapping[LinearSpec, torch.Tensor], wanted: Sequence[tuple[LinearSpec, Choice]],
                 statistics: Statistics | None) -> Iterator[tuple[LinearSpec, Variant]]:
        for linear, variant in plain(self, weights, wanted, statistics):
            made.append((linear.name, variant.choice))
            yield linear, variant

    monkeypatch.setattr(Gptq, "quantize_together", quantize)
    return made


def test_nothing_is_quantized_twice(tiny_config: RunConfig, quantized: list[tuple[str, Choice]], cache: Path) -> None:
    whole = outcome(cut(tiny_config, "estimate", 0))
    assert whole == outcome(cut(replace(tiny_config, cache=False), "estimate", 0))
    count = 4 * 7 * 3  # blocks, linears, 4 and 2 bits and 3 between
    assert len(quantized) == 2 * count
    folder = cut(replace(tiny_config, bits=(2, 3, 4)), "estimate", 0)  # other runs find them too
    assert len(quantized) == 2 * count and outcome(folder)["variants.json"] == whole["variants.json"]
    cut(replace(tiny_config, bits=(3, 8), budget="4bits"), "estimate", 0)  # behind 8 bits, 3 are others than behind 4
    assert len(quantized) == 2 * count + 4 * 7 * 3
    assert len(shelves()) == 2 and {shelf.count for shelf in shelves()} == {count}
    assert all(shelf.about["label"] == tiny_config.model for shelf in shelves())


def test_damaged_variants_are_made_anew(tiny_config: RunConfig, quantized: list[tuple[str, Choice]]) -> None:
    whole = outcome(run(tiny_config).folder)
    del quantized[:]
    [shelf] = shelves()
    torn, flipped, gone = sorted(shelf.folder.glob("*.safetensors"))[10:13]
    torn.write_bytes(torn.read_bytes()[:100])
    data = bytearray(flipped.read_bytes())
    data[-5] ^= 16
    flipped.write_bytes(data)
    gone.unlink()
    with pytest.warns(RuntimeWarning, match="is damaged and made anew") as warned:
        assert outcome(run(tiny_config).folder) == whole
    assert len(quantized) == 3 and len([w for w in warned if "damaged" in str(w.message)]) == 2
    assert outcome(run(tiny_config).folder) == whole and len(quantized) == 3


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[Assignment]:
    """Allocations that the model was run under for a score."""
    made: list[Assignment] = []
    measure = Evaluator._measure

    def count(self: Evaluator, assignments: Mapping[str, Assignment],
              passed: Callable[[int], None]) -> dict[str, Score]:
        made.extend(assignments.values())
        return measure(self, assignments, passed)

    monkeypatch.setattr(Evaluator, "_measure", count)
    return made


def test_nothing_is_scored_twice(tiny_config: RunConfig, scored: list[Assignment]) -> None:
    def count(config: RunConfig) -> tuple[int, bytes]:
        del scored[:]
        folder = run(config).folder
        return len(scored), (folder / "evaluation.json").read_bytes()

    every, whole = count(tiny_config)
    assert every > 5
    assert count(tiny_config) == (0, whole)
    assert count(replace(tiny_config, cache=False)) == (every, whole)
    finer, _ = count(replace(tiny_config, granularity="group"))
    assert 0 < finer <= every - 3  # the uniform models and the unquantized one are the same
    other, _ = count(replace(tiny_config, evaluation=replace(tiny_config.evaluation, windows=3)))
    assert other == every
    [shelf] = shelves()
    files = sorted(shelf.folder.glob("score-*.json"))
    assert len(files) == shelf.facts == 2 * every + finer
    for file, damage in zip(files, itertools.cycle(('"kl": 1', "{", "[]")), strict=False):
        file.write_text(file.read_text().replace('"kl": ', damage) if "kl" in damage else damage)
    with pytest.warns(RuntimeWarning, match="is damaged and made anew"):
        assert count(tiny_config) == (every, whole)
    assert count(tiny_config) == (0, whole)


@pytest.mark.parametrize("broken", ["a file", "full"])
def test_a_cache_that_takes_nothing_is_a_warning(broken: str, tiny_config: RunConfig, cache: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "a file":
        cache.mkdir()
        (cache / "variants").write_text("")
    else:
        def full(path: Path, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("impq_core.model.cache.replace_file", full)
    with pytest.warns(RuntimeWarning, match="variants are not kept"):
        result = run(tiny_config)
    assert result.evaluation is not None


def test_the_same_numbers_with_the_cache_and_without(tiny_config: RunConfig) -> None:
    results: list[RunResult] = [run(replace(tiny_config, cache=cache, backend=backend, bits=(4, 8), options={}))
                                for backend in ("hqq", "quanto") for cache in (True, True, False)]
    for first, second, third in (results[:3], results[3:]):
        assert outcome(first.folder) == outcome(second.folder) == outcome(third.folder)
    assert not np.array_equal(results[0].evaluation.plan.window_nll, results[3].evaluation.plan.window_nll)


@pytest.mark.usefixtures("variants")
def test_a_run_exists_only_with_what_it_is_resumed_from(tiny_config: RunConfig,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("impq_core.runs.folder.write_text", full)
    with pytest.raises(ImpqError, match="No space left on device"):
        pipeline.run(tiny_config)
    assert list(Path(tiny_config.output).iterdir()) == []


@pytest.mark.builds_store
@pytest.mark.usefixtures("variants")
def test_a_store_whose_maker_died_is_no_store(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    def die(self: MlflowClient) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, "search_experiments", die)
        run(tiny_config, tracked(tiny_config))
    assert not Path(tiny_config.tracking_uri.removeprefix("sqlite:///")).exists()
    assert run(tiny_config, tracked(tiny_config)).evaluation is not None
    Path(tiny_config.tracking_uri.removeprefix("sqlite:///")).write_text("no database")
    with pytest.raises(ImpqError, match="no SQLite database"):
        run(tiny_config, tracked(tiny_config))
