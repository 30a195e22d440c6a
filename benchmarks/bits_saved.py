"""What a plan is worth in bytes: the size of each backend's plan against the size at which that backend's uniform line
has the plan's loss.

The uniform line joins the losses of the uniform models of neighbouring sizes. Rows are kept in a file of JSON lines in
kept/, so that a stopped benchmark continues.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import RESULTS, Bench, add_model, command, heading, model_name, page_of, plus_minus, table, write
from keyed import Keyed, facts_of
from lines import KEPT
from matplotlib.figure import Figure
from uniform_line import line

from impq_core.budget import Budget
from impq_core.compare.uniform import EqualLoss, UniformLine
from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError
from impq_core.plugins import Plugins
from impq_core.results import Row
from impq_core.runs.prepare import prepare
from impq_core.statistics import standard_error

BUDGETS = (2.5, 3.0, 3.5)
MENUS = {"gptq": ("2", "3", "4"), "hqq": ("2", "3", "4"), "quanto": ("2", "4"),
         "cmpq": ("2", "2.5", "3", "4"),
         "ratio": ("2", "2+20%", "3", "3+20%", "4"), "slim": ("2", "3", "4")}
"""Not gguf: in rows of 576, as the demo has, llama.cpp stores no type below 4 bits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    parser.add_argument("--backends", default=",".join(MENUS))
    parser.add_argument("--estimator", default="guided-output")
    parser.add_argument("--calibration-windows", type=int, default=32)
    parser.add_argument("--evaluation-windows", type=int, default=24)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for backend in given.backends.split(","):
        config = RunConfig(tracking_uri="none", model=given.model, backend=backend, bits=MENUS[backend],
                           granularity="linear", estimator=given.estimator, cache=False,
                           calibration=TextConfig(windows=given.calibration_windows),
                           evaluation=TextConfig(windows=given.evaluation_windows))
        key = {**facts_of(prepare(config, Plugins())), "estimator": given.estimator, "budgets": BUDGETS}
        kept = Keyed(KEPT / "bits_saved.jsonl", key)
        if not kept.rows():
            kept.add(backend=backend, **measure(config))
        rows += kept.rows()[-1:]
        write(page_of("bits_saved.md", given.model), report(rows, given))
        draw(rows, page_of("bits_saved.png", given.model))


def measure(config: RunConfig) -> dict[str, Any]:
    """Sizes in bytes and losses (windows,) of a backend's uniform models and plans."""
    bench = Bench.build(config)
    space = bench.prepared.space
    estimate, _ = bench.estimate(replace(config, probe_windows=config.calibration.windows))
    smallest, largest = (space.bytes_of(space.uniform(k)) for k in (len(space.choices) - 1, 0))
    plans = {budget: bench.plan(config, estimate, budget) for budget in BUDGETS
             if smallest <= Budget.nominal(budget).resolve(space) <= largest}
    return {"weights": sum(layer.parameters for layer in space.layers), "text": str(bench.prepared.evaluation),
            "uniform": [{"name": name, "bytes": nbytes, "windows": score.window_nll.tolist()}
                        for name, nbytes, score in bench.uniforms()],
            "plans": [{"budget": budget, "bytes": plan.nbytes, "windows": bench.score(plan).window_nll.tolist()}
                      for budget, plan in plans.items()]}


def equal_loss(row: Mapping[str, Any], plan: Mapping[str, Any]) -> EqualLoss | None:
    """The size of a backend's uniform line at a plan's loss; None if the line does not reach it."""
    models = tuple(Row(uniform["name"], np.array(uniform["windows"]), uniform["bytes"]) for uniform in row["uniform"])
    found = UniformLine((models,)).equal_loss(Row("plan", np.array(plan["windows"]), plan["bytes"]))
    return None if found is None or found.bound else found


def minus_line(model: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> str:
    """A model's NLL minus the line between others at its size, paired over windows; empty outside of the line."""
    try:
        there = line([other["bytes"] for other in models], [other["windows"] for other in models], model["bytes"])
    except ImpqError:
        return ""
    apart = np.array(model["windows"]) - there
    return plus_minus(apart.mean(), standard_error(apart), sign=True)


def report(rows: Sequence[Mapping[str, Any]], given: argparse.Namespace) -> list[str]:
    cells = []
    for row in rows:
        for plan in row["plans"]:
            found = equal_loss(row, plan)
            gain = ["beyond the line", "", ""] if found is None else [
                f"{found.nbytes / 1e6:.2f}", f"{100 * found.saved:.1f} ± {100 * found.saved_stderr:.1f} %",
                f"{8 * (found.nbytes - plan['bytes']) / row['weights']:.2f}"]
            cells.append([row["backend"], f"{plan['budget']:g}", f"{8 * plan['bytes'] / row['weights']:.2f}",
                          f"{plan['bytes'] / 1e6:.2f}", f"{np.mean(plan['windows']):.3f}",
                          minus_line(plan, row["uniform"]), *gain])
    return [*heading("Bits that plans save", command()),
            f"Model {model_name(given.model)}, plans over single linears by `{given.estimator}` on "
            f"{given.calibration_windows} windows; NLL, nats per token, on {rows[0]['text']}. Every width is quantized "
            "behind the same prefix. The last columns: the size at which the backend's uniform line has the plan's "
            "loss, and what the plan saves of it, in percent and in bits a weight. Errors are paired over windows.", "",
            *table(["backend", "nominal bits", "stored bits", "MB", "NLL of the plan", "minus the line",
                    "MB of the line", "saved", "bits saved"], cells),
            f"![Bytes that plans save]({page_of('bits_saved.png', given.model)})", "", *beside_gptq(rows)]


def beside_gptq(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The models of each other backend minus those of gptq of the same stored bytes, paired over windows."""
    lines = {}
    for row in rows:
        if row["backend"] == "gptq":
            ends = [row["uniform"][0], row["uniform"][-1]]
            lines = {"uniform": row["uniform"],
                     "plan": sorted([*ends, *row["plans"]], key=lambda model: model["bytes"])}
    cells = []
    for row in rows if lines else []:
        named = [*((f"uniform {model['name'].removeprefix('uniform ')}", model) for model in row["uniform"]),
                 *((f"plan at {model['budget']:g} bits", model) for model in row["plans"])]
        for name, model in named if row["backend"] != "gptq" else []:
            cell = [row["backend"], name, f"{8 * model['bytes'] / row['weights']:.3f}",
                    f"{np.mean(model['windows']):.3f}"]
            cells.append([*cell, *(minus_line(model, models) for models in lines.values())])
    return ["## Beside gptq at equal stored bytes", "", *table(
        ["backend", "model", "stored bits", "NLL", "minus uniform gptq", "minus planned gptq"], cells)]


def draw(rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Saved bytes in percent by backend, a mark for each budget."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for number, budget in enumerate(BUDGETS):
        points = [(place + 0.2 * (number - 1), found.saved, found.saved_stderr) for place, row in enumerate(rows)
                  for plan in row["plans"] if plan["budget"] == budget and (found := equal_loss(row, plan))]
        if points:
            places, shares, errors = np.array(points).T
            axes.errorbar(places, 100 * shares, 100 * errors, fmt="o^s"[number], capsize=3, label=f"{budget:g} bits")
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row["backend"] for row in rows])
    axes.set_ylabel("bytes saved at equal loss, %")
    axes.legend(frameon=False)
    figure.savefig(RESULTS / name, dpi=120)


if __name__ == "__main__":
    main()
