"""Mixtures of experts: their coverage, and slopes of linears that read some tokens, none, or rows without windows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from impq_gptq.backend import Gptq, Options
from toy import BLOCKS, EXPERTS, Toy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from impq_core.errors import ImpqError, UsageError
from impq_core.game.probe import ModelProbe
from impq_core.interfaces import Backend
from impq_core.model.bank import Bank, fill_bank
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.layers import coverage, layers_of, search_space
from impq_core.model.text import Windows
from impq_core.space import SearchSpace
from impq_core.testing.rounding import Rounding

WINDOWS = Windows(np.random.default_rng(0).integers(0, 256, (5, 24)), "test", "random bytes")


def filled(model: Toy, backend: Backend, granularity: str = "linear") -> tuple[SearchSpace, Bank, BlockwiseModel]:
    choices = tuple(choice for choice in backend.choices() if choice.bits in (4, 2))
    space = search_space(layers_of(model, granularity), backend, choices)
    runner = BlockwiseModel(model)
    bank = Bank(model, space.everyone, backend, torch.float32)
    hidden = runner.embed(WINDOWS.ids) if backend.needs else None
    fill_bank(bank, runner, hidden, [choices] * len(space), lambda done, total: None)
    return space, bank, runner


def mixtral(**more: int) -> torch.nn.Module:
    config = CONFIG_MAPPING["mixtral"](vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                       num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2, **more)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_coverage_is_the_share_of_the_blocks_weights_that_layers_hold() -> None:
    model = mixtral(num_local_experts=4)
    attention, experts, router = 64 * (64 + 32 + 32 + 64), 4 * 3 * 64 * 128, 4 * 64
    for granularity in ("block", "group", "linear"):
        covered = coverage(model, layers_of(model, granularity))
        assert covered.share == pytest.approx(attention / (attention + experts + router))
        assert covered.uncovered == "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(ImpqError, match=r"model moe: only 11% .* model\.layers\.0\.mlp\.experts\.gate.*--partial"):
        covered.require("moe")
    dense = Toy()
    assert coverage(dense, layers_of(dense, "block")).share == 1.0
    coverage(dense, layers_of(dense, "block")).require("dense")


def test_a_linear_that_returns_a_tuple_is_no_layer() -> None:
    model = Toy(experts=True)
    names = {linear.name for layer in layers_of(model, "block") for linear in layer.linears}
    assert len(names) == BLOCKS * (1 + 2 + 2 * EXPERTS) and not any("router" in name for name in names)
    covered = coverage(model, layers_of(model, "block"))
    assert 0.9 < covered.share < 1 and covered.uncovered.endswith("router.weight")


def test_a_refused_shape_can_be_excluded_at_any_granularity() -> None:
    model = Toy()
    model.model.layers[1].feed.gate = torch.nn.Linear(64, 1, bias=False)
    backend = Gptq()
    choices = tuple(choice for choice in backend.choices() if choice.bits in (4, 2))
    for granularity in ("block", "group", "linear"):
        layers = layers_of(model, granularity)
        with pytest.raises(ImpqError, match=r"layers\.1\.feed\.gate is 1 x 64.*--exclude '\*\.gate'"):
            search_space(layers, backend, choices)
        space = search_space(layers, backend, choices, exclude=("*.gate",))
        assert [(pin.layer.name, pin.choice, pin.nbytes) for pin in space.pinned] == [
            ("model.layers.1.feed.gate", None, 2 * 64)]
        assert space.parameters == sum(layer.parameters for layer in layers)
        assert len(space) == len(layers) - (granularity != "block")
    with pytest.raises(UsageError, match="matches no layer"):
        search_space(layers, backend, choices, exclude=("*.gates",))


def test_slopes_of_experts_are_those_of_each_window_alone() -> None:
    space, bank, runner = filled(Toy(experts=True), Rounding())
    at = np.array([0.5, 0.5])
    probe = ModelProbe(space, bank, runner, WINDOWS)
    slopes = probe.slopes(at)
    for window in range(len(WINDOWS.ids)):
        alone = ModelProbe(space, bank, runner, WINDOWS.part(window, window + 1)).slopes(at)
        np.testing.assert_allclose(slopes[window], alone[0], rtol=1e-3, atol=1e-6)
    names = [layer.name for layer in space.layers]
    last = [f"experts.{EXPERTS - 1}." in name for name in names]
    assert (slopes[:, last] == 0).all()  # no token is sent there
    assert (np.abs(slopes[:, ~np.array(last)]).max(axis=(0, 2)) > 0).all()
    # Along all layers' changes together, a slope is a derivative of the loss.
    ends = []
    for step in (1e-2, -1e-2):
        shares = dict(zip(space.choices, at + step * np.array([-1, 1]), strict=True))
        for layer in range(len(space)):
            bank.blend(layer, shares)
        ends.append(runner.nll(runner.run_all(runner.embed(WINDOWS.ids)), WINDOWS.ids).mean(axis=1))
    moved = (slopes[:, :, 1] - slopes[:, :, 0]).sum(axis=1)
    np.testing.assert_allclose(moved.mean(), ((ends[0] - ends[1]) / 2e-2).mean(), rtol=0.05)


def test_hessian_traces_of_experts_are_finite_and_zero_where_no_token_comes() -> None:
    space, bank, runner = filled(Toy(experts=True), Rounding())
    traces = ModelProbe(space, bank, runner, WINDOWS).hessian_traces(np.random.default_rng(0))
    assert all(np.isfinite(trace) for trace in traces.values())
    unreached = [trace for linear, trace in traces.items() if f"experts.{EXPERTS - 1}." in linear.name]
    assert unreached and not any(unreached)


def test_linears_that_no_token_reaches_are_rounded_plainly_and_named(tmp_path: Path) -> None:
    model = Toy(experts=True)
    with pytest.warns(RuntimeWarning, match=rf"{2 * BLOCKS} linears .*first: model\.layers\.0\.feed\.experts\.3\.up"):
        space, bank, _ = filled(model, Gptq(Options(clip_search=False)))
    bank.save_record(tmp_path / "variants.json")
    marked = {row["linear"] for row in json.loads((tmp_path / "variants.json").read_text()) if row.get("unreached")}
    assert marked == {linear.name for layer in space.layers for linear in layer.linears if ".experts.3." in linear.name}
    [linear] = [layer.linears[0] for layer in space.layers if layer.name == "model.layers.0.feed.experts.3.up"]
    error = (bank.variant(linear, space.choices[0]) - bank.original(linear)).square().mean().sqrt()
    assert error < 0.15 * bank.original(linear).square().mean().sqrt()
