"""Size, time and predicted loss of plans for llama.cpp, and the meter ``llamacpp`` against llama.cpp's own times.

The first part makes a plan for each pair of a budget and a limit on the latency. The second part writes plans as GGUF
files, uniform and mixed ones, generates with each of them in llama.cpp (one sequence, one thread by default,
repetitions of all files interleaved), and compares the median time of a token with the latency of the meter.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, Bench, add_model, command, heading, model_name, page_of, table, write
from impq_gguf.exporter import GgufExporter
from impq_gguf.llama import declare, errors_logged, llama
from scipy.stats import spearmanr

from impq_core.budget import Budget
from impq_core.config import RunConfig, TextConfig
from impq_core.costs import Cost
from impq_core.errors import ImpqError
from impq_core.exports.export import make_checkpoint
from impq_core.model.outline import outline
from impq_core.references import random_plan
from impq_core.types import Plan, SensitivityEstimate

MENU = ("Q8_0", "Q5_K", "Q4_K", "IQ4_XS", "IQ3_XXS", "IQ2_XS")
BASE = RunConfig(tracking_uri="none", backend="gguf", bits=MENU, granularity="linear", estimator="guided-output",
                 quantize_embeddings=True, meters=("llamacpp",), evaluation=TextConfig(windows=2),
                 calibration=TextConfig(windows=8), game_windows=4)
BUDGETS, LIMITS = 5, 5
"""Numbers of budgets, and of limits for each of them, of the first part."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    parser.add_argument("--threads", type=int, default=1, help="Threads of llama.cpp.")
    parser.add_argument("--repeats", type=int, default=20, help="Repetitions of kernels and of files.")
    parser.add_argument("--tokens", type=int, default=16, help="Tokens of a file in a repetition.")
    parser.add_argument("--no-frontier", action="store_true", help="Leave out the plans of every budget and limit.")
    given = parser.parse_args()
    config = replace(BASE, model=given.model,
                     options={"meter.llamacpp": {"threads": given.threads, "repeats": given.repeats},
                              # A proof of optimality to 1e-6 for every pair of limits takes most of an hour.
                              "allocator": {"gap": 1e-3, "work_limit": 5.0}})
    bench = Bench.build(config)
    [cost], [metering] = bench.prepared.costs, bench.prepared.meterings
    estimate, _ = bench.estimate(config)
    lines = heading("Size, time and loss: limits on the latency", command())
    lines += [f"{model_name(given.model)}, layers: every linear and the tied embedding; menu {', '.join(MENU)} with "
              f"llama.cpp's stand-ins; latency: {'; '.join(metering.notes)}.", ""]
    if not given.no_frontier:
        lines += frontier(bench, estimate, cost, page_of("latency.png", given.model))
    lines += against_files(bench, estimate, cost, given.threads, given.repeats, given.tokens)
    write(page_of("latency.md", given.model), lines)


def plan_within(bench: Bench, estimate: SensitivityEstimate, budget: int, cost: Cost) -> Plan | None:
    """The plan within a budget and the limit of a cost; None if there is none."""
    try:
        return bench.prepared.parts.plan(estimate, budget, (cost,))
    except ImpqError:
        return None


def frontier(bench: Bench, estimate: SensitivityEstimate, cost: Cost, picture: str) -> list[str]:
    """Plans of every pair of a budget and a limit: a table and a figure of that name."""
    space = bench.prepared.space
    budgets = np.linspace(space.low_bytes, space.high_bytes, BUDGETS + 2)[1:-1].astype(int)
    rows, points = [], []
    for budget in budgets.tolist():
        free = plan_within(bench, estimate, budget, cost)
        assert free is not None and free.predicted_loss is not None
        slowest, fastest = cost.of(free.pick), cost.fixed + float(cost.values.min(axis=1).sum())
        for limit in np.linspace(slowest, fastest, LIMITS).tolist():
            plan = plan_within(bench, estimate, budget, replace(cost, limit=limit))
            if plan is None or plan.predicted_loss is None:
                rows.append([f"{budget / 1e6:.1f}", f"{limit:.2f}", "", "", "none"])
                continue
            points.append((plan.nbytes / 1e6, cost.of(plan.pick), plan.predicted_loss, budget / 1e6))
            rows.append([f"{budget / 1e6:.1f}", f"{limit:.2f}", f"{plan.nbytes / 1e6:.1f}",
                         f"{cost.of(plan.pick):.2f}", f"{plan.predicted_loss:.4g}"])
    draw(points, RESULTS / picture)
    return ["## The frontier", "", f"![Predicted loss over latency, a line for each budget]({picture})", "",
            *table(["budget, MB", "limit, ms", "MB", "ms", "predicted loss"], rows), ""]


def draw(points: list[tuple[float, float, float, float]], file: Path) -> None:
    """Predicted loss over latency, a line for each budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    budgets = sorted({budget for *_, budget in points})
    for budget in budgets:
        own = sorted((latency, loss) for _, latency, loss, its in points if its == budget)
        axes.plot(*zip(*own, strict=True), marker="o", label=f"{budget:.0f} MB")
    axes.set(xlabel="latency by the meter, ms a token", ylabel="predicted loss, nats per token")
    axes.set_yscale("symlog", linthresh=0.02)  # predicted losses of wide plans may be below zero
    axes.legend(title="budget")
    figure.savefig(file, dpi=120)


def some_plans(bench: Bench, estimate: SensitivityEstimate, cost: Cost) -> dict[str, Plan]:
    """Uniform plans of every type, random mixtures of all types, and plans within budgets and limits."""
    space = bench.prepared.space
    plans = {f"uniform {choice}": space.uniform(k) for k, choice in enumerate(space.choices)}
    rng = np.random.default_rng(0)
    plans |= {f"random mixture {at}": rng.integers(0, len(space.choices), len(space)) for at in (1, 2)}
    middle = Budget.nominal(sum(space.ends) / 2).resolve(space)
    plans["random widths"] = random_plan(space, middle, rng)
    found = {name: Plan(space, pick, space.bytes_of(pick)) for name, pick in plans.items()}
    free = plan_within(bench, estimate, middle, cost)
    assert free is not None
    least = cost.fixed + float(cost.values.min(axis=1).sum())
    found["plan without a limit"] = free
    for share in (0.5, 0.1):
        limit = least + share * (cost.of(free.pick) - least)
        plan = plan_within(bench, estimate, middle, replace(cost, limit=limit))
        if plan is not None:
            found[f"plan within {limit:.2f} ms"] = plan
    return found


def against_files(bench: Bench, estimate: SensitivityEstimate, cost: Cost, threads: int, repeats: int,
                  tokens: int) -> list[str]:
    """The time of a token of whole files beside the latency of the meter."""
    plans = some_plans(bench, estimate, cost)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: export(bench, plan, Path(folder) / str(number)) for number, (name, plan)
                 in enumerate(plans.items())}
        times = time_files(list(files.values()), threads, repeats, tokens)  # (repetitions, files)
        sizes = [sum(part.stat().st_size for part in file.parent.glob("*.gguf")) for file in files.values()]
    measured = np.median(times, axis=0)
    spread = 1.2533 * 1.4826 * np.median(np.abs(times - measured), axis=0) / np.sqrt(len(times))
    predicted = np.array([cost.of(plan.pick) for plan in plans.values()])
    rest = float(np.median(measured - predicted))
    rank = float(spearmanr(predicted, measured).statistic)
    by_size = float(spearmanr(sizes, measured).statistic)
    slope, offset = np.polyfit(predicted, measured, 1)
    rows = [[name, f"{size / 1e6:.2f}", f"{guess:.2f} ± {cost.error(plan.pick):.2f}", f"{real:.2f} ± {error:.2f}",
             f"{real - guess:+.2f}", f"{100 * (guess + rest - real) / real:+.1f} %"]
            for (name, plan), size, guess, real, error in zip(plans.items(), sizes, predicted, measured, spread,
                                                              strict=True)]
    off = np.abs(predicted + rest - measured) / measured
    return [f"## Whole files: {threads} thread{'s' * (threads > 1)}, {repeats} repetitions of {tokens} tokens", "",
            *table(["plan", "MB of the file", "latency of the meter, ms", "llama.cpp, ms a token", "difference, ms",
                    "error with the rest added"], rows), "",
            f"Rank correlation (Spearman) of meter and llama.cpp over {len(rows)} files: {rank:.3f}; of file size and "
            f"llama.cpp: {by_size:.3f}. The line of least squares: {slope:.3f} ms a ms of the meter, and {offset:.2f} "
            f"ms. With the median difference of {rest:.2f} ms added to all files, which is what the meter's option "
            f"`rest` is for (attention, norms, and what a graph loses between products), the error is "
            f"{100 * off.mean():.1f} % on average and {100 * off.max():.1f} % at most.", ""]


def export(bench: Bench, plan: Plan, folder: Path) -> Path:
    """A plan as a GGUF file, of the variants in the bank."""
    prepared, session, exporter = bench.prepared, bench.session, GgufExporter()
    folder.mkdir()
    outlined = outline(prepared.source, session.runner.model, plan, "gguf", prepared.parts.backend, session.dtype, True)
    exporter.export(make_checkpoint(session, outlined, exporter), folder)
    return exporter.files(folder)[0]


class ContextParams(ctypes.Structure):
    """The beginning of ``struct llama_context_params``, and room for the rest."""

    _fields_ = (*((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq",
                                                       "n_outputs_max", "n_outputs_max_per_seq")),
                ("n_threads", ctypes.c_int32), ("n_threads_batch", ctypes.c_int32), ("rest", ctypes.c_char * 512))


class Batch(ctypes.Structure):
    """``struct llama_batch``."""

    _fields_ = (("n_tokens", ctypes.c_int32), *((name, ctypes.c_void_p) for name in (
        "token", "embd", "pos", "n_seq_id", "seq_id", "logits")))


SYMBOLS = {
    "llama_context_default_params": (ContextParams,),
    "llama_init_from_model": (ctypes.c_void_p, ctypes.c_void_p, ContextParams),
    "llama_free": (None, ctypes.c_void_p),
    "llama_batch_get_one": (Batch, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32),
    "llama_decode": (ctypes.c_int32, ctypes.c_void_p, Batch),
    "llama_get_memory": (ctypes.c_void_p, ctypes.c_void_p),
    "llama_memory_clear": (None, ctypes.c_void_p, ctypes.c_bool),
    "llama_synchronize": (None, ctypes.c_void_p),
}
"""Result and arguments of each C function that is used."""


def time_files(files: list[Path], threads: int, repeats: int, tokens: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Milliseconds of a token (repeats, files): in each repetition every file generates ``tokens`` tokens behind an
    empty context, in an order of its own; the first repetition does not count."""
    lib = llama()
    declare(lib, SYMBOLS)
    times = np.zeros((repeats + 1, len(files)))
    random = np.random.default_rng(0)
    with errors_logged() as errors:
        models = [lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
                  for file in files]
        assert all(models), errors
        contexts = []
        for model in models:
            params = lib.llama_context_default_params()
            params.n_ctx, params.n_threads, params.n_threads_batch = 256, threads, threads
            contexts.append(lib.llama_init_from_model(model, params))
        assert all(contexts), errors
        for repeat in range(repeats + 1):
            for at in random.permutation(len(files)):
                lib.llama_memory_clear(lib.llama_get_memory(contexts[at]), True)
                token = ctypes.c_int32(5)
                lib.llama_decode(contexts[at], lib.llama_batch_get_one(ctypes.byref(token), 1))  # loads the caches
                start = time.perf_counter()
                for number in range(tokens):
                    token.value = 100 + number
                    assert lib.llama_decode(contexts[at], lib.llama_batch_get_one(ctypes.byref(token), 1)) == 0
                    lib.llama_synchronize(contexts[at])
                times[repeat, at] = 1e3 * (time.perf_counter() - start) / tokens
        for context, model in zip(contexts, models, strict=True):
            lib.llama_free(context)
            lib.llama_model_free(model)
    return times[1:]


if __name__ == "__main__":
    main()
