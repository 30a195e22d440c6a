"""Whole runs on a tiny model."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from impq_core.cli import main
from impq_core.config import RunConfig, TextConfig, read_toml
from impq_core.display.progress import console
from impq_core.errors import ImpqError
from impq_core.hookspecs import hookimpl
from impq_core.ledger import MeasurementLog
from impq_core.plugins import Plugins
from impq_core.results import RunResult
from impq_core.runs.fit import fit_run
from impq_core.runs.pipeline import play, run
from impq_core.tracking.tracker import Tracker
from impq_core.types import Measurements, Plan, SensitivityEstimate

pytestmark = pytest.mark.usefixtures("variants")


@pytest.fixture
def result(tiny_config: RunConfig) -> RunResult:
    return run(tiny_config)


def test_a_run_leaves_everything_behind(result: RunResult, tiny_config: RunConfig) -> None:
    folder = result.folder
    assert {path.name for path in folder.iterdir()} >= {"impq.toml", "measurements.jsonl", "measurements.npz",
                                                        "estimate.npz", "plan.json", "evaluation.json", "cost.json"}
    header, rows = MeasurementLog.read(folder / "measurements.jsonl")
    assert header["space"] == result.plan.space.fingerprint and header["game"]["label"].startswith("4 windows of 48")
    measurements = Measurements.load(folder / "measurements.npz")
    assert {tuple(pick) for pick in measurements.picks} <= {pick for pick, _ in rows}
    assert SensitivityEstimate.load(folder / "estimate.npz").space.fingerprint == header["space"]
    assert json.loads((folder / "plan.json").read_text())["bytes"] == result.plan.nbytes <= result.plan.budget_bytes
    # The plan's own loss can be looked up: it is what the game measured for that pick.
    measured = dict(rows)[tuple(result.plan.pick)] - measurements.reference_loss
    assert result.measured_loss == measured
    # 259 tokens of width 64, twice as the head is not tied; two norms a block and the last; float32.
    assert result.rest_bytes == 4 * (2 * 259 * 64 + (2 * 4 + 1) * 64)
    assert result.model_bytes == result.plan.nbytes + result.rest_bytes


def test_the_table_holds_the_plan_against_its_references(result: RunResult) -> None:
    evaluation = result.evaluation
    names = [row.name for row in evaluation.rows]
    assert names == ["plan", "unquantized", "uniform 4", "uniform 3", "uniform 2", "first/last high", "random 1",
                     "random 2", "random 3", "line low-high", "line of uniforms"]
    unquantized = evaluation.row("unquantized").score
    assert unquantized is not None and unquantized.kl == pytest.approx(0, abs=1e-6) and unquantized.top1 == 1
    for row in evaluation.rows:
        if row.score is not None and row.name != "unquantized":
            assert row.score.kl > 0 and 0 < row.score.top1 < 1 and row.score.window_nll.shape == (6,)
        if row.name.startswith(("first", "random")):
            assert row.nbytes is not None and row.nbytes <= result.plan.budget_bytes
    # A uniform 3-bit model stands on the 2-to-4 line nearly at 3 bits; the line is straight between the ends.
    low, high = evaluation.row("uniform 2"), evaluation.row("uniform 4")
    assert low.nbytes and high.nbytes
    share = (result.plan.nbytes - low.nbytes) / (high.nbytes - low.nbytes)
    assert evaluation.row("line low-high").nll == pytest.approx(low.nll + share * (high.nll - low.nll))
    difference = evaluation.against_plan(low)
    assert difference is not None and difference[0] == pytest.approx(low.nll - evaluation.plan.nll)
    stored = json.loads((result.folder / "evaluation.json").read_text())
    assert [row["name"] for row in stored["rows"]] == names and stored["tokens"] == 6 * 47


def test_the_resolved_configuration_makes_the_same_run_again(result: RunResult) -> None:
    config = read_toml(result.folder / "impq.toml")
    assert config == result.config and Path(config.model).is_absolute()
    assert config.bits == ("4", "2") and config.budget == "3bits"
    assert config.options["estimator"] == {"permutations": 4, "antithetic": True, "tolerance": 0.0, "settle": 0.0,
                                                  "fresh": True, "truncate": 0.0, "around": 0.0, "span": 0.25}
    again = run(config)
    np.testing.assert_array_equal(again.plan.pick, result.plan.pick)
    assert again.measurements is not None and result.measurements is not None
    np.testing.assert_array_equal(again.measurements.losses, result.measurements.losses)
    assert [row.nll for row in again.evaluation.rows] == [row.nll for row in result.evaluation.rows]


def test_other_surrogates_are_fitted_without_the_model(result: RunResult, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["additive", "auto", "covariance", "coverage", "regression"]
    fits = fit_run(str(result.folder), [], {}, Plugins())
    fitted = {one.surrogate: one for one in fits.surrogates}
    assert np.isnan(fits.game.loss)  # two pairs of orders on windows of their own leave too little of four layers
    assert sorted(fitted) == names
    # Narrower widths may help a random model, which is nothing that coverage could describe.
    assert {one.surrogate for one in fitted.values() if one.problem} <= {"coverage"}
    again = SensitivityEstimate.load(fitted["auto"].file)
    assert result.estimate is not None and again.method == result.estimate.method
    assert result.estimate.is_loss and result.plan.is_loss and not fitted["covariance"].estimate.is_loss
    assert again.method.startswith("auto: ") and "misordered: additive" in again.method
    np.testing.assert_array_equal(again.linear, result.estimate.linear)
    [plain] = fit_run(str(result.folder), ["covariance"], {"alpha": "1"}, Plugins()).surrogates
    assert plain.estimate is not None and "alpha=1" in plain.estimate.method
    main(["fit", str(result.folder), "--surrogate", "regression"])
    assert "regression" in capsys.readouterr().out
    (result.folder / "measurements.npz").unlink()
    with pytest.raises(ImpqError, match="no losses to fit"):
        fit_run(str(result.folder), names, {}, Plugins())


def test_a_plan_is_applied_without_measuring(result: RunResult, tiny_config: RunConfig) -> None:
    again = run(replace(tiny_config, plan=str(result.folder / "plan.json")))
    assert again.plan.pick.tolist() == result.plan.pick.tolist() and again.estimate is None and again.forwards == 0
    assert again.evaluation.plan.nll == result.evaluation.plan.nll


@pytest.mark.parametrize("change", [{"granularity": "group"}, {"bits": (2, 3, 4), "budget": "2.7bits"},
                                    {"surrogate": "additive", "bits": (3, 8), "budget": "60%"}])
def test_other_menus_and_granularities(change: dict[str, object], tiny_config: RunConfig) -> None:
    result = run(replace(tiny_config, **change))  # type: ignore[arg-type]
    assert result.plan.nbytes <= result.plan.budget_bytes
    assert len(result.plan.space) == (16 if "granularity" in change else 4)


COSTS = {"isolated": 5, "clado": 17.5, "coarse-to-fine": 21, "llm-mq": 7.8, "fisher": 7.8, "guided-output": 10.9,
         "token-fisher": 18.7, "aumann-shapley": 31, "hawq": 31, "autoscheme": 23.4, "gamma": 15.6, "lieq": 4.2,
         "lim": 2, "activation": 2, "zscore": 0, "kurtosis": 0, "nsds": 0, "first-last": 0, "random": 0}
"""Cost of estimators in forwards, for 4 layers, 3 widths and twice as many probe windows as game windows; of a game
approximately."""

PAIRS = {"clado", "fisher"}
"""Estimators that know costs of pairs of layers, without which a wider choice may seem worse."""


@pytest.mark.parametrize("changes", [{"estimator": "zscore"}, {"surrogate": "covariance"}])
def test_a_score_is_not_called_a_loss(changes: dict[str, str], tiny_config: RunConfig,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    config = replace(tiny_config, options={}, **changes)
    plugins = console()
    plugins.watch(Tracker(config.tracking_uri, config.experiment))
    result = run(config, plugins)
    output = capsys.readouterr().out
    assert "without unit (the estimate only ranks)" in output and "nats per token, proven" not in output
    assert not result.plan.is_loss and json.loads((result.folder / "plan.json").read_text())["is_loss"] is False
    assert not SensitivityEstimate.load(result.folder / "estimate.npz").is_loss
    client = MlflowClient(config.tracking_uri)
    [kept] = client.search_runs([client.get_experiment_by_name(config.experiment or "impq").experiment_id])
    assert kept.data.metrics["predicted_score"] == result.plan.predicted_loss
    assert not {"predicted_loss", "surrogate_error"} & set(kept.data.metrics)


@pytest.mark.parametrize("estimator", sorted(set(Plugins().names("estimator")) - {"spqe"}))  # the one of other tests
def test_every_estimator_has_its_cost(estimator: str, tiny_config: RunConfig) -> None:
    result = run(replace(tiny_config, estimator=estimator, allocator="greedy", bits=(2, 3, 4),
                         options={"backend": {"grid": "min-max"}, "estimator": {"steps": 2} if estimator == "gamma"
                                  else {}}), only_estimate=True)
    assert result.estimate is not None and result.estimate.method.startswith(estimator)
    assert (result.estimate.pairwise is not None) == (estimator in PAIRS)
    assert estimator in PAIRS or (np.diff(result.estimate.linear, axis=1) >= 0).all()
    played = estimator in ("isolated", "clado", "coarse-to-fine")
    assert result.forwards == pytest.approx(COSTS[estimator], abs=4 if played else 0, rel=0.1)


@pytest.mark.parametrize("backend", ["hqq", "quanto"])
def test_a_data_free_run_reads_no_calibration_text(backend: str, tiny_config: RunConfig) -> None:
    config = replace(tiny_config, estimator="zscore", backend=backend, options={},
                     calibration=TextConfig(source="no-such-dataset", windows=64))
    result = run(config)
    assert result.measured_loss is None and set(result.digests) == {"evaluation"} and result.forwards == 0
    assert _tracked(config).plan.pick.tolist() == result.plan.pick.tolist()


@pytest.mark.parametrize("backend", ["hqq", "quanto"])
def test_spqe_on_other_backends(backend: str, tiny_config: RunConfig) -> None:
    result = run(replace(tiny_config, backend=backend, bits=(4, 8), options={"estimator": {"permutations": 2}}))
    assert result.plan.nbytes <= result.plan.budget_bytes


def test_one_backend_is_measured_and_another_deployed(tiny_config: RunConfig) -> None:
    config = replace(tiny_config, bits=(), options={"estimator": {"permutations": 2}, "backend": {"grid": "min-max"},
                                                    "estimate_with": {"group_size": 32}})
    both = run(replace(config, estimate_with="quanto"))
    assert both.config.bits == ("4", "2")  # of GPTQ's default menu what quanto has
    alone = run(replace(config, backend="quanto", bits=(2, 4), options={
        "estimator": {"permutations": 2}, "backend": {"group_size": 32}}))
    assert both.estimate is not None and alone.estimate is not None
    np.testing.assert_array_equal(both.estimate.linear, alone.estimate.linear)
    assert [c.group_size for c in both.estimate.space.choices] == [32, 32]
    assert [c.group_size for c in both.plan.space.choices] == [64, 64]
    assert both.plan.nbytes <= both.plan.budget_bytes
    header, _ = MeasurementLog.read(both.folder / "measurements.jsonl")
    assert header["variants"]["backend"] == "impq_quanto.backend"
    assert header["variants"]["options"] == {"group_size": 32}
    for config in (tiny_config, both.config):
        deployed = run(replace(config, plan=str(both.folder / "plan.json")))
        assert deployed.evaluation.plan.nll == both.evaluation.plan.nll


@pytest.mark.parametrize("refiner", ["swaps", "evolve"])
def test_a_plan_is_refined_on_windows_held_back(refiner: str, tiny_config: RunConfig) -> None:
    config = replace(tiny_config, bits=(2, 3, 4), granularity="linear", estimator="random", allocator="greedy",
                     refine=12, refiner=refiner, options={"backend": {"grid": "min-max"}})
    plain, refined = run(replace(config, refine=0)), run(config)
    assert refined.forwards == pytest.approx(12, abs=2) and plain.forwards == 0
    assert refined.plan.nbytes <= plain.plan.budget_bytes and f"+ {refiner}(" in refined.plan.method
    assert refined.config.options["refiner"] and (refined.folder / "refinement.jsonl").exists()
    stored = Plan.load(refined.folder / "plan.json", refined.plan.space)
    np.testing.assert_array_equal(stored.pick, refined.plan.pick)
    header, judged = MeasurementLog.read(refined.folder / "referee.jsonl")
    assert header["game"]["label"].startswith("4 windows of 48")
    losses = dict(judged)
    first, last = losses[tuple(plain.plan.pick)], losses[tuple(refined.plan.pick)]
    assert last < first or (plain.plan.pick == refined.plan.pick).all()
    # Any start will do: a plan from a file is refined too.
    again = run(replace(config, plan=str(plain.folder / "plan.json")))
    assert again.plan.nbytes <= plain.plan.nbytes and again.forwards > 10


def test_pinned_and_excluded_layers_stay_and_count(tiny_config: RunConfig) -> None:
    free = run(tiny_config)
    pinned = run(replace(tiny_config, pins={"model.layers.0*": 8}, exclude=("*.3",), budget="4.5bits"))
    space = pinned.plan.space
    assert len(space) == 2 and [pin.layer.name for pin in space.pinned] == ["model.layers.0", "model.layers.3"]
    assert space.parameters == free.plan.space.parameters
    weights = space.pinned[1].layer.parameters
    assert space.pinned[1].nbytes == 2 * weights
    stored = json.loads((pinned.folder / "plan.json").read_text())["layers"]
    assert stored["model.layers.0"] == {"bits": 8.0, "group_size": 64} and stored["model.layers.3"] is None
    again = run(replace(pinned.config, plan=str(pinned.folder / "plan.json")))
    assert again.evaluation.plan.nll == pinned.evaluation.plan.nll
    unquantized = [result.evaluation.row("unquantized").nll for result in (free, pinned)]
    assert unquantized[0] == unquantized[1]
    # The widest reference of the pinned run has 8 bits and no quantization where the free one has 4.
    kls = [result.evaluation.row("uniform 4").score for result in (free, pinned)]
    assert kls[0] is not None and kls[1] is not None and kls[1].kl < kls[0].kl
    estimate = SensitivityEstimate.load(pinned.folder / "estimate.npz")
    assert estimate.space.fingerprint == space.fingerprint


def _statuses(config: RunConfig) -> list[str]:
    with sqlite3.connect(config.tracking_uri.removeprefix("sqlite:///")) as store:
        return [row[0] for row in store.execute("select status from runs order by start_time")]


def _tracked(config: RunConfig, *observers: object) -> RunResult:
    plugins = Plugins()
    plugins.watch(Tracker(config.tracking_uri, config.experiment))
    for observer in observers:
        plugins.watch(observer)
    return run(config, plugins)


class _Saboteur:
    """Ends a run at its first measurements."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    @hookimpl
    def impq_measured(self) -> None:
        raise self._error


def test_mlflow_keeps_a_finished_run(tiny_config: RunConfig, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    result = _tracked(tiny_config)
    client = MlflowClient(tiny_config.tracking_uri)
    experiment = client.get_experiment_by_name("impq")
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()
    [kept] = client.search_runs([experiment.experiment_id])
    assert kept.info.status == "FINISHED"
    assert kept.data.params["options.estimator.permutations"] == "4" and kept.data.params["bits"] == "4,2"
    assert kept.data.metrics["nll"] == pytest.approx(result.evaluation.plan.nll)
    assert kept.data.metrics["bytes"] == result.plan.nbytes
    assert kept.data.metrics["search_forwards"] == pytest.approx(result.forwards)
    assert len(client.get_metric_history(kept.info.run_id, "measured_loss")) == 4 * 5 + 1  # and the plan's own loss
    assert {item.path for item in client.list_artifacts(kept.info.run_id)} >= {"plan.json", "impq.toml", "figures"}
    assert {i.dataset.digest for i in kept.inputs.dataset_inputs} == {
        *result.digests.values()}


def test_a_crash_leaves_a_failed_run_and_a_whole_log(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("impq_surrogates.auto.Auto.fit", crash)
    with pytest.raises(RuntimeError):
        _tracked(tiny_config)
    assert _statuses(tiny_config) == ["FAILED"]
    [folder] = Path(tiny_config.output).iterdir()
    assert "out of memory" in (folder / "error.txt").read_text()
    assert len(MeasurementLog.read(folder / "measurements.jsonl")[1]) >= 5


def test_ctrl_c_leaves_a_killed_run(tiny_config: RunConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        _tracked(tiny_config, _Saboteur(KeyboardInterrupt()))
    assert _statuses(tiny_config) == ["KILLED"]


def test_a_failing_upload_warns_and_the_run_goes_on(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("store is gone")

    monkeypatch.setattr("mlflow.MlflowClient.log_inputs", fail)
    with pytest.warns(RuntimeWarning, match="Tracker failed in impq_run_finished: ConnectionError"):
        result = _tracked(tiny_config)
    assert (result.folder / "evaluation.json").exists()


def test_nothing_is_left_behind_by_what_is_refused(tiny_config: RunConfig, texts: tuple[Path, Path]) -> None:
    wrong = [
        {"budget": "1MB"}, {"evaluation": replace(tiny_config.evaluation, source=str(texts[0]))},
        {"evaluation": TextConfig(str(texts[1]), 9999, 48)}, {"tracking_uri": "sqlite:////nowhere/x.db"},
        {"options": {"backend": {"group_size": 128}}}, {"output": "/dev/null/x"}]
    for change in wrong:
        with pytest.raises(ImpqError) as error:
            _tracked(replace(tiny_config, **change))  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    assert not Path(tiny_config.output).exists()
    assert not Path(tiny_config.tracking_uri.removeprefix("sqlite:///")).exists()


def test_a_script_plays_the_game_of_a_run(tiny_config: RunConfig, result: RunResult) -> None:
    game, measurements = play(tiny_config), result.measurements
    assert game.reference_loss == measurements.reference_loss
    for number in range(4):
        rows = measurements.path == number
        assert (measurements.windows[rows] == game.redraw(number // 2)).all()  # each pair has its own set
        assert np.array_equal(game.losses(measurements.picks[rows]), measurements.losses[rows])
    assert game.budget_bytes == measurements.budget_bytes and len(list(Path(tiny_config.output).iterdir())) == 1
    blind = replace(tiny_config, estimator="random", backend="hqq", options={})
    with pytest.raises(ImpqError, match="'random' reads no calibration text"):
        play(blind)
