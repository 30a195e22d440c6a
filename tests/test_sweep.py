"""Estimate once, plan often: allocate, and sweeps with one measurement for each estimator and backend."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from impq_surrogates.shapley import Additive

from impq_core.config import RunConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.hookspecs import hookimpl
from impq_core.interfaces import Surrogate
from impq_core.ledger import MeasurementLog
from impq_core.plugins import Plugins
from impq_core.runs.allocate import allocate_run
from impq_core.runs.folder import RunFolder
from impq_core.runs.pipeline import run
from impq_core.runs.sweep import Sweep, run_sweep
from impq_core.tracking.tracker import Tracker
from impq_core.types import Measurements, Plan, SensitivityEstimate


class Watcher:
    """Counts events, and stops a sweep after ``stop_after`` finished runs, as Ctrl-C does."""

    def __init__(self, stop_after: int = 1000) -> None:
        self.seen: Counter[str] = Counter()
        self.forwards = 0.0
        self._stop_after = stop_after

    @hookimpl
    def impq_measured(self, picks: np.ndarray, losses: np.ndarray, forwards: float) -> None:
        self.forwards = max(self.forwards, forwards)

    @hookimpl
    def impq_run_finished(self) -> None:
        self.seen["finished"] += 1
        if self.seen["finished"] == self._stop_after:
            raise KeyboardInterrupt

    @hookimpl
    def impq_run_failed(self, error: BaseException) -> None:
        self.seen[type(error).__name__] += 1


@pytest.fixture
def sweep(tiny_config: RunConfig) -> Sweep:
    """Six runs: ``isolated`` needs no surrogate, so that its runs do not multiply by the surrogates."""
    return Sweep(replace(tiny_config, backend="hqq", options={}), {
        "estimator": ("spqe", "isolated"), "surrogate": ("covariance", "additive"), "allocator": ("greedy",),
        "budget": ("2.5bits", "3bits")}, {"permutations": "2"})


def watched(config: RunConfig, *observers: object) -> Plugins:
    plugins = Plugins()
    for observer in (Tracker(config.tracking_uri, config.experiment), *observers):
        plugins.watch(observer)
    return plugins


def outcome(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.name in ("plan.json", "estimate.npz", "evaluation.json", "measurements.jsonl")}


def test_every_combination_is_a_run_and_nothing_is_measured_twice(sweep: Sweep) -> None:
    plugins = Plugins()
    plugins.watch(watcher := Watcher())
    two = replace(sweep, varied={**sweep.varied, "allocator": ("qp", "greedy"), "budget": ("2.5bits",)})
    folder = run_sweep(two, plugins)
    runs = sorted(path.name for path in (folder / "runs").iterdir())
    assert len(runs) == 2 * 2 + 2 == watcher.seen["finished"]
    assert runs[0] == "hqq-isolated-greedy-2.5bits" and "hqq-spqe-covariance-qp-2.5bits" in runs
    assert sorted(path.name for path in (folder / "measured").iterdir()) == ["hqq-isolated", "hqq-spqe"]
    _, rows = MeasurementLog.read(folder / "measured" / "hqq-spqe" / "measurements.jsonl")
    assert len(rows) == len(set(rows))  # the windows of another order repeat a pick, with another loss
    # A run of the sweep equals the same run on its own.
    alone = run(replace(sweep.base, surrogate="covariance", budget="2.5bits",
                        options={"estimator": {"permutations": 2}}))
    child = RunFolder.open(folder / "runs" / "hqq-spqe-covariance-qp-2.5bits")
    np.testing.assert_array_equal(child.read_estimate().linear, alone.estimate.linear)
    assert Plan.load(child.plan, alone.plan.space).pick.tolist() == alone.plan.pick.tolist()
    assert child.evaluation.read_bytes() == (alone.folder / "evaluation.json").read_bytes()
    assert child.read_config().options == alone.config.options
    assert len((folder / "scores-hqq.jsonl").read_text().splitlines()) < len(runs) + 12  # each allocation once


def test_a_sweep_continues_in_mlflow_too(sweep: Sweep) -> None:
    from mlflow import MlflowClient

    small = replace(sweep, varied={"estimator": ("zscore", "random"), "budget": ("2.5bits", "3bits")}, pairs={})
    with pytest.raises(KeyboardInterrupt):
        run_sweep(small, watched(small.base, Watcher(stop_after=2)))
    [folder] = Path(small.base.output).iterdir()
    run_sweep(Sweep.open(str(folder)), watched(small.base), folder)
    client = MlflowClient(small.base.tracking_uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    [parent] = [r for r in runs if r.data.tags.get("impq.kind") == "sweep"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 4 and len(runs) == 5 and {r.info.status for r in runs} == {"FINISHED"}
    assert parent.data.params["estimator"] == "zscore,random" and parent.data.params["budget"] == "2.5bits,3bits"
    assert {(r.data.params["estimator"], r.data.params["budget"]) for r in children} == {
        (e, b) for e in ("zscore", "random") for b in ("2.5bits", "3bits")}
    assert all("nll" in r.data.metrics and r.data.params["seed"] == "0" for r in children)


def test_a_sweep_that_was_cut_ends_as_if_it_had_not_been(sweep: Sweep) -> None:
    whole = outcome(run_sweep(sweep, Plugins()))
    for stop_after in (1, 5):  # in the first and in the second estimator
        before = set(Path(sweep.base.output).iterdir())
        plugins, again = Plugins(), Plugins()
        plugins.watch(first := Watcher(stop_after))
        again.watch(second := Watcher())
        with pytest.raises(KeyboardInterrupt):
            run_sweep(sweep, plugins)
        [folder] = set(Path(sweep.base.output).iterdir()) - before
        assert run_sweep(Sweep.open(str(folder)), again, folder) == folder
        assert outcome(folder) == whole
        assert first.seen["finished"] + second.seen["finished"] in (6, 7)  # the interrupted run may finish twice


class Picky(Surrogate):
    """Fits nothing."""

    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        raise ImpqError("never enough")


def test_what_cannot_be_made_is_told_and_the_rest_goes_on(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("impq_surrogates.shapley.Covariance.fit", Picky.fit)
    small = replace(sweep, varied={"surrogate": ("covariance", "additive")})
    folder = run_sweep(small, watched(small.base, watcher := Watcher()))
    assert [path.name for path in sorted((folder / "runs").glob("*/evaluation.json"))] == ["evaluation.json"]
    assert "never enough" in (folder / "runs" / "hqq-spqe-covariance-qp-3bits" / "error.txt").read_text()
    assert watcher.seen == {"finished": 1, "ImpqError": 1}
    from mlflow import MlflowClient

    client = MlflowClient(small.base.tracking_uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    states = {(run.data.tags.get("impq.kind"), run.data.params["surrogate"]): run.info.status for run in runs}
    assert states == {("sweep", "covariance,additive"): "FINISHED", (None, "covariance"): "FAILED",
                      (None, "additive"): "FINISHED"}
    [parent] = [run for run in runs if "impq.kind" in run.data.tags]
    assert "error" not in parent.data.tags


@pytest.mark.parametrize("change, message", [
    ({"varied": {"estimator": ("spqe", "isolatd")}}, "did you mean 'isolated'"),
    ({"varied": {"estimator": ("spqe", "")}}, "nothing between two commas"),
    ({"pairs": {"permutation": "2"}}, "did you mean 'permutations'"),
    ({"pairs": {"permutations": "three"}}, "takes int"),
    ({"varied": {"budget": ("3bits", "1bits")}}, "1bits")])
def test_what_is_wrong_is_said_before_anything_is_made(sweep: Sweep, change: dict[str, object], message: str) -> None:
    with pytest.raises(ImpqError) as error:
        run_sweep(replace(sweep, **change), Plugins())  # type: ignore[arg-type]
    assert message in str(error.value) and not Path(sweep.base.output).exists()


def test_a_sweep_refines_nothing(sweep: Sweep) -> None:
    with pytest.raises(UsageError, match="refine none"):
        replace(sweep, base=replace(sweep.base, refine=4)).configs(Plugins())


def test_a_surrogate_is_fitted_near_the_new_budget(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the bytes of the space that was measured, which another backend's variants make another."""
    config = replace(tiny_config, backend="hqq", estimate_with="quanto", options={"estimator": {"permutations": 2}},
                     pins={"model.layers.0.self_attn.q_proj": 4.0}, granularity="linear", bits=(2, 4))
    folder = run(config, only_estimate=True).folder
    wanted: list[Measurements] = []
    fit = Additive.fit

    def watched(self: Additive, measurements: Measurements) -> SensitivityEstimate:
        wanted.append(measurements)
        return fit(self, measurements)

    monkeypatch.setattr(Additive, "fit", watched)
    made = allocate_run(str(folder), ["2.5bits", "3.5bits"], "additive", "greedy", {}, Plugins())
    for one, measured in zip(made, wanted, strict=True):
        space, played = one.plan.space, measured.space
        assert played.fingerprint != space.fingerprint and measured.budget_bytes is not None
        place = (one.plan.budget_bytes - space.low_bytes) / (space.high_bytes - space.low_bytes)
        assert measured.budget_bytes == pytest.approx(
            played.low_bytes + place * (played.high_bytes - played.low_bytes), abs=1)


def test_other_budgets_from_an_estimate(tiny_config: RunConfig) -> None:
    # Narrower widths always cost divergence, but may lower the loss of a random model.
    config = replace(tiny_config, backend="hqq", value="kl", options={"estimator": {"permutations": 4}})
    folder = run(config, only_estimate=True).folder
    made = allocate_run(str(folder), ["2.5bits", "90%"], None, None, {}, Plugins())
    assert made[0].plan.nbytes < made[1].plan.nbytes
    for one in made:
        whole = run(replace(config, budget=one.budget))
        # The surrogate is chosen again near each budget, and is the same one here.
        chosen = [method.partition(" (")[0] for method in (whole.estimate.method, one.plan.provenance["estimate"])]
        assert chosen == ["auto: additive"] * 2
        assert one.plan.pick.tolist() == whole.plan.pick.tolist()
        assert Plan.load(one.file, whole.plan.space).pick.tolist() == one.plan.pick.tolist()
    [other] = allocate_run(str(folder), ["3bits"], "additive", "greedy", {}, Plugins())
    assert other.plan.method.startswith("greedy") and other.file.name == "greedy-additive-3bits.json"
    with pytest.raises(ImpqError, match=r"no estimate\.npz"):
        (folder / "estimate.npz").unlink()
        allocate_run(str(folder), ["3bits"], None, None, {}, Plugins())
