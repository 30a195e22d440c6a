"""Cost of an evaluation of the game in forwards, and its time relative to naive evaluation, in one process in turns.

Naive evaluation quantizes the block that changed and runs the whole model. Both evaluate the same picks, the demotions
of one random permutation, and must measure the same losses.
"""

from __future__ import annotations

import time
from functools import partial

import numpy as np
from common import heading, table, write
from impq_spqe.sampler import demotions

from impq_core.config import RunConfig
from impq_core.game.model_game import ModelGame
from impq_core.model.calibration import input_statistics
from impq_core.plugins import Plugins
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session

STEPS = 10


def main() -> None:
    prepared = prepare(RunConfig(tracking_uri="none", granularity="block"), Plugins())
    space, backend = prepared.space, prepared.parts.backend
    session = Session(prepared, Plugins())
    session.quantize_deployed()
    runner, bank = session.runner, session.bank
    hidden, statistics = runner.embed(prepared.calibration.ids), {}
    for block, layer in enumerate(space.layers):  # as in the bank: each block behind the widest prefix
        bank.switch(block, None)
        statistics |= input_statistics(runner, block, hidden, [bank.module(spec) for spec in layer.linears])
        bank.switch(block, space.choices[0])
        hidden = runner.run(block, hidden)

    windows = prepared.calibration.first(prepared.config.game_windows)
    game = ModelGame(space, bank, runner, windows)
    order = np.random.default_rng(0).permutation(len(space))
    path = demotions(space, order)
    game.losses(path)
    whole = [f"{game.forwards:.2f}", str(game.evaluations), f"{game.forwards / game.evaluations:.3f}"]

    fresh = ModelGame(space, bank, runner, windows)
    reference = fresh.reference_loss
    times: dict[str, list[float]] = {"game": [], "naive": []}
    for step in range(1, STEPS + 1):
        start = time.perf_counter()
        loss = fresh.loss(path[step])
        times["game"].append(time.perf_counter() - start)
        start = time.perf_counter()
        choice = space.choices[1]
        bank.apply(space.assignment(path[step]))
        for spec in space.layers[order[step - 1]].linears:
            variant = backend.quantize(bank.original(spec), choice, statistics[bank.module(spec)])
            runner.placement.replace(bank.module(spec), partial(backend.dequantize, variant, spec))
        losses = runner.nll(runner.run_all(runner.embed(windows.ids)), windows.ids)
        naive = float(losses.mean(axis=1).mean()) - reference
        times["naive"].append(time.perf_counter() - start)
        assert naive == loss, (naive, loss)
    ratios = np.array(times["naive"]) / np.array(times["game"])
    lines = heading("Cost of the game", "python benchmarks/game_cost.py")
    lines += ["One permutation of SmolLM2-135M's 30 blocks, "
              f"{windows.scored_tokens} scored tokens:", "",
              *table(["full-model forwards", "evaluations", "forwards per evaluation"], [whole]),
              f"Time of an evaluation, game and naive in turns over the first {STEPS} demotions (equal losses, bit for "
              "bit):", "",
              *table(["game, median s", "naive, median s", "ratio, median", "ratio, least"],
                     [[f"{np.median(times['game']):.2f}", f"{np.median(times['naive']):.2f}",
                       f"{np.median(ratios):.1f}", f"{ratios.min():.1f}"]])]
    write("game_cost.md", lines)


if __name__ == "__main__":
    main()
