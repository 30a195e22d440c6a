"""The estimator that a run uses by default, beside others, on several models and backends.

Every linear is quantized once for each model and backend, behind the same prefix. The loss of each plan is compared
with the line of uniform models at the same bytes, paired over windows. Rows are kept in a file of JSON lines in kept/,
so that a stopped benchmark continues.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Bench, heading, plus_minus, table, write

from impq_core.config import RunConfig, TextConfig
from impq_core.results import Score
from impq_core.statistics import standard_error

KEPT = Path(__file__).parent / "kept"
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
    given = parser.parse_args()
    torch.set_num_threads(1)
    KEPT.mkdir(exist_ok=True)
    path = KEPT / "default.jsonl"
    rows = list(map(json.loads, path.read_text().splitlines())) if path.is_file() else []
    for model in given.models.split(","):
        for backend in given.backends.split(","):
            wanted = [{"model": Path(model).name, "backend": backend, "granularity": granularity,
                       "estimator": estimator, "probed": int(probed), "evaluated": given.evaluation_windows}
                      for granularity in given.granularities.split(",") for probed in given.probe_windows.split(",")
                      for estimator in given.estimators.split(",")]
            wanted = [facts for facts in wanted if not any(facts.items() <= row.items() for row in rows)]
            if not wanted:
                continue
            bench = Bench.build(RunConfig(
                tracking_uri="none", model=model, backend=backend, bits=MENUS[backend], granularity="linear",
                estimator="guided-output", calibration=TextConfig(windows=64),
                evaluation=TextConfig(windows=given.evaluation_windows)))
            for facts in wanted:
                for row in measure(bench, facts):
                    rows.append(row)
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    write("default.md", report(rows))


def measure(bench: Bench, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each budget."""
    config = replace(bench.prepared.config, granularity=facts["granularity"], estimator=facts["estimator"],
                     probe_windows=facts["probed"], options={})
    there = bench.at(config)
    estimate, _ = there.estimate(config)
    uniforms = bench.uniforms()
    sizes = [nbytes for _, nbytes, _ in uniforms]
    rows = []
    for budget in BUDGETS:
        plan = there.plan(replace(config, options={"allocator": {"work_limit": 10.0}}), estimate, budget)
        score: Score = bench.evaluator.score(
            [{linear.name: choice for layer, choice in zip(there.prepared.space.everyone, assignment, strict=True)
              for linear in layer.linears}[layer.linears[0].name]
             for assignment in [there.prepared.space.assignment(plan.pick)]
             for layer in bench.prepared.space.everyone])
        line = [np.interp(plan.nbytes, sizes, values)
                for values in np.stack([uniform.window_nll for *_, uniform in uniforms], axis=1)]
        rows.append({**facts, "budget": budget, "bytes": plan.nbytes, "windows": score.window_nll.tolist(),
                     "line": line, "kl": score.kl, "forwards": estimate.forwards,
                     "kl_line": float(np.interp(plan.nbytes, sizes, [uniform.kl for *_, uniform in uniforms])),
                     "text": str(bench.prepared.evaluation)})
        print(f"{facts}: {budget:g} bits {score.nll:.4f}", flush=True)
    return rows


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = []
    for row in sorted(rows, key=lambda row: [row[name] for name in (
            "model", "backend", "granularity", "budget", "probed", "estimator")]):
        apart = np.array(row["windows"]) - np.array(row["line"])
        cells.append([row["model"], row["backend"], row["granularity"], f"{row['budget']:g}", row["estimator"],
                      str(row["probed"]), f"{row['forwards']:.0f}", f"{np.mean(row['windows']):.3f}",
                      plus_minus(apart.mean(), standard_error(apart), sign=True), f"{row['kl'] - row['kl_line']:+.3f}"])
    return [*heading("The default estimator", shlex.join(["python", "benchmarks/default.py", *(
                Path(word).name for word in sys.argv[1:])])),
            "NLL, nats per token, on " + "; ".join(dict.fromkeys(row["text"] for row in rows)) + ". Forwards are of 8 "
            "windows. The last columns: the plan's loss and KL divergence minus those on the line between the uniform "
            "models of neighbouring sizes, at the plan's bytes; errors are paired over windows.", "",
            *table(["model", "backend", "granularity", "bits", "estimator", "windows", "forwards", "NLL",
                    "minus the line", "KL minus the line"], cells)]


if __name__ == "__main__":
    main()
