"""kill -9 of workers, of Ray's head and of the leader at random moments of runs; opt-in (``tox -e ray``), half an hour.
"""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from stopped import bytes_of, hands, same_rows

from impq_core.config import RunConfig
from impq_core.runs.pipeline import run

psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.ray

KILLS = int(os.environ.get("IMPQ_KILLS", "20"))
VICTIMS = ("worker", "worker", "gcs_server", "raylet", "leader")


def start(folder: Path, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "impq_core.cli", "run", *arguments], cwd=folder, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env={**os.environ, "IMPQ_CACHE": str(cache)})


def kill(leader: psutil.Process, victim: str, below: list[psutil.Process], rng: random.Random) -> bool:
    """Whether there was one."""
    pids = {"worker": lambda: hands(leader.pid), "leader": lambda: [leader.pid]}.get(
        victim, lambda: [one.pid for one in below if one.name() == victim])()
    if pids:
        psutil.Process(rng.choice(pids)).kill()
    return bool(pids)


def differing(alone: Path, shared: Path) -> list[str]:
    expected, found = bytes_of(alone), bytes_of(shared)
    return [name for name in {**expected, **found} if expected.get(name) != found.get(name)]


def test_whatever_dies_at_whatever_moment_the_bytes_are_the_same(tiny_config: RunConfig, tmp_path: Path,
                                                                 monkeypatch) -> None:
    """And no process of Ray is left."""
    rng, counts = random.Random(0), Counter[str]()
    config = replace(tiny_config, tracking_uri="none", threads=1, bits=("2", "3", "4"), value="kl",
                     options={"estimator": {"permutations": 32}}, refine=4, refiner="evolve")
    monkeypatch.setenv("IMPQ_CACHE", str(tmp_path / "alone"))
    alone = run(replace(config, output=str(tmp_path / "whole")))
    seconds, killed = math.inf, 0
    for number in count(-1):  # the first one is not killed, and gives the time
        if killed == KILLS:
            break
        assert number < 2 * KILLS, "most runs end before they are killed"
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "impq.toml").write_text(replace(config, workers="2", output=str(folder / "runs")).to_toml())
        began = time.monotonic()
        process, victim = start(folder, folder / "cache"), VICTIMS[killed % len(VICTIMS)] if number >= 0 else "nobody"
        below: list[psutil.Process] = []
        happened = False
        if number >= 0:
            time.sleep(rng.uniform(0.3, 0.95) * seconds)
            with suppress(psutil.NoSuchProcess):  # it has ended
                leader = psutil.Process(process.pid)
                below = leader.children(recursive=True)
                happened = kill(leader, victim, below, rng)
        killed += happened
        said = process.communicate(timeout=600)[1]
        if not happened:
            seconds = min(seconds, time.monotonic() - began)
        _, left = psutil.wait_procs(below, timeout=180)  # Ray's agents look every minute whether their Ray is there
        assert not left, (number, victim, left)
        code, runs = process.returncode, [*(folder / "runs").glob("*/")]
        if code:
            assert happened and victim != "worker" and code == (-signal.SIGKILL if victim == "leader" else 1), (
                victim, said)
            if code == 1:  # a Ray that dies before it is there leaves no run
                assert said.strip().splitlines()[-1].count("is gone" if runs else "Ray cannot start") == 1, said
            for path in runs:
                again = start(folder, folder / "cache", "--resume", str(path))
                resumed = again.communicate(timeout=600)[1]
                assert again.returncode == 0, resumed
        ended = "ended" if not code else "resumed" if runs else "had not begun"
        counts[f"{victim}: {ended}"] += happened
        print(number, victim, "killed" if happened else "not there", ended, flush=True)
        for path in runs:
            assert not differing(alone.folder, path), (number, victim)
            assert same_rows(alone.folder, path), (number, victim)
    print(dict(counts))
