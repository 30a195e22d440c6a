"""The plan beside its references on the real model, for two menus, budget in the middle, three seeds of the orders.

Variants are quantized once a menu; every seed plays its own permutations and makes its own plan.
"""

from __future__ import annotations

import argparse

import numpy as np
from common import heading, say, table, write

from impq_core.config import RunConfig
from impq_core.evaluate import Evaluator, evaluate_plan
from impq_core.game import ModelGame
from impq_core.pipeline import load_runner, prepare, quantize_all
from impq_core.plugins import Plugins
from impq_core.probe import ModelProbe
from impq_core.report import evaluation_rows

MENUS = ((2.0, 4.0), (3.0, 8.0))
SEEDS = (0, 1, 2)


def measure(bits: tuple[float, ...]) -> list[str]:
    prepared = prepare(RunConfig(bits=bits, tracking_uri="none"), Plugins())
    runner = load_runner(prepared)
    bank = quantize_all(prepared, runner, say("quantize"))
    assert prepared.calibration is not None
    windows = prepared.calibration.first(prepared.config.game_windows)
    probe = ModelProbe(prepared.space, bank, runner, windows)
    evaluator = None
    lines: list[str] = []
    plans = []
    for seed in SEEDS:
        game = ModelGame(prepared.space, bank, runner, windows)
        estimate, _ = prepared.parts.estimate(game, probe, np.random.default_rng(seed))
        plan = prepared.parts.allocator.allocate(estimate, prepared.budget_bytes)
        predicted, measured = plan.predicted_loss, game.loss(plan.pick)
        forwards = estimate.forwards
        evaluator = evaluator or Evaluator(runner, bank, prepared.evaluation)
        evaluation = evaluate_plan(evaluator, plan, prepared.between, prepared.evaluation, seed, say(f"seed {seed}"))
        assert estimate.stderr is not None
        plans.append(plan.pick)
        same = ", ".join(f"{int((plan.pick != other).sum())} layers from seed {s}"
                         for s, other in zip(SEEDS, plans[:-1], strict=False))
        lines += [f"### Seed {seed}", "",
                  f"{forwards:.1f} forwards of {windows.scored_tokens} tokens; standard error of the Shapley values "
                  f"{estimate.stderr[:, 1:].mean():.4f} on average; plan's objective {predicted:.4f}, its measured "
                  f"calibration loss {measured:.4f} nats per token above all-high; proven within {plan.gap:.1g}"
                  + (f"; the plan differs in {same}" if same else "") + ".", ""]
        header, cells = evaluation_rows(evaluation)
        lines += table(header, cells)
        beaten = [row.name for row in evaluation.rows[1:] if (d := evaluation.against_plan(row)) and d[0] < 0
                  and row.nbytes is not None and row.nbytes <= plan.nbytes]
        lines += [f"The plan loses to: {', '.join(beaten) if beaten else 'nothing of its size or smaller'}.", ""]
    menu = ",".join(f"{b:g}" for b in bits)
    return [f"## `--bits {menu}`, budget {prepared.config.budget}", "",
            f"SPQE with {prepared.parts.estimator.options}, surrogate {estimate.method}; evaluated on "
            f"{prepared.evaluation}, {prepared.evaluation.scored_tokens} scored tokens, bfloat16 forwards.", "", *lines]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    lines = heading("The spine: SPQE, covariance, QP, GPTQ on SmolLM2-135M", "python benchmarks/spine.py")
    for bits in MENUS:
        lines += measure(bits)
        write("spine.md", lines)


if __name__ == "__main__":
    main()
