"""Embedding and head as layers: losses, scores and slopes against the model with their weights written into it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from toy import Toy

from impq_core.errors import ImpqError
from impq_core.evaluate import Evaluator
from impq_core.game.ends import embedded_changes
from impq_core.game.model_game import ModelGame
from impq_core.game.probe import ModelProbe
from impq_core.interfaces import Statistics, Variant
from impq_core.model.bank import Bank
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.ends import end_layers, ends_of
from impq_core.model.layers import layers_of, search_space
from impq_core.model.quantize import fill_bank
from impq_core.model.text import Windows
from impq_core.space import Choice, LinearSpec
from impq_core.testing.rounding import Rounding
from impq_core.testing.tiny import _random_model

WINDOWS = Windows(np.random.default_rng(0).integers(0, 256, (5, 16)), "test", "random bytes")
KINDS = ("llama", "gemma3", "gemma2")  # two weights; one weight with a scale; one with a scale and capped logits


class Counting(Rounding):
    """Counts the variants that are unpacked, and keeps the statistics of each weight."""

    needs = frozenset({"activations"})

    def __init__(self) -> None:
        super().__init__()
        self.unpacked: Counter[tuple[str, Choice]] = Counter()
        self.statistics: list[tuple[tuple[int, ...], Statistics]] = []

    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        assert statistics is not None
        self.statistics.append((tuple(weight.shape), statistics))
        return super().quantize(weight, choice, statistics)

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        self.unpacked[linear.name, variant.choice] += 1
        return super().dequantize(variant, linear)


class Table:
    def __init__(self, kind: str = "llama", granularity: str = "group", bits: tuple[float, ...] = (4, 2)) -> None:
        self.model: Any = Toy() if kind == "toy" else _random_model(kind, 3, 0).eval().requires_grad_(False)
        self.backend, self.runner = Counting(), BlockwiseModel(self.model, room=1)
        choices = tuple(choice for choice in self.backend.choices() if choice.bits in bits)
        layers = sorted((*layers_of(self.model, granularity), *end_layers(self.model)), key=lambda layer: layer.block)
        self.space = search_space(tuple(layers), self.backend, choices)
        self.bank = Bank(self.runner, self.space.everyone, self.backend)
        fill_bank(self.bank, self.runner, WINDOWS.ids, [choices] * len(self.space),
                  lambda done, total: None)
        self.bank.apply([None] * len(self.space))
        self.backend.unpacked.clear()

    def logits(self, pick: np.ndarray | None) -> torch.Tensor:
        """By the plain forward, with every weight written into its module."""
        self.bank.apply([None] * len(self.space))
        own = {name: value.clone() for name, value in self.model.state_dict().items()}
        for layer, choice in zip(self.space.layers, pick if pick is not None else [], strict=pick is not None):
            for linear in layer.linears:
                self.bank.module(linear).weight.copy_(self.bank.variant(linear, self.space.choices[choice]))
        options = {} if isinstance(self.model, Toy) else {"use_cache": False}
        found: torch.Tensor = self.model(input_ids=torch.from_numpy(WINDOWS.ids), **options).logits.float()
        self.model.load_state_dict(own)
        return found[:, :-1]

    def expected(self, pick: np.ndarray, value: str) -> np.ndarray:
        logits, targets = self.logits(pick), torch.from_numpy(WINDOWS.ids)[:, 1:]
        losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        if value == "kl":
            losses = functional.kl_div(logits.log_softmax(-1), self.logits(None).log_softmax(-1), reduction="none",
                                       log_target=True).sum(-1)
        return losses.mean(dim=1).double().numpy()

    def picks(self, count: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, len(self.space.choices), (count, len(self.space)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("value", "granularity"), [("nll", "group"), ("kl", "block")])
def test_losses_are_those_of_the_model_with_the_weights_written_into_it(kind: str, value: str,
                                                                        granularity: str) -> None:
    table = Table(kind, granularity)
    picks = table.picks(6)
    game = ModelGame(table.space, table.bank, table.runner, WINDOWS, value=value)
    game.losses(picks)
    for pick in picks:
        np.testing.assert_allclose(game.window_losses(pick), table.expected(pick, value), rtol=1e-4, atol=1e-6)
    alone = ModelGame(table.space, table.bank, table.runner, WINDOWS, value=value)
    np.testing.assert_array_equal([game.window_losses(pick) for pick in picks],
                                  [alone.window_losses(pick) for pick in picks])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_model_with_the_weights_written_into_it(kind: str) -> None:
    table = Table(kind)
    picks = table.picks(5)
    scores = Evaluator(table.runner, table.bank, WINDOWS).scores([table.space.assignment(pick) for pick in picks])
    for pick, score in zip(picks, scores, strict=True):
        np.testing.assert_allclose(score.window_nll, table.expected(pick, "nll"), rtol=1e-4)
        np.testing.assert_allclose(score.kl, table.expected(pick, "kl").mean(), rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_ends_are_unpacked_once_a_batch_and_the_head_alone_costs_the_head_alone(kind: str) -> None:
    table = Table(kind)
    picks = table.picks(8)
    ends = [layer.linears[0].name for layer in end_layers(table.model)]
    game = ModelGame(table.space, table.bank, table.runner, WINDOWS)
    game.losses(picks)
    for name in ends:  # a tied pair: for the first block, and for the logits
        assert all(0 < table.backend.unpacked[name, choice] <= len(ends[:2]) + 1 for choice in table.space.choices)
    cost, last = table.runner.cost(WINDOWS.ids), picks[-1]
    head = table.space.layers[-1].block == len(table.runner)
    for layer, blocks in ((0, cost.behind(0)), (-1, 0 if head else cost.blocks[-1])):
        changed, before = last.copy(), game.forwards
        changed[layer] = 1 - changed[layer]
        game.loss(last)
        game.loss(changed)
        assert game.forwards - before == pytest.approx((blocks + cost.head) / cost.total)
        np.testing.assert_allclose(game.window_losses(changed), table.expected(changed, "nll"), rtol=1e-4)
        last = changed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", ["nll", "kl"])
def test_slopes_are_differences_of_losses(kind: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("impq_core.game.probe.BATCH_TOKENS", 32)  # two windows
    monkeypatch.setattr("impq_core.game.ends.HEAD_TOKENS", 100)
    table = Table(kind, bits=(8, 4, 2))
    table.runner.head_rows = 20
    at = np.array([0.5, 0.3, 0.2])
    probe = ModelProbe(table.space, table.bank, table.runner, WINDOWS, value)
    slopes = probe.slopes(at)
    step = 0.02
    for layer in {0, len(table.space) - 1}:
        for choice in (0, 2):
            ends = []
            for sign in (1, -1):
                for other in range(len(table.space)):
                    mixed = at.copy()
                    if other == layer:
                        mixed = (1 - sign * step) * at + sign * step * np.eye(3)[choice]
                    table.bank.blend(other, dict(zip(table.space.choices, mixed.tolist(), strict=True)))
                hidden = table.runner.run_all(table.runner.embed(WINDOWS.ids))
                if value == "nll":
                    ends.append(table.runner.nll(hidden, WINDOWS.ids).mean(axis=1))
                else:
                    reference = probe._unquantized
                    assert reference is not None
                    cut = torch.split(reference, [len(batch.ids) for batch in hidden])
                    against = [replace(batch, states=part) for batch, part in zip(hidden, cut, strict=True)]
                    ends.append(table.runner.compare([hidden], WINDOWS.ids, against)[0].kl.mean(axis=1))
            difference = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(slopes[:, layer, choice], difference, rtol=0.05,
                                       atol=0.02 * np.abs(difference).max())


@pytest.mark.parametrize("kind", KINDS)
def test_squares_are_those_of_the_shares_of_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("impq_core.game.probe.BATCH_TOKENS", 32)  # two windows
    monkeypatch.setattr("impq_core.game.ends.HEAD_TOKENS", 100)
    table = Table(kind, bits=(8, 4, 2))
    table.runner.head_rows = 20
    squares = ModelProbe(table.space, table.bank, table.runner, WINDOWS).token_squares()
    table.bank.apply([None] * len(table.bank.layers))
    ends, ids = ends_of(table.runner.model), torch.from_numpy(WINDOWS.ids).long()
    seen: dict[str, torch.Tensor] = {}

    def embedded(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        seen["embedded"] = output.detach().clone().requires_grad_()
        return seen["embedded"]

    def logits(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.retain_grad()
        seen["inputs"], seen["logits"] = args[0].detach(), output

    handles = [ends.embedding.register_forward_hook(embedded), ends.head.register_forward_hook(logits)]
    out = table.runner.model(ids, use_cache=False).logits[:, :-1]
    functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for layer in [0] if ends.tied else [0, len(table.space) - 1]:
        [linear] = table.space.layers[layer].linears
        module = table.bank.module(linear)
        for k, choice in enumerate(table.space.choices):
            change = table.bank.variant(linear, choice) - table.bank.original(linear)
            expected = torch.zeros(len(ids))
            if module is ends.embedding or ends.tied:
                [moved] = embedded_changes(ends.embedding, [change], ids)
                gradient = seen["embedded"].grad
                assert gradient is not None
                expected += (gradient * moved).sum(dim=2).square().sum(dim=1)
            if module is ends.head or ends.tied:
                gradient = seen["logits"].grad
                assert gradient is not None
                expected += (gradient * (seen["inputs"] @ change.T)).sum(dim=2).square().sum(dim=1)
            np.testing.assert_allclose(squares[:, layer, k], expected.numpy() / (ids.shape[1] - 1), rtol=5e-3)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_traces_of_ends_are_those_of_their_hessians(kind: str) -> None:
    table = Table(kind)
    own = table.model.get_output_embeddings().weight
    probe = ModelProbe(table.space, table.bank, table.runner, WINDOWS)
    linear = table.space.layers[-1 if kind == "llama" else 0].linears[0]
    found = np.mean([probe.hessian_traces(np.random.default_rng(seed))[linear] for seed in range(8)])
    assert table.model.get_output_embeddings().weight is own and np.isfinite(found)
    if kind == "llama":  # the Hessian of the head: (diag p - p pT) times x xT, whose trace is known
        with torch.no_grad():
            hidden = table.runner.run_all(table.runner.embed(WINDOWS.ids))
            inputs = torch.cat([table.runner.forward.head_inputs(
                batch.ids[:, :-1].flatten(), table.runner.forward.rows(batch.states, 15)) for batch in hidden])
            chances = functional.linear(inputs, own).softmax(-1)
            trace = ((1 - (chances**2).sum(-1)) * (inputs**2).sum(-1)).mean()
        assert found == pytest.approx(float(trace), rel=0.3)


def test_statistics_of_the_head_are_those_of_its_inputs_and_an_embedding_has_none() -> None:
    for kind in ("llama", "gemma3"):
        table = Table(kind)
        pick = np.zeros(len(table.space), dtype=np.int64)
        assignment = list(table.space.assignment(pick))
        if kind == "gemma3":  # the tied pair is quantized behind the blocks
            assignment[0] = None
        table.bank.apply(assignment)
        seen: list[torch.Tensor] = []
        handle = table.model.get_output_embeddings().register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0]))
        table.model(input_ids=torch.from_numpy(WINDOWS.ids), use_cache=False)
        with table.runner.placement.loaded(0, 1, 2):
            table.model(input_ids=torch.from_numpy(WINDOWS.ids), use_cache=False)
        handle.remove()
        rows = seen[-1].flatten(0, -2)
        found = [statistics for shape, statistics in table.backend.statistics if shape == (259, 64)]
        first, last = found[0], found[-1]
        torch.testing.assert_close(last.gram, rows.T @ rows, rtol=1e-3, atol=1e-3)
        assert last.tokens == len(rows)
        if kind == "llama":
            assert first.tokens == 0 and not first.gram.any() and first.gram.shape == (64, 64)


def test_layouts_that_a_plan_cannot_hold_are_refused() -> None:
    shared: Any = Toy()
    shared.model.layers[0].again = shared.lm_head.weight
    shared.model.layers[0].register_parameter("again", shared.lm_head.weight)
    second: Any = Toy()
    second.model.per_layer = torch.nn.Embedding(259, 12)
    other: Any = Toy()
    other.model.embed = torch.nn.Identity()
    for model, named in ((shared, "layers.0"), (second, "per_layer"), (other, "Identity")):
        with pytest.raises(ImpqError, match=named):
            end_layers(model)


def test_blocks_that_read_the_embedding_themselves_are_refused() -> None:
    for hands in ("", "dict"):
        BlockwiseModel(Toy(hands=hands)).check_ends(WINDOWS.ids)
    with pytest.raises(ImpqError, match="embedding"):  # blocks are not even given the same arguments
        BlockwiseModel(Toy(hands="text")).check_ends(WINDOWS.ids)


def test_a_model_whose_blocks_hand_on_a_state_has_other_ends_too() -> None:
    model = Toy(hands="dict")
    table = Table.__new__(Table)
    table.__dict__.update(vars(Table("toy")))
    runner = BlockwiseModel(model)
    bank = Bank(runner, table.space.everyone, table.backend)
    bank.add_all(table.bank)
    picks = table.picks(4)
    table.runner.embed(WINDOWS.ids)
    game = ModelGame(table.space, bank, runner, WINDOWS)
    game.losses(picks)
    assert not runner.partial
    for pick in picks:
        np.testing.assert_allclose(game.window_losses(pick), table.expected(pick, "nll"), rtol=1e-4)
