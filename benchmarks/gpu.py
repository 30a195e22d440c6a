"""A smoke run on an accelerator, in under five minutes: equal plans and near-equal losses on both devices, equal bits
when a run is repeated or killed and resumed, the suites of the backends and the commands on the device, and the time
and memory of blocks of the shape of Llama-3-8B's. The exit code is 1 unless every step's result is right. Without an
accelerator: one line, exit code 1.

Each step is a process of its own with a limit of time, and writes a JSON file; steps that are not timed run side by
side. The report is made of the files, also on another machine: ``--report``.

``--device cpu --tiny`` tries the script itself without an accelerator, with small shapes, and writes no report.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_steps
from gpu_report import read, report, summary

from impq_core.errors import ImpqError, nearest
from impq_core.files import write_text
from impq_core.model.device import resolve_device

Answer = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A step of the smoke run.

    Args:
        work: called with the given device, whether shapes are small, and a folder; returns what is kept, with ``ok``:
            whether it is right.
        limit: seconds after which the process is ended.
        alone: whether no other step may run beside it, because it is timed.
    """

    work: Callable[[str, bool, Path], Answer]
    limit: int
    alone: bool = False


STEPS: Mapping[str, Step] = {
    "machine": Step(gpu_steps.machine, 60),
    "plans": Step(gpu_steps.plans, 120),
    "losses": Step(gpu_steps.losses, 200),
    "repeat": Step(gpu_steps.repeat, 200),
    "suites": Step(gpu_steps.suites, 200),
    "commands": Step(gpu_steps.commands, 200),
    "block": Step(gpu_steps.block, 200, alone=True),
    "memory": Step(gpu_steps.memory, 200, alone=True),
}


def carry_out(name: str, device: str, tiny: bool, out: Path) -> None:
    """One step, in this process; its answer is written to ``out``."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        try:
            answer = STEPS[name].work(device, tiny, Path(place))
        except Exception as error:  # a step that fails is a result, too
            answer = failed(f"{type(error).__name__}: {error}"[:2000])
            traceback.print_exc()
    keep(out, name, {**answer, "seconds": round(time.monotonic() - start, 1)})


def failed(reason: str) -> Answer:
    """The answer of a step without a result."""
    return {"error": reason, "ok": False}


def keep(out: Path, name: str, answer: Answer) -> None:
    write_text(out / f"{name}.json", json.dumps(answer, indent=1) + "\n")


def start(name: str, device: str, tiny: bool, out: Path) -> str:
    """One step in a process of its own, in place of an earlier answer; its output goes to a file beside its answer.
    Returns a line."""
    command = [sys.executable, __file__, "--step", name, "--device", device, "--out", str(out), *["--tiny"] * tiny]
    begun = time.monotonic()
    (out / f"{name}.json").unlink(missing_ok=True)
    with (out / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=STEPS[name].limit,
                                  env={**os.environ, "IMPQ_CACHE": os.environ.get("IMPQ_CACHE", str(out / "cache"))}
                                  ).returncode
            reason = f"exit code {code}, see {name}.log"
        except subprocess.TimeoutExpired:
            code, reason = 1, f"not done after {STEPS[name].limit} s"
    if code or name not in read(out):
        keep(out, name, failed(reason))
    answer = read(out)[name]
    state = "done" if answer["ok"] else "FAILED" if "error" in answer else "WRONG"
    return f"{name}: {state} after {time.monotonic() - begun:.0f} s"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", help="as impq's [auto]")
    parser.add_argument("--tiny", action="store_true", help="small shapes, and no report")
    parser.add_argument("--out", type=Path, default=Path("gpu-smoke"), help="folder of the answers [gpu-smoke]")
    parser.add_argument("--steps", default=",".join(STEPS), help="some of the steps, separated by commas")
    parser.add_argument("--side-by-side", type=int, default=max(1, min(5, (os.cpu_count() or 2) // 2)),
                        help="steps at a time, of those that are not timed")
    parser.add_argument("--report", action="store_true", help="write the report from the folder of answers")
    parser.add_argument("--step", choices=tuple(STEPS), help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    names = given.steps.split(",")
    for name in names:
        if name not in STEPS:
            print(f"--steps: there is no step '{name}'{nearest(name, STEPS)}", file=sys.stderr)
            return 2
    if given.report:
        return reported(given.out)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.step:
        carry_out(given.step, given.device, given.tiny, given.out)
        return 0
    try:
        device = resolve_device(given.device)
    except ImpqError as error:
        print(error, file=sys.stderr)
        return 1
    if device.type == "cpu" and not given.tiny:
        print("torch can use no accelerator here: nothing to measure (--device cpu --tiny tries the script)",
              file=sys.stderr)
        return 1
    names = list(dict.fromkeys(["machine", *names]))  # the report says where the others ran
    with ThreadPoolExecutor(given.side_by_side) as pool:
        together = [name for name in names if not STEPS[name].alone]
        for line in pool.map(lambda name: start(name, given.device, given.tiny, given.out), together):
            print(line, flush=True)
    for name in names:
        if STEPS[name].alone:
            print(start(name, given.device, given.tiny, given.out), flush=True)
    print("\n".join(summary(given.out)), flush=True)
    answers = read(given.out)
    code = int(not all(answers[name]["ok"] for name in names))
    return code if given.tiny else max(code, reported(given.out))


def reported(out: Path) -> int:
    """Write the report; returns the exit code."""
    try:
        report(out)
    except ImpqError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
