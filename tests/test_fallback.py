"""The uniform model in place of a plan that does not beat it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from impq_core.compare.read import read_contestant
from impq_core.config import RunConfig, TextConfig
from impq_core.documents.runs import RunDocument, UniformTestDocument
from impq_core.errors import UsageError
from impq_core.evaluate import Evaluator
from impq_core.plugins import Plugins
from impq_core.runs.curves import read_point
from impq_core.runs.folder import RunFolder
from impq_core.runs.forecast import forecast_run
from impq_core.runs.grid import Sweep
from impq_core.runs.pipeline import resume, run
from impq_core.runs.prepare import prepare
from impq_core.runs.reading import read_run
from impq_core.runs.sweep import run_sweep
from impq_core.space import FloatArray
from impq_core.terminal import summary
from impq_core.testing import made_text, planted_estimate
from impq_core.tracking.pages import run_numbers
from impq_core.types import Plan
from impq_core.uniform_test import UniformTest, uniform_within

FINITE = st.floats(0, 20, width=32)
LOSSES = st.integers(1, 6).flatmap(lambda n: st.tuples(*[arrays(np.float64, n, elements=FINITE)] * 2))


def plan_of(seed: int = 0, budget: float = 0.5) -> Plan:
    estimate = planted_estimate(seed, 4, (4, 3, 2), 0.1)
    space = estimate.space
    size = round(space.low_bytes + budget * (space.high_bytes - space.low_bytes))
    return Plan(space, space.uniform(2), size)


def judged(of_plan: FloatArray, of_uniform: FloatArray) -> UniformTest:
    plan = plan_of()
    return UniformTest.of(plan, plan.space.uniform(1), (of_plan, of_uniform), None, "nll", 100)


@given(LOSSES)
def test_a_plan_stays_only_if_its_gain_is_larger_than_chance(losses: tuple[FloatArray, FloatArray]) -> None:
    test = judged(*losses)
    gain = losses[1] - losses[0]
    if np.ptp(gain) == 0:  # also one window: its gain decides
        assert test.replaces == (not gain.mean() > 0)
    elif np.ptp(gain) >= 1e-6:
        chance = scipy.stats.ttest_1samp(gain, 0, alternative="greater").pvalue
        if not math.isclose(chance, scipy.stats.norm.sf(1), abs_tol=1e-6):
            assert test.replaces == (chance > scipy.stats.norm.sf(1))
    assert UniformTest.from_dict(json.loads(json.dumps(test.to_dict()))).to_dict() == test.to_dict()


@pytest.mark.parametrize("windows", [2, 3, 16])
def test_a_worthless_plan_passes_in_sixteen_of_a_hundred_runs(windows: int) -> None:
    gains = np.random.default_rng(windows).normal(size=(2000, windows))
    passed = np.mean([not judged(3 - gain, np.full(windows, 3.0)).replaces for gain in gains])
    assert passed == pytest.approx(scipy.stats.norm.sf(1), abs=0.025)  # three standard errors of 2000 runs


@pytest.mark.parametrize(("of_plan", "of_uniform", "replaces"), [
    ([math.inf, 1.0], [3.0, 3.0], True), ([math.nan, 1.0], [3.0, 3.0], True), ([1.0, 1.0], [math.inf, 3.0], False),
    ([math.inf, 1.0], [math.inf, 3.0], True)])
def test_a_loss_that_is_not_finite_never_wins(of_plan: list[float], of_uniform: list[float], replaces: bool) -> None:
    test = judged(np.array(of_plan), np.array(of_uniform))
    assert test.replaces == replaces
    assert UniformTest.from_dict(json.loads(json.dumps(test.to_dict()))).replaces == replaces


@given(st.integers(0, 50), st.floats(0, 1))
def test_the_uniform_model_is_the_largest_within_the_budget(seed: int, share: float) -> None:
    plan = plan_of(seed, share)
    space = plan.space
    sizes = [space.bytes_of(space.uniform(k)) for k in range(3)]
    largest = max(size for size in sizes if size <= plan.budget_bytes)
    found = uniform_within(plan)
    assert (plan.nbytes if found is None else space.bytes_of(found)) == largest
    widest = replace(plan, pick=space.uniform(sizes.index(largest)))
    assert uniform_within(widest) is None


@pytest.fixture
def config(tiny_config: RunConfig, variants: None) -> RunConfig:
    """Uniform 3 has the size of the plans."""
    return replace(tiny_config, bits=("2", "3", "4"), budget="3bits", estimator="random", fallback="auto",
                   tracking_uri="none", options={"backend": {"grid": "min-max"}})


def decide(monkeypatch: pytest.MonkeyPatch, replaces: bool) -> None:
    monkeypatch.setattr(UniformTest, "replaces", property(lambda self: replaces))


def test_a_plan_that_loses_is_replaced_in_every_file_and_answer(config: RunConfig,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    raw = run(replace(config, fallback="no"))
    decide(monkeypatch, True)
    result = run(config)
    assert result.plan is not None and raw.plan is not None and result.evaluation is not None
    assert set(result.plan.pick.tolist()) == {1}
    row = result.evaluation.row("uniform 3")
    np.testing.assert_array_equal(result.evaluation.plan.window_nll, row.window_nll)
    assert raw.evaluation is not None
    np.testing.assert_array_equal(result.evaluation.row("estimated plan").window_nll, raw.evaluation.plan.window_nll)
    assert "estimated plan" not in {row.name for row in raw.evaluation.rows}
    folder = RunFolder(result.folder)
    np.testing.assert_array_equal(Plan.load(folder.estimated_plan, raw.plan.space).pick, raw.plan.pick)
    assert result.uniform_test is not None and result.plan.provenance["in_place_of"]["uniform"] == "3"
    again = read_run(result.folder)
    assert again.plan is not None and again.uniform_test == result.uniform_test
    np.testing.assert_array_equal(again.plan.pick, result.plan.pick)
    assert run_numbers(again)["uniform_is_plan"] == 1 and "optimality_gap" not in run_numbers(again)
    assert any("uniform 3" in line and "--no-fallback" in line for line in summary(again))
    assert read_contestant(result.folder).verdict.startswith("is uniform 3; ")
    assert read_point(folder).evaluation.plan_is == "uniform 3"
    assert RunDocument.of(again).uniform_test == UniformTestDocument.of(result.uniform_test)
    assert raw.uniform_test is None and not RunFolder(raw.folder).uniform_test.exists()


def test_the_decision_is_that_of_the_losses_on_windows_that_the_search_did_not_read(config: RunConfig) -> None:
    result, prepared = run(config), prepare(config, Plugins())
    assert result.uniform_test is not None and prepared.held_back is not None
    scores = [json.loads(line) for line in RunFolder(result.folder).held_back_scores.read_text().splitlines()[1:]]
    apart = np.array(scores[0]["window_nll"]) - np.array(scores[1]["window_nll"])
    assert result.uniform_test.minus_uniform == pytest.approx(apart.mean())
    assert len(apart) == config.held_back == result.uniform_test.windows == 2


def test_gradients_read_as_many_windows_as_was_asked_for(config: RunConfig) -> None:
    """And the test has what they leave."""
    asked = replace(config, calibration=replace(config.calibration, windows=16), estimator="guided-output")
    for probes, refine, held in ((0, 0, 4), (12, 0, 4), (13, 0, 3), (16, 0, 0), (10, 8, 2), (12, 8, 0)):
        prepared = prepare(replace(asked, probe_windows=probes, refine=refine), Plugins())
        referee = asked.game_windows if refine else 0
        assert prepared.probed is not None and len(prepared.probed.ids) == (probes or 16 - held - referee)
        assert (len(prepared.held_back.ids) if prepared.held_back else 0) == held
    for probes, refine in ((17, 0), (13, 8)):
        with pytest.raises(UsageError, match="probe_windows"):
            replace(asked, probe_windows=probes, refine=refine)


@pytest.mark.parametrize("refine", [0, 8])
def test_held_back_windows_are_read_by_nothing_else(config: RunConfig, refine: int) -> None:
    calibration = replace(config.calibration, windows=16)
    prepared = prepare(replace(config, calibration=calibration, refine=refine, backend="gptq"), Plugins())
    assert prepared.held_back and prepared.calibration and prepared.probed and prepared.spare and prepared.game_windows
    held = {tuple(window) for window in prepared.held_back.ids.tolist()}
    assert len(held) == 4
    for part in (prepared.probed, prepared.spare, prepared.game_windows):
        assert not held & {tuple(window) for window in part.ids.tolist()}
    everything = {tuple(window) for window in prepared.calibration.ids.tolist()}
    referee = ({tuple(window) for window in prepared.refiner_windows["referee"].ids.tolist()} if refine else set())
    assert held | {tuple(window) for window in prepared.probed.ids.tolist()} | referee == everything


def test_game_gradients_and_test_read_all_parts_of_a_text(config: RunConfig, tmp_path: Path) -> None:
    """Whatever changes along a file, such as its language, is in the windows of each."""
    halves = [made_text(seed, 20_000).lower() for seed in range(2)]
    (tmp_path / "sorted.txt").write_text(halves[0] + halves[1].upper())
    calibration = TextConfig(str(tmp_path / "sorted.txt"), 64, 48)
    for seed in range(3):
        sorted_text = replace(config, calibration=replace(calibration, seed=seed), game_windows=16, refine=8,
                              probe_windows=16, backend="gptq")
        prepared = prepare(sorted_text, Plugins())
        for windows in (*prepared.refiner_windows.values(), prepared.probed, prepared.held_back):
            assert windows is not None
            upper = [bool(np.isin(row, range(ord("A"), ord("Z") + 1)).any()) for row in windows.ids]
            assert 3 <= sum(upper) <= 13
        again = prepare(sorted_text, Plugins()).held_back
        assert prepared.held_back and again and again.digest == prepared.held_back.digest


def test_a_stopped_test_is_continued_bit_for_bit(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, True)
    whole = RunFolder(run(config).folder)
    wanted = {path: path.read_bytes() for path in (whole.plan, whole.estimated_plan, whole.uniform_test,
                                                   whole.held_back_scores, whole.evaluation)}
    lines = whole.held_back_scores.read_bytes().splitlines(keepends=True)
    whole.held_back_scores.write_bytes(b"".join(lines[:2]))  # the plan's score, and not the uniform model's
    for path in (whole.uniform_test, whole.evaluation):
        path.unlink()
    resume(whole.path)
    assert {path: path.read_bytes() for path in wanted} == wanted

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("impq_core.runs.pipeline.against_uniform", stop)
    with pytest.raises(KeyboardInterrupt):
        resume(whole.path)
    assert whole.plan.read_bytes() == wanted[whole.plan]


def test_a_plan_is_not_tested_without_windows_or_if_it_was_given(config: RunConfig) -> None:
    every = replace(config, game_windows=config.calibration.windows)
    assert every.held_back == 0 and run(every).uniform_test is None
    first = run(replace(config, fallback="no"))
    given_plan = run(replace(config, plan=str(first.folder / "plan.json"), budget=""))
    assert given_plan.uniform_test is None and given_plan.plan is not None and first.plan is not None
    np.testing.assert_array_equal(given_plan.plan.pick, first.plan.pick)


def test_a_stopped_score_costs_nothing_again(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run of the same plan reads both scores from the cache."""
    run(config)
    measured: list[int] = []
    before = Evaluator._measure
    monkeypatch.setattr(Evaluator, "_measure", lambda self, some, passed: (measured.append(len(some)),
                                                                           before(self, some, passed))[1])
    run(config)
    assert not sum(measured)


def test_sweeps_over_parts_compare_plans_as_they_are(config: RunConfig) -> None:
    plugins = Plugins()
    parts, budgets = {"estimator": ("random", "first-last")}, {"budget": ("2.5bits", "3bits")}
    assert {one.fallback for one in Sweep(config, parts).configs(plugins)} == {"no"}
    assert {one.fallback for one in Sweep(replace(config, fallback="yes"), parts).configs(plugins)} == {"yes"}
    assert all(one.held_back for one in Sweep(config, budgets).configs(plugins))


def test_every_budget_of_a_run_is_tested(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, True)
    folder = run_sweep(Sweep(replace(config, budget=""), {"budget": ("2.5bits", "3bits")}))
    plans = [read_run(path).plan for path in sorted(Path(folder, "runs").iterdir())]
    assert [set(plan.pick.tolist()) for plan in plans if plan] == [{2}, {1}]


def test_a_dry_run_counts_the_test(config: RunConfig) -> None:
    with_test, without = (forecast_run(replace(config, fallback=which)).searches[0].forwards["fallback"]
                          for which in ("yes", "no"))
    assert without == 0 and with_test == pytest.approx(3 * 2 / config.game_windows)
