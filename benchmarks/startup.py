"""Time to the first line of output, and the modules imported by then: medians of ten starts, with bare Python."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import heading, table, write

RUNS = 10
IMPQ = [sys.executable, "-m", "impq_core.cli"]
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "impq --help": [*IMPQ, "--help"],
    "impq plugins": [*IMPQ, "plugins"],
    "impq run --estimater (a typo)": [*IMPQ, "run", "--estimater", "spqe"],
    "impq run --estimator spqq (a typo)": [*IMPQ, "run", "--estimator", "spqq"],
    "impq run (its first line)": [*IMPQ, "run", "--tracking-uri", "none"],
    "impq run with MLflow (its first line)": [*IMPQ, "run"],
}
HEAVY = ("torch", "transformers", "mlflow", "gptqmodel", "pyomo", "datasets", "matplotlib", "scipy", "numpy", "rich",
         "click", "pluggy", "filelock")


def first_line(command: list[str], folder: str) -> float:
    """Seconds from start to the first line on either stream."""
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        seconds = time.monotonic() - start
        process.kill()
    return seconds


def imported(arguments: list[str], folder: str) -> tuple[int, list[str]]:
    """The number of modules that a command imports, and the heavy ones among them."""
    script = ("import sys\nfrom impq_core.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
              "print(chr(10) + 'MODULES ' + ' '.join(sys.modules))")
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=folder, capture_output=True, text=True)
    modules = done.stdout.rsplit("MODULES ", 1)[1].split()
    return len(modules), [name for name in HEAVY if name in modules]


def main() -> None:
    lines = heading("Time to the first line", "python benchmarks/startup.py")
    lines += [f"Median of {RUNS} starts, one command after the other in each round, and its ratio to bare Python; "
              "seconds are of a machine that others use too.", ""]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(__file__).parents[1] / part) for part in (".", "plugins"))
        seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
        for _ in range(RUNS):
            for name, command in COMMANDS.items():
                seconds[name].append(first_line(command, folder))
        bare = statistics.median(seconds["python -c pass"])
        rows = []
        for name, times in seconds.items():
            middle = statistics.median(times)
            rows.append([f"`{name}`", f"{middle:.2f}", f"{min(times):.2f}", f"{middle / bare:.1f}"])
        lines += table(["command", "median, s", "least, s", "times bare Python"], rows)
        rows = []
        for name in ("--help", "plugins"):
            count, heavy = imported([name], folder)
            rows.append([f"`impq {name}`", str(count), ", ".join(heavy)])
        lines += ["What is imported by then; `tests/test_cli.py` holds that torch, mlflow, transformers, gptqmodel and "
                  "pyomo are not, and the import contracts in pyproject.toml (`tox -e layers`) hold that no module met "
                  "before a command is chosen can reach them:", ""]
        lines += table(["command", "modules", "of the large ones"], rows)
    write("startup.md", lines)


if __name__ == "__main__":
    main()
