"""The estimator that a run uses by default, beside others, on several models and backends.

Every linear is quantized once for each model and backend, behind the same prefix. The loss of each plan is compared
with the line of uniform models at the same bytes, paired over windows. Rows are kept as JSON lines, so that a stopped
benchmark continues; ``regret.py --rows`` reads them too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from cells import divergences
from common import Bench, command, heading, plus_minus, table, write
from rows import KEPT, UNIFORM, Kept, PlanRow, line_at, problem_of

from impq_core.config import RunConfig, TextConfig
from impq_core.statistics import standard_error

BUDGETS = (2.5, 3.0, 3.5)
MENUS = {"gptq": ("2", "3", "4"), "hqq": ("2", "3", "4"), "quanto": ("2", "4")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="demo", help="demo and folders of models, with , between")
    parser.add_argument("--backends", default="gptq")
    parser.add_argument("--estimators", default="guided-output,aumann-shapley")
    parser.add_argument("--granularities", default="group,linear")
    parser.add_argument("--probe-windows", default="16,64", help="windows of gradients")
    parser.add_argument("--evaluation-windows", type=int, default=24)
    parser.add_argument("--kept", type=Path, default=KEPT / "default-rows.jsonl", help="file of rows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = Kept(given.kept)
    for model in given.models.split(","):
        for backend in given.backends.split(","):
            measure(kept, given, RunConfig(
                tracking_uri="none", model=model, backend=backend, bits=MENUS[backend], granularity="linear",
                estimator="guided-output", calibration=TextConfig(windows=64),
                evaluation=TextConfig(windows=given.evaluation_windows)))
    write("default.md", report(kept.rows))


def measure(kept: Kept, given: argparse.Namespace, config: RunConfig) -> None:
    """The rows of a model and backend: uniform models, and plans of each estimator, text and granularity."""
    whole = Bench.build(config)
    game = whole.windows.scored_tokens
    facts = problem_of(whole.prepared, game)
    if kept.missing(facts, UNIFORM, 0, [choice.bits for choice in whole.prepared.space.choices]):
        bits = {f"uniform {choice}": choice.bits for choice in whole.prepared.space.choices}
        kept.add(PlanRow(**facts, budget=bits[name], budget_bytes=nbytes, nbytes=nbytes, method=UNIFORM, seed=0,
                         forwards=0.0, nll=score.window_nll, kl=divergences(score))
                 for name, nbytes, score in whole.uniforms() if name in bits)
    for granularity in given.granularities.split(","):
        there = whole.at(replace(config, granularity=granularity))
        facts = problem_of(there.prepared, game)
        for probed in map(int, given.probe_windows.split(",")):
            for estimator in given.estimators.split(","):
                method = f"{estimator}, gradients of {probed} windows"
                missing = kept.missing(facts, method, 0, BUDGETS)
                if not missing:
                    continue
                chosen = replace(config, granularity=granularity, estimator=estimator, probe_windows=probed,
                                 options={"allocator": {"work_limit": 10.0}})
                estimate, _ = there.estimate(chosen)
                for budget in missing:
                    plan = there.plan(chosen, estimate, budget)
                    row = PlanRow.of(facts, plan, there.score(plan), budget, method, forwards=estimate.forwards)
                    kept.add([row])
                    print(f"{row.model}, {row.backend}, {granularity}, {budget:g} bits, {method}: "
                          f"{row.nll.mean():.4f}", flush=True)


def report(rows: Sequence[PlanRow]) -> list[str]:
    cells = []
    plans = [row for row in rows if row.method != UNIFORM]
    for row in sorted(plans, key=lambda row: (row.model, row.backend, row.granularity, row.budget, row.method)):
        uniforms = [other for other in rows if other.method == UNIFORM and other.problem == row.problem]
        apart, kl = row.nll - line_at(uniforms, row.nbytes), row.kl - line_at(uniforms, row.nbytes, kl=True)
        cells.append([row.model, row.backend, row.granularity, f"{row.budget:g}", row.method, f"{row.forwards:.0f}",
                      f"{row.nll.mean():.3f}", plus_minus(apart.mean(), standard_error(apart), sign=True),
                      plus_minus(kl.mean(), standard_error(kl), sign=True)])
    return [*heading("The default estimator", command()),
            "NLL, nats per token, on " + "; ".join(dict.fromkeys(row.shown for row in plans)) + ". Forwards are of "
            + "; ".join(dict.fromkeys(f"{row.tokens:,}" for row in plans)) + " scored tokens. The last columns: the "
            "plan's loss and KL divergence minus those on the line between the uniform models of neighbouring sizes, "
            "at the plan's bytes; errors are paired over windows.", "",
            *table(["model", "backend", "granularity", "bits", "method", "forwards", "NLL", "minus the line",
                    "KL minus the line"], cells)]


if __name__ == "__main__":
    main()
