"""A sweep over budgets and allocators, from one measurement.

    python examples/sweep_from_python.py
    python examples/sweep_from_python.py --model ./my-model --budgets 2.5bits,60MB --allocators qp,greedy,exhaustive

All runs of the sweep have the same measurement and differ in their plans. The script prints a line for each run: stored
MB of the quantized weights; the plan's predicted loss above the all-widest model; the proven gap to the best prediction
of any plan, if the allocator proves one; the held-out NLL with its standard error over windows; and the difference to
the best run of the budget, paired over windows. Losses are in nats per token.

This is the sweep of ``impq sweep --budget ... --allocator ...``. On the demo model it costs 96 forwards for any number
of budgets and allocators, and about 12 minutes on two cores with matrix tiles (AMX): each distinct plan or reference is
scored once.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import impq_core
from impq_core import RunConfig, Sweep, TextConfig


def main(arguments: list[str] | None = None) -> None:
    """Run the sweep, read its runs, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, a folder, or a hub name")
    parser.add_argument("--budgets", default="2.25bits,2.5bits,3bits", help="with commas")
    parser.add_argument("--allocators", default="qp,greedy", help="names, with commas")
    parser.add_argument("--calibration", default="demo", help="text to measure on: demo or a file")
    parser.add_argument("--evaluation", default="demo", help="held-out text: demo or a file")
    parser.add_argument("--windows", type=int, default=64, help="windows drawn from each text")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--output", type=Path, default=Path("impq-runs"))
    given = parser.parse_args(arguments)

    plugins = impq_core.console(brief=True)  # the installed plugins and a printer of the progress
    # The common configuration of all runs, and the lists of values that are combined: any of backend, estimator,
    # surrogate, allocator and budget.
    base = RunConfig(
        model=given.model, bits=(2, 3, 4), output=given.output,
        calibration=TextConfig(given.calibration, given.windows, given.length), game_windows=min(8, given.windows),
        evaluation=TextConfig(given.evaluation, given.windows, given.length))
    sweep = Sweep(base, {"budget": given.budgets.split(","), "allocator": given.allocators.split(",")})
    folder = impq_core.run_sweep(sweep, plugins)

    # Every run has its own run folder. A run that failed was reported above and has none.
    [contest], _ = impq_core.gather([folder])
    print(f"\n{contest.text}; {contest.tokens} scored tokens; "
          f"{contest.contestants[0].forwards:.1f} forwards in all")
    print(f"{'budget':<9} {'allocator':<11} {'MB':>7}  {'predicted':>9}  {'gap':<7}  {'NLL':<17} minus best")
    for budget, runs in contest.budgets.items():
        for run in runs:
            plan = json.loads((run.folder / "plan.json").read_text())
            gap = "" if plan["bound"] is None else f"{max(0.0, plan['predicted_loss'] - plan['bound']):.4f}"
            print(f"{budget:<9} {run.config.allocator:<11} {run.plan.nbytes / 1e6:>7.2f}  "
                  f"{plan['predicted_loss']:>9.4f}  {gap:<7}  {run.plan.nll:.4f} ± {run.plan.stderr:.4f}   "
                  f"{contest.behind_best(run) or 'best'}")
    print(f"runs in {folder}")


if __name__ == "__main__":
    main()
