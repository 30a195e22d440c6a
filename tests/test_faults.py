"""Faults of version 0.1 that belong to no component alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from impq_core.config import RunConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.evaluate import RANDOM_PLANS
from impq_core.interfaces import NO_FILE, InputFile, Inspector, Probe
from impq_core.parts import Parts
from impq_core.plugins import Plugins, build_options
from impq_core.runs.allocate import allocate_run
from impq_core.runs.children import Child
from impq_core.runs.pipeline import REFINE_STREAM, resume, run
from impq_core.testing import PlantedProbe, planted_estimate
from impq_core.types import SensitivityEstimate


@dataclass(frozen=True)
class _Options:
    prior: InputFile = NO_FILE


class _Reader(Inspector):
    Options = _Options

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """Another space than the probe's."""
        return planted_estimate(0, len(probe.space) + 1)


def test_a_file_that_an_option_names_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = build_options(_Reader, "estimator", "mine", {"prior": "sub/estimate.npz"})
    assert options.prior == str(tmp_path / "sub" / "estimate.npz")
    assert build_options(_Reader, "estimator", "mine", {"prior": ""}).prior == ""


def test_a_prior_named_by_a_relative_path_resumes_elsewhere_and_is_part_of_the_run(
        tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny_config, backend="hqq", options={"estimator": {"permutations": 4}}, tracking_uri="none")
    first = run(config)
    monkeypatch.chdir(first.folder)
    priored = run(replace(config, surrogate="regression", options={**config.options,
                                                                   "surrogate": {"prior": "estimate.npz"}}))
    monkeypatch.chdir(tmp_path)
    assert resume(priored.folder).plan.pick.tolist() == priored.plan.pick.tolist()
    second = planted_estimate(3, 4)
    replace(second, space=priored.estimate.space).save(first.folder / "estimate.npz")
    with pytest.raises(ImpqError, match="prior"):
        resume(priored.folder)


def test_a_given_plan_is_held_to_the_budget(tiny_config: RunConfig) -> None:
    config = replace(tiny_config, backend="hqq", estimator="random", options={}, tracking_uri="none")
    made = run(replace(config, budget="3.5bits"))
    given = replace(config, plan=str(made.folder / "plan.json"))
    with pytest.raises(UsageError, match=r"more than the \d+ of --budget 2.5bits"):
        run(replace(given, budget="2.5bits"))
    applied = run(given)  # without a budget, the plan is its own
    assert applied.plan.budget_bytes == applied.plan.nbytes == made.plan.nbytes
    assert resume(applied.folder).plan.nbytes == made.plan.nbytes


def test_budgets_of_every_digit_are_resumed_and_allocated(tiny_config: RunConfig) -> None:
    config = replace(tiny_config, backend="hqq", estimator="random", options={}, tracking_uri="none")
    nbytes = run(config).plan.space.low_bytes + 10_001
    made = run(replace(config, budget=f"{nbytes}B"))
    assert made.plan.budget_bytes == nbytes and resume(made.folder).plan.budget_bytes == nbytes
    [planned] = allocate_run(made.folder, [f"{nbytes + 1}B"])
    assert planned.plan.budget_bytes == nbytes + 1


def test_two_names_of_a_sweep_are_two_folders() -> None:
    taken: set[str] = set()
    parts = SimpleNamespace(estimator=SimpleNamespace(needs_surrogate=False))
    for budget in ("60%", "60 %", "60percent", "1600001B", "1600002B", "a/b", "a\\b", "a b"):
        run = SimpleNamespace(config=RunConfig(budget=budget), parts=parts)
        taken.add(Child.of(run, taken).name)  # type: ignore[arg-type]
    assert len(taken) == 8 and not any(set(name) & set("/\\% ") for name in taken)


def test_an_estimate_of_another_space_is_refused() -> None:
    probe = PlantedProbe(planted_estimate(0, 4))
    parts = replace(Parts.build(RunConfig(estimator="random"), Plugins()), estimator=_Reader())
    with pytest.raises(ImpqError, match=r"_Reader returned SensitivityEstimate of another search space"):
        parts.measure(None, probe, np.random.default_rng(0))


def test_random_draws_of_a_run_are_independent_streams() -> None:
    streams = [(0,), *((0, plan) for plan in range(RANDOM_PLANS)), (0, *REFINE_STREAM)]
    assert len({np.random.default_rng(list(stream)).random() for stream in streams[1:]}) == len(streams) - 1
