"""The suites of impq_core.testing fail for parts with one fault each, in the right test."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np
import pytest
import torch
from impq_greedy.allocators import Greedy
from impq_refine.swaps import Swaps
from impq_scores.gradients import LlmMq
from impq_scores.inspected import ZScore
from impq_scores.played import Isolated
from impq_surrogates.shapley import Additive

from impq_core.errors import ImpqError
from impq_core.hookspecs import Component, hookimpl
from impq_core.interfaces import Game, Inspector, Part, Probe, Refiner, Statistics, Variant
from impq_core.space import Choice, FloatArray, IntArray, LinearSpec, SearchSpace
from impq_core.testing import AllocatorSuite, BackendSuite, EstimatorSuite, PluginSuite, RefinerSuite, SurrogateSuite
from impq_core.testing.part import PartSuite, Suite
from impq_core.testing.rounding import Rounding
from impq_core.types import Measurements, Plan, SensitivityEstimate
from impq_core.workload import Workload

Rng = np.random.Generator


IMPORTS = "test_nothing_heavy_is_imported_with_it"


def failures(kind: type[Suite], skip: Collection[str] = (IMPORTS,), **attributes: object) -> set[str]:
    """Names of the tests that fail for a part. Parts of this file import torch with it: that test is skipped."""
    suite, found = type("TestIt", (kind,), attributes)(), set()
    for name in dir(suite):
        if name.startswith("test_") and name not in skip:
            try:
                getattr(suite, name)()
            except Exception:
                found.add(name)
    return found


class Careless(Isolated):
    def estimate(self, game: Game, rng: Rng) -> SensitivityEstimate:
        estimate = super().estimate(game, rng)
        return replace(estimate, linear=estimate.linear * np.random.random(), forwards=1.0)


class Backwards(Isolated):
    def estimate(self, game: Game, rng: Rng) -> SensitivityEstimate:
        estimate = super().estimate(game, rng)
        return replace(estimate, linear=-estimate.linear)


class Modest(Isolated):
    def workload(self, space: SearchSpace, sets: int) -> Workload:
        work = super().workload(space, sets)
        return replace(work, losses=work.losses / 2)


class Nameless(ZScore):
    def inspect(self, probe: Probe, rng: Rng) -> SensitivityEstimate:
        return replace(super().inspect(probe, rng), method="")


class Vandal(ZScore):
    def inspect(self, probe: Probe, rng: Rng) -> SensitivityEstimate:
        probe.weight(probe.space.layers[0].linears[0]).mul_(2)
        return super().inspect(probe, rng)


class Curious(LlmMq):
    needs = frozenset()


class Shy(Inspector):
    def inspect(self, probe: Probe, rng: Rng) -> SensitivityEstimate:
        return None  # type: ignore[return-value]


@pytest.mark.parametrize(("part", "wrong"), [
    (Careless, {"test_every_draw_comes_from_the_generator_given", "test_the_cost_is_what_the_model_did"}),
    (Backwards, {"test_what_matters_is_found"}), (Modest, {"test_the_work_is_forecast"}),
    (Nameless, {"test_a_model_is_estimated"}), (Vandal, {"test_weights_are_left_alone"}),
    (Curious, {"test_it_looks_only_at_what_it_says_it_needs"}), (Isolated, set()), (ZScore, set())])
def test_estimators(part: type[Part], wrong: set[str]) -> None:
    assert failures(EstimatorSuite, part=part) == wrong


def test_an_estimator_without_an_estimate_is_told_so() -> None:
    suite = type("TestIt", (EstimatorSuite,), {"part": Shy})()
    with pytest.raises(ImpqError, match=r"test_suites\.Shy\.inspect returned NoneType, not SensitivityEstimate"):
        suite.test_a_model_is_estimated()


class Unfair(Additive):
    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        losses = np.nan_to_num(measurements.losses)
        estimate = super().fit(replace(measurements, losses=losses))
        return replace(estimate, linear=estimate.linear[::-1], forwards=estimate.forwards + 1)


def test_surrogates() -> None:
    assert failures(SurrogateSuite, part=Unfair) == {
        "test_the_estimate_names_its_space_method_and_cost", "test_an_additive_game_is_recovered",
        "test_a_loss_that_is_not_finite_is_refused", "test_losses_of_several_sets_of_windows_are_fitted"}


class Boastful(Greedy):
    def allocate(self, estimate: SensitivityEstimate, budget_bytes: int) -> Plan:
        plan = super().allocate(estimate, max(budget_bytes, estimate.space.low_bytes))
        return replace(plan, bound=plan.predicted_loss)


def test_allocators() -> None:
    assert failures(AllocatorSuite, part=Boastful) == {
        "test_plans_fit_and_keep_their_promises", "test_a_budget_below_everything_is_refused", "test_plans_keep_limits"}
    assert failures(AllocatorSuite, part=Greedy, exact=True) == {
        "test_plans_fit_and_keep_their_promises", "test_plans_keep_limits"}


class Reckless(Refiner):
    """Takes any plan that looks better to the game alone."""

    def refine(self, plan: Plan, estimate: SensitivityEstimate | None, game: Game, referee: Game, forwards: float,
               rng: Rng) -> Plan:
        for _ in range(int(forwards)):
            other = replace(plan, pick=rng.permutation(plan.pick), budget_bytes=10**9, predicted_loss=None)
            if other.nbytes <= plan.budget_bytes and game.loss(other.pick) < game.loss(plan.pick):
                plan = other
        return plan


class Brittle(Swaps):
    """Stops at the first loss that is not finite."""

    def refine(self, plan: Plan, estimate: SensitivityEstimate | None, game: Game, referee: Game, forwards: float,
               rng: Rng) -> Plan:
        class Cautious:
            def __getattr__(self, name: str) -> object:
                return getattr(game, name)

            def window_losses(self, pick: IntArray) -> FloatArray:
                losses = game.window_losses(pick)
                if not np.isfinite(losses).all():
                    raise StopIteration
                return losses

        try:
            return super().refine(plan, estimate, cast(Game, Cautious()), referee, forwards, rng)
        except StopIteration:
            return plan


def test_refiners() -> None:
    assert failures(RefinerSuite, part=Brittle, enough=300) == {
        "test_losses_that_are_not_finite_are_passed_over"}
    assert failures(RefinerSuite, part=Reckless) == {
        "test_a_random_plan_becomes_nearly_the_best", "test_nothing_worse_is_taken",
        "test_a_referee_that_sees_no_difference_lets_nothing_pass"}


class Endless(Refiner):
    def refine(self, plan: Plan, estimate: SensitivityEstimate | None, game: Game, referee: Game, forwards: float,
               rng: Rng) -> Plan:
        while game.forwards < forwards:
            game.loss(plan.pick)
        return plan


def test_a_refiner_without_an_end() -> None:
    suite = type("TestIt", (RefinerSuite,), {"part": Endless})()
    with pytest.raises(AssertionError, match="does not end"):
        suite.test_it_ends_where_there_is_nothing_left_to_measure()


class Sloppy(Rounding):
    def nbytes(self, linear: LinearSpec, choice: Choice) -> int:
        return linear.parameters

    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        if choice.bits == 3:
            weight.mul_(1.01)
        return super().quantize(weight, choice, statistics)

    def check(self, linear: LinearSpec, choice: Choice) -> None:
        if linear.rows % 2:
            raise ImpqError("no")


def test_backends() -> None:
    assert failures(BackendSuite, part=Rounding) == set()
    assert failures(BackendSuite, part=Sloppy) == {
        "test_sizes_are_exact", "test_the_same_weight_makes_the_same_variant_and_nothing_is_touched",
        "test_awkward_shapes_are_exact_or_refused_by_name",
        "test_linears_quantized_together_are_those_quantized_alone"}


def _joined(backend: Rounding, weights: Mapping[LinearSpec, torch.Tensor], wanted: Sequence[tuple[LinearSpec, Choice]],
            statistics: Statistics | None) -> Iterator[tuple[LinearSpec, Variant]]:
    """Rows of all linears share one scale."""
    most = max((float(weights[linear].abs().max()) for linear, _ in wanted), default=0.0)
    for linear, choice in wanted:
        variant = backend.quantize(weights[linear], choice, statistics)
        yield linear, replace(variant, tensors={**variant.tensors, "scale": variant.tensors["scale"].clamp(min=most)})


def _disordered(backend: Rounding, weights: Mapping[LinearSpec, torch.Tensor],
                wanted: Sequence[tuple[LinearSpec, Choice]],
                statistics: Statistics | None) -> Iterator[tuple[LinearSpec, Variant]]:
    return Rounding.quantize_together(backend, weights, wanted[::-1], statistics)


@pytest.mark.parametrize("together", [_joined, _disordered])
def test_backends_that_quantize_together(together: Callable[..., object]) -> None:
    part = type("Bad", (Rounding,), {"quantize_together": together})
    assert failures(BackendSuite, part=part) == {"test_linears_quantized_together_are_those_quantized_alone"}


class Transposed(Rounding):
    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        variant = super().quantize(weight, choice, statistics)
        return replace(variant, tensors={**variant.tensors, "codes": variant.tensors["codes"].T.contiguous().T})

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        return super().dequantize(variant, linear).contiguous()


def test_backends_whose_variants_are_laid_out_otherwise() -> None:
    assert failures(BackendSuite, part=Transposed) == {"test_variants_are_contiguous_in_host_memory"}


@dataclass
class Untold:
    depth: int = 1
    where: tuple[int, ...] = ()


def test_options_and_imports() -> None:
    part = type("Bad", (ZScore,), {"Options": Untold, "__module__": "impq_core.model.bank"})
    assert failures(PartSuite, skip=(), part=part) == {"test_options_are_described", IMPORTS}


class Forgetful(Inspector):
    def inspect(self, probe: Probe, rng: Rng) -> SensitivityEstimate:
        return SensitivityEstimate(probe.space, np.zeros(probe.space.nbytes.shape), method="nothing")


def test_options_that_were_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("impq_forgetful")
    module.Options = Untold  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "impq_forgetful", module)
    monkeypatch.setattr(Forgetful, "__module__", "impq_forgetful")
    suite = type("TestIt", (PartSuite,), {"part": Forgetful})()
    with pytest.raises(AssertionError, match="lacks 'Options = Options'"):
        suite.test_options_are_described()


def _plugin(monkeypatch: pytest.MonkeyPatch, **functions: object) -> types.ModuleType:
    module = types.ModuleType("impq_imagined")
    for name, function in functions.items():
        function.__name__ = name  # type: ignore[attr-defined]
        setattr(module, name, hookimpl(function))
    monkeypatch.setitem(sys.modules, "impq_imagined", module)
    return module


@pytest.mark.parametrize(("hook", "offered", "wrong"), [
    ("impq_estimators", [], set()),
    ("impq_estimator", [], {"test_it_is_used"}),
    ("impq_allocators", [Component("mine", "impq_greedy.allocators:Greedy", "greedy again")], set()),
    ("impq_allocators", [Component("greedy", "impq_greedy.allocators:Greedy", "again")], {"test_names_are_free"}),
    ("impq_allocators", [Component("mine", "impq_greedy.allocators:Greedy")], {"test_every_offer_has_a_summary"}),
    ("impq_estimators", [Component("mine", "impq_greedy.allocators:Greedy", "no estimator")],
     {"test_every_offer_loads"})])
def test_plugins(hook: str, offered: list[Component], wrong: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures(PluginSuite, plugin=_plugin(monkeypatch, **{hook: lambda: offered})) == wrong


def test_a_failure_that_is_expected_must_happen() -> None:
    class TestIt(EstimatorSuite):
        part = Backwards
        expected_failures: ClassVar[dict[str, str]] = {"test_what_matters_is_found": "it is backwards"}

    [mark] = TestIt.test_what_matters_is_found.pytestmark  # type: ignore[attr-defined]
    assert (mark.name, mark.kwargs) == ("xfail", {"reason": "it is backwards", "strict": True})
    assert not hasattr(EstimatorSuite.test_what_matters_is_found, "pytestmark")
    with pytest.raises(TypeError, match="did you mean 'test_what_matters_is_found'"):
        type("TestThat", (EstimatorSuite,), {"expected_failures": {"test_what_matters_is_fond": "a typo"}})
