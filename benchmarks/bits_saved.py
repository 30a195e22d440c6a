"""What a plan is worth in bytes: the size of each backend's plan against the size at which that backend's uniform line
has the plan's loss.

The uniform line joins the losses of the uniform models of neighbouring sizes. Rows are kept in a file of JSON lines in
kept/, so that a stopped benchmark continues.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Bench, add_model, heading, page_of, plus_minus, table, write
from lines import KEPT, Lines
from matplotlib.figure import Figure

from impq_core.budget import Budget
from impq_core.config import RunConfig, TextConfig
from impq_core.space import FloatArray
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
    key = [given.model, given.estimator, given.calibration_windows, given.evaluation_windows]
    lines = Lines(KEPT / "bits_saved.jsonl")
    kept = {row["backend"]: row for row in lines.rows if row["key"] == key}
    for backend in given.backends.split(","):
        if backend not in kept:
            config = RunConfig(tracking_uri="none", model=given.model, backend=backend, bits=MENUS[backend],
                               granularity="linear", estimator=given.estimator, cache=False,
                               calibration=TextConfig(windows=given.calibration_windows),
                               evaluation=TextConfig(windows=given.evaluation_windows))
            kept[backend] = {"key": key, "backend": backend, **measure(config)}
            lines.add(kept[backend])
        rows = [kept[name] for name in given.backends.split(",") if name in kept]
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


def saved(row: Mapping[str, Any], plan: Mapping[str, Any]) -> tuple[float, float, float]:
    """The share of bytes that a plan saves, its standard error, and the bytes of the uniform line at the plan's loss;
    NaN if the line does not reach it."""
    sizes = [uniform["bytes"] for uniform in row["uniform"]]
    losses = [np.array(uniform["windows"]) for uniform in row["uniform"]]  # (windows,) from small to large
    loss: FloatArray = np.array(plan["windows"])
    for low, high in itertools.pairwise(range(len(sizes))):
        first, last = losses[low].mean(), losses[high].mean()
        if first >= loss.mean() >= last and first > last:
            share = (first - loss.mean()) / (first - last)
            nbytes = sizes[low] + share * (sizes[high] - sizes[low])
            slope = (first - last) / (sizes[high] - sizes[low])  # nats per byte
            apart = loss - (1 - share) * losses[low] - share * losses[high]
            return 1 - plan["bytes"] / nbytes, standard_error(apart) / slope / nbytes, nbytes
    return float("nan"), float("nan"), float("nan")


def report(rows: Sequence[Mapping[str, Any]], given: argparse.Namespace) -> list[str]:
    cells = []
    for row in rows:
        for plan in row["plans"]:
            share, stderr, nbytes = saved(row, plan)
            sizes = [uniform["bytes"] for uniform in row["uniform"]]
            line = [float(np.interp(plan["bytes"], sizes, at)) for at in np.array(
                [uniform["windows"] for uniform in row["uniform"]]).T]  # (windows,) the line at the plan's size
            apart = np.array(plan["windows"]) - np.array(line)
            cells.append([row["backend"], f"{plan['budget']:g}", f"{8 * plan['bytes'] / row['weights']:.2f}",
                          f"{plan['bytes'] / 1e6:.2f}", f"{np.mean(plan['windows']):.3f}",
                          plus_minus(apart.mean(), standard_error(apart), sign=True),
                          "beyond the line" if np.isnan(share) else f"{nbytes / 1e6:.2f}",
                          "" if np.isnan(share) else f"{100 * share:.1f} ± {100 * stderr:.1f} %",
                          "" if np.isnan(share) else f"{8 * (nbytes - plan['bytes']) / row['weights']:.2f}"])
    return [*heading("Bits that plans save", shlex.join(["python", "benchmarks/bits_saved.py", *sys.argv[1:]])),
            f"Model {Path(given.model).name}, plans over single linears by `{given.estimator}` on "
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
            for line in lines.values():
                sizes = [other["bytes"] for other in line]
                inside = sizes[0] <= model["bytes"] <= sizes[-1]
                there = [np.interp(model["bytes"], sizes, at) for at in np.array([x["windows"] for x in line]).T]
                apart = np.array(model["windows"]) - np.array(there)
                cell.append(plus_minus(apart.mean(), standard_error(apart), sign=True) if inside else "")
            cells.append(cell)
    return ["## Beside gptq at equal stored bytes", "", *table(
        ["backend", "model", "stored bits", "NLL", "minus uniform gptq", "minus planned gptq"], cells)]


def draw(rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Saved bytes in percent by backend, a mark for each budget."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for number, budget in enumerate(BUDGETS):
        points = [(place + 0.2 * (number - 1), *saved(row, plan)[:2]) for place, row in enumerate(rows)
                  for plan in row["plans"] if plan["budget"] == budget]
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
