"""kill -9 at random moments of a small run of the real model; opt-in (``tox -e crash``), some twenty minutes."""

from __future__ import annotations

import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from impq_core.model.demo import cache_folder, demo_model, demo_text

pytestmark = pytest.mark.crash

KILLS = int(os.environ.get("IMPQ_KILLS", "30"))
TRIES = 4
"""Most runs for one kill: a run that ends before its moment is made again, and killed earlier."""

ARGUMENTS = ["run", "--estimator", "spqe", "--granularity", "block", "--bits", "3,4",
             "--calibration-windows", "8", "--calibration-length", "64", "--game-windows", "2",
             "--evaluation-windows", "2", "--evaluation-length", "64", "-o", "grid=min-max", "-o",
             "permutations=2", "--surrogate", "covariance", "--refine", "3",
             "--exclude", "model.layers.[4-9]", "--exclude", "model.layers.1?", "--exclude", "model.layers.2?"]
"""The game has four of the thirty blocks as layers, so that a run takes half a minute."""

LITTLE = ["--memory", os.environ.get("IMPQ_CRASH_MEMORY", "0.93GB")]
"""Memory in which blocks stay on disk until they work."""

RESULTS = ("estimate.npz", "plan.json", "measurements.npz", "measurements.jsonl", "evaluation.json")


@pytest.fixture(autouse=True)
def cache() -> None:
    """The user's cache, with the model and the texts; variants are kept in another cache."""


@pytest.fixture
def start(tmp_path: Path):
    """Start impq in a folder with a cache that has only the model and the texts."""
    demo_model(), demo_text("calibration"), demo_text("evaluation")
    home = cache_folder()

    def begin(name: str, *arguments: str) -> subprocess.Popen[str]:
        folder, cache = tmp_path / name, tmp_path / name / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        for part in ("models", "texts"):
            if not (cache / part).exists():
                (cache / part).symlink_to(home / part)
        return subprocess.Popen([sys.executable, "-u", "-m", "impq_core.cli", *arguments], cwd=folder, text=True,
                                stdout=subprocess.PIPE, stderr=(folder / "stderr.txt").open("a"),
                                env={**os.environ, "IMPQ_CACHE": str(cache)})
    return begin


def run_folder(process: subprocess.Popen[str]) -> tuple[str, float]:
    """The run's folder from the first line that names it, and the time of that line."""
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.match(r"run folder (.*)", line):
            return match[1], time.monotonic()
    raise AssertionError("no run folder")


def files(folder: str) -> dict[str, bytes]:
    return {name: (Path(folder) / name).read_bytes() for name in RESULTS}


@pytest.mark.parametrize("memory", [[], LITTLE], ids=["resident", "streamed"])
def test_whatever_moment_a_run_is_killed_at_it_ends_the_same(memory: list[str], start, tmp_path: Path) -> None:
    """The killed runs are compared with a resident one."""
    whole = start("whole", *ARGUMENTS)
    folder, began = run_folder(whole)
    rest = whole.stdout.read()
    seconds = time.monotonic() - began
    assert whole.wait() == 0, rest
    expected = files(folder)
    rng = random.Random(0)
    passed, report = 0, []
    for number in range(KILLS):
        moment = (number + rng.random()) / KILLS * seconds  # at random, and in every part of the run
        for attempt in range(TRIES):
            name = f"kill{number}-{attempt}"
            process = start(name, *ARGUMENTS, *memory)
            folder, began = run_folder(process)
            time.sleep(max(0.0, began + moment - time.monotonic()))
            process.kill()
            stages = re.findall(r"^(quantize|estimate|refine|evaluate)", process.stdout.read(), re.M)
            if process.wait() == -signal.SIGKILL:
                break
            moment *= 0.9  # this run was faster than the whole one, and had ended
        assert process.returncode == -signal.SIGKILL, f"{TRIES} runs ended before they were killed"
        resumed = start(name, "run", "--resume", folder)
        rest = resumed.stdout.read()
        same = resumed.wait() == 0 and files(folder) == expected
        passed += same
        report.append(f"killed after {moment:.1f} of {seconds:.1f} s in {stages[-1] if stages else 'loading'}: "
                    + ("the same" if same else f"NOT the same {rest[-300:]}"))
        print(report[-1], flush=True)
        with sqlite3.connect(tmp_path / name / "mlflow.db") as store:
            assert store.execute("select status from runs").fetchall() == [("FINISHED",)]
    assert passed == KILLS, "\n".join(report)
