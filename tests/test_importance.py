"""Estimators from output gradients, from the shape of weights, and from the geometry of activations, where the answer
is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from impq_scores.curvature import AutoScheme, GuidedOutput, GuidedOutputOptions
from impq_scores.geometry import LieQ, effective_rank
from impq_scores.weights import Kurtosis, Nsds, excess_kurtosis, with_jumps_doubled

from impq_core.errors import UsageError
from impq_core.space import Choice, FloatArray, LayerSpec, LinearSpec, SearchSpace
from impq_core.testing import planted_space
from impq_core.testing.tiny import TinyTable

RNG = np.random.default_rng(0)


class Probe:
    """Weights, gradients and activations that a test gives."""

    window_tokens = 1

    def __init__(self, space: SearchSpace, weights: dict[str, torch.Tensor] | None = None) -> None:
        self.space, self.forwards, self.weights = space, 0.0, weights or {}
        self.grams: dict[str, torch.Tensor] = {}
        self.outputs: dict[int, torch.Tensor] = {}

    def weight(self, linear: LinearSpec) -> torch.Tensor:
        return self.weights[linear.name]

    def variant(self, linear: LinearSpec, choice: Choice) -> torch.Tensor:
        return self.weights[linear.name] + 2.0**-choice.bits

    def charging(self) -> nullcontext[None]:
        return nullcontext()

    def token_squares(self, at: FloatArray | None = None) -> FloatArray:
        errors = np.array([4.0**-choice.bits for choice in self.space.choices])
        return np.arange(1.0, 1 + len(self.space))[None, :, None] * errors

    def absolute_slopes(self, at: FloatArray | None = None) -> FloatArray:
        assert at is not None and sorted(at) == [0.0] * (len(at) - 1) + [1.0]  # at one width
        width = self.space.choices[int(np.argmax(at))].bits
        return np.tile(np.arange(1.0, 1 + len(self.space)) * 2.0**-width, (3, 1))

    def output_curvature(self, groups: int = 1) -> Iterator[tuple[LinearSpec, torch.Tensor]]:
        for layer in self.space.layers:
            for linear in layer.linears:
                gram = self.grams[linear.name]
                yield linear, gram / 4  # in two parts
                yield linear, 3 * gram / 4

    def first_outputs(self, weights: Callable[[LinearSpec], torch.Tensor] | None = None) -> Iterator[
            tuple[int, dict[LinearSpec, list[torch.Tensor]]]]:
        for layer in self.space.layers:
            inputs = self.outputs[layer.block] if weights is None else torch.eye(64)
            yield layer.block, {layer.linears[0]: [inputs[:32, None], inputs[32:, None]]}


def test_output_errors_are_weighted_by_squared_gradients_of_tokens() -> None:
    probe = Probe(planted_space(3, bits=(4, 3, 2)))
    estimate = GuidedOutput().inspect(probe, RNG)  # type: ignore[arg-type]
    errors = np.array([4.0**-bits for bits in (4, 3, 2)])
    np.testing.assert_allclose(estimate.linear, 0.5 * np.arange(1, 4)[:, None] * (errors - errors[0]))
    assert estimate.is_loss


def test_standard_errors_are_those_of_the_costs_over_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all windows share, such as the cost of the widest choice, is no error."""
    probe = Probe(planted_space(3, bits=(4, 3, 2)))
    alone = GuidedOutput().inspect(probe, RNG)  # type: ignore[arg-type]
    assert alone.stderr is not None and np.isnan(alone.stderr).all()
    squares = np.random.default_rng(1).uniform(size=(9, 3, 3)) + np.arange(9.0)[:, None, None]
    monkeypatch.setattr(probe, "token_squares", lambda: squares)
    estimate = GuidedOutput().inspect(probe, RNG)  # type: ignore[arg-type]
    drawn = (squares - squares[:, :, :1]) / 2
    assert estimate.stderr is not None
    np.testing.assert_allclose(estimate.linear, drawn.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(estimate.stderr, drawn.std(axis=0, ddof=1) / 3)


def test_output_errors_by_gram_are_the_trace_of_each_group_of_rows() -> None:
    space = planted_space(3, bits=(4, 2))
    probe = Probe(space)
    expected = []
    for i, layer in enumerate(space.layers):
        linear = layer.linears[0]
        probe.weights[linear.name] = torch.zeros(linear.rows, linear.columns)
        gram = torch.zeros(2, linear.columns, linear.columns)
        gram[0], gram[1] = torch.eye(linear.columns) * (i + 1), torch.ones(linear.columns, linear.columns)
        probe.grams[linear.name] = gram
        half, size = linear.rows / 2, linear.columns  # dW is constant: d' I d = C e^2, d' 11' d = (C e)^2
        expected.append([0.5 * half * ((i + 1) * size + size**2) * 4.0**-bits for bits in (4, 2)])
    estimate = GuidedOutput(GuidedOutputOptions("gram", 2)).inspect(probe, RNG)  # type: ignore[arg-type]
    np.testing.assert_allclose(estimate.linear, np.array(expected) - np.array(expected)[:, :1], rtol=1e-5)


def test_a_group_for_each_row_weighs_each_output_by_its_own_gradients() -> None:
    table = TinyTable((8, 2), "linear", exclude=("*up*", "*down*", "*gate*", "*[vqo]_proj"))
    probe = table.game.probe
    by_rows = GuidedOutput(GuidedOutputOptions("gram", 32)).inspect(probe, RNG).linear
    whole = GuidedOutput(GuidedOutputOptions("gram", 1)).inspect(probe, RNG).linear
    tokens = GuidedOutput().inspect(probe, RNG).linear
    assert (by_rows[:, 1] > 0).all() and (tokens[:, 1] > 0).all()
    assert not np.allclose(by_rows, whole, rtol=1e-3)
    np.testing.assert_allclose(np.log(by_rows[:, 1]), np.log(whole[:, 1]), atol=1.0)  # of the same size
    np.testing.assert_allclose(np.log(by_rows[:, 1]), np.log(tokens[:, 1]), atol=1.0)


def test_estimators_of_blocks_refuse_the_embedding() -> None:
    layer = LayerSpec("embed", -1, (LinearSpec("embed", 64, 64),))
    space = SearchSpace((layer,), (Choice(4.0, 64), Choice(2.0, 64)), np.array([[2048, 1024]]))
    for part in (GuidedOutput(GuidedOutputOptions("gram")), AutoScheme()):
        with pytest.raises(UsageError, match="--quantize-embeddings"):
            part.check_space(space)


def test_autoscheme_reads_gradients_at_the_width_that_it_scores() -> None:
    estimate = AutoScheme().inspect(Probe(planted_space(3, bits=(4, 3, 2))), RNG)  # type: ignore[arg-type]
    scores = np.array([2.0**-bits for bits in (4, 3, 2)])
    np.testing.assert_allclose(estimate.linear, np.arange(1, 4)[:, None] * (scores - scores[0]))
    assert not estimate.is_loss


def test_excess_kurtosis_is_that_of_known_distributions() -> None:
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert float(excess_kurtosis(normal)) == pytest.approx(0.0, abs=0.05)
    assert float(excess_kurtosis(torch.tensor([1.0, -1.0]))) == pytest.approx(-2.0)
    assert float(excess_kurtosis(torch.ones(5))) == 0.0


def _heavy(space: SearchSpace, heavy: int) -> dict[str, torch.Tensor]:
    """Normal weights, and in one layer weights with some large ones."""
    found = {}
    for i, layer in enumerate(space.layers):
        linear = layer.linears[0]
        weight = torch.randn(linear.rows, linear.columns, generator=torch.Generator().manual_seed(i))
        if i == heavy:
            weight[3, ::8] *= 20
        found[linear.name] = weight
    return found


@pytest.mark.parametrize("part", [Kurtosis, Nsds])
def test_heavy_tails_are_important(part: type[Kurtosis] | type[Nsds]) -> None:
    space = planted_space(8, bits=(4, 2))
    estimate = part().inspect(Probe(space, _heavy(space, 5)), RNG)  # type: ignore[arg-type]
    assert estimate.linear[:, 1].argmax() == 5 and not estimate.is_loss and estimate.forwards == 0


def test_a_jump_that_stands_out_doubles_an_importance() -> None:
    scores = np.array([3.0, 3.1, 3.0, 3.1, 3.0, 3.1, 5.0, 5.1, 5.0, 5.1])
    expected = scores.copy()
    expected[6] *= 2
    np.testing.assert_allclose(with_jumps_doubled(planted_space(10), scores), expected)


def test_nsds_sees_in_which_directions_the_energy_lies() -> None:
    space = planted_space(8, bits=(4, 2))
    weights, rng = {}, np.random.default_rng(0)
    for i, layer in enumerate(space.layers):
        linear = layer.linears[0]
        left, right = (np.linalg.qr(rng.normal(size=(size, 64)))[0] for size in (linear.rows, linear.columns))
        if i == 2:
            right = np.eye(64)  # each direction is a single feature
        weights[linear.name] = torch.from_numpy((left * np.linspace(2, 1, 64)) @ right.T).float()
    estimate = Nsds().inspect(Probe(space, weights), RNG)  # type: ignore[arg-type]
    assert estimate.linear[:, 1].argmax() == 2


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_effective_rank_is_the_rank_of_equal_directions(rank: int) -> None:
    basis, _ = torch.linalg.qr(torch.cat([torch.ones(64, 1), torch.randn(
        64, rank, generator=torch.Generator().manual_seed(0))], dim=1))
    rows = torch.cat([basis[:, 1:].T, -5 * basis[:, 1:].T]) + 3  # the centre and the length of a row do not count
    assert effective_rank([rows[:2], rows[2:]], Probe(planted_space(1))) == pytest.approx(  # type: ignore[arg-type]
        rank, rel=1e-3)


def test_what_is_more_compact_than_its_twin_is_more_important() -> None:
    space = planted_space(4, bits=(4, 2))
    probe, generator = Probe(space), torch.Generator().manual_seed(0)
    for block, rank in enumerate((40, 2, 20, 10)):
        probe.outputs[block] = torch.randn(64, rank, generator=generator) @ torch.randn(rank, 64, generator=generator)
    estimate = LieQ().inspect(probe, RNG)  # type: ignore[arg-type]
    assert np.argsort(estimate.linear[:, 1]).tolist() == [0, 2, 3, 1]


def test_a_twin_runs_with_its_own_weights_and_the_model_is_left_as_it_was() -> None:
    table = TinyTable((8, 2), "group")
    probe, before = table.game.probe, table.digest()
    own = {block: outputs for block, outputs in probe.first_outputs()}
    drawn = {}

    def weights(linear: LinearSpec) -> torch.Tensor:
        drawn[linear.name] = torch.zeros(linear.rows, linear.columns)
        return drawn[linear.name]

    twin = {block: outputs for block, outputs in probe.first_outputs(weights)}
    names = [linear.name.rpartition(".")[2] for linear in own[1]]
    assert names == ["q_proj", "k_proj", "v_proj"] and list(own) == [0, 1, 2]
    assert all(not part.any() for outputs in twin.values() for parts in outputs.values() for part in parts)
    assert len(drawn) == 21 and table.digest() == before
    again = {block: outputs for block, outputs in probe.first_outputs()}
    assert all(torch.equal(a, b) for block in own for linear in own[block]
               for a, b in zip(own[block][linear], again[block][linear], strict=True))
