"""Every part of impq passes the public suites of ``impq_core.testing``, as any plugin's parts must."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from impq_gguf.backend import Gguf
from impq_gguf.meter import LlamaCpp
from impq_gguf.types import TYPES
from impq_gptq.backend import Gptq
from impq_greedy.allocators import Exhaustive, Greedy
from impq_hqq.backend import Hqq
from impq_meters.table import Table
from impq_meters.traffic import Traffic
from impq_qp.program import QuadraticProgram
from impq_quanto.backend import Quanto
from impq_refine.evolve import Evolve
from impq_refine.swaps import Swaps
from impq_scores.curvature import AutoScheme, GuidedOutput
from impq_scores.fine import CoarseToFine
from impq_scores.geometry import LieQ
from impq_scores.gradients import AumannShapley, Fisher, Hawq, LlmMq, TokenFisher
from impq_scores.inspected import Activation, FirstLast, Lim, Random, ZScore
from impq_scores.learned import Gamma
from impq_scores.played import Clado, Isolated
from impq_scores.weights import Kurtosis, Nsds
from impq_spqe.sampler import Spqe
from impq_surrogates.auto import Auto
from impq_surrogates.regression import Coverage, Regression
from impq_surrogates.shapley import Additive, Covariance
from impq_within.cmpq import Cmpq
from impq_within.ratio import Ratio
from impq_within.slim import Slim

from impq_core.plugins import Plugins
from impq_core.testing import (
    AllocatorSuite,
    BackendSuite,
    EstimatorSuite,
    MeterSuite,
    PluginSuite,
    RefinerSuite,
    SurrogateSuite,
)


class TestSpqe(EstimatorSuite):
    part = Spqe


class TestSpqePaper(EstimatorSuite):
    part, options = Spqe, {"permutations": "3", "antithetic": "false"}


class TestSpqeFreshAndSettling(EstimatorSuite):
    part, options = Spqe, {"fresh": "true", "settle": "0.01", "tolerance": "0.1"}


class TestIsolated(EstimatorSuite):
    part = Isolated


class TestClado(EstimatorSuite):
    part = Clado


class TestCoarseToFine(EstimatorSuite):
    part = CoarseToFine


class TestAumannShapley(EstimatorSuite):
    part = AumannShapley


class TestFisher(EstimatorSuite):
    part = Fisher


class TestTokenFisher(EstimatorSuite):
    part = TokenFisher


class TestHawq(EstimatorSuite):
    part = Hawq


class TestLlmMq(EstimatorSuite):
    part = LlmMq


class TestGuidedOutput(EstimatorSuite):
    part = GuidedOutput


class TestGuidedOutputByGram(EstimatorSuite):
    part, options = GuidedOutput, {"form": "gram", "groups": "2"}


class TestAutoScheme(EstimatorSuite):
    part = AutoScheme


class TestGamma(EstimatorSuite):
    part = Gamma


class TestLieQ(EstimatorSuite):
    part = LieQ


class TestKurtosis(EstimatorSuite):
    part = Kurtosis


class TestNsds(EstimatorSuite):
    part = Nsds


class TestLim(EstimatorSuite):
    part = Lim


class TestActivation(EstimatorSuite):
    part = Activation


class TestZScore(EstimatorSuite):
    part = ZScore


class TestFirstLast(EstimatorSuite):
    part = FirstLast


class TestRandom(EstimatorSuite):
    part = Random


class TestAuto(SurrogateSuite):
    part = Auto


class TestCovariance(SurrogateSuite):
    part = Covariance


class TestAdditive(SurrogateSuite):
    part = Additive


class TestRegression(SurrogateSuite):
    part = Regression


class TestCoverage(SurrogateSuite):
    part = Coverage


class TestQuadraticProgram(AllocatorSuite):
    part, exact = QuadraticProgram, True


class TestGreedy(AllocatorSuite):
    part = Greedy


class TestExhaustive(AllocatorSuite):
    part, exact = Exhaustive, True


class TestSwaps(RefinerSuite):
    part, enough = Swaps, 300


class TestEvolve(RefinerSuite):
    part = Evolve


class TestTraffic(MeterSuite):
    part = Traffic


class TestTable(MeterSuite):
    part = Table

    @pytest.fixture(autouse=True)
    def table(self, tmp_path: Path) -> None:
        (tmp_path / "costs.csv").write_text("layer,choice,cost,error\n64x64,*,0.5,0.1\n128x64,4,2,0\n128x64,2,1,0\n")
        self.options = {"file": str(tmp_path / "costs.csv")}  # type: ignore[misc]


class TestLlamaCpp(MeterSuite):
    part, exact = LlamaCpp, False
    options = MappingProxyType({"threads": 1, "repeats": 3})
    choices = TYPES["Q8_0"].choice, TYPES["Q4_0"].choice
    shapes = ((512, 512), (1024, 512))


class TestGguf(BackendSuite):
    part, names = Gguf, ("F16", "Q8_0", "Q5_K", "IQ4_XS", "Q3_K", "IQ2_XXS")

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight, inputs = super().data()
        return torch.cat([weight, -weight.flip(0)], dim=1), torch.cat([inputs, inputs.flip(0)], dim=1)  # 256 columns


class TestGgufWithoutImportance(BackendSuite):
    part, options, names = Gguf, {"importance": "false"}, ("BF16", "Q6_K", "Q4_K", "Q2_K")

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        return TestGguf().data()


class TestGptq(BackendSuite):
    part = Gptq


class TestGptqSymmetric(BackendSuite):
    part, options = Gptq, {"symmetric": "true"}


class TestGptqSmallGroups(BackendSuite):
    part, options = Gptq, {"group_size": "32", "group_aware": "false"}


class TestGptqUnclipped(BackendSuite):
    part, options = Gptq, {"grid": "min-max"}


class TestHqq(BackendSuite):
    part = Hqq


class TestHqqSmallGroups(BackendSuite):
    part, options = Hqq, {"optimize": "false", "group_size": "32"}


class TestQuanto(BackendSuite):
    part = Quanto


class TestQuantoSmallGroups(BackendSuite):
    part, options = Quanto, {"group_size": "32"}


class TestCmpq(BackendSuite):
    part, fine = Cmpq, 0.1


class TestCmpqPaper(BackendSuite):
    part, fine, options = Cmpq, 0.1, {
        "overhead": "16", "feedback": "false", "outliers_by_activation": "0.0005", "outliers_by_error": "0.0045"}


class TestCmpqRows(BackendSuite):
    part, fine, options = Cmpq, 0.2, {
        "codebook": "row", "overhead": "0.5", "weigh_errors": "true", "exchange": "0",
        "outliers_by_error": "0.001"}


class TestRatio(BackendSuite):
    part, fine = Ratio, 0.1


class TestRatioSmallGroups(BackendSuite):
    part, fine, options = Ratio, 0.1, {"group_size": "16"}


class TestSlim(BackendSuite):
    part, fine = Slim, 0.1


class TestSlimOneBit(BackendSuite):
    part, fine, options = Slim, 0.1, {"group_size": "16", "lowest": "1"}


FIRST_PARTY = {entry.value: entry for entry in entry_points(group="impq") if entry.dist and entry.dist.name == "impq"}


@pytest.fixture(params=FIRST_PARTY)
def suite(request: pytest.FixtureRequest) -> PluginSuite:
    class Theirs(PluginSuite):
        plugin = importlib.import_module(request.param)

    return Theirs()


@pytest.mark.parametrize("test", [name for name in dir(PluginSuite) if name.startswith("test_")])
def test_plugins(suite: PluginSuite, test: str) -> None:
    getattr(suite, test)()


def test_no_part_is_left_out() -> None:
    held = {kind.part for kind in vars(sys.modules[__name__]).values() if hasattr(kind, "part")}
    found = Plugins()
    for (role, name), offer in found.offers.items():
        # Exporters are held against their libraries, crews against runs without workers (test_ray.py).
        if role not in ("exporter", "crew") and offer.origin.startswith("impq:"):
            assert found.load(role, name, object) in held, f"{role} '{name}' has no suite"
