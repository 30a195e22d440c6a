"""Loss against size: several budgets from one estimate, the knee, and the smallest plan within a target."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from impq_core.cli import cli
from impq_core.compare.curve import answer_lines, curve_lines
from impq_core.compare.read import gather
from impq_core.config import RunConfig
from impq_core.curve import Curve, Outcome, Point
from impq_core.errors import ImpqError, UsageError
from impq_core.hookspecs import hookimpl
from impq_core.plugins import Plugins
from impq_core.results import Evaluation, Row, Score
from impq_core.runs.curves import read_curves
from impq_core.runs.folder import RunFolder
from impq_core.runs.forecast import forecast_sweep
from impq_core.runs.grid import Sweep
from impq_core.runs.pipeline import resume, run
from impq_core.runs.points import extend_curve
from impq_core.runs.sweep import run_sweep
from impq_core.target import Target, Tried, border_of, next_budget
from impq_core.tracking.tracker import Tracker
from impq_core.window_losses import Difference

LOW, HIGH = 1000, 9000


def search(loss: Callable[[int], float], limit: float, steps: int, grain: int = 1,
           known: tuple[int, ...] = ()) -> tuple[list[Tried], int]:
    """All measured plans, and how many the search measured. Plans are budgets rounded down to a multiple of a grain."""
    def tried(budget: int) -> Tried:
        nbytes = max(LOW, budget - budget % grain)
        return Tried(budget, nbytes, loss(nbytes))

    measured = [tried(budget) for budget in known]
    while (budget := next_budget(limit, measured, LOW, HIGH, steps)) is not None:
        assert LOW <= budget <= HIGH and all(one.budget != budget for one in measured)
        measured.append(tried(budget))
    return measured, len(measured) - len(known)


@given(border=st.integers(LOW + 1, HIGH), steps=st.integers(0, 13), grain=st.sampled_from([1, 7, 100]),
       known=st.lists(st.integers(LOW, HIGH), max_size=4, unique=True))
def test_the_border_of_falling_losses_is_found(border: int, steps: int, grain: int, known: list[int]) -> None:
    measured, count = search(lambda nbytes: float(nbytes < border), 0.5, steps, grain, tuple(known))
    smallest = min((n for n in {max(LOW, b - b % grain) for b in range(LOW, HIGH + 1)} if n >= border), default=None)
    found = border_of(0.5, measured)
    assert count <= steps + 2 and not found.larger_outside
    if smallest is None:  # the largest plan is rounded down below the border
        assert found.within is None
        return
    assert found.within is not None and found.outside is not None
    assert smallest <= found.within.nbytes <= smallest + 1 + (HIGH - LOW) / 2**steps
    assert found.outside.nbytes < border


@given(seed=st.integers(0, 10_000), limit=st.floats(0.05, 0.95), steps=st.integers(0, 10),
       grain=st.sampled_from([1, 90]), known=st.lists(st.integers(LOW, HIGH), max_size=4, unique=True),
       rough=st.booleans())
def test_any_losses_end_with_the_smallest_that_was_measured(seed: int, limit: float, steps: int, grain: int,
                                                            known: list[int], rough: bool) -> None:
    noise = np.random.default_rng(seed).uniform(size=HIGH + 1)
    trend = np.linspace(1, 0, HIGH + 1)
    losses = noise if rough else trend + 0.1 * noise
    measured, count = search(lambda nbytes: float(losses[nbytes]), limit, steps, grain, tuple(known))
    assert count <= steps + 2
    found = border_of(limit, measured)
    passing = [one.nbytes for one in measured if one.loss <= limit]
    assert (found.within.nbytes if found.within else None) == min(passing, default=None)
    assert {one.nbytes for one in found.larger_outside} == {
        one.nbytes for one in measured if one.loss > limit and found.within and one.nbytes > found.within.nbytes}
    # What comes next depends on what was measured alone, in whatever order: a search can be cut anywhere.
    mixed = [measured[i] for i in np.random.default_rng(seed).permutation(len(measured))]
    assert next_budget(limit, mixed, LOW, HIGH, steps) is None


def test_a_loss_that_is_not_a_number_misses_every_target() -> None:
    measured, _ = search(lambda nbytes: math.nan if nbytes < 5000 else 0.0, 1e9, 12)
    found = border_of(1e9, measured).within
    assert found and 5000 <= found.nbytes < 5010


@given(measure=st.sampled_from(["nll", "kl"]), limit=st.floats(1e-9, 1e6))
def test_a_target_is_read_as_it_is_written(measure: str, limit: float) -> None:
    target = Target(measure, limit)
    assert Target.parse(str(target)) == target
    assert Target.parse(f" {str(target).upper().replace('=', ' = ').replace('+', ' + ')} ") == target


@pytest.mark.parametrize("text", ["", "0.1", "nll", "nll0.1", "nll=3", "nll-0.1", "nll+-1", "nll+0", "nll+1e999", "kl",
                                  "kl+0.1", "kl=", "kl=nan", "kl=inf", "kl=0.1%", "ppl+1", "nll+٣", "nll+0.1,kl=0.2"])
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Target.parse(text)


def test_confidence_is_calibrated() -> None:
    """If the true loss is the limit, any confidence is as likely as another."""
    rng = np.random.default_rng(0)
    target, windows = Target("nll", 0.1), 5
    draws = rng.normal(0.1, 0.03, (4000, windows))
    sure = np.array([target.confidence(Difference(row.mean(), row.std(ddof=1) / windows**0.5), windows)
                     for row in draws])
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert np.mean(sure < share) == pytest.approx(share, abs=0.025)
    assert target.confidence(Difference(0.093, 0.011), 10_000) == pytest.approx(0.7377, abs=1e-3)
    assert target.confidence(Difference(0.2, 0.0), 3) == 0.0 and target.confidence(Difference(0.1, 0.0), 3) == 1.0
    assert math.isnan(target.confidence(Difference(0.05, math.nan), 1))


def planted(sizes: list[float], losses: list[float], noise: float = 1e-4, budgets: list[int] | None = None) -> Curve:
    """A curve of plans with these losses above an unquantized model, on 16 windows."""
    rng = np.random.default_rng(1)
    base = 3 + rng.normal(0, 0.3, 16)

    def row(name: str, nbytes: int | None, loss: float) -> Row:
        score = Score(base + loss + rng.normal(0, noise, 16), loss, 0.5, window_kl=loss + rng.normal(0, noise, 16))
        return Row(name, score.window_nll, nbytes, *([2.0, 2.1] if nbytes else []), score=score)

    points = []
    for number, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
        rows = (row("plan", int(size), loss), row("unquantized", None, 0.0), row("uniform 2", int(min(sizes)), 1.0),
                row("uniform 4", int(max(sizes)), 0.1))
        points.append(Point(Path(f"run{number}"), f"{int(size)}B", budgets[number] if budgets else int(size), None,
                            Evaluation(rows, "text", 100).with_lines()))
    return Curve({"backend": "hqq"}, tuple(points))


@given(bend=st.integers(1, 5), left=st.floats(0.5, 2), right=st.floats(0.01, 0.4), scale=st.floats(0.1, 50),
       stretch=st.integers(1, 10_000))
def test_the_knee_is_the_bend_in_any_units(bend: int, left: float, right: float, scale: float, stretch: int) -> None:
    sizes = [1000.0 + stretch * 10 * i for i in range(7)]
    heights = np.array([left * max(0, bend - i) - right * max(0, i - bend) for i in range(7)])
    curve = planted(sizes, list(scale * heights))
    assert curve.knee is not None and curve.knee.point is curve.points[bend]
    share = (sizes[bend] - sizes[0]) / (sizes[-1] - sizes[0])
    depth = scale * (heights[0] + share * (heights[-1] - heights[0]) - heights[bend])
    assert curve.knee.depth.mean == pytest.approx(depth, abs=0.01 * scale + 1e-3) and curve.knee.depth.significant


def test_a_curve_without_a_bend_has_no_knee() -> None:
    sizes = [1000.0 + 10 * i for i in range(6)]
    assert planted(sizes, [1 - 0.1 * i for i in range(6)], noise=0.3).knee is None  # straight but for noise
    assert planted(sizes, [1 - 0.02 * i**2 for i in range(6)]).knee is None  # bent the other way
    assert planted(sizes[:2], [1.0, 0.1]).knee is None
    assert planted([1000.0] * 5, [1.0, 0.9, 0.8, 0.7, 0.6]).knee is None  # one size


def test_an_answer_says_what_is_not_certain() -> None:
    target = Target("nll", 0.2)
    falls = Outcome(target, planted([10, 20, 30, 40], [0.5, 0.25, 0.195, 0.05], noise=0.02))
    assert falls.within is falls.curve.points[2] and falls.outside is falls.curve.points[1]
    assert 0.05 < falls.confidence(falls.curve.points[2]) < 0.95 < falls.confidence(falls.curve.points[3])
    assert any("95% sure" in line for line in answer_lines(falls))
    waves = Outcome(target, planted([10, 20, 30, 40], [0.5, 0.15, 0.3, 0.05]))
    assert waves.within is waves.curve.points[1] and waves.larger_outside == (waves.curve.points[2],)
    assert any("do not fall with size" in line for line in answer_lines(waves))
    never = Outcome(target, planted([10, 20], [0.5, 0.3]))  # but uniform 4 is at 0.1
    assert never.within is None and never.uniform_within is not None and "uniform 4" in "".join(answer_lines(never))
    always = Outcome(target, planted([10, 20], [0.1, 0.05]))
    assert always.within is always.curve.points[0] and always.outside is None and always.uniform_within is None
    assert json.dumps([one.to_dict(Path()) for one in (falls, waves, never, always)])
    assert curve_lines(falls.curve, falls)


class Watcher:
    """Counts finished runs, and stops after some, as Ctrl-C does."""

    def __init__(self, stop_after: int = 1000) -> None:
        self.names: list[str] = []
        self._stop_after = stop_after

    @hookimpl
    def impq_run_finished(self, result: Any) -> None:
        self.names.append(result.folder.name)
        if len(self.names) == self._stop_after:
            raise KeyboardInterrupt


def watched(*observers: object) -> Plugins:
    plugins = Plugins()
    for observer in observers:
        plugins.watch(observer)
    return plugins


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    """A run whose KL falls with size."""
    return replace(tiny_config, backend="hqq", bits=("2", "3", "4"), value="kl", granularity="linear",
                   estimator="zscore", allocator="greedy", options={}, tracking_uri="none")


def files_of(folder: Path, *names: str) -> dict[str, bytes]:
    wanted = names or ("plan.json", "estimate.npz", "evaluation.json", "curve.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.name in wanted}


@pytest.mark.parametrize("estimator", ["isolated", "spqe"])  # makes its own estimate, leaves losses to fit
def test_points_are_single_runs_bit_for_bit(config: RunConfig, estimator: str) -> None:
    budgets = ("2.25bits", "2.75bits", "3.5bits")
    config = replace(config, estimator=estimator, granularity="block",
                     options={"estimator": {"permutations": 2}} if estimator == "spqe" else {})
    folder = run_sweep(Sweep(config, {"budget": budgets}), Plugins())
    alone = run(replace(config, budget="2.75bits"), Plugins()).folder
    extend_curve(alone, ["3.5bits", "2.25bits"], plugins=watched(watcher := Watcher()))
    assert len(watcher.names) == 2  # its own plan is not measured again
    [swept], [grown] = read_curves(folder), read_curves(alone)
    assert [point.budget for point in swept.points] == [point.budget for point in grown.points] == list(budgets)
    for one, other in zip(swept.points, grown.points, strict=True):
        single = run(replace(config, budget=one.budget), Plugins()).folder
        for file in ("evaluation.json", "estimate.npz"):
            assert ((one.run / file).read_bytes() == (other.run / file).read_bytes()
                    == (single / file).read_bytes()), (one.budget, file)
        layers = [json.loads((run / "plan.json").read_text())["layers"] for run in (one.run, other.run, single)]
        assert layers[0] == layers[1] == layers[2]
    assert (replace_runs(folder / "curve.json") == replace_runs(alone / "curve.json"))
    [contest], _ = gather([alone])
    assert len(contest.contestants) == 3


def replace_runs(path: Path) -> dict[str, Any]:
    """The numbers of a curve.json, without the names of its runs."""
    data: dict[str, Any] = json.loads(path.read_text())
    for curve in data["curves"]:
        for point in curve["points"]:
            point.pop("run")
        (curve["knee"] or {}).pop("run", None)
    return data


def test_a_search_that_was_cut_ends_as_if_it_had_not_been(config: RunConfig) -> None:
    [curve] = read_curves(run_sweep(Sweep(config, {"budget": ("2bits", "4bits")}), Plugins()))
    narrow, wide = (point.divergence.mean for point in curve.points)
    sweep = Sweep(config, target=f"kl={(narrow * wide)**0.5:.6f}", steps=4)
    whole = run_sweep(sweep, watched(every := Watcher()))
    [curve] = read_curves(whole)
    answer = Outcome(Target.parse(sweep.target), curve)
    assert answer.within and answer.outside and answer.outside.nbytes < answer.within.nbytes
    assert answer.loss(answer.within).mean <= answer.target.limit < answer.loss(answer.outside).mean
    assert 3 <= len(curve.points) <= 6
    kinds = {point.budget: {row.kind for row in point.evaluation.rows} for point in curve.points}
    assert [budget for budget, rows in kinds.items() if "random" in rows] == [answer.within.budget]
    for stop_after in range(1, len(every.names), 2):
        before = set(Path(config.output).iterdir())
        with pytest.raises(KeyboardInterrupt):
            run_sweep(sweep, watched(Watcher(stop_after)))
        [folder] = set(Path(config.output).iterdir()) - before
        assert run_sweep(Sweep.open(str(folder)), Plugins(), folder) == folder
        assert files_of(folder) == files_of(whole)
    # From the folder of a single run the same plan is found, and asking again measures nothing.
    single = run(replace(config, budget="4bits"), Plugins()).folder
    with pytest.raises(KeyboardInterrupt):
        extend_curve(single, target=sweep.target, steps=4, plugins=watched(Watcher(2)))
    found = extend_curve(single, target=sweep.target, steps=4)
    assert found and found.within and found.within.row.window_nll.tolist() == answer.within.row.window_nll.tolist()
    scores = (single / "scores.jsonl").read_bytes()
    extend_curve(single, target=sweep.target, steps=4, plugins=watched(watcher := Watcher()))
    assert watcher.names == [] and (single / "scores.jsonl").read_bytes() == scores
    assert json.loads((single / "curve.json").read_text())["target"]["within"]["bytes"] == found.within.nbytes
    assert resume(single, Plugins()).evaluation  # further budgets are no part of the run itself


def test_the_forecast_of_a_search_is_an_upper_bound(config: RunConfig) -> None:
    sweep = Sweep(replace(config, cache=False), target="kl=0.05", steps=3)
    [search] = forecast_sweep(sweep).searches
    folder = run_sweep(sweep, Plugins())
    scored = len((folder / "scores-hqq.jsonl").read_text().splitlines()) - 1
    forward = forecast_sweep(replace(sweep, steps=4)).searches[0].forwards["evaluate"] - search.forwards["evaluate"]
    assert 0 < scored * forward <= search.forwards["evaluate"] and search.budgets == ()


def test_the_command_prints_draws_and_tracks(config: RunConfig, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "impq.toml").write_text(replace(config, tracking_uri=uri).to_toml())
    done = CliRunner().invoke(cli, ["run", "--budget", "2.5bits, 3.5bits"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    [folder] = Path(config.output).iterdir()
    again = CliRunner().invoke(cli, ["curve", str(folder), "--budget", "3bits"], catch_exceptions=False)
    assert again.exit_code == 0, again.output
    shown = CliRunner().invoke(cli, ["curve", str(folder), "--json"], catch_exceptions=False)
    data = json.loads((folder / "curve.json").read_text())
    assert data["format"] == "impq-curve/1"
    [curve] = data["curves"]
    [printed] = json.loads(shown.stdout)["result"]["curves"]
    assert [plan["excess_nats"] for plan in printed["plans"]] == [point["excess"] for point in curve["points"]]
    assert [point["budget"] for point in curve["points"]] == ["2.5bits", "3bits", "3.5bits"]
    for point in curve["points"]:
        evaluation = RunFolder(folder / point["run"]).read_evaluation()
        minus = evaluation.rows[0].minus(evaluation.row("unquantized"))
        assert (point["excess"], point["excess_stderr"]) == pytest.approx(minus)
        line = evaluation.rows[0].minus(evaluation.row("line of uniforms"))
        assert (point["minus_line"], point["minus_line_stderr"]) == pytest.approx(line)
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    client = MlflowClient(uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    [parent] = [r for r in runs if r.data.tags.get("impq.kind") == "sweep"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 3 and len(runs) == 4 and {r.info.status for r in runs} == {"FINISHED"}
    history = client.get_metric_history(parent.info.run_id, "curve_excess")
    assert {(m.step, m.value) for m in history} == {(p["bytes"], p["excess"]) for p in curve["points"]}
    assert {"curve.json", "curve.png"} <= {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_further_budgets_of_a_run_are_below_it_in_mlflow(config: RunConfig) -> None:
    from mlflow import MlflowClient

    tracked = replace(config, tracking_uri=f"sqlite:///{Path(config.output).parent}/mlflow.db", budget="3bits")
    folder = run(tracked, watched(Tracker(tracked.tracking_uri, ""))).folder
    extend_curve(folder, ["2.5bits"], plugins=watched(Tracker(tracked.tracking_uri, "")))
    client = MlflowClient(tracked.tracking_uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    parent = client.get_run(json.loads((folder / "mlflow.json").read_text())["run_id"])
    [child] = [r for r in runs if r.info.run_id != parent.info.run_id]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id and "impq.kind" not in parent.data.tags
    assert parent.data.params["budget"] == "3bits" and child.data.params["budget"] == "2.5bits"
    assert {r.info.status for r in runs} == {"FINISHED"} and "curve_excess" in parent.data.metrics


def test_curves_of_several_parts_are_not_extended(config: RunConfig) -> None:
    folder = run_sweep(Sweep(config, {"estimator": ("zscore", "random"), "budget": ("3bits",)}), Plugins())
    assert len(read_curves(folder)) == 2
    with pytest.raises(ImpqError, match="several curves"):
        extend_curve(folder, ["2.5bits"])
    child = next((folder / "runs").iterdir())
    extend_curve(child, ["2.5bits"])
    assert [point.budget for point in read_curves(child)[0].points] == ["2.5bits", "3bits"]


def test_other_texts_or_budgets_are_refused_before_the_model_is_loaded(config: RunConfig, texts: tuple[Path, Path],
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(replace(config, budget="3bits"), Plugins()).folder
    monkeypatch.setattr("impq_core.runs.points.Session", None)
    for budgets, target in ((["9bits"], ""), (["1B"], ""), ([], "nll+"), (["3bits"], "kl=0.1"), (["2bits", ""], "")):
        with pytest.raises(UsageError):
            extend_curve(folder, budgets, target)
    assert extend_curve(folder, ["3bits"]) is None  # it is there
    toml = folder / "impq.toml"
    toml.write_text(toml.read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(ImpqError, match="cannot be continued"):
        extend_curve(folder, ["2.5bits"])
