"""Every estimator with both allocators on the real model, for four menus of three backends and three budgets each.

Variants are quantized once for each menu, and every estimator measures once for each menu.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

import numpy as np
from common import Bench, add_model, command, heading, model_name, page_of, plus_minus, table, write

from impq_core.budget import Budget
from impq_core.config import RunConfig, TextConfig
from impq_core.parts import Parts
from impq_core.results import Score

MENUS = (
    ("gptq", (2.0, 4.0), (2.5, 3.0, 3.5)),
    ("hqq", (3.0, 8.0), (4.25, 5.5, 6.75)),
    ("quanto", (4.0, 8.0), (5.0, 6.0, 7.0)),
    ("quanto", (2.0, 4.0), (3.0, 3.5, 3.75)),
)
BASE = RunConfig(tracking_uri="none", estimator="spqe", granularity="block", evaluation=TextConfig(windows=32))
PLAYED = replace(BASE, estimator="spqe", options={"estimator": {"permutations": 10, "fresh": False}})
ESTIMATORS = {
    "spqe, covariance": PLAYED,
    "spqe, additive": replace(PLAYED, surrogate="additive"),
    "isolated": replace(BASE, estimator="isolated"),
    "llm-mq": replace(BASE, estimator="llm-mq"),
    "lim": replace(BASE, estimator="lim"),
    "activation": replace(BASE, estimator="activation"),
    "zscore, fewer": replace(BASE, estimator="zscore"),
    "zscore, more": replace(BASE, estimator="zscore", options={"estimator": {"direction": "more"}}),
    "first-last": replace(BASE, estimator="first-last"),
    **{f"random, seed {seed}": replace(BASE, estimator="random", seed=seed) for seed in range(3)},
}
ALLOCATORS = ("greedy", "qp")


def measure(model: str, backend: str, bits: tuple[float, ...], budgets: tuple[float, ...]) -> list[str]:
    base = replace(BASE, model=model, backend=backend, bits=bits)
    bench = Bench.build(base)
    space = bench.prepared.space
    scores: dict[tuple[str, float, str], Score] = {}
    forwards = {}
    measured = None
    for name, config in ESTIMATORS.items():
        config = replace(config, model=model, backend=backend, bits=bits)
        if config.estimator == "spqe" and measured is not None:  # another surrogate for the same losses
            estimate = Parts.build(config, bench.session.plugins).surrogate.fit(measured)
        else:
            estimate, measurements = bench.estimate(config)
            measured = measurements or measured
        forwards[name] = estimate.forwards
        for budget in budgets:
            for allocator in ALLOCATORS:
                plan = bench.plan(replace(config, allocator=allocator), estimate, budget)
                scores[name, budget, allocator] = bench.score(plan)
                print(name, budget, allocator, plus_minus(scores[name, budget, allocator].nll, math.nan), flush=True)
    uniforms = bench.uniforms()
    sizes = [Budget(budget, "bits").resolve(space) for budget in budgets]
    line = np.interp(sizes, [n for _, n, _ in uniforms], [s.nll for *_, s in uniforms])
    reference = bench.evaluator.score([None] * len(space))
    header = ["estimator", "forwards", *(f"{budget:g} bits, {a}" for budget in budgets for a in ALLOCATORS)]
    cells = [[name, f"{forwards[name]:.1f}",
              *(plus_minus(scores[name, b, a].nll, scores[name, b, a].stderr) for b in budgets for a in ALLOCATORS)]
             for name in ESTIMATORS]
    cells.append(["line of uniforms", "", *(f"{value:.3f}" for value in line for _ in ALLOCATORS)])
    played = next(iter(ESTIMATORS))
    paired = [[name, "", *(plus_minus(*scores[name, b, a].minus(scores[played, b, "qp"]), sign=True)
                           for b in budgets for a in ALLOCATORS)] for name in ESTIMATORS]
    alike = [f"{name} ({space.nominal_bits(nbytes):.2f} nominal, {space.bits_per_weight(nbytes):.2f} stored) "
             f"{plus_minus(score.nll, score.stderr)}" for name, nbytes, score in uniforms]
    menu = ",".join(f"{b:g}" for b in bits)
    beaten = sum(score.minus(scores[played, budget, "qp"])[0] < 0
                 for (name, budget, _), score in scores.items() if name != played)
    options = ", ".join(f"{k}={v}" for k, v in bench.prepared.config.options.get("backend", {}).items())
    return [f"## {backend} `--bits {menu}`", "",
            f"Backend options: {options}. Losses of the game on {bench.windows.scored_tokens} tokens; held out: "
            f"{bench.prepared.evaluation}, {bench.prepared.evaluation.scored_tokens} scored tokens. Unquantized "
            f"{plus_minus(reference.nll, reference.stderr)}; {'; '.join(alike)}.", "",
            "NLL, nats per token:", "", *table(header, cells),
            f"The same minus `{played}` with qp, paired over windows (negative: better than the main method, which is "
            f"so in {beaten} of {len(scores) - len(budgets) * len(ALLOCATORS)} cells):", "", *table(header, paired)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    model = parser.parse_args().model
    lines = heading(f"Every estimator and allocator on {model_name(model)}, block level", command())
    lines += ["Blocks of equal size: with two widths an additive estimate is a ranking, of which both "
              "allocators keep the top; they can differ only by pair terms.", ""]
    for menu in MENUS:
        lines += measure(model, *menu)
        write(page_of("estimators.md", model), lines)


if __name__ == "__main__":
    main()
