"""Backends whose widths mix inside a linear: cmpq, ratio and slim."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from impq_gptq.backend import Gptq
from impq_recipes.exporters import AutoRoundRecipe, GptqModelRecipe
from impq_within.cmpq import Cmpq
from impq_within.cmpq import Options as CmpqOptions
from impq_within.codes import bytes_of, pack, unpack
from impq_within.feedback import corrected, hessian, inverse_factor, spread
from impq_within.kmeans import centroids, nearest
from impq_within.parts import Part, round_parts, settings_of, values
from impq_within.ratio import Options as RatioOptions
from impq_within.ratio import Ratio
from impq_within.slim import Options as SlimOptions
from impq_within.slim import Slim, best_count

from impq_core.errors import ImpqError
from impq_core.interfaces import Backend, Checkpoint, Statistics
from impq_core.space import Choice, LinearSpec

PAPER = CmpqOptions(overhead=16.0, feedback=False, outliers_by_activation=0.0005, outliers_by_error=0.0045)
"""The paper's."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics_of(inputs: torch.Tensor) -> Statistics:
    return Statistics(inputs.T @ inputs, len(inputs))


def restored(backend: Backend, weight: torch.Tensor, name: str, statistics: Statistics) -> torch.Tensor:
    spec, choice = LinearSpec("block.linear", *weight.shape), backend.choice(name)
    assert choice is not None
    choice = backend.stand_in(spec, choice)
    variant = backend.quantize(weight, choice, statistics)
    assert variant.nbytes == backend.nbytes(spec, choice)
    return backend.dequantize(variant, spec)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", (1, 31, 32, 33, 250))
def test_codes_of_any_width_and_number_come_back(bits: int, count: int) -> None:
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(count)).to(torch.uint8)
    words = pack(codes, bits)
    assert words.shape == (bytes_of(count, bits),) and torch.equal(unpack(words, bits, (count,)), codes)


def test_k_means_finds_planted_centroids() -> None:
    planted = torch.tensor([[-3.0, -1.0, 0.5, 2.0], [10.0, 11.0, 20.0, 21.0]])
    values = planted[:, torch.arange(400) % 4] + 0.01 * normal(2, 400)
    assert torch.allclose(centroids(values, torch.ones_like(values), 4), planted, atol=0.01)


def test_k_means_ignores_numbers_without_weight_and_follows_heavy_ones() -> None:
    values = torch.tensor([[0.0, 1.0, 2.0, 100.0]])
    assert centroids(values, torch.tensor([[1.0, 1.0, 1.0, 0.0]]), 1).item() == 1.0
    assert centroids(values, torch.tensor([[2.0, 1.0, 1.0, 0.0]]), 1).item() == 0.75


def test_k_means_is_a_fixed_point_of_lloyd() -> None:
    values, weights = normal(3, 200), normal(3, 200, seed=1).square()
    found = centroids(values, weights, 4)
    codes = nearest(values, found)
    assert torch.equal(codes, (values[..., None] - found[:, None]).abs().argmin(-1))
    for line in range(3):
        for code in range(4):
            own = codes[line] == code
            mean = (values[line] * weights[line])[own].sum() / weights[line][own].sum()
            assert abs(float(mean - found[line, code])) < 1e-5


def test_feedback_spreads_errors_as_gptq_does() -> None:
    """Against the textbook: after each column the rest moves by the optimal correction, with the inverse updated."""
    inputs, weight = normal(300, 12) @ normal(12, 12, seed=1), normal(5, 12, seed=2)
    damped = hessian(statistics_of(inputs), 0.05)
    left, inverse = weight.double().clone(), torch.linalg.inv(damped)
    wanted = torch.zeros_like(left)
    for column in range(12):
        wanted[:, column] = left[:, column].round()
        left -= torch.outer((left[:, column] - wanted[:, column]) / inverse[column, column], inverse[column])
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0
    found = spread(weight, inverse_factor(damped), [(5, lambda _: lambda _, values: values.round()),
                                                    (7, lambda _: lambda _, values: values.round())])
    assert torch.equal(found.double(), wanted)


def test_drift_is_made_up_for_as_ridge_regression_does() -> None:
    """With alpha 1, W X_fp' is fitted by the corrected weight times X', with a ridge that draws to W."""
    inputs, weight = correlated(32), normal(8, 32, seed=3)
    there = inputs + 0.3 * normal(*inputs.shape, seed=4)
    statistics = replace(statistics_of(inputs), drift=(there - inputs).T @ inputs)
    ridge = statistics.gram.diagonal().mean().sqrt() * torch.eye(32)
    wanted = torch.linalg.lstsq(torch.cat([inputs, ridge]).double(),
                                torch.cat([there @ weight.T, ridge @ weight.T]).double()).solution.T
    assert torch.allclose(corrected(weight, statistics, 1.0).double(), wanted, atol=1e-3)
    assert torch.equal(corrected(weight, statistics_of(inputs), 1.0), weight)


@pytest.mark.parametrize("backend, name", ((Cmpq(), "3"), (Ratio(RatioOptions(group_size=16)), "3+50%"),
                                           (Slim(SlimOptions(group_size=16)), "3")))
def test_backends_make_up_for_drift(backend: Backend, name: str) -> None:
    inputs, weight = correlated(32), normal(8, 32, seed=3)
    there = 1.5 * inputs
    statistics = replace(statistics_of(inputs), drift=(there - inputs).T @ inputs)
    with_drift, without = (restored(backend, weight, name, some) for some in (statistics, statistics_of(inputs)))
    wanted = weight @ there.T
    assert (with_drift @ inputs.T - wanted).norm() < 0.8 * (without @ inputs.T - wanted).norm()


def test_bytes_of_the_papers_codebooks() -> None:
    """At 2.25 bits of 576 x 192 (inputs x outputs): 144 columns of 3 bits, 432 of 2, with 8 and 4 centroids each."""
    spec = LinearSpec("a", 192, 576)
    codes, books = 192 * (144 * 3 + 432 * 2) // 8, 2 * (144 * 8 + 432 * 4)
    outliers = round(0.0005 * 192 * 576) + round(0.0045 * 192 * 576)
    assert Cmpq(PAPER).nbytes(spec, Choice(2.25, 0)) == codes + books + 2 * 576 + 4 * outliers + 2 * 576
    plain = replace(PAPER, outliers_by_activation=0.0, outliers_by_error=0.0)
    assert Cmpq(plain).nbytes(spec, Choice(2.25, 0)) == codes + books + 2 * 576


@pytest.mark.parametrize("shape", ((192, 576), (576, 1536), (1536, 576)))
@pytest.mark.parametrize("bits", (2.25, 3.0, 4.0))
def test_codebooks_take_no_more_than_the_overhead(shape: tuple[int, int], bits: float) -> None:
    spec = LinearSpec("a", *shape)
    for codebook in ("column", "row"):
        backend = Cmpq(CmpqOptions(codebook=codebook, overhead=0.125, outliers_by_activation=0.0,
                                   outliers_by_error=0.0, exchange=0.0))
        books = 8 * backend.nbytes(spec, Choice(bits, 0)) - 16 * spec.columns - bits * spec.parameters
        assert 0.05 * spec.parameters < books <= 0.125 * spec.parameters


@pytest.mark.parametrize("options", (PAPER, CmpqOptions(overhead=0.5), CmpqOptions(codebook="row", overhead=0.5)))
def test_the_channels_of_largest_norm_have_the_wider_codes(options: CmpqOptions) -> None:
    scales = torch.ones(64)
    scales[[5, 40]] = 30.0
    weight = normal(96, 64)
    errors = (restored(Cmpq(options), weight, "2.03", statistics_of(normal(500, 64, seed=1) * scales)) - weight)
    assert round(0.03 * 64) == 2
    size = errors.square().mean(0)
    assert size[[5, 40]].mean() < 0.5 * size[scales == 1].mean()


def test_planted_outliers_stay_at_16_bits_and_out_of_the_fit() -> None:
    weight = normal(100, 80)
    weight[3, 7], weight[50, 60] = 40.0, -40.0
    options = replace(PAPER, outliers_by_activation=2 / 8000, outliers_by_error=0.0)
    found = restored(Cmpq(options), weight, "3", statistics_of(normal(400, 80, seed=1)))
    assert found[3, 7] == 40.0 and found[50, 60] == -40.0
    assert float((found - weight).abs().max()) < 2.0


def test_errors_of_important_channels_become_outliers_first() -> None:
    """Channel 0 has small errors that count, channel 1 large ones that do not."""
    scales, weight = torch.ones(64), normal(128, 64)
    scales[0], scales[1], weight[:, 1] = 1000.0, 0.001, 10 * weight[:, 1]
    statistics, shares = statistics_of(normal(400, 64, seed=1) * scales), (0.0, 20 / weight.numel())
    exact = {}
    for weighed in (True, False):
        options = replace(PAPER, weigh_errors=weighed, outliers_by_activation=shares[0], outliers_by_error=shares[1])
        exact[weighed] = (restored(Cmpq(options), weight, "2", statistics) == weight.half().float()).sum(0)[:2]
    assert exact[True][0] >= 20 and exact[False][1] >= 20
    assert exact[True][1] < 20 and exact[False][0] < 20


def test_feedback_lowers_the_output_error_of_codebooks() -> None:
    inputs, weight = normal(800, 64) @ normal(64, 64, seed=1), normal(96, 64, seed=2)
    error = {feedback: float(((restored(Cmpq(replace(PAPER, feedback=feedback)), weight, "2.5",
                                        statistics_of(inputs)) - weight) @ inputs.T).norm())
             for feedback in (True, False)}
    assert error[True] < 0.9 * error[False]


def test_a_linear_without_tokens_is_quantized_and_said() -> None:
    backend, weight = Cmpq(), normal(64, 32)
    variant = backend.quantize(weight, Choice(3.0, 0), Statistics(torch.zeros(32, 32), 0))
    assert variant.record == {"unreached": 1.0}
    assert float((backend.dequantize(variant, LinearSpec("a", 64, 32)) - weight).norm() / weight.norm()) < 0.3


def test_widths_of_cmpq_by_name() -> None:
    backend = Cmpq()
    assert backend.choice("2.25") == Choice(2.25, 0) and backend.choice("3") == Choice(3.0, 0)
    assert [backend.choice(name) for name in ("0.5", "8.5", "2.2555", "x", "2@64", "-2")] == [None] * 6


def correlated(columns: int, seed: int = 1) -> torch.Tensor:
    return normal(20 * columns, columns, seed=seed) @ normal(columns, columns, seed=seed + 1)


def output_error(weight: torch.Tensor, found: torch.Tensor, inputs: torch.Tensor) -> float:
    return float(((found - weight) @ inputs.T).norm() / (weight @ inputs.T).norm())


def test_parts_of_one_width_are_one_sweep() -> None:
    """Two parts of one width, cut where the sweep over all columns has a border, round to the weight of that sweep."""
    weight, inputs = normal(24, 64), correlated(64) * torch.linspace(2.0, 0.5, 64)
    statistics, columns = statistics_of(inputs), torch.arange(64)
    settings = replace(settings_of(32, 0.05), group_aware=False)
    whole = values(round_parts(weight, statistics, [Part(columns, 3)], settings)[0], 32)
    halves = [values(solution, 32) for solution in
              round_parts(weight, statistics, [Part(columns[:32], 3), Part(columns[32:], 3)], settings)]
    # GPTQ's first block spans all 64 columns here, so that the second group's grid is not the corrected weight's.
    assert torch.equal(halves[0], whole[:, :32])
    assert abs(output_error(weight, torch.cat(halves, 1), inputs) / output_error(weight, whole, inputs) - 1) < 0.1


def test_a_planted_channel_of_high_impact_is_wide() -> None:
    weight, inputs = normal(64, 128), normal(2000, 128, seed=1)
    weight[:, 100] *= 3.0
    inputs[:, 7] *= 5.0
    spec, backend = LinearSpec("a", 64, 128), Ratio()
    choice = backend.stand_in(spec, backend.choice("2+10%"))  # type: ignore[arg-type]
    variant = backend.quantize(weight, choice, statistics_of(inputs))
    assert choice == Choice(2.5, 64, "2+50%") and {7, 100} <= set(variant.tensors["order"][:64].tolist())
    assert output_error(weight, backend.dequantize(variant, spec), inputs) < 0.8 * output_error(
        weight, restored(backend, weight, "2", statistics_of(inputs)), inputs)


def test_guided_impact_is_the_fisher_diagonal() -> None:
    weight, inputs = normal(64, 128), normal(2000, 128, seed=1)
    backend, spec = Ratio(RatioOptions(impact="guided")), LinearSpec("a", 64, 128)
    choice = backend.stand_in(spec, backend.choice("2+10%"))  # type: ignore[arg-type]
    assert backend.needs == {"activations", "gradients", "drift"}
    with pytest.raises(ImpqError, match="gradients"):
        backend.quantize(weight, choice, statistics_of(inputs))
    statistics = replace(statistics_of(inputs), guided=torch.stack([torch.diag(torch.arange(128.0)), torch.eye(128)]))
    assert backend.quantize(weight, choice, statistics).tensors["order"][:64].tolist() == list(range(64, 128))


@pytest.mark.parametrize("width", ("2", "3", "4"))
def test_a_ratio_of_nothing_is_gptq(width: str) -> None:
    weight, statistics = normal(64, 192), statistics_of(correlated(192))
    ours, theirs = (restored(backend, weight, width, statistics) for backend in (Ratio(), Gptq()))
    assert torch.equal(ours.half().float(), theirs)  # gptq gives its weights in 16 bits


def test_ratios_that_round_alike_are_one_choice() -> None:
    backend, spec = Ratio(), LinearSpec("a", 192, 576)
    stored = {name: backend.stand_in(spec, backend.choice(name))  # type: ignore[arg-type]
              for name in ("2", "2+2%", "2+10%", "2+11.11%", "2+11.2%", "2+20%", "2+95%", "3")}
    assert stored["2+2%"] == stored["2+10%"] == stored["2+11.11%"] == Choice(2 + 64 / 576, 64, "2+11.11%")
    assert stored["2+11.2%"] == stored["2+20%"] and stored["2+95%"] == stored["3"] == Choice(3.0, 64)
    for choice in stored.values():
        assert backend.stand_in(spec, choice) == choice
        assert backend.stand_in(spec, backend.choice(choice.name)) == choice  # type: ignore[arg-type]
    codes = 192 * (64 * 3 + 512 * 2) // 8
    assert backend.nbytes(spec, stored["2+2%"]) == codes + 9 * 192 * 2 + 192 * (3 + 8 * 2) // 8 + 2 * 576
    assert backend.nbytes(spec, stored["2"]) == 192 * 576 * 2 // 8 + 9 * 192 * 2 + 9 * 192 * 2 // 8


def test_names_of_ratios() -> None:
    backend = Ratio()
    assert backend.choice("2+10%") == Choice(2.1, 64, "2+10%") and backend.choice("2+0%") == Choice(2.0, 64)
    assert [backend.choice(name) for name in ("2+100%", "5+10%", "2+10", "2+-1%", "2+1.234%", "1")] == [None] * 6


def brute_force_count(plain: torch.Tensor, narrow: torch.Tensor, wide: torch.Tensor, hessian: torch.Tensor,
                      ranked: list[int], size: int) -> int:
    losses = []
    for count in range(len(ranked) // 2 + 1):
        errors = plain.clone()
        for groups, other in ((ranked[:count], narrow), (ranked[len(ranked) - count:], wide)):
            for group in groups:
                errors[:, group * size:(group + 1) * size] = other[:, group * size:(group + 1) * size]
        losses.append(float(torch.trace(errors @ hessian @ errors.T)))
    return losses.index(min(losses))


@pytest.mark.parametrize("seed", range(8))
def test_the_count_that_loses_least(seed: int) -> None:
    plain, inputs = normal(6, 32, seed=seed), correlated(32, seed=seed + 50)
    narrow, wide = 1.7 * normal(6, 32, seed=seed + 10), 0.6 * normal(6, 32, seed=seed + 20)
    ranked = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    gram = inputs.T @ inputs
    assert best_count(plain, narrow, wide, gram, ranked) == brute_force_count(plain, narrow, wide, gram,
                                                                              ranked.tolist(), 4)


@pytest.mark.parametrize("trial", ("feedback", "outputs"))
def test_equal_groups_stay_at_one_width_and_unequal_ones_do_not(trial: str) -> None:
    weight, inputs = normal(64, 512), normal(4000, 512, seed=1)
    choice, backend = Choice(3.0, 64), Slim(SlimOptions(trial=trial))
    even = backend.quantize(weight, choice, statistics_of(inputs))
    scales = torch.ones(8, 64)
    scales[2], scales[5] = 20.0, 0.05
    uneven = backend.quantize(weight, choice, statistics_of(inputs * scales.flatten()))
    assert even.record["wider"] == 0 and uneven.record["wider"] > 0 and even.nbytes == uneven.nbytes
    spec = LinearSpec("a", 64, 512)
    errors = ((backend.dequantize(uneven, spec) - weight) * scales.flatten()).square().view(64, 8, 64).sum((0, 2))
    plain = Slim(SlimOptions(lowest=2))
    assert float(errors[2]) < 0.5 * float(((restored(Gptq(), weight, "3", statistics_of(inputs * scales.flatten()))
                                            - weight) * scales.flatten()).square().view(64, 8, 64).sum((0, 2))[2])
    assert plain.quantize(weight, Choice(2.0, 64), statistics_of(inputs * scales.flatten())).record["wider"] == 0


def test_groups_of_one_bit_have_two_values_around_their_mean() -> None:
    weight, backend = normal(16, 512) + 0.3, Slim(SlimOptions(lowest=1))
    scales = torch.logspace(2, -2, 8).repeat_interleave(64)
    variant = backend.quantize(weight, Choice(2.0, 64), statistics_of(normal(3000, 512, seed=1) * scales))
    spec = LinearSpec("a", 16, 512)
    assert variant.record["wider"] > 0 and variant.nbytes == backend.nbytes(spec, Choice(2.0, 64))
    group = int(unpack(variant.tensors["widths"], 2, (8,)).argmin())
    found = backend.dequantize(variant, spec).view(16, 8, 64)[:, group]
    assert all(len(row.unique()) == 2 for row in found)
    assert float((found.mean(1) - 0.3).abs().mean()) < 0.3
    assert variant.nbytes - Slim().nbytes(spec, Choice(2.0, 64)) == 16 * 8 * 6 // 8


def test_recipes_of_whole_widths_refuse_fractions(tmp_path: Path) -> None:
    for name in ("2.25", "2+10%"):
        backend = Cmpq() if name == "2.25" else Ratio()
        checkpoint = Checkpoint(None, {"a": backend.choice(name)}, {}, {}, {}, {}, "", {}, tmp_path)  # type: ignore
        for recipe in (GptqModelRecipe, AutoRoundRecipe):
            with pytest.raises(ImpqError, match="whole bits"):
                recipe().export(checkpoint, tmp_path)
