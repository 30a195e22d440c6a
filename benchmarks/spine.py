"""Plans and their references on the real model, for two menus, the middle budget and three seeds of the orders.

Variants are quantized once for each menu; every seed has its own permutations and its own plan.
"""

from __future__ import annotations

import argparse

import numpy as np
from common import Bench, add_model, command, heading, model_name, page_of, table, write

from impq_core.config import RunConfig
from impq_core.evaluate import evaluate_plan
from impq_core.terminal import evaluation_rows

MENUS = ((2.0, 4.0), (3.0, 8.0))
SEEDS = (0, 1, 2)
OPTIONS = {"estimator": {"permutations": 10, "fresh": False}}


def measure(model: str, bits: tuple[float, ...]) -> list[str]:
    bench = Bench.build(RunConfig(model=model, estimator="spqe", granularity="block", bits=bits, tracking_uri="none",
                                  options=OPTIONS))
    prepared, windows = bench.prepared, bench.windows
    lines: list[str] = []
    plans = []
    for seed in SEEDS:
        game = bench.game(prepared.config)
        estimate, _ = prepared.parts.estimate(game, game.probe, np.random.default_rng(seed))
        plan = prepared.parts.allocator.allocate(estimate, prepared.budget_bytes)
        predicted, measured, forwards = plan.predicted_loss, game.loss(plan.pick), estimate.forwards
        evaluation = evaluate_plan(bench.evaluator, plan, prepared.between, prepared.mixes, seed,
                                   bench.session.report(f"seed {seed}"))
        error = ("" if estimate.stderr is None else  # some surrogates have none
                 f"standard error of the costs {estimate.stderr[:, 1:].mean():.4f} on average; ")
        plans.append(plan.pick)
        same = ", ".join(f"{int((plan.pick != other).sum())} layers from seed {s}"
                         for s, other in zip(SEEDS, plans[:-1], strict=False))
        lines += [f"### Seed {seed}", "",
                  f"{forwards:.1f} forwards of {windows.scored_tokens} tokens; {error}plan's objective "
                  f"{predicted:.4f}, its measured calibration loss {measured:.4f} nats per token above all-high; "
                  f"proven within {plan.gap:.1g}"
                  + (f"; the plan differs in {same}" if same else "") + ".", ""]
        header, cells = evaluation_rows(evaluation)
        lines += table(header, cells)
        beaten = [row.name for row in evaluation.rows[1:] if (d := evaluation.against_plan(row)) and d[0] < 0
                  and row.nbytes is not None and row.nbytes <= plan.nbytes]
        lines += [f"The plan loses to: {', '.join(beaten) if beaten else 'nothing of its size or smaller'}.", ""]
    menu = ",".join(f"{b:g}" for b in bits)
    return [f"## `--bits {menu}`, budget {prepared.config.budget}", "",
            f"SPQE with {prepared.parts.estimator.options}, surrogate {estimate.method}; evaluated on "
            f"{prepared.evaluation}, {prepared.evaluation.scored_tokens} scored tokens, {prepared.config.dtype} "
            "forwards.", "", *lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    model = parser.parse_args().model
    lines = heading(f"The spine: SPQE, covariance, QP, GPTQ on {model_name(model)}", command())
    for bits in MENUS:
        lines += measure(model, bits)
        write(page_of("spine.md", model), lines)


if __name__ == "__main__":
    main()
