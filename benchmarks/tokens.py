"""Quality of plans against the text that gradients are read on, and what feasible and shrunken costs add.

Gradients of every window are read once, and kept in kept/tokens, the scores of plans in kept/tokens.jsonl, so that a
stopped benchmark continues. An estimate is made from some of the windows by the estimator itself. First table: the cost
of its plan by the gradients of all other windows, above that of the plan that these would make; no model is needed for
that, so many draws of windows are averaged. Second table: held-out losses of plans, beside the line of uniform models.

*feasible*: as a run uses costs, at least 0 and growing as a layer gets narrower. *shrunken*: empirical Bayes;
logarithms of feasible costs are drawn towards a fit by kind of linear, width and depth (a polynomial of degree four),
as far as their errors over windows say, beside the spread of all layers about the fit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Bench, add_model, command, heading, model_name, page_of, plus_minus, table, write
from keyed import Keyed
from lines import KEPT
from uniform_line import line

from impq_core.budget import Budget
from impq_core.config import RunConfig, TextConfig
from impq_core.feasible_costs import feasible
from impq_core.files import write_npz
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.space import FloatArray, IntArray, SearchSpace
from impq_core.statistics import standard_error
from impq_core.types import SensitivityEstimate

FOLDER = KEPT / "tokens"
BUDGETS = (2.5, 3.0)
MENUS = {"gptq": ("2", "3", "4"), "hqq": ("2", "3", "4")}
DRAWS = 20


class KeepingProbe:
    """A probe that keeps what it reads in files."""

    def __init__(self, probe: Any, folder: Path) -> None:
        self.space, self._probe, self._folder = probe.space, probe, folder

    @property
    def forwards(self) -> float:
        return self._probe.forwards

    def token_squares(self, at: FloatArray | None = None) -> FloatArray:
        return self._kept("squares", at, self._probe.token_squares)

    def slopes(self, at: FloatArray | None = None) -> FloatArray:
        return self._kept("slopes", at, self._probe.slopes)

    def _kept(self, kind: str, at: FloatArray | None, read: Callable[[FloatArray | None], FloatArray]) -> FloatArray:
        path = self._folder / f"{_name(kind, at)}.npz"
        if not path.is_file():
            before = self._probe.forwards
            found = read(at)
            write_npz(path, {"values": found, "forwards": self._probe.forwards - before})
            print(f"read {path.name}", flush=True)
        return _load(path)


@dataclass(frozen=True, eq=False)
class KeptProbe:
    """A probe that answers from kept gradients (windows, linears, m) of some of the windows.

    Args:
        space: layers of one linear or several.
        folder: of ``KeepingProbe``.
        place: row of each linear in what is kept, by its name.
        windows: numbers of the windows.
    """

    space: SearchSpace
    folder: Path
    place: Mapping[str, int]
    windows: IntArray
    forwards: float = 0.0

    def token_squares(self, at: FloatArray | None = None) -> FloatArray:
        return self._of("squares", at)

    def slopes(self, at: FloatArray | None = None) -> FloatArray:
        return self._of("slopes", at)

    def _of(self, kind: str, at: FloatArray | None) -> FloatArray:
        values = _load(self.folder / f"{_name(kind, at)}.npz")[self.windows]
        return np.stack([values[:, [self.place[linear.name] for linear in layer.linears]].sum(axis=1)
                         for layer in self.space.layers], axis=1)


@cache
def _load(path: Path) -> FloatArray:
    with np.load(path) as data:
        return np.asarray(data["values"])


def _name(kind: str, at: FloatArray | None) -> str:
    return kind if at is None else kind + "".join(f"-{share:.6f}" for share in np.ravel(at))


@dataclass(frozen=True, eq=False)
class Source:
    """Estimates from kept gradients.

    Args:
        estimator: of guided-output or aumann-shapley.
        space, folder, place: see ``KeptProbe``.
        count: number of windows of the gradients.
    """

    estimator: Any
    space: SearchSpace
    folder: Path
    place: Mapping[str, int]
    count: int

    def raw(self, windows: IntArray) -> SensitivityEstimate:
        probe = KeptProbe(self.space, self.folder, self.place, windows)
        return self.estimator.inspect(probe, np.random.default_rng(0))

    def feasible(self, windows: IntArray) -> SensitivityEstimate:
        return feasible(self.raw(windows))

    def shrunken(self, windows: IntArray) -> SensitivityEstimate:
        every = np.stack([self.raw(windows[[number]]).linear for number in range(len(windows))])  # (windows, n, m)
        estimate = self.feasible(windows)
        kinds = [".".join(part for part in layer.name.split(".") if not part.isdigit()) for layer in self.space.layers]
        kind = np.unique(kinds, return_inverse=True)[1]
        depth = np.array([layer.block for layer in self.space.layers])
        known = np.column_stack([np.eye(kind.max() + 1)[kind],
                                 *((2 * depth / depth.max() - 1) ** power for power in range(1, 5))])
        linear = estimate.linear.copy()
        for k in range(1, linear.shape[1]):
            costs = np.maximum(linear[:, k], 1e-3 * np.median(linear[:, k]))
            relative = every[:, :, k].std(axis=0, ddof=1) / np.sqrt(len(windows)) / costs
            noise, spread = float(np.median(np.log1p(np.minimum(relative, 3.0) ** 2))), 0.3
            values = np.log(costs)
            fit = known @ np.linalg.lstsq(known, values, rcond=None)[0]
            spread = max(1e-4, ((values - fit) ** 2).sum() / (len(values) - known.shape[1]) - noise)
            linear[:, k] = np.exp((values / noise + fit / spread) / (1 / noise + 1 / spread))
        return feasible(replace(estimate, linear=linear))


FORMS: dict[str, Callable[[Source, IntArray], SensitivityEstimate]] = {
    "as estimated": Source.raw, "feasible": Source.feasible, "shrunken": Source.shrunken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    parser.add_argument("--backend", default="gptq")
    parser.add_argument("--estimators", default="guided-output:64,aumann-shapley:16",
                        help="each with the number of windows that its gradients are read on")
    parser.add_argument("--windows", default="4,8,16,64", help="windows of gradients")
    parser.add_argument("--scored-draws", type=int, default=2, help="the most scored plans for a number of windows")
    parser.add_argument("--evaluation-windows", type=int, default=16)
    given = parser.parse_args()
    torch.set_num_threads(1)
    counts = [int(count) for count in given.windows.split(",")]
    config = RunConfig(tracking_uri="none", model=given.model, backend=given.backend, bits=MENUS[given.backend],
                       granularity="linear", estimator="guided-output", calibration=TextConfig(windows=64),
                       evaluation=TextConfig(windows=given.evaluation_windows))
    bench = Bench.build(config)
    rows = {linear.name: number for number, layer in enumerate(bench.prepared.space.layers)
            for linear in layer.linears}
    gradients = bench.prepared.slopes_key.digest
    kept = Keyed(KEPT / "tokens.jsonl", {"gradients": gradients, "evaluation": bench.prepared.evaluation.digest})
    regrets: list[list[str]] = []
    calibration = bench.prepared.calibration
    assert calibration is not None
    for estimator, _, read in (text.partition(":") for text in given.estimators.split(",")):
        parts = Parts.build(replace(config, estimator=estimator), Plugins())
        folder = FOLDER / gradients / f"{estimator}-{read}"
        folder.mkdir(parents=True, exist_ok=True)
        probe = bench.session.probe(text=calibration.first(int(read)))
        parts.estimator.inspect(KeepingProbe(probe, folder), np.random.default_rng(0))
        here = [count for count in counts if count <= int(read)]
        for granularity in ("group", "linear"):
            there = bench.at(replace(config, granularity=granularity))
            source = Source(parts.estimator, there.prepared.space, folder, rows, int(read))
            if estimator == "guided-output":
                regrets += regret_rows(source, granularity, [count for count in here if count < source.count])
            if granularity == "group":
                score_plans(there, source, estimator, here, given.scored_draws, kept)
    write(page_of("tokens.md", given.model), report(bench, regrets, kept.rows(), counts))


def regret_rows(source: Source, granularity: str, counts: Sequence[int]) -> list[list[str]]:
    """Cost of plans by the gradients of the other windows, above the least, in percent of the least."""
    allocator = Parts.build(RunConfig(allocator="greedy"), Plugins()).allocator
    found: dict[tuple[float, int, str], list[float]] = {}
    rng = np.random.default_rng(0)
    for count in counts:
        for _ in range(DRAWS):
            order = rng.permutation(source.count)
            truth = source.raw(order[count:])
            for budget in BUDGETS:
                size = Budget.nominal(budget).resolve(source.space)
                least = float(truth.predict(allocator.allocate(truth, size).pick)[0])
                for form, make in FORMS.items():
                    pick = allocator.allocate(make(source, order[:count]), size).pick
                    found.setdefault((budget, count, form), []).append(float(truth.predict(pick)[0]) / least - 1)
    return [[granularity, f"{budget:g}", str(count), *(
        _percent(found[budget, count, form]) for form in FORMS)] for budget in BUDGETS for count in counts]


def _percent(values: Sequence[float]) -> str:
    shares = 100 * np.array(values)
    return f"{shares.mean():.1f} ± {standard_error(shares):.1f}"


def score_plans(there: Bench, source: Source, estimator: str, counts: Sequence[int], draws: int, kept: Keyed) -> None:
    """Held-out scores of the plans of disjoint parts of the windows; those that are kept are not made again."""
    wanted = [(count, draw, form, budget) for count in counts for draw in range(min(draws, source.count // count))
              for form in ("feasible", "shrunken") for budget in BUDGETS if form == "feasible" or count < 16]
    facts = [{"estimator": estimator, "windows": count, "draw": draw, "form": form, "budget": budget}
             for count, draw, form, budget in wanted]
    new = [each for each in facts if not kept.rows(**each)]
    if not new:
        return
    config = replace(there.prepared.config, options={"allocator": {"work_limit": 5.0}})
    plans = []
    for each in new:
        windows = np.arange(each["draw"] * each["windows"], (each["draw"] + 1) * each["windows"])
        plans.append(there.plan(config, FORMS[each["form"]](source, windows), each["budget"]))
    uniforms = there.uniforms()
    space = there.prepared.space
    scores = there.evaluator.scores([space.assignment(plan.pick) for plan in plans],
                                    lambda done, total: print(f"scores: {done} of {total}", flush=True))
    sizes, losses = [nbytes for _, nbytes, _ in uniforms], [score.window_nll for *_, score in uniforms]
    for each, plan, score in zip(new, plans, scores, strict=True):
        kept.add(**each, nll=score.window_nll.tolist(), kl=score.kl, line=line(sizes, losses, plan.nbytes).tolist())


def held_out(scored: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> list[list[str]]:
    """Rows of the second table."""
    cells = []
    for estimator in dict.fromkeys(row["estimator"] for row in scored):
        for budget in BUDGETS:
            for count in counts:
                for form in ("feasible", "shrunken"):
                    same = [row for row in scored if (row["estimator"], row["budget"], row["windows"], row["form"]) == (
                        estimator, budget, count, form)]
                    if not same:
                        continue
                    apart = np.mean([np.array(row["nll"]) - np.array(row["line"]) for row in same], axis=0)
                    cells.append([estimator, form, f"{budget:g}", str(count), str(len(same)),
                                  f"{np.mean([row['nll'] for row in same]):.3f}",
                                  plus_minus(apart.mean(), standard_error(apart), sign=True),
                                  f"{np.mean([row['kl'] for row in same]):.3f}"])
    return cells


def report(bench: Bench, regrets: Sequence[Sequence[str]], scored: Sequence[Mapping[str, Any]],
           counts: Sequence[int]) -> list[str]:
    return [*heading("Quality of plans against the text that gradients are read on", command()),
            f"{model_name(bench.prepared.config.model)}, {bench.prepared.config.backend} at "
            f"{', '.join(MENUS[bench.prepared.config.backend])} bits.", "",
            "".join((__doc__ or "").partition("*feasible*")[1:]).replace("\n", " ").strip(), "",
            "## Cost by the gradients of the other windows", "",
            f"Above the least, in percent of it; mean of {DRAWS} draws ± standard error. All draws are from the same "
            "windows, so they are not independent: the error is that of the draw, not of the text.", "",
            *table(["granularity", "bits", "windows", *FORMS], regrets),
            f"## Held-out losses over groups, on {bench.prepared.evaluation}", "",
            "NLL in nats per token, the mean of plans from disjoint windows; its difference from the line of uniform "
            "models at the plans' bytes, paired over held-out windows.", "",
            *table(["estimator", "costs", "bits", "windows", "plans", "NLL", "minus the line", "KL"],
                   held_out(scored, counts))]


if __name__ == "__main__":
    main()
