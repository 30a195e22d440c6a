"""Which estimator is worth its forwards? Several of them plan the same model for the same budget.

    python examples/compare_estimators.py
    python examples/compare_estimators.py --model ./my-model --estimators isolated,spqe --budget 2.5bits

A sweep quantizes the model once, lets every estimator plan from the same variants, and scores each plan on the same
held-out windows. Printed is a line for each estimator, the cheapest first: full-model forwards, held-out NLL in nats
per token with its standard error over windows, and the difference to the cheapest plan, paired over windows (below
zero is better). Then whether plain references of the same size beat the best plan, and where the page of
``impq compare`` is.

On the demo model the default estimators spend 180 forwards over its 30 blocks: zscore none, fisher 24, isolated 32 and
spqe 124. Some 12 minutes on two cores with matrix tiles, of which a third goes into quantizing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import impq_core
from impq_core import RunConfig, Sweep, TextConfig


def main(arguments: list[str] | None = None) -> None:
    """Sweep, read the runs back, print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, a folder, or a hub name")
    parser.add_argument("--estimators", default="zscore,fisher,isolated,spqe", help="names, with commas")
    parser.add_argument("--budget", default="3bits")
    parser.add_argument("--calibration", default="demo", help="text to measure on: demo or a file")
    parser.add_argument("--evaluation", default="demo", help="held-out text: demo or a file")
    parser.add_argument("--windows", type=int, default=64, help="windows drawn from each text")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--output", type=Path, default=Path("impq-runs"))
    given = parser.parse_args(arguments)

    plugins = impq_core.console(brief=True)  # the installed plugins, with the terminal watching
    base = RunConfig(
        model=given.model, budget=given.budget, bits=(2, 3, 4),
        granularity="block",  # the same layers for all: an estimator that plays pays for each of them
        calibration=TextConfig(given.calibration, given.windows, given.length), game_windows=min(8, given.windows),
        evaluation=TextConfig(given.evaluation, given.windows, given.length), output=given.output)
    folder = impq_core.run_sweep(Sweep(base, {"estimator": given.estimators.split(",")}), plugins)

    # Runs that were scored on the same windows make a contest; here that is all of them.
    contests, _ = impq_core.gather([folder])
    [contest] = contests
    runs = sorted(contest.contestants, key=lambda run: run.forwards)
    cheapest = runs[0]
    print(f"\n{contest.text}; {contest.tokens} scored tokens; {cheapest.budget}")
    print(f"{'estimator':<16} {'forwards':>8}  {'NLL':<17} minus {cheapest.config.estimator}")
    for run in runs:
        difference = "" if run is cheapest else str(run.plan.minus(cheapest.plan))
        score = f"{run.plan.nll:.4f} ± {run.plan.stderr:.4f}"
        print(f"{run.config.estimator:<16} {run.forwards:>8.1f}  {score:<17} {difference}")

    best = min(runs, key=lambda run: run.plan.nll)
    print(f"\n{best.config.estimator} against references of its size: {best.verdict}")
    page = folder / "compare.html"
    impq_core.write_page(contests, page)
    print(f"page of the comparison: {page}")


if __name__ == "__main__":
    main()
