"""Slopes of the loss on a tiny model, and the estimates made of them."""

from __future__ import annotations

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
    LlmMq,
    quadratic,
    shares_at,
)

from impq_core.bank import Bank, fill_bank
from impq_core.blockwise import BlockwiseModel
from impq_core.model import layers_of, search_space
from impq_core.probe import ModelProbe
from impq_core.source import locate_model
from impq_core.testing import planted_space, tiny_model
from impq_core.text import Windows

WINDOWS = Windows(np.random.default_rng(0).integers(0, 256, (6, 24)), "test", "random bytes")
RNG = np.random.default_rng(0)


class Table:
    """A tiny model with three widths, its loss at blended weights, and a probe."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self.model = locate_model(str(tiny_model(folder, architecture, blocks=3))).load(torch.float32)
        self.runner, backend = BlockwiseModel(self.model), Hqq()
        choices = backend.choices()[:3]
        self.space = search_space(layers_of(self.model, "group"), backend, choices, exclude=("*.2.*",))
        self.bank = Bank(self.model, self.space.everyone, backend, torch.float32)
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


def test_slopes_are_the_derivatives_of_each_windows_loss(table: Table) -> None:
    n, m = table.space.nbytes.shape
    at = np.array([0.0, 0.5, 0.5])
    slopes = table.probe().slopes(at)
    assert slopes.shape == (6, n, m)
    step = 1e-2
    for layer, choice in ((0, 2), (3, 0), (n - 1, 2)):
        moved = []
        for sign in (1, -1):
            shares = np.tile(at, (n, 1))
            shares[layer] = (1 - sign * step) * at + sign * step * np.eye(m)[choice]
            moved.append(table.losses(shares))
        numeric = (moved[0] - moved[1]) / (2 * step)
        np.testing.assert_allclose(slopes[:, layer, choice], numeric, rtol=0.03, atol=2e-4)


def test_slopes_are_the_same_in_any_batch_and_leave_the_model_as_it_was(table: Table,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    probe = table.probe()
    whole = probe.slopes()
    monkeypatch.setattr("impq_core.probe.BATCH_TOKENS", 48)
    np.testing.assert_allclose(table.probe().slopes(), whole, rtol=1e-3, atol=1e-6)
    assert probe.forwards == 3
    table.bank.apply([None] * len(table.bank.layers))
    assert all(not p.requires_grad for p in table.model.parameters())
    fresh = table.bank.original(table.space.layers[0].linears[0])
    assert torch.equal(table.bank.module(table.space.layers[0].linears[0]).weight, fresh)


def test_aumann_shapley_values_add_up_to_the_whole_loss(table: Table) -> None:
    estimate = AumannShapley(AumannShapleyOptions(nodes=3)).inspect(table.probe(), RNG)
    n, m = table.space.nbytes.shape
    ends = [table.losses(np.tile(np.eye(m)[k], (n, 1))).mean() for k in (0, m - 1)]
    assert estimate.linear[:, -1].sum() == pytest.approx(ends[1] - ends[0], rel=0.02)
    assert estimate.forwards == 3 * 3 * (m - 1)


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
    assert estimate.forwards == 3


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


def test_places_between_the_widths() -> None:
    space = planted_space(2, bits=(4, 3, 2))
    shares = [shares_at(space, at).tolist() for at in (0, 0.25, 0.5, 1)]
    assert shares == [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]]
