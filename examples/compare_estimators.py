"""Compare estimators: their plans for one model and budget, against their cost in forwards.

    python examples/compare_estimators.py
    python examples/compare_estimators.py --model ./my-model --estimators isolated,spqe --budget 2.5bits

A sweep quantizes the model once, makes a plan with every estimator from the same variants, and scores each plan on the
same held-out windows. The script prints a line for each estimator, the cheapest first: full-model forwards, held-out
NLL in nats per token with its standard error over windows, and the difference to the cheapest estimator's plan, paired
over windows (below zero is better). Then it prints whether references of the same size are better than the best plan,
and the path of the page of ``impq compare``.

On the demo model with its 30 blocks the default estimators cost 180 forwards: zscore 0, fisher 24, isolated 32 and spqe
124. This takes about 12 minutes on two cores with matrix tiles (AMX), a third of it for quantization.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import impq_core
from impq_core import RunConfig, Sweep, TextConfig


def main(arguments: list[str] | None = None) -> None:
    """Run the sweep, read its runs, and print the comparison."""
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

    plugins = impq_core.console(brief=True)  # the installed plugins and a printer of the progress
    base = RunConfig(
        model=given.model, budget=given.budget, bits=(2, 3, 4),
        granularity="block",  # the same layers for all estimators; a game costs forwards for each layer
        calibration=TextConfig(given.calibration, given.windows, given.length), game_windows=min(8, given.windows),
        evaluation=TextConfig(given.evaluation, given.windows, given.length), output=given.output)
    folder = impq_core.run_sweep(Sweep(base, {"estimator": given.estimators.split(",")}), plugins)

    # A contest holds the runs that were scored on the same windows: here all of them.
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
