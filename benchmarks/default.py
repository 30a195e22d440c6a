"""The estimator that a run uses by default, beside others, on several models and backends.

The loss of each plan is compared with the line of uniform models at the same bytes, paired over windows. With
``--seeds`` plans are made from several disjoint calibration texts, as far as there are windows. ``regret.py --rows``
reads the rows, too.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

import numpy as np
from cells import Cell, Method, add_options, cells_of, config_of, exit_code, plugins_of
from common import command, heading, plus_minus, table, write
from rows import PlanRow, Problem, each, measured_on, problems, read_all
from task_columns import task_table

from impq_core.config import VALUES, RunConfig
from impq_core.errors import UsageError
from impq_core.parts import Parts
from impq_core.statistics import standard_error

BUDGETS = (2.5, 3.0, 3.5)
MENUS = {"quanto": ("2", "4")}
DEFAULT_MENU = ("2", "3", "4")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "default-rows", "gptq", windows=8, evaluation_windows=24)
    parser.add_argument("--estimators", default="guided-output,aumann-shapley")
    parser.add_argument("--granularities", default="group,linear")
    parser.add_argument("--probe-windows", default="16,64", help="windows of gradients, of 64 [16,64]")
    parser.add_argument("--value", default="nll", choices=VALUES, help="as impq's: the loss of gradients [nll]")
    parser.add_argument("--name", default="default", help="of the page in results/ [default]")
    given = parser.parse_args(words)

    def work() -> None:
        if not given.report:
            measure(given)
        write(f"{given.name}.md", report(read_all(given.kept, given.rows)))

    return exit_code(work)


def measure(given: argparse.Namespace) -> None:
    """The rows: uniform models, and plans of each estimator, amount of text, seed and granularity."""
    if not all(word.isdigit() and 1 <= int(word) <= 64 for word in given.probe_windows.split(",")):
        raise UsageError(f"--probe-windows {given.probe_windows}: numbers from 1 to 64 with , between")
    of_divergence = ", --value kl" if given.value == "kl" else ""
    methods = [Method(f"{estimator}{of_divergence}, gradients of {count} windows", estimator, windows=int(count),
                      options={"allocator": {"work_limit": 10.0}})
               for count in given.probe_windows.split(",") for estimator in given.estimators.split(",")]
    windows = max(64, given.seeds * max(method.windows for method in methods))
    configs = [config_of(given, windows, model=model, backend=backend, bits=MENUS.get(backend, DEFAULT_MENU),
                         granularity=granularity, estimator="guided-output", value=given.value)
               for model in given.models.split(",") for backend in given.backends.split(",")
               for granularity in given.granularities.split(",")]
    plugins = plugins_of(given)
    for config, method in itertools.product(configs[:1], methods):
        Parts.build(method.applied(config), plugins)
    with cells_of(Cell, given, configs, BUDGETS, plugins) as cells:
        for cell in cells:
            cell.uniforms()
            for seed in range(given.seeds):
                for method in methods:
                    cell.estimated(method, seed)
            cell.ask()


def report(rows: Sequence[PlanRow]) -> list[str]:
    """The page."""
    found = problems(rows, Problem)
    cells = [line for problem in found for line in lines_of(problem)]
    lines = [*heading("The default estimator", command(), measured_on(rows)),
             f"NLL, nats per token, on {each(row.shown for row in rows)}. Forwards are of "
             f"{each(f'{row.tokens:,}' for row in rows)} scored tokens. *seeds* is the number of disjoint calibration "
             "texts; losses are means over them, and *sd* is the standard deviation of the NLL over them. The last "
             "columns: the plan's loss and KL divergence minus those on the line between the uniform models of "
             "neighbouring sizes, at the plan's bytes; errors are paired over windows.", "",
             *table(["model, backend", "granularity", "bits", "method", "seeds", "forwards", "NLL", "sd",
                     "minus the line", "KL minus the line"], cells)]
    lines += ["NLL of a method minus that of the default estimator on the same seeds, at the same budget; paired over "
              "windows.", "", *table(["model, backend", "granularity", "bits", "method", "minus", "difference"],
                                     [line for problem in found for line in against_default(problem)])]
    for problem in found:
        if asked := task_table(problem):
            lines += [f"## {problem.title}: tasks", "", *asked]
    return lines


def lines_of(problem: Problem) -> list[list[str]]:
    """The lines of a problem in the table."""
    lines = []
    for (budget, method, granularity), alike in sorted(problem.methods.items(), key=lambda item: (
            item[0][2], item[0][0], item[0][1])):
        losses = [row.nll.mean() for row in alike]
        lines.append([problem.title, granularity, f"{budget:g}", method, str(len(alike)),
                      f"{np.mean([row.forwards for row in alike]):.0f}", f"{np.mean(losses):.3f}",
                      f"{np.std(losses, ddof=1):.3f}" if len(losses) > 1 else "",
                      over_line(problem, alike), over_line(problem, alike, kl=True)])
    return lines


def against_default(problem: Problem) -> list[list[str]]:
    """The differences between each method and those of the default estimator, at every budget and granularity."""
    lines = []
    for (budget, method, granularity), rows in problem.methods.items():
        for (other_budget, other, other_granularity), others in problem.methods.items():
            if (budget, granularity) != (other_budget, other_granularity) or method == other or not other.startswith(
                    RunConfig().estimator):
                continue
            nll = {row.seed: row.nll for row in others}
            apart = [row.nll - nll[row.seed] for row in rows if row.seed in nll]
            if apart:
                mean = np.mean(apart, axis=0)
                lines.append([problem.title, granularity, f"{budget:g}", method, other,
                              plus_minus(float(mean.mean()), standard_error(mean), sign=True)])
    return lines


def over_line(problem: Problem, alike: Sequence[PlanRow], kl: bool = False) -> str:
    """Losses minus the line at each plan's bytes, the mean over rows; empty if a row or the line lacks them."""
    apart = [(row.kl if kl else row.nll) - line for row in alike
             if (line := problem.line(row.nbytes, kl)) is not None and (not kl or len(row.kl))]
    if len(apart) < len(alike):
        return ""
    mean = np.mean(apart, axis=0)
    return plus_minus(float(mean.mean()), standard_error(mean), sign=True)


if __name__ == "__main__":
    sys.exit(main())
