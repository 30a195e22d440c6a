"""Mixtures of experts: their coverage, and slopes of linears that read some tokens, none, or rows without windows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import BLOCKS as BLOCKS_OF_TINY
from architectures import config_of, tiny
from impq_gptq.backend import Gptq, Options
from toy import BLOCKS, EXPERTS, Toy
from transformers import AutoModelForCausalLM

from impq_core.config import GRANULARITIES, RunConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.game.probe import ModelProbe
from impq_core.interfaces import Backend
from impq_core.model.bank import Bank
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.layers import coverage, layers_of, search_space, unstorable
from impq_core.model.linears import to_linears
from impq_core.model.quantize import fill_bank
from impq_core.model.text import Windows
from impq_core.plugins import Plugins
from impq_core.runs.prepare import prepare
from impq_core.space import SearchSpace
from impq_core.testing.rounding import Rounding
from impq_core.testing.tiny import byte_tokenizer

WINDOWS = Windows(np.random.default_rng(0).integers(0, 256, (5, 24)), "test", "random bytes")


def filled(model: Toy, backend: Backend, granularity: str = "linear",
           exclude: tuple[str, ...] = ()) -> tuple[SearchSpace, Bank, BlockwiseModel]:
    choices = tuple(choice for choice in backend.choices() if choice.bits in (4, 2))
    space = search_space(layers_of(model, granularity), backend, choices, exclude=exclude)
    runner = BlockwiseModel(model)
    bank = Bank(runner, space.everyone, backend)
    ids = WINDOWS.ids if backend.needs else None
    fill_bank(bank, runner, ids, [choices] * len(space) + [()] * len(space.pinned), lambda done, total: None)
    return space, bank, runner


def test_coverage_is_the_share_of_the_blocks_weights_that_can_be_quantized() -> None:
    with torch.device("meta"):
        fused = AutoModelForCausalLM.from_config(config_of("mixtral"))
        model = to_linears(AutoModelForCausalLM.from_config(config_of("mixtral")))
    attention, experts, router = 64 * (64 + 32 + 32 + 64), 4 * 3 * 64 * 128, 4 * 64
    for granularity in GRANULARITIES[1:]:
        covered = coverage(fused, layers_of(fused, granularity))
        assert covered.share == pytest.approx(attention / (attention + experts + router))
        assert covered.uncovered == "model.layers.0.mlp.experts.gate_up_proj"
        layers = layers_of(model, granularity)
        assert coverage(model, layers).share == pytest.approx(1 - router / (attention + experts + router))
        dense = {linear.name: "too odd" for layer in layers for linear in layer.linears if "experts" in linear.name}
        with pytest.raises(ImpqError, match=r"model moe: only 11% .* model\.layers\.0.* \(too odd\); --partial"):
            coverage(model, layers, dense).require("moe", dense)
    toy = Toy()
    assert coverage(toy, layers_of(toy, "block")).share == 1.0
    coverage(toy, layers_of(toy, "block")).require("dense")


def test_what_a_layer_is_in_a_mixture() -> None:
    with torch.device("meta"):
        model = to_linears(AutoModelForCausalLM.from_config(config_of("mixtral")))
    experts = "model.layers.0.mlp.experts"
    attention = {f"model.layers.0.self_attn.{part}" for part in ("qkv", "o_proj")}
    by = {granularity: {layer.name: len(layer.linears) for layer in layers_of(model, granularity) if layer.block == 0}
          for granularity in GRANULARITIES[1:]}
    assert by["block"] == {"model.layers.0": 4 + 3 * 4}
    assert by["group"].items() >= {f"{experts}.gate_up": 8, f"{experts}.down_proj": 4}.items()
    assert set(by["group"]) - {f"{experts}.gate_up", f"{experts}.down_proj"} == attention
    assert set(by["expert"]) == {*attention, *(f"{experts}.{number}" for number in range(4))}
    assert by["expert"][f"{experts}.3"] == 3
    assert len(by["linear"]) == 4 + 3 * 4


def test_a_linear_that_returns_a_tuple_is_no_layer() -> None:
    model = Toy(experts=True)
    names = {linear.name for layer in layers_of(model, "block") for linear in layer.linears}
    assert len(names) == BLOCKS * (1 + 2 + 2 * EXPERTS) and not any("router" in name for name in names)
    covered = coverage(model, layers_of(model, "block"))
    assert 0.9 < covered.share < 1 and covered.uncovered.endswith("router.weight")


def test_a_shape_that_a_backend_refuses_stays_at_16_bits_at_any_granularity() -> None:
    model = Toy()
    model.model.layers[1].feed.gate = torch.nn.Linear(64, 1, bias=False)
    backend = Gptq()
    choices = tuple(choice for choice in backend.choices() if choice.bits in (4, 2))
    for granularity in GRANULARITIES[1:]:
        layers = layers_of(model, granularity)
        dense = unstorable(layers, backend, choices)
        assert list(dense) == ["model.layers.1.feed.gate"] and "is 1 x 64" in dense["model.layers.1.feed.gate"]
        by_name = search_space(layers, backend, choices, dense=dense)
        by_pattern = search_space(layers, backend, choices, exclude=("*.gate",))
        for space in (by_name, by_pattern):
            assert [(pin.layer.name, pin.choice, pin.nbytes) for pin in space.pinned] == [
                ("model.layers.1.feed.gate", None, 2 * 64)]
            assert space.parameters == sum(layer.parameters for layer in layers)
            assert len(space) == len(layers) - (granularity != "block")
        assert by_name.fingerprint == by_pattern.fingerprint
        for given in ({}, {"pins": {"*.gate": "4"}, "dense": dense}):
            with pytest.raises(ImpqError, match=r"layers\.1\.feed\.gate is 1 x 64"):
                search_space(layers, backend, choices, **given)
    with pytest.raises(UsageError, match="matches no layer"):
        search_space(layers, backend, choices, exclude=("*.gates",))


def test_a_run_says_how_many_linears_stay_at_16_bits(tiny_config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tiny("qwen2_moe").save_pretrained(folder)  # a gate of one row beside each shared expert
    byte_tokenizer().save_pretrained(folder)
    options = {"backend": {"group_size": 32, "grid": "min-max"}}
    with pytest.warns(RuntimeWarning, match=rf"^{BLOCKS_OF_TINY} linears stay at 16 bits, 0\.\d% .*shared_expert_gate"):
        prepared = prepare(replace(tiny_config, model=str(folder), options=options), Plugins())
    assert {pin.layer.name.rpartition(".")[2] for pin in prepared.space.pinned} == {"shared_expert_gate"}
    assert 0.9 < prepared.coverage < 1
    options = {"backend": {"group_size": 128}}
    with pytest.raises(ImpqError, match=r"only \d+% .*group size 128 does not divide .*-o group_size=64"):
        prepare(replace(tiny_config, options=options), Plugins())


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


@pytest.mark.parametrize(("group", "few"), [(16, {"3"}), (64, {"0", "1", "2", "3"})])
def test_experts_that_few_tokens_reach_are_rounded_plainly_and_named(group: int, few: set[str], tmp_path: Path) -> None:
    model = Toy(experts=True)
    with pytest.warns(RuntimeWarning, match=rf"{2 * BLOCKS * len(few)} linears .*layers\.0\.feed\.experts\.{min(few)}"):
        space, bank, _ = filled(model, Gptq(Options(group_size=group, grid="min-max")))
    bank.save_record(tmp_path / "variants.json")
    marked = {row["linear"] for row in json.loads((tmp_path / "variants.json").read_text()) if row.get("unreached")}
    linears = [linear for layer in space.layers for linear in layer.linears]
    assert marked == {linear.name for linear in linears if linear.name.partition(".experts.")[2][:1] in few}
    [linear] = [linear for linear in linears if linear.name == "model.layers.0.feed.experts.3.up"]
    error = (bank.variant(linear, space.choices[0]) - bank.original(linear)).square().mean().sqrt()
    assert error < 0.15 * bank.original(linear).square().mean().sqrt()


def test_the_cost_of_slopes_does_not_depend_on_the_weights_of_the_moment() -> None:
    """Other weights route tokens to other experts, of which some may not play; a resumed run begins with others."""
    found = []
    for choice in (0, 1):
        space, bank, runner = filled(Toy(experts=True), Rounding(), exclude=("*.experts.0.*",))
        bank.apply(space.assignment(space.uniform(choice)))
        probe = ModelProbe(space, bank, runner, WINDOWS)
        probe.slopes(np.array([1.0 - choice, choice]))
        found.append(probe.forwards)
    assert found[0] == found[1]
