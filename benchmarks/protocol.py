"""Measurement with another backend than the deployed one: SPQE with Quanto, GPTQ and HQQ, plans for GPTQ and HQQ.

The paper measures with Quanto and deploys other backends: ``impq run --estimate-with quanto --backend gptq``. This
benchmark makes plans for each deployed backend from the estimates of all backends, and compares their scores.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from common import Bench, add_model, command, heading, model_name, page_of, plus_minus, table, write

from impq_core.budget import Budget
from impq_core.config import RunConfig, TextConfig
from impq_core.types import SensitivityEstimate

MEASURED = ("quanto", "gptq", "hqq")
DEPLOYED = ("gptq", "hqq")
MENUS = {(2.0, 4.0): (2.5, 3.0, 3.5), (4.0, 8.0): (5.0, 6.0, 7.0)}
PERMUTATIONS = 4
BASE = RunConfig(tracking_uri="none", estimator="spqe", granularity="block",
                 bits=(2.0, 4.0, 8.0), evaluation=TextConfig(windows=32),
                 options={"estimator": {"permutations": PERMUTATIONS, "fresh": False}})


def spearman(a: SensitivityEstimate, b: SensitivityEstimate) -> float:
    ranks = [np.argsort(np.argsort(estimate.linear[:, -1])) for estimate in (a, b)]
    return float(np.corrcoef(ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    base = replace(BASE, model=parser.parse_args().model)
    lines = heading(f"Measuring with one backend, deploying another, on {model_name(base.model)}", command())
    estimates: dict[tuple[str, tuple[float, ...]], SensitivityEstimate] = {}
    benches = {}
    for backend in MEASURED:
        whole = Bench.build(replace(base, backend=backend))
        for menu in MENUS:
            config = replace(base, backend=backend, bits=menu)
            bench = whole.at(config)
            estimates[backend, menu], _ = bench.estimate(config)
        if backend in DEPLOYED:
            benches[backend] = whole
    lines += [f"SPQE with {PERMUTATIONS} permutations on {bench.windows.scored_tokens} tokens, covariance surrogate, "
              f"allocator qp, block level; held-out NLL on {bench.prepared.evaluation}, "
              f"{bench.prepared.evaluation.scored_tokens} scored tokens. In brackets the difference to the plan "
              "measured with the deployed backend, paired over windows (positive: measuring elsewhere costs).", ""]
    for menu, budgets in MENUS.items():
        shown = ",".join(f"{b:g}" for b in menu)
        lines += [f"## `--bits {shown}`", "", "Rank correlation (Spearman) of the estimates: " + ", ".join(
            f"{a}/{b} {spearman(estimates[a, menu], estimates[b, menu]):.2f}"
            for a, b in (("quanto", "gptq"), ("quanto", "hqq"), ("gptq", "hqq"))) + ".", ""]
        rows = []
        for deployed in DEPLOYED:
            config = replace(base, backend=deployed, bits=menu)
            bench = benches[deployed].at(config)
            space = bench.prepared.space
            scores = {(measured, budget): bench.score(bench.plan(config, estimates[measured, menu].on(space), budget))
                      for measured in MEASURED for budget in budgets}
            for measured in MEASURED:
                cells = []
                for budget in budgets:
                    score, own = scores[measured, budget], scores[deployed, budget]
                    apart = f" ({plus_minus(*score.minus(own), sign=True)})" if measured != deployed else ""
                    cells.append(plus_minus(score.nll, score.stderr) + apart)
                rows.append([measured, deployed, *cells])
            uniforms = bench.uniforms()
            sizes = [Budget(budget, "bits").resolve(space) for budget in budgets]
            line = np.interp(sizes, [n for _, n, _ in uniforms], [s.nll for *_, s in uniforms])
            rows.append(["line of uniforms", deployed, *(f"{value:.3f}" for value in line)])
        lines += table(["measured with", "deployed with", *(f"{budget:g} bits" for budget in budgets)], rows)
        write(page_of("protocol.md", base.model), lines)


if __name__ == "__main__":
    main()
