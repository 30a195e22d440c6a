"""Backends whose widths mix inside a linear beside GPTQ's, at equal stored bytes: uniform models and plans.

Every model is quantized in sequence, each block behind the quantized ones, as an export is. Scores are kept in a file
of JSON lines in kept/, so that a stopped benchmark continues.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from common import add_model, command, heading, page_of, plus_minus, table, write
from keyed import Keyed, facts_of
from lines import KEPT
from uniform_line import line

from impq_core.budget import Budget
from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError
from impq_core.plugins import Plugins
from impq_core.results import Score
from impq_core.runs.prepare import Prepared, prepare
from impq_core.runs.session import Session
from impq_core.space import IntArray
from impq_core.types import Plan

PAPER = {"overhead": 16.0, "outliers_by_activation": 0.0005, "outliers_by_error": 0.0045, "feedback": False}

UNQUANTIZED = "unquantized"

NOTES = [
    "Figures of the papers are of models of 7 to 70 billion weights, and differ from these for three reasons. A linear "
    "of this model has 192 to 1536 outputs and inputs, so that what is stored for each channel counts: a codebook for "
    "every channel takes 16 * 2^b / outputs bits a weight, 0.03 at 3 bits and 4096 outputs, 0.67 at 192. Small models "
    "lose more by the same error. And the quantizers below the mixtures differ: learned rounding and clipping "
    "(2511.17801), clip search without the Hessian (2405.14917) or no error feedback (2410.13056) there, GPTQ here."]
"""Below the table."""


@dataclass(frozen=True)
class Setting:
    """Models of one backend.

    Args:
        name: of the rows.
        backend: its name.
        choices: of the uniform models.
        budgets: nominal bits of the plans, made of ``choices``.
        options: of the backend.
    """

    name: str
    backend: str
    choices: tuple[str, ...]
    budgets: tuple[float, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


SETTINGS = (
    Setting("gptq", "gptq", ("2", "3", "4"), (2.25, 2.5, 2.75, 3.25, 3.5)),
    Setting("cmpq", "cmpq", ("2", "2.25", "2.5", "3", "3.5", "4"), (2.5, 3.0)),
    Setting("ratio", "ratio", ("2+20%", "3+20%")),
    Setting("slim", "slim", ("3", "4")),
    Setting("cmpq, as in the paper", "cmpq", ("2.25", "3"), options=PAPER),
    Setting("slim, groups of 1 bit", "slim", ("2", "3"), options={"lowest": 1}),
)


@dataclass(frozen=True, eq=False)
class Result:
    """A model: its name, the evaluation text, stored bits a weight, seconds of quantization, and score."""

    name: str
    text: str
    bits: float
    seconds: float
    score: Score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    parser.add_argument("--windows", type=int, default=24, help="Windows of calibration, of 256 tokens.")
    parser.add_argument("--evaluation-windows", type=int, default=16, help="Windows of evaluation, of 256 tokens.")
    parser.add_argument("--only", default="", help="Names of settings, with ; between; all if empty.")
    parser.add_argument("--no-plans", action="store_true", help="Uniform models only.")
    given = parser.parse_args()
    base = RunConfig(tracking_uri="none", model=given.model, granularity="linear", cache=False,
                     calibration=TextConfig(windows=given.windows), game_windows=8,
                     evaluation=TextConfig(windows=given.evaluation_windows))
    done: dict[str, Result] = {}
    for setting in SETTINGS:
        if given.only and setting.name not in given.only.split(";"):
            continue
        plugins = Plugins()
        prepared = prepare(replace(base, backend=setting.backend, bits=setting.choices,
                                   options={"backend": dict(setting.options)}), plugins)
        log = Keyed(KEPT / "within.jsonl", facts_of(prepared))
        done |= {row["name"]: Result(row["name"], row["text"], row["bits"], row["seconds"],
                                     Score.from_dict(row["score"])) for row in log.rows(setting=setting.name)}
        wanted = replace(setting, budgets=()) if given.no_plans else setting
        for found in results(prepared, plugins, wanted, {*done}):
            done[found.name] = found
            log.add(setting=setting.name, **{**vars(found), "score": found.score.to_dict()})
            print(f"{found.name}: {found.bits:.3f} bits, {found.score.nll:.3f}, {found.seconds:.0f} s", flush=True)
    write(page_of("within.md", given.model), [
        *heading("Widths mixed inside linears, at equal stored bytes", command()), *report([*done.values()])])


def results(prepared: Prepared, plugins: Plugins, setting: Setting, done: set[str]) -> Iterator[Result]:
    """Each model of a setting that is not done, and the unquantized one."""
    names = {f"{setting.name} {choice}": choice for choice in setting.choices}
    plans = {f"{setting.name} plan {budget:g}": budget for budget in setting.budgets}
    if done.issuperset([UNQUANTIZED, *names, *plans]):
        return
    space, session = prepared.space, Session(prepared, plugins)
    if UNQUANTIZED not in done:
        score = session.evaluator_of_exports().score([None] * len(space))
        yield Result(UNQUANTIZED, f"{prepared.evaluation}, {prepared.evaluation.scored_tokens} scored tokens", 16.0,
                     0.0, score)
    for name, choice in names.items():
        if name not in done:
            number = next(number for number, found in enumerate(space.choices) if found.name == choice)
            yield in_sequence(session, name, space.uniform(number))
    if done.issuperset(plans):
        return
    session.bank.apply([None] * len(space))
    game = Session(prepared, plugins, session.runner)
    game.quantize_deployed()
    estimate, _ = prepared.parts.estimate(game.game(), game.probe(), np.random.default_rng(prepared.config.seed))
    game.bank.apply([None] * len(space))
    for name, budget in plans.items():
        if name not in done:
            plan = prepared.parts.allocator.allocate(estimate, Budget.nominal(budget).resolve(space))
            yield in_sequence(session, name, plan.pick)


def in_sequence(like: Session, name: str, pick: IntArray) -> Result:
    """Quantize a pick in sequence and score it, in a session of its own with the same model as another's."""
    prepared, space = like.prepared, like.prepared.space
    like.bank.apply([None] * len(space))
    session = Session(prepared, like.plugins, like.runner)
    evaluator, start, nbytes = session.evaluator_of_exports(), time.process_time(), space.bytes_of(pick)
    session.quantize_plan(Plan(space, pick, nbytes))
    seconds = time.process_time() - start
    score = evaluator.score(space.assignment(pick))
    session.bank.apply([None] * len(space))
    return Result(name, f"{prepared.evaluation}", space.bits_per_weight(nbytes), seconds, score)


def report(done: Sequence[Result]) -> list[str]:
    """The table of all models, by stored bits, with the difference from GPTQ at the same bytes."""
    unquantized = next(result for result in done if result.name == UNQUANTIZED)
    lines = {name: sorted((result for result in done if re.fullmatch(pattern, result.name)), key=lambda r: r.bits)
             for name, pattern in (("uniform", "gptq [0-9]"), ("plans", "gptq ([24]|plan .*)"))}
    if not any(result.name.startswith("gptq plan") for result in done):
        lines["plans"] = []
    rows = []
    for result in sorted(done, key=lambda result: (result.bits, result.name)):
        cells = [result.name, f"{result.bits:.3f}", plus_minus(result.score.nll, result.score.stderr),
                 plus_minus(*result.score.minus(unquantized.score), sign=True), f"{result.score.kl:.3f}",
                 f"{result.seconds:.0f}"]
        rows.append([*cells, *(minus_line(result, models) for models in lines.values())])
    return [f"Held-out NLL, nats per token, on {unquantized.text}. Bits stored: a weight of the blocks' linears, with "
            "all that is stored beside codes; embeddings and head at 16 bits. Seconds: of one core, statistics "
            "included. The last two columns are differences to GPTQ at the same stored bytes, paired over windows: to "
            "the line between its neighbouring uniform models, and to that between its neighbouring plans.", "",
            *table(["model", "bits stored", "NLL", "minus unquantized", "KL", "seconds", "minus uniform GPTQ",
                    "minus planned GPTQ"], rows), *NOTES]


def minus_line(result: Result, models: Sequence[Result]) -> str:
    """A model's NLL minus the line between GPTQ's at its size; empty for GPTQ's, and outside of the line."""
    try:
        there = line([model.bits for model in models], [model.score.window_nll for model in models], result.bits)
    except ImpqError:
        return ""
    if result.name.startswith(("gptq", UNQUANTIZED)):
        return ""
    return plus_minus(*result.score.minus(Score(there, float("nan"), float("nan"))), sign=True)


if __name__ == "__main__":
    main()
