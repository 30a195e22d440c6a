"""The prefix of a search's variants: statistics of a block that are collected behind the blocks in front of it at their
widest choices, or behind the unquantized ones.

Plans of the default estimator from either, each quantized in sequence and scored as it is exported; and the uniform
models as each search sees them, beside what they are in sequence. Variants and scores stay in the cache, so that a
second start reads them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from common import Bench, add_model, command, heading, page_of, plus_minus, table, write

from impq_core.config import PREFIXES, RunConfig, TextConfig
from impq_core.results import Score
from impq_core.statistics import standard_error

BUDGETS = (2.5, 3.0)
BLOCKS = 8
"""Blocks that are quantized, unless all are, so that a search takes minutes."""

GAME_WINDOWS = 8


@dataclass(frozen=True, eq=False)
class Search:
    """What a search behind a prefix found.

    Args:
        plans: scores in sequence of the plan of each budget.
        seen: scores of the uniform models from the search's variants, by width.
        uniform: their scores in sequence, which no prefix changes; none unless they were asked for.
        text: the held-out windows in words.
    """

    plans: list[Score]
    seen: dict[str, Score]
    uniform: dict[str, Score]
    text: str


def search(config: RunConfig, with_uniform: bool) -> Search:
    """Estimate and plan behind the prefix of a configuration, and score the plans."""
    bench = Bench.build(config)
    space = bench.prepared.space
    estimate, _ = bench.estimate(config)
    plans = [space.assignment(bench.plan(config, estimate, budget).pick) for budget in BUDGETS]
    uniform = {str(choice): space.assignment(space.uniform(number)) for number, choice in enumerate(space.choices)}
    seen = bench.evaluator.scores([*uniform.values()])
    compared = uniform if with_uniform else {}
    scores = bench.session.evaluator().scores([*plans, *compared.values()], bench.session.report("in sequence"))
    return Search(scores[:len(plans)], dict(zip(uniform, seen, strict=True)),
                  dict(zip(compared, scores[len(plans):], strict=True)), str(bench.prepared.evaluation))


def report(found: dict[str, list[Search]], explained: str) -> list[str]:
    """The tables: per prefix, the searches of all calibration texts."""
    widest, other = (found[prefix] for prefix in PREFIXES)
    rows = []
    for place, budget in enumerate(BUDGETS):
        pairs = [(one.plans[place], two.plans[place]) for one, two in zip(widest, other, strict=True)]
        means = np.array([float((two.window_nll - one.window_nll).mean()) for one, two in pairs])
        # All calibration texts have the same held-out windows: the error is that of differences averaged over texts.
        windows = np.mean([two.window_nll - one.window_nll for one, two in pairs], axis=0)
        divergence = np.mean([two.kl - one.kl for one, two in pairs])
        rows.append([f"{budget:g}", *(f"{np.mean([score.nll for score in scores]):.3f}"
                                      for scores in zip(*pairs, strict=True)),
                     plus_minus(float(means.mean()), standard_error(windows), True),
                     ", ".join(f"{value:+.3f}" for value in means), f"{divergence:+.3f}"])
    lines = heading("The prefix of a search's variants", command())
    lines += [explained, "", "Plans in sequence, NLL, means over the calibration texts. Differences are unquantized "
              "minus widest: above 0, the plans from behind the unquantized prefix are worse.", ""]
    lines += table(["nominal bits", *PREFIXES, "difference, paired over held-out windows", "by calibration text",
                    "difference of KL"], rows)
    lines += ["The uniform models: what each search sees of them, and what they are in sequence.", ""]
    lines += table(["width", *(f"seen, {prefix}" for prefix in PREFIXES), "in sequence"], [
        [width, *(f"{np.mean([one.seen[width].nll for one in found[prefix]]):.3f}" for prefix in PREFIXES),
         f"{np.mean([one.uniform[width].nll for one in widest]):.3f}"] for width in widest[0].seen])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--whole", action="store_true", help=f"quantize every block, not the first {BLOCKS}")
    parser.add_argument("--seeds", type=int, default=3, help="number of calibration texts [3]")
    parser.add_argument("--windows", type=int, default=64, help="windows of each text [64]")
    given = parser.parse_args()
    left = () if given.whole else (*(f"model.layers.{number}.*" for number in range(BLOCKS, 10)),
                                   "model.layers.[1-9][0-9].*")
    found: dict[str, list[Search]] = {prefix: [] for prefix in PREFIXES}
    for seed in range(given.seeds):
        for prefix in PREFIXES:
            print(f"calibration text {seed}, {prefix}", flush=True)
            found[prefix].append(search(RunConfig(
                model=given.model, bits=("2", "3", "4"), exclude=left, partial=True, sequential="yes", prefix=prefix,
                calibration=TextConfig(windows=given.windows, seed=seed), evaluation=TextConfig(windows=given.windows),
                game_windows=GAME_WINDOWS, probe_windows=given.windows, fallback="no", tracking_uri="none"),
                with_uniform=prefix == PREFIXES[0]))
    blocks = "Every block is quantized." if given.whole else (
        f"The first {BLOCKS} blocks are quantized, the others stay at 16 bits.")
    write(page_of("prefix.md", given.model), report(
        found, f"{blocks} {given.seeds} calibration texts of {given.windows} windows; {found[PREFIXES[0]][0].text}."))


if __name__ == "__main__":
    main()
