"""All benchmarks, one after the other, with the time that each takes; `tox -e bench` runs this.

``--list`` prints them with what they took before and runs nothing; ``--only`` chooses some. Times of a run are added to
results/times.md as soon as a benchmark has ended.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from common import RESULTS, add_model, heading, model_name, table, write
from lines import Lines, read_lines

from impq_core.errors import nearest

TIMES = RESULTS / "times.jsonl"
SCRIPTS = ("game_cost", "shape", "roundtrip", "allocation", "startup", "speed", "memory", "llama_cpp", "quantizers",
           "within", "bits_saved", "default", "latency", "rotation", "regret", "paper", "peers", "tokens", "workers",
           "prefix", "frontier")
"""In this order; frontier takes longest. Not gpu, which needs an accelerator."""

CELLS = ("paper", "regret", "default")
"""Benchmarks that are made of cells: here with three calibration texts, and two tasks for each row."""

WITHOUT_MODEL = ("game_cost", "roundtrip", "allocation", "startup", "speed", "memory", "workers")
"""Benchmarks that take no model to measure: they measure time or memory with the demo, or make models themselves."""


def times() -> dict[tuple[str, str], dict[str, object]]:
    """The last time of each benchmark and model."""
    return {(row["benchmark"], row["model"]): row for row in read_lines(TIMES)}


def shown(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else (
        f"{seconds / 3600:.1f} h")


def report() -> list[str]:
    cells = [[name, model, shown(float(str(row["seconds"]))), str(row["cores"]), str(row["date"])]
             for (name, model), row in sorted(times().items())]
    return [*heading("How long the benchmarks take", "python benchmarks/every.py"),
            "Wall-clock time of whole benchmarks with their default options. Variants that are in the cache, and rows "
            "that an earlier run kept, are not made again, so a first run takes longer than a repeated one.", "",
            *table(["benchmark", "model", "time", "cores", "date"], cells)]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--only", default=",".join(SCRIPTS), help="names, with , between [all]")
    parser.add_argument("--list", action="store_true", help="print the known times, and run nothing")
    given = parser.parse_args(words)
    names = given.only.split(",")
    for name in names:
        if name not in SCRIPTS:
            print(f"--only: there is no benchmark '{name}'{nearest(name, SCRIPTS)}", file=sys.stderr)
            return 2
    failed = []
    for name in names:
        model = "demo" if name in WITHOUT_MODEL else given.model
        before = times().get((name, model_name(model)))
        took = f"took {shown(float(str(before['seconds'])))} on {before['date']}" if before else "time unknown"
        print(f"{name}.py, {model_name(model)}: {took}", flush=True)
        if given.list:
            continue
        options = ["--seeds", "3", "--tasks", "continuation,last-word"] if name in CELLS else []
        if model != "demo":
            options += ["--models" if name in CELLS else "--model", model]
        start = time.monotonic()
        code = subprocess.run([sys.executable, str(Path(__file__).with_name(f"{name}.py")), *options]).returncode
        if code:
            failed.append(name)
            continue
        Lines(TIMES).add({"benchmark": name, "model": model_name(model), "date": date.today().isoformat(),
                          "seconds": round(time.monotonic() - start, 1), "cores": os.cpu_count()})
        write("times.md", report())
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
