"""Granularities: plans of GPTQ with 2, 3 and 4 bits at block, group and linear level, against uniform 3 bits.

Every linear is quantized once; the three levels have the same variants.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from common import Bench, add_model, command, heading, model_name, page_of, plus_minus, table, write

from impq_core.budget import Budget
from impq_core.config import RunConfig, TextConfig

BUDGETS = (2.5, 3.0, 3.5)
BASE = RunConfig(tracking_uri="none", estimator="spqe", granularity="block",
                 bits=(2.0, 3.0, 4.0), evaluation=TextConfig(windows=32))
PERMUTATIONS = {"block": 4, "group": 2, "linear": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    model = parser.parse_args().model
    lines = heading(f"GPTQ 2,3,4 bits at three granularities on {model_name(model)}", command())
    whole = Bench.build(replace(BASE, model=model))
    space = whole.prepared.space
    uniforms = whole.uniforms()
    sizes = [Budget(budget, "bits").resolve(space) for budget in BUDGETS]
    line = np.interp(sizes, [n for _, n, _ in uniforms], [s.nll for *_, s in uniforms])
    three = {name: score for name, _, score in uniforms}["uniform 3"]
    rows, facts = [], []
    for granularity, permutations in PERMUTATIONS.items():
        config = replace(BASE, model=model, granularity=granularity)
        bench = whole.at(config)
        for estimator, options in (("spqe", {"permutations": permutations, "fresh": False}), ("isolated", {})):
            config = replace(config, estimator=estimator, options={"estimator": options})
            estimate, _ = bench.estimate(config)
            plans = [bench.plan(config, estimate, budget) for budget in BUDGETS]
            scores = [bench.score(plan) for plan in plans]
            rows.append([granularity, str(len(bench.prepared.space)), estimator, f"{estimate.forwards:.1f}",
                         *(plus_minus(score.nll, score.stderr) for score in scores),
                         plus_minus(*scores[1].minus(three), sign=True)])
            facts.append(f"{granularity}, {estimator}: " + "; ".join(
                f"{budget:g} bits {'/'.join(str(int((plan.pick == k).sum())) for k in range(3))} at 4/3/2"
                + (f", gap {plan.gap:.2g}" if plan.gap is not None else "")
                for budget, plan in zip(BUDGETS, plans, strict=True)))
            alike = ", ".join(f"{name} {plus_minus(score.nll, score.stderr)}" for name, _, score in uniforms)
            header = ["granularity", "layers", "estimator", "forwards", *(f"{b:g} bits" for b in BUDGETS),
                      "3 bits minus uniform 3"]
            reference = ["", "", "line of uniforms", "", *(f"{value:.3f}" for value in line), ""]
            write(page_of("granularity.md", model), [
                *lines, f"Held-out NLL, nats per token, on {bench.prepared.evaluation}, "
                f"{bench.prepared.evaluation.scored_tokens} scored tokens; losses of the game on "
                f"{bench.windows.scored_tokens} tokens; covariance surrogate for spqe ("
                + ", ".join(f"{count} permutations at {g} level" for g, count in PERMUTATIONS.items())
                + f"), allocator qp. The last column is paired over windows at the same bytes. {alike}.", "",
                *table(header, [*rows, reference]), "Plans:", "", *(f"- {fact}" for fact in facts)])


if __name__ == "__main__":
    main()
