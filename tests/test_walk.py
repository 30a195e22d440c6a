"""Assignments side by side: the losses of one after the other, each distinct prefix once, each variant once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from toy import BLOCKS, Toy

from impq_core.game.model_game import ModelGame
from impq_core.game.probe import ModelProbe
from impq_core.interfaces import Variant
from impq_core.model.bank import Bank
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.layers import layers_of, search_space
from impq_core.model.quantize import fill_bank
from impq_core.model.text import Windows
from impq_core.model.walk import Prefix, Walk
from impq_core.space import LinearSpec
from impq_core.testing.rounding import Rounding

WINDOWS = Windows(np.random.default_rng(0).integers(0, 256, (5, 16)), "test", "random bytes")


class Counting(Rounding):
    """Counts the variants that are unpacked."""

    def __init__(self) -> None:
        super().__init__()
        self.unpacked: Counter[tuple[str, float]] = Counter()

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        self.unpacked[linear.name, variant.choice.bits] += 1
        return super().dequantize(variant, linear)


class Table:
    def __init__(self, hands: str = "", shared: bool = False) -> None:
        self.backend, model = Counting(), Toy(hands=hands)
        if shared:
            model.model.layers[2].mix = model.model.layers[0].mix
        self.runner = BlockwiseModel(model, room=1)
        self.choices = tuple(choice for choice in self.backend.choices() if choice.bits in (2, 4))
        self.space = search_space(layers_of(self.runner.model, "linear"), self.backend, self.choices)
        self.bank = Bank(self.runner, self.space.everyone, self.backend)
        fill_bank(self.bank, self.runner, None, [self.choices] * len(self.space), lambda done, total: None)
        self.runner.embed(WINDOWS.ids)
        self.backend.unpacked.clear()

    def alone(self, pick: np.ndarray) -> np.ndarray:
        self.bank.apply(self.space.assignment(pick))
        hidden = self.runner.run_all(self.runner.embed(WINDOWS.ids))
        return self.runner.nll(hidden, WINDOWS.ids).mean(axis=1)


@pytest.mark.parametrize("seed", range(5))
def test_each_distinct_prefix_is_run_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table, rng = Table(), np.random.default_rng(seed)
    picks = rng.integers(0, 2, (12, len(table.space)))
    picks[:, rng.random(len(table.space)) < 0.7] = 0  # so that some have the same first blocks
    blocks = np.array([layer.block for layer in table.space.layers])
    prefixes = [len({pick[blocks <= block].tobytes() for pick in picks}) for block in range(BLOCKS)]
    ran: Counter[int] = Counter()
    run_batch = BlockwiseModel.run_batch
    monkeypatch.setattr(BlockwiseModel, "run_batch",
                        lambda self, index, batch: ran.update([index]) or run_batch(self, index, batch))
    walk, hidden = Walk(table.runner, table.bank), table.runner.embed(WINDOWS.ids)
    assignments = [table.space.assignment(pick) for pick in picks]
    outputs, known = walk.outputs(assignments, Prefix(None, [hidden]), keep=True)
    batches = len(hidden)
    assert [ran[block] // batches for block in range(BLOCKS)] == prefixes == walk.runs(assignments, None)
    assert max(table.backend.unpacked.values()) <= len({pick[blocks == 0].tobytes() for pick in picks}) * 2**2
    for pick, output in zip(picks, outputs, strict=True):
        np.testing.assert_array_equal(table.runner.nll(output, WINDOWS.ids).mean(axis=1), table.alone(pick))
    changed = picks[-1].copy()  # another way of the last layer: only the last block is run
    changed[-1] = 1 - changed[-1]
    ran.clear()
    outputs, _ = walk.outputs([table.space.assignment(changed)], known)
    assert ran == {BLOCKS - 1: batches} and walk.runs([table.space.assignment(changed)], assignments[-1]) == [0, 0, 1]
    np.testing.assert_array_equal(table.runner.nll(outputs[0], WINDOWS.ids).mean(axis=1), table.alone(changed))


@pytest.mark.parametrize("hands", ["", "dict"])
@pytest.mark.parametrize("value", ["nll", "kl"])
def test_losses_do_not_depend_on_what_is_measured_beside_them(hands: str, value: str) -> None:
    table = Table(hands)
    picks = np.random.default_rng(1).integers(0, 2, (70, len(table.space)))  # three batches
    together = ModelGame(table.space, table.bank, table.runner, WINDOWS, value=value).losses(picks)
    game = ModelGame(table.space, table.bank, table.runner, WINDOWS, value=value)
    np.testing.assert_array_equal(together, [game.loss(pick) for pick in picks])


def test_a_permutation_unpacks_each_variant_once() -> None:
    table = Table()
    n = len(table.space)
    picks = np.tril(np.ones((n + 1, n), dtype=int), -1)  # one layer more in each, from the first on
    ModelGame(table.space, table.bank, table.runner, WINDOWS).losses(picks)
    combinations = max(Counter(layer.block for layer in table.space.layers).values()) + 1
    assert max(table.backend.unpacked.values()) <= combinations


def test_slopes_unpack_a_variant_for_the_blend_and_for_its_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("impq_core.game.probe.BATCH_TOKENS", 16)  # a window
    table = Table()
    probe, at, found = ModelProbe(table.space, table.bank, table.runner, WINDOWS), np.array([0.5, 0.5]), []
    probe.slopes(at)  # the first time, its operations are counted on a window
    for room, windows in ((1, 1), (2**28, len(WINDOWS.ids))):
        table.runner.room = room
        table.backend.unpacked.clear()
        found.append(probe.slopes(at))
        parts = -(-len(WINDOWS.ids) // windows)
        assert set(table.backend.unpacked.values()) == {3 * parts}  # for the forward, the backward, and the change
    np.testing.assert_array_equal(*found)


def test_a_linear_that_two_blocks_share_has_its_width_in_both() -> None:
    table = Table(shared=True)
    picks = np.random.default_rng(2).integers(0, 2, (8, len(table.space)))
    game = ModelGame(table.space, table.bank, table.runner, WINDOWS)
    np.testing.assert_array_equal([game.window_losses(pick) for pick in picks], [table.alone(pick) for pick in picks])
    losses = ModelGame(table.space, table.bank, table.runner, WINDOWS).losses(picks)
    np.testing.assert_array_equal(losses, [game.loss(pick) for pick in picks])
    layer = next(i for i, layer in enumerate(table.space.layers) if layer.name.endswith("layers.0.mix"))
    ends, step = [], 0.02
    for share in (0.5 + step, 0.5 - step):
        for other in range(len(table.space)):
            at = share if other == layer else 0.5
            table.bank.blend(other, dict(zip(table.choices, (1 - at, at), strict=True)))
        hidden = table.runner.run_all(table.runner.embed(WINDOWS.ids))
        ends.append(table.runner.nll(hidden, WINDOWS.ids).mean(axis=1))
    slopes = ModelProbe(table.space, table.bank, table.runner, WINDOWS).slopes(np.array([0.5, 0.5]))[:, layer]
    np.testing.assert_allclose(slopes[:, 1] - slopes[:, 0], (ends[0] - ends[1]) / (2 * step), rtol=0.05, atol=1e-3)
