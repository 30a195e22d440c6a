"""The game on a tiny model: its losses are those of whole forwards, at the cost of the blocks from a difference on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from impq_gptq.backend import Gptq, Options
from impq_spqe.sampler import Options as SpqeOptions
from impq_spqe.sampler import Spqe

from impq_core.errors import ImpqError
from impq_core.game.model_game import ModelGame
from impq_core.game.probe import ModelProbe
from impq_core.keys import TextKey
from impq_core.ledger import Ledger, MeasurementLog
from impq_core.model.bank import Bank
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.layers import layers_of, search_space
from impq_core.model.quantize import fill_bank
from impq_core.model.source import locate_model
from impq_core.model.text import Windows
from impq_core.space import Choice, SearchSpace
from impq_core.testing import tiny_model

BLOCKS = 12
WINDOWS = Windows(np.random.default_rng(0).integers(0, 256, (6, 24)), "test", "random bytes")


class Table:
    """A tiny model with its variants, and games on it."""

    def __init__(self, folder: Path, granularity: str = "block") -> None:
        self.model = locate_model(str(tiny_model(folder, blocks=BLOCKS))).load(torch.float32)
        self.runner, backend = BlockwiseModel(self.model), Gptq(Options(grid="min-max"))
        choices = backend.choices()[1:]
        self.space: SearchSpace = search_space(layers_of(self.model, granularity), backend, choices)
        self.bank = Bank(self.runner, self.space.layers, backend)
        fill_bank(self.bank, self.runner, WINDOWS.ids,
                  [choices] * len(self.space), lambda done, total: None)

    def game(self, log: MeasurementLog | None = None) -> ModelGame:
        return ModelGame(self.space, self.bank, self.runner, WINDOWS, log)

    def plainly(self, pick: np.ndarray) -> float:
        """Absolute loss by switching everything and running the whole model."""
        self.bank.apply([self.space.choices[k] for k in pick])
        losses = self.runner.nll(self.runner.run_all(self.runner.embed(WINDOWS.ids)), WINDOWS.ids)
        return float(losses.mean(axis=1).mean())


@pytest.fixture(scope="module", params=["block", "linear"])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return Table(tmp_path_factory.mktemp("game") / "m", request.param)


def test_shared_prefixes_change_nothing(table: Table) -> None:
    rng = np.random.default_rng(1)
    picks = rng.integers(0, 3, (20, len(table.space)))
    picks[5], picks[11] = picks[3], 0
    game = table.game()
    losses = game.losses(picks)
    plain = np.array([table.plainly(pick) for pick in picks]) - table.plainly(table.space.uniform(0))
    np.testing.assert_array_equal(losses, plain)
    again = game.forwards
    np.testing.assert_array_equal(game.losses(picks), losses)
    assert game.forwards == again  # the memo answered
    assert game.loss(table.space.uniform(0)) == 0.0


def test_the_value_may_be_the_divergence_from_the_unquantized_model(table: Table) -> None:
    game = ModelGame(table.space, table.bank, table.runner, WINDOWS, value="kl")
    pick = np.random.default_rng(4).integers(0, 3, len(table.space))
    assert game.reference_loss > 0 and game.forwards == 2  # the unquantized model's blocks and its logits count
    ours = game.window_losses(pick)

    def logits(choices: list[Choice | None]) -> torch.Tensor:
        table.bank.apply(choices)
        with torch.no_grad(), table.runner.placement.loaded(*range(BLOCKS)):
            return table.model(input_ids=torch.from_numpy(WINDOWS.ids)).logits[:, :-1].log_softmax(dim=-1)

    p, q = logits([None] * len(table.space)), logits([table.space.choices[k] for k in pick])
    np.testing.assert_allclose(ours, (p.exp() * (p - q)).sum(dim=-1).mean(dim=1).numpy(), rtol=1e-4)


def test_other_windows_are_another_game_and_the_first_is_not_forgotten(table: Table) -> None:
    spare = Windows(np.random.default_rng(8).integers(0, 256, (13, WINDOWS.ids.shape[1])), "test", "more bytes")
    game = ModelGame(table.space, table.bank, table.runner, WINDOWS, spare=spare)
    pick = np.random.default_rng(4).integers(0, 3, len(table.space))
    first = game.window_losses(pick)
    game.redraw(2)
    other = ModelGame(table.space, table.bank, table.runner, spare.part(6, 12))
    np.testing.assert_array_equal(game.window_losses(pick), other.window_losses(pick))
    assert game.loss(pick) == other.loss(pick) != float(first.mean()) and game.evaluations == 4
    before = game.forwards
    game.redraw(3)  # there are three sets: this is the first again
    np.testing.assert_array_equal(game.window_losses(pick), first)
    assert game.forwards == before


def test_what_the_probe_looks_at_counts(table: Table) -> None:
    game = table.game()
    pick = table.space.uniform(1)
    loss, spent = game.loss(pick), game.forwards
    game.probe.slopes(np.array([0.5, 0.5, 0.0]))
    assert game.forwards == pytest.approx(spent + 4, abs=0.3)
    game.loss(table.space.uniform(2))
    assert game.loss(pick) == loss == table.plainly(pick) - table.plainly(table.space.uniform(0))


def test_a_permutation_costs_little_more_than_half_a_forward_an_evaluation(table: Table) -> None:
    game = table.game()
    m = Spqe(SpqeOptions(4, antithetic=True)).sample(game, np.random.default_rng(0))
    cost = table.runner.cost(WINDOWS.ids)
    head = cost.head / cost.total
    assert game.forwards / game.evaluations <= 0.6 * (1 - head) + head  # blocks are shared, the head is not
    assert m.forwards == game.forwards and m.tokens == 6 * 23


def test_evaluating_elsewhere_in_between_does_not_confuse_the_game(table: Table) -> None:
    game = table.game()
    pick = np.random.default_rng(2).integers(0, 3, len(table.space))
    game.loss(pick)
    table.bank.apply([None] * len(table.space))
    pick[-1] = (pick[-1] + 1) % 3
    assert game.loss(pick) == table.plainly(pick) - table.plainly(table.space.uniform(0))


def test_every_loss_is_in_the_log_before_it_is_returned(table: Table, tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    log = MeasurementLog(path, TextKey("tiny"))
    game = table.game(log)
    pick = table.space.uniform(1)
    loss = game.loss(pick)
    header, rows = MeasurementLog.read(path)
    assert header["tokens"] == "tiny"
    assert [row[0] for row in rows] == [tuple(table.space.uniform(0)), tuple(pick)]
    assert rows[1][1] - rows[0][1] == loss
    log.close()
    with path.open("a") as file:
        file.write('{"pick": [0, 0')
    assert MeasurementLog.read(path)[1] == rows  # a torn last line is no loss
    text = path.read_text().replace('{"pick"', '"pick"', 1)
    path.write_text(text)
    with pytest.raises(ImpqError, match="line 2"):
        MeasurementLog.read(path)
    with pytest.raises(ImpqError, match="line 2"):
        MeasurementLog(path, TextKey("tiny"))


def test_a_game_goes_on_from_its_log_as_if_nothing_had_happened(table: Table, tmp_path: Path) -> None:
    def play(path: Path, count: int) -> list[float]:
        game = ModelGame(table.space, table.bank, table.runner, WINDOWS.first(2), MeasurementLog(path, TextKey("tiny")),
                         spare=WINDOWS.part(2, 6))
        rng, losses = np.random.default_rng(3), []
        for number in range(count):
            game.redraw(number // 4)
            losses += [game.loss(rng.integers(0, 3, len(table.space))), game.forwards]
        return losses

    whole = play(tmp_path / "whole", 12)
    for stop in (1, 5, 12):
        path = tmp_path / f"cut{stop}"
        play(path, stop)
        table.bank.apply([None] * len(table.space))
        assert play(path, 12) == whole
        assert path.read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_row_with_fewer_windows_is_refused(table: Table, tmp_path: Path) -> None:
    path, pick = tmp_path / "log", table.space.uniform(1)
    table.game(MeasurementLog(path, TextKey("tiny"))).loss(pick)
    *rows, last = path.read_text().splitlines(keepends=True)
    row = json.loads(last)
    path.write_text("".join([*rows, json.dumps({**row, "windows": row["windows"][1:]}) + "\n"]))
    with pytest.raises(ImpqError, match="number of losses is not that of the 6 windows"):
        table.game(MeasurementLog(path, TextKey("tiny"))).loss(pick)


def test_gradients_come_back_from_their_log(table: Table, tmp_path: Path) -> None:
    path, at = tmp_path / "gradients", np.array([0.5, 0.25, 0.25])
    found = []
    for log in (None, path, path):
        probe = ModelProbe(table.space, table.bank, table.runner, WINDOWS,
                           log=Ledger(log, "impq-gradients/2", TextKey("tiny")) if log else None)
        found.append((probe.slopes(), probe.slopes(at), probe.hessian_traces(np.random.default_rng(0)), probe.forwards))
    assert path.read_text().count("\n") == 4  # a header, two slopes, a draw of traces: nothing twice
    for one in found[1:]:
        np.testing.assert_array_equal(one[0], found[0][0])
        np.testing.assert_array_equal(one[1], found[0][1])
        assert one[2:] == found[0][2:]


def test_the_bank_stores_what_it_says(table: Table) -> None:
    assert table.bank.nbytes == table.space.nbytes.sum()


def test_weights_that_are_no_numbers_are_named(table: Table) -> None:
    spec = table.space.layers[3].linears[0]
    weight = table.bank.module(spec).weight
    kept = weight[0, 0].item()
    weight[0, 0] = float("nan")
    with pytest.raises(ImpqError, match=spec.name):
        table.bank.original(spec)
    weight[0, 0] = kept
