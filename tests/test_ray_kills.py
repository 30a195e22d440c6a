"""kill -9 of workers and of Ray's head at random moments of runs; opt-in (``tox -e ray``), some ten minutes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_ray import hands
from test_workers import bytes_of, same_rows

from impq_core.config import RunConfig
from impq_core.runs.pipeline import run

psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.ray

KILLS = int(os.environ.get("IMPQ_KILLS", "20"))
VICTIMS = ("worker", "worker", "gcs_server", "raylet")


def start(folder: Path, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "impq_core.cli", "run", *arguments], cwd=folder, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env={**os.environ, "IMPQ_CACHE": str(cache)})


def kill(process: subprocess.Popen[str], victim: str, rng: random.Random) -> bool:
    try:
        below = psutil.Process(process.pid).children(recursive=True)
        pids = hands(process.pid) if victim == "worker" else [one.pid for one in below if one.name() == victim]
    except psutil.NoSuchProcess:
        return False
    if pids:
        psutil.Process(rng.choice(pids)).kill()
    return bool(pids)


def test_whatever_dies_at_whatever_moment_the_bytes_are_the_same(tiny_config: RunConfig, tmp_path: Path,
                                                                 monkeypatch) -> None:
    rng, counts = random.Random(0), {True: 0, False: 0}
    config = replace(tiny_config, tracking_uri="none", threads=1, bits=("2", "3", "4"), value="kl",
                     options={"estimator": {"permutations": 32}}, refine=4, refiner="evolve")
    monkeypatch.setenv("IMPQ_CACHE", str(tmp_path / "alone"))
    alone = run(replace(config, output=str(tmp_path / "whole")))
    seconds = 0.0
    for number in range(-1, KILLS):  # the first one is not killed, and gives the time
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "impq.toml").write_text(replace(config, workers="2", output=str(folder / "runs")).to_toml())
        began = time.monotonic()
        process, victim = start(folder, folder / "cache"), rng.choice(VICTIMS)
        if number >= 0:
            time.sleep(rng.uniform(0.3, 1.0) * seconds)
            happened = kill(process, victim, rng)
        said = process.communicate(timeout=600)[1]
        if number < 0:
            seconds, happened = time.monotonic() - began, False
        code = process.returncode
        if code:
            assert happened and victim != "worker" and code == 1, (victim, said)
            assert said.strip().splitlines()[-1].count("is gone") == 1, said
            for path in [*(folder / "runs").glob("*/")]:
                again = start(folder, folder / "cache", "--resume", str(path))
                assert again.wait(timeout=600) == 0, again.stderr.read()
        counts[code == 0] += 1
        print(number, victim, "killed" if happened else "not there", "ended" if code == 0 else "resumed", flush=True)
        for path in (folder / "runs").glob("*/"):
            assert bytes_of(path) == bytes_of(alone.folder), (number, victim)
            assert same_rows(alone.folder, path), (number, victim)
    print(counts)
