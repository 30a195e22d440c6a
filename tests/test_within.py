"""Backends whose widths mix inside a linear: codebooks and channels of cmpq."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from impq_within.cmpq import Cmpq
from impq_within.cmpq import Options as CmpqOptions
from impq_within.codes import bytes_of, pack, unpack
from impq_within.feedback import hessian, inverse_factor, spread
from impq_within.kmeans import centroids, nearest

from impq_core.interfaces import Backend, Statistics
from impq_core.space import Choice, LinearSpec

PAPER = CmpqOptions(codebook="column", overhead=16.0, feedback=False, weigh_errors=False)


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
    damped, _ = hessian(statistics_of(inputs), 0.05, "cmpq")
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


def test_bytes_of_the_papers_codebooks() -> None:
    """At 2.25 bits of 576 x 192 (inputs x outputs): 144 columns of 3 bits, 432 of 2, with 8 and 4 centroids each."""
    spec = LinearSpec("a", 192, 576)
    codes, books = 192 * (144 * 3 + 432 * 2) // 8, 2 * (144 * 8 + 432 * 4)
    outliers = round(0.0005 * 192 * 576) + round(0.0045 * 192 * 576)
    assert Cmpq(PAPER).nbytes(spec, Choice(2.25, 0)) == codes + books + 2 * 576 + 4 * outliers + 4 * 577
    plain = replace(PAPER, outliers_by_activation=0.0, outliers_by_error=0.0)
    assert Cmpq(plain).nbytes(spec, Choice(2.25, 0)) == codes + books + 2 * 576


@pytest.mark.parametrize("shape", ((192, 576), (576, 1536), (1536, 576)))
@pytest.mark.parametrize("bits", (2.25, 3.0, 4.0))
def test_codebooks_take_no_more_than_the_overhead(shape: tuple[int, int], bits: float) -> None:
    spec, few = LinearSpec("a", *shape), {"outliers_by_activation": 0.0, "outliers_by_error": 0.0, "exchange": 0.0}
    sizes = {}
    for codebook in ("column", "row", "auto"):
        backend = Cmpq(CmpqOptions(codebook=codebook, overhead=0.125, **few))
        books = 8 * backend.nbytes(spec, Choice(bits, 0)) - 16 * spec.columns - bits * spec.parameters
        assert 0 < books <= 0.125 * spec.parameters
        sizes[codebook] = Cmpq(CmpqOptions(codebook=codebook, overhead=16.0, **few)).nbytes(spec, Choice(bits, 0))
    assert sizes["auto"] == min(sizes.values())


@pytest.mark.parametrize("options", (PAPER, CmpqOptions(), CmpqOptions(codebook="row", overhead=0.5)))
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
