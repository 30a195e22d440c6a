"""Slopes of the loss on a tiny model, and the estimates from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from impq_hqq.backend import Hqq
from impq_scores.gradients import (
    AumannShapley,
    AumannShapleyOptions,
    Fisher,
    FisherOptions,
    Hawq,
    HawqOptions,
    LlmMq,
    TokenFisher,
    TokenFisherOptions,
    quadratic,
    shares_at,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from impq_core.game.model_game import ModelGame
from impq_core.game.probe import ModelProbe
from impq_core.model.bank import Bank
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.cost import flop_counter
from impq_core.model.layers import layers_of, search_space
from impq_core.model.quantize import fill_bank
from impq_core.model.source import locate_model
from impq_core.model.text import Windows
from impq_core.space import Choice, LinearSpec
from impq_core.testing import planted_space, tiny_model
from impq_core.testing.tiny import TinyTable

WINDOWS = Windows(np.random.default_rng(0).integers(0, 256, (6, 24)), "test", "random bytes")
RNG = np.random.default_rng(0)


class Table:
    """A tiny model with three widths, its loss at blended weights, and a probe."""

    def __init__(self, folder: Path, architecture: str, dtype: torch.dtype = torch.float32) -> None:
        self.model = locate_model(str(tiny_model(folder, architecture, blocks=3))).load(dtype)
        self.runner, backend = BlockwiseModel(self.model), Hqq()
        choices = backend.choices()[:3]
        self.space = search_space(layers_of(self.model, "group"), backend, choices, exclude=("*.2.*",))
        self.bank = Bank(self.runner, self.space.everyone, backend)
        menus = [choices] * len(self.space) + [[]] * len(self.space.pinned)
        fill_bank(self.bank, self.runner, None, menus, lambda done, total: None)

    def probe(self) -> ModelProbe:
        return ModelProbe(self.space, self.bank, self.runner, WINDOWS)

    def losses(self, shares: np.ndarray) -> np.ndarray:
        """Loss of each window with layer i's weights blended by shares (n, m)."""
        self.bank.apply([None] * len(self.bank.layers))
        for layer, share in enumerate(shares):
            self.bank.blend(layer, dict(zip(self.space.choices, map(float, share), strict=True)))
        return self.runner.nll(self.runner.run_all(self.runner.embed(WINDOWS.ids)), WINDOWS.ids).mean(axis=1)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return Table(tmp_path_factory.mktemp("gradients") / "m", request.param)


@pytest.mark.parametrize("same", [np.array([0.0, 0.5, 0.5]), None])
def test_slopes_are_the_derivatives_of_each_windows_loss(table: Table, same: np.ndarray | None) -> None:
    n, m = table.space.nbytes.shape
    at = same if same is not None else np.random.default_rng(2).dirichlet(np.ones(m), n)
    slopes = table.probe().slopes(at)
    assert slopes.shape == (6, n, m)
    step = 1e-2
    for layer, choice in ((0, 2), (3, 0), (n - 1, 2)):
        moved = []
        for sign in (1, -1):
            shares = np.broadcast_to(at, (n, m)).copy()
            shares[layer] = (1 - sign * step) * shares[layer] + sign * step * np.eye(m)[choice]
            moved.append(table.losses(shares))
        numeric = (moved[0] - moved[1]) / (2 * step)
        np.testing.assert_allclose(slopes[:, layer, choice], numeric, rtol=0.03, atol=2e-4)


def test_the_divergence_from_the_unquantized_model_is_flat_there_and_has_slopes_elsewhere(table: Table) -> None:
    n, m = table.space.nbytes.shape
    probe = ModelProbe(table.space, table.bank, table.runner, WINDOWS, value="kl")
    steep = np.abs(table.probe().slopes()).max()
    assert np.abs(probe.slopes()).max() < 1e-3 * steep
    assert probe.forwards == pytest.approx(4.6, abs=0.4)  # the unquantized model's blocks and logits count
    at, layer, step = np.array([0.0, 0.5, 0.5]), 3, 0.05
    slopes = probe.slopes(at)
    game, ends = ModelGame(table.space, table.bank, table.runner, WINDOWS, value="kl"), []
    for sign in (1, -1):
        shares = np.tile(at, (n, 1))
        shares[layer] = (1 - sign * step) * at + sign * step * np.eye(m)[2]
        table.losses(shares)  # leaves the weights blended
        hidden = table.runner.run_all(table.runner.embed(WINDOWS.ids))
        assert game._unquantized is not None
        ends.append(table.runner.compare([hidden], WINDOWS.ids, game._unquantized)[0].kl.mean(axis=1))
    np.testing.assert_allclose(slopes[:, layer, 2], (ends[0] - ends[1]) / (2 * step), rtol=0.05, atol=2e-4)


def test_slopes_are_the_same_in_any_batch_and_leave_the_model_as_it_was(table: Table,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    probe = table.probe()
    whole = probe.slopes()
    monkeypatch.setattr("impq_core.game.probe.BATCH_TOKENS", 48)
    np.testing.assert_allclose(table.probe().slopes(), whole, rtol=1e-3, atol=1e-6)
    assert probe.forwards == pytest.approx(3.6, abs=0.4)
    table.bank.apply([None] * len(table.bank.layers))
    assert all(not p.requires_grad for p in table.model.parameters())
    fresh = table.bank.original(table.space.layers[0].linears[0])
    assert torch.equal(table.bank.module(table.space.layers[0].linears[0]).weight, fresh)


def test_aumann_shapley_values_add_up_to_the_whole_loss(table: Table) -> None:
    estimate = AumannShapley(AumannShapleyOptions(nodes=3)).inspect(table.probe(), RNG)
    n, m = table.space.nbytes.shape
    ends = [table.losses(np.tile(np.eye(m)[k], (n, 1))).mean() for k in (0, m - 1)]
    assert estimate.linear[:, -1].sum() == pytest.approx(ends[1] - ends[0], rel=0.02)
    probe = table.probe()
    probe.slopes()
    assert estimate.forwards == pytest.approx(3 * (m - 1) * probe.forwards)


def test_llm_mq_never_pays_for_the_reference(table: Table) -> None:
    linear = LlmMq().inspect(table.probe(), RNG).linear
    assert (linear[:, 0] == 0).all() and (linear >= 0).all() and linear[:, 2].max() > 0


def test_fisher_says_what_its_quadratic_form_says(table: Table) -> None:
    options = FisherOptions(at=0.5, curvature=0.3)
    estimate = Fisher(options).inspect(table.probe(), RNG)
    slopes = table.probe().slopes(shares_at(table.space, 0.5))
    n, m = table.space.nbytes.shape

    def form(pick: np.ndarray) -> float:
        change = slopes[:, np.arange(n), pick].sum(axis=1)
        return float(change.mean() + 0.5 * 0.3 * 23 * change.var())

    picks = RNG.integers(0, m, (20, n))
    expected = np.array([form(pick) for pick in picks]) - form(np.zeros(n, dtype=int))
    np.testing.assert_allclose(estimate.predict(picks), expected, rtol=1e-6, atol=1e-9)
    assert estimate.forwards == pytest.approx(3.6, abs=0.4)


def test_token_fisher_is_exact_for_a_quadratic_loss_among_layers_that_are_quantized_too() -> None:
    """Layer 0 costs nothing alone, and something where layer 1 is quantized: a score at the unquantized model cannot
    know that."""
    space, hessian = planted_space(3, bits=(4, 3, 2)), np.array([[1e-9, 0.3, 0.0], [0.3, 2.0, -0.4], [0.0, -0.4, 1.0]])
    moved = np.array([[0.0, 0.5, 1.0], [0.1, 0.4, 2.0], [0.0, 0.7, 1.5]])  # of each layer, at each choice

    class Quadratic:
        window_tokens, forwards = 1, 0.0

        def __init__(self) -> None:
            self.space = space

        def changes(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return (moved * at).sum(axis=1), moved - (moved * at).sum(axis=1)[:, None]

        def slopes(self, at: np.ndarray) -> np.ndarray:
            now, changes = self.changes(at)
            return ((hessian @ now)[:, None] * changes)[None]

        def token_squares(self, at: np.ndarray) -> np.ndarray:
            return (np.diag(hessian)[:, None] * self.changes(at)[1] ** 2)[None]

    def loss(places: np.ndarray) -> float:
        return 0.5 * float(places @ hessian @ places)

    for at in (0.25, 0.6):
        estimate = TokenFisher(TokenFisherOptions(at=at)).inspect(Quadratic(), RNG)  # type: ignore[arg-type]
        now = (moved * shares_at(space, at)).sum(axis=1)
        for i, k in np.ndindex(3, 3):
            losses = [loss(np.where(np.arange(3) == i, moved[i, choice], now)) for choice in (k, 0)]
            assert estimate.linear[i, k] == pytest.approx(losses[0] - losses[1], abs=1e-9)
        assert estimate.linear[0, 2] > 0.01 and estimate.is_loss


def test_a_quadratic_form_is_measured_from_the_reference() -> None:
    space = planted_space(4, bits=(4, 3, 2))
    slope, root = RNG.normal(size=(4, 3)), RNG.normal(size=(5, 12))
    matrix = (root.T @ root).reshape(4, 3, 4, 3)
    estimate = quadratic(space, slope, matrix, "planted", 1.0)

    def form(pick: np.ndarray) -> float:
        own = np.arange(4)
        return float(slope[own, pick].sum() + 0.5 * matrix[own[:, None], pick[:, None], own, pick].sum())

    picks = RNG.integers(0, 3, (30, 4))
    expected = np.array([form(pick) for pick in picks]) - form(np.zeros(4, dtype=int))
    np.testing.assert_allclose(estimate.predict(picks), expected)


@contextmanager
def _differentiable(model: PreTrainedModel, weights: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Gradients of the mean loss in some weights, which can be differentiated once more."""
    ids = torch.from_numpy(WINDOWS.ids)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            yield torch.autograd.grad(loss, weights, create_graph=True)
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def test_a_draw_of_the_traces_is_a_second_derivative(table: Table) -> None:
    found = table.probe().hessian_traces(np.random.default_rng(1))
    # The signs it drew: from a seed of their own, under which the draw is found in the log again.
    again = np.random.default_rng(int(np.random.default_rng(1).integers(2**63)))
    signs = [torch.from_numpy(2.0 * again.integers(0, 2, (spec.rows, spec.columns), dtype=np.int8) - 1).float()
             for spec in found]
    weights = [table.bank.module(spec).weight for spec in found]
    sizes = [weight.square().mean().sqrt() for weight in weights]
    with _differentiable(table.model, weights) as slopes:
        along = sum(((slope * sign * size).sum() for slope, sign, size in zip(slopes, signs, sizes, strict=True)),
                    torch.zeros(()))
        second = torch.autograd.grad(along, weights)
    exact = [float((h * sign).sum() / size) for h, sign, size in zip(second, signs, sizes, strict=True)]
    scale = np.abs(exact).max()
    np.testing.assert_allclose(np.array(list(found.values())) / scale, np.array(exact) / scale, atol=2e-3)


def test_the_traces_are_right_on_average(tmp_path: Path) -> None:
    model = locate_model(str(tiny_model(tmp_path / "m", blocks=1))).load(torch.float32)
    space = search_space(layers_of(model, "linear"), Hqq(), Hqq().choices()[:2], exclude=("*.mlp.*", "*.[vqo]_proj"))
    runner = BlockwiseModel(model)
    bank = Bank(runner, space.everyone, Hqq())
    [linear] = [spec for layer in space.layers for spec in layer.linears]
    probe, rng = ModelProbe(space, bank, runner, WINDOWS), np.random.default_rng(0)
    draws = np.array([probe.hessian_traces(rng)[linear] for _ in range(64)])
    assert linear.name.endswith("k_proj") and 4 * 64 < probe.forwards < 8 * 64  # the only gradient is a small one
    weight = bank.module(linear).weight
    with _differentiable(model, [weight]) as [slope]:
        rows = [torch.autograd.grad(slope.flatten(), weight, unit, retain_graph=True, is_grads_batched=True)[0]
                .flatten(1).mul(unit).sum() for unit in torch.eye(weight.numel()).split(64)]
    stderr = draws.std(ddof=1) / 8
    assert draws.mean() == pytest.approx(float(sum(rows)), abs=3 * stderr)
    assert stderr < 0.2 * draws.mean()


def test_hessian_traces_need_no_float32_model_and_leave_it_as_it_was(tmp_path: Path) -> None:
    tables = [Table(tmp_path / str(dtype), "llama", dtype) for dtype in (torch.float32, torch.bfloat16)]
    for table in tables:
        table.bank.apply([None] * len(table.bank.layers))
    before = [[(p.data_ptr(), p.detach().clone()) for p in table.model.parameters()] for table in tables]
    fine, coarse = (table.probe().hessian_traces(np.random.default_rng(1)) for table in tables)
    assert list(fine) == list(coarse) and len(fine) == sum(len(layer.linears) for layer in tables[0].space.layers)
    assert np.corrcoef(list(fine.values()), list(coarse.values()))[0, 1] > 0.99
    for table, kept in zip(tables, before, strict=True):
        for p, (place, value) in zip(table.model.parameters(), kept, strict=True):
            assert p.data_ptr() == place and p.dtype == value.dtype and torch.equal(p, value) and not p.requires_grad


class PlantedProbe:
    """The quadratic loss ``1/2 sum_l h_l ||W_l - W_l0||^2``: HAWQ's own assumption."""

    def __init__(self, curvatures: list[float], noise: float = 0.0) -> None:
        self.space = planted_space(len(curvatures), bits=(4, 3, 2))
        self.curvatures, self.noise, self.forwards, self.window_tokens = curvatures, noise, 0.0, 1

    def weight(self, linear: LinearSpec) -> torch.Tensor:
        return torch.zeros(linear.rows, linear.columns)

    def variant(self, linear: LinearSpec, choice: Choice) -> torch.Tensor:
        return torch.full((linear.rows, linear.columns), 2.0**-choice.bits)

    def hessian_traces(self, rng: np.random.Generator) -> dict[LinearSpec, float]:
        self.forwards += 6
        return {layer.linears[0]: layer.parameters * (h + self.noise * rng.normal())
                for layer, h in zip(self.space.layers, self.curvatures, strict=True)}


def test_hawq_is_the_second_order_term() -> None:
    probe = PlantedProbe([1.0, 0.5, -1.0])
    estimate = Hawq(HawqOptions(samples=2)).inspect(probe, RNG)  # type: ignore[arg-type]
    errors = np.array([4.0**-bits for bits in (4, 3, 2)])
    expected = [[0.5 * h * layer.parameters * (e - errors[0]) for e in errors]
                for h, layer in zip((1.0, 0.5, 0.0), probe.space.layers, strict=True)]
    np.testing.assert_allclose(estimate.linear, expected)
    assert estimate.forwards == 12 and estimate.stderr is not None and np.abs(estimate.stderr).max() < 1e-12
    noisy = Hawq(HawqOptions(samples=400)).inspect(PlantedProbe([1.0], 0.5), RNG)  # type: ignore[arg-type]
    assert noisy.stderr is not None
    assert noisy.stderr[0, 2] == pytest.approx(0.5 / 20 * noisy.linear[0, 2], rel=0.2)
    with pytest.raises(ValueError, match="at least 1"):
        HawqOptions(samples=0)


def test_hawq_never_pays_for_the_reference(table: Table) -> None:
    estimate = Hawq().inspect(table.probe(), RNG)
    assert estimate.forwards == pytest.approx(14.6, abs=1.6) and (estimate.linear[:, 0] == 0).all()
    assert (np.diff(estimate.linear, axis=1) >= 0).all() and (estimate.linear[:, 2] > 0).any()


def test_places_between_the_widths() -> None:
    space = planted_space(2, bits=(4, 3, 2))
    shares = [shares_at(space, at).tolist() for at in (0, 0.25, 0.5, 1)]
    assert shares == [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]]


def test_hawq_sees_the_divergence_of_a_model_in_bfloat16(tmp_path: Path) -> None:
    table = Table(tmp_path / "m", "llama", torch.bfloat16)
    probe = ModelProbe(table.space, table.bank, table.runner, WINDOWS, value="kl")
    assert np.isfinite(Hawq().inspect(probe, RNG).linear).all() and probe.forwards == pytest.approx(15.6, abs=1.6)


def test_slopes_do_as_much_work_on_a_long_menu_as_on_a_short_one() -> None:
    done = []
    for bits in ((8, 2), (8, 4, 3, 2)):
        table = TinyTable(bits, "group")
        table.game.probe.slopes()
        before = table.game.forwards
        with flop_counter() as counter:
            table.game.probe.slopes()
        done.append(counter.get_total_flops())
        assert table.game.forwards - before == pytest.approx(done[-1] / table.forward_flops(), rel=0.03)
    assert done[0] == done[1]


@pytest.mark.parametrize("value", ["nll", "kl"])
def test_what_a_game_and_a_probe_are_charged_is_what_the_model_did(table: Table, value: str) -> None:
    played, rng = WINDOWS.first(3), np.random.default_rng(0)
    picks = rng.integers(0, 3, (6, len(table.space)))
    probe = ModelProbe(table.space, table.bank, table.runner, WINDOWS, value, game_windows=3)
    probe.slopes()
    table.runner.embed(played.ids)  # checks of a batch's shape are no part of a search
    with torch.no_grad(), flop_counter() as counter:
        table.model(input_ids=torch.from_numpy(played.ids))
    forward, before = counter.get_total_flops(), probe.forwards
    with flop_counter() as counter:
        game = ModelGame(table.space, table.bank, table.runner, played, value=value, probe=probe)
        game.losses(picks)
        game.redraw(0)
        game.window_losses((picks[0] + 1) % 3)
        assert len(list(game.probe.block_states())) == 3
        game.probe.slopes(np.array([0, 0.5, 0.5]))
        game.probe.hessian_traces(rng)
    assert game.forwards - before == pytest.approx(counter.get_total_flops() / forward, rel=0.03)
    game.losses(picks)
    assert game.forwards - before == pytest.approx(counter.get_total_flops() / forward, rel=0.03)  # known by now
