"""Plans from variants that are quantized behind the widest and behind the unquantized model, scored as they are
exported, and the uniform models that a search sees behind each."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace

from common import Printer, heading, plus_minus, table, write

from impq_core.config import RunConfig, TextConfig
from impq_core.plugins import Plugins
from impq_core.results import Evaluation
from impq_core.runs.pipeline import run

BUDGETS = ("2.5bits", "3bits")
BLOCKS = tuple(f"model.layers.{number}.*" for number in range(8, 30))
"""Blocks that stay unquantized, so that a run takes minutes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--whole", action="store_true", help="quantize every block")
    given = parser.parse_args()
    rows = []
    for budget in BUDGETS:
        found: dict[str, Evaluation] = {}
        with tempfile.TemporaryDirectory() as folder:
            base = RunConfig(model=given.model, budget=budget, tracking_uri="none", output=folder, sequential="yes",
                             exclude=() if given.whole else BLOCKS, partial=True, bits=("2", "3", "4"),
                             calibration=TextConfig(windows=32), evaluation=TextConfig(windows=32))
            for prefix in ("widest", "unquantized"):
                plugins = Plugins()
                plugins.watch(Printer())
                result = run(replace(base, prefix=prefix), plugins)
                assert result.evaluation is not None
                found[prefix] = result.evaluation
        plans = {prefix: evaluation.row("plan") for prefix, evaluation in found.items()}
        difference = plans["unquantized"].window_nll - plans["widest"].window_nll
        stderr = float(difference.std(ddof=1) / len(difference) ** 0.5)
        rows.append([budget, *(f"{plan.nll:.3f}" for plan in plans.values()),
                     plus_minus(float(difference.mean()), stderr, True)])
    lines = heading("The prefix of a search's variants", "python benchmarks/prefix.py")
    lines += ["Plans of the default estimator from variants behind either prefix, quantized in sequence and scored on "
              "32 held-out windows; the difference is paired over windows. "
              + ("" if given.whole else "Eight blocks are quantized, the others stay at 16 bits."), ""]
    lines += table(["budget", "NLL, widest", "NLL, unquantized", "difference"], rows)
    write("prefix.md", lines)


if __name__ == "__main__":
    main()
