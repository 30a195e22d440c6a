"""The report of ``gpu.py``, from the JSON files of its steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import table, write

from impq_core.errors import ImpqError

TITLES = {"plans": "Plans", "losses": "Losses on two devices", "repeat": "Repeated and resumed runs",
          "suites": "Tests on the device", "commands": "Commands", "block": "A block", "memory": "Memory of a run"}


def read(folder: Path) -> dict[str, Any]:
    """The answers of the steps that were made, by name."""
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("machine", *TITLES)
            if (folder / f"{name}.json").exists()}


def summary(folder: Path) -> list[str]:
    """A line for each step."""
    lines = []
    for name, answer in read(folder).items():
        rest = {key: value for key, value in answer.items() if key not in ("error", "seconds")}
        lines.append(f"{name}: {answer['error'].splitlines()[-1][:300]}" if "error" in answer
                     else f"{name}: {answer['seconds']} s {json.dumps(rest)[:1500]}")
    return lines


def report(folder: Path) -> None:
    """Write results/gpu.md.

    Raises:
        ImpqError: the folder does not say on which machine the steps ran.
    """
    found = read(folder)
    machine = found.get("machine", {})
    if "versions" not in machine:
        raise ImpqError(f"{folder} has no answer of the step machine: run gpu.py with --out {folder}")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = ["# On an accelerator", "",
             f"Written by `python benchmarks/gpu.py` on {machine['date']}, {machine['hardware']} (CUDA "
             f"{machine['cuda']}), {machine['cores']} cores, Python {machine['python']}; {versions}.", ""]
    for name, title in TITLES.items():
        if name not in found:
            continue
        lines += [f"## {title}", ""]
        if "error" in found[name]:
            lines += [f"The step failed: `{found[name]['error'].splitlines()[-1][:300]}`", ""]
        else:
            lines += PARTS[name](found[name])
            lines += [] if found[name].get("ok", True) else ["**Not all of this is right.**", ""]
    write("gpu.md", lines)


def _plans(answer: Mapping[str, Any]) -> list[str]:
    return ["A planted game of 24 layers, whose losses are computed on the device in float32: SPQE, the regression "
            f"surrogate and the QP make {'the same plan' if answer['equal'] else 'DIFFERENT plans'} on both; losses "
            f"differ by at most {answer['losses_apart']:.1e} nats.", ""]


def _losses(answer: Mapping[str, Any]) -> list[str]:
    rows = [[row["model"], row["backend"], ", ".join(row["bits"]), f"{row['bytes']:,}",
             "equal" if row["bytes_equal"] else "DIFFERENT", f"{100 * row['elements_equal']:.2f}%",
             f"{row['unpacked_apart']:.1e}", f"{row['losses_apart']:.1e}",
             "equal" if row["plans_equal"] else "different"] for row in answer["rows"]]
    return ["The same model in float32, at most two blocks of it quantized, on the processor and on the device, each "
            "by itself. Elements are those of the packed tensors. *Unpacked* is the largest difference of the "
            "processor's variants unpacked on both, relative to a linear's largest weight; *losses* is that of seven "
            "picks, relative; *plan* is that of `aumann-shapley`.", "",
            *table(["model", "backend", "bits", "bytes", "on both", "equal elements", "unpacked", "losses", "plan"],
                   rows)]


def _repeat(answer: Mapping[str, Any]) -> list[str]:
    def shown(names: list[str]) -> str:
        return f"different: {', '.join(names)}" if names else "the same bits"

    rows = [[row["estimator"], row["dtype"], shown(row["repeated"]), shown(row["resumed"]),
             str(row["logged_when_killed"])] for row in answer["rows"]]
    return ["A run of a tiny model twice on the device, each in a cache of its own; and a run that gets SIGKILL while "
            "it estimates and is resumed. Compared are logs, estimate, plan and held-out losses.", "",
            *table(["estimator", "dtype", "run twice", "killed and resumed", "lines logged when killed"], rows)]


def _suites(answer: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, what in (("backends", "The suites of all backends but `gguf`, with `IMPQ_TEST_DEVICE`"),
                       ("devices", "The tests of devices")):
        lines.append(f"- {what}: {answer[name]['summary'].strip('= ')}")
        lines += [f"  - `{line[:200]}`" for line in answer[name]["failed"]]
    return [*lines, ""]


def _commands(answer: Mapping[str, Any]) -> list[str]:
    rows = [[name, "done" if got["code"] == 0 else f"exit code {got['code']}: {' '.join(got['said'])[:200]}",
             f"{got['seconds']:.0f} s"] for name, got in answer["commands"].items()]
    return ["Commands on a tiny model, with what else runs beside them.", "", *table(["command", "", "time"], rows)]


def _block(answer: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in answer["rows"]:
        if "tflops" in row:
            rate = f"{row['tflops']:.0f} TFLOP/s"
        elif row["stage"] == "quantize gptq":
            rate = f"{row['us_per_column']:.0f} us a column, {row['ns_per_weight']:.1f} ns a weight"
        else:
            rate = f"{row['ns_per_weight']:.3f} ns a weight" if "ns_per_weight" in row else ""
        rows.append([row["stage"], row["what"], f"{1e3 * row['seconds']:.1f} ms", rate, _gb(row["peak"])])
    return [f"One block of {answer['weights'] / 1e6:.1f} M weights: {answer['shape']}. Linears that share their inputs "
            "are quantized together. Memory is the most that was allocated on the device during the stage, with what "
            "stood there before.", "", *table(["stage", "", "time", "", "GB at the peak"], rows)]


def _memory(answer: Mapping[str, Any]) -> list[str]:
    rows = [["on disk" if row["streamed"] else "resident", row["stage"], f"{row['seconds']:.1f} s", _gb(row["peak"]),
             _gb(row["forecast"] or None)] for row in answer["stages"]]
    return [f"A random model of {answer['blocks']} blocks with the vocabulary of Llama-3: {answer['shape']}. `gptq` at "
            "2, 3 and 4 bits; 64 windows of 256 tokens; *estimate* is one reading of the slopes. Beside the peak "
            "stands what `--dry-run` forecasts for the stage, without the libraries.", "",
            *table(["blocks", "stage", "time", "GB at the peak", "GB forecast"], rows)]


def _gb(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f}"


PARTS = {"plans": _plans, "losses": _losses, "repeat": _repeat, "suites": _suites, "commands": _commands,
         "block": _block, "memory": _memory}
