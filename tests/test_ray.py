"""Workers of Ray. One Ray is started for all tests of this file, but for those of a head that goes away."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from stopped import bytes_of, forwards, hands, rows_of

from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.hookspecs import hookimpl
from impq_core.plugins import Plugins
from impq_core.runs.orders import order_of
from impq_core.runs.pipeline import resume, run
from impq_core.runs.prepare import prepare
from impq_core.tasks.measure import evaluate_tasks
from impq_core.trust import NO_TRUST

ray = pytest.importorskip("ray", reason="needs ray (pip install 'impq[ray]')")
psutil = pytest.importorskip("psutil")

from impq_ray.crew import Ray  # noqa: E402


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level="error", log_to_driver=False,
             object_store_memory=80 * 2**20)
    yield
    ray.shutdown()


class Kills:
    """Kills a worker at the first progress of a stage."""

    def __init__(self, stage: str) -> None:
        self.stage, self.killed = stage, 0

    @hookimpl
    def impq_progress(self, stage: str, done: int, total: int) -> None:
        if stage == self.stage and done and not self.killed:
            for pid in hands()[:1]:
                os.kill(pid, signal.SIGKILL)
                self.killed = pid


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    return replace(tiny_config, tracking_uri="none", backend="quanto", threads=1,
                   options={"estimator": {"permutations": 8}})


def test_one_two_and_three_workers_give_what_none_gives(one_ray: None, config: RunConfig, cache: Path,
                                                        tmp_path: Path) -> None:
    """With two, one is killed in the middle."""
    alone = run(config)
    for count in ("1", "2", "3"):
        cache.rename(tmp_path / f"cache{count}")
        found = Plugins()
        if count == "2":
            found.watch(kills := Kills("estimate"))
        shared = run(replace(config, workers=count), found)
        assert bytes_of(shared.folder) == bytes_of(alone.folder)
        assert rows_of(shared.folder) == rows_of(alone.folder)
        assert forwards(shared.folder) == forwards(alone.folder)
    assert kills.killed


def test_tasks_have_the_values_that_they_have_without_workers(one_ray: None, config: RunConfig, tmp_path: Path) -> None:
    folder = run(replace(config, estimator="random", options={})).folder
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(f'{{"question": "{word}", "choices": ["a", "b"], "answer": 0}}\n' for word in "xyz"))
    found = []
    for workers in ("0", "2"):
        found.append((evaluate_tasks(folder, [str(questions)], ("unquantized", "plan"), workers=workers),
                      (folder / "tasks.json").read_bytes()))
        (folder / "tasks.json").unlink()
    assert found[0] == found[1] and len(found[0][0].scores) == 4  # two models, two metrics


def test_a_worker_that_differs_ends_the_run_in_one_line(one_ray: None, config: RunConfig) -> None:
    plugins = Plugins()
    order = order_of(prepare(config, plugins), plugins, NO_TRUST)
    other = {**order, "key": {**order["key"], "code": "0" * 16}}
    crew = Ray()
    crew.open("1", 1, False)
    try:
        with pytest.raises(ImpqError, match="code") as refused:
            list(crew.carry_out(other, [{"kind": "losses", "game": "estimate", "set": 0, "picks": [[0, 0, 0, 0]]}]))
        assert "\n" not in str(refused.value)
    finally:
        crew.close()


def test_a_cluster_that_is_not_there_is_refused(config: RunConfig) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for place in (address, "nowhere", "127.0.0.1:99999"):
        with pytest.raises(ImpqError, match=place):
            run(replace(config, workers=f"ray://{place}"))


def test_too_few_cores_are_refused(one_ray: None, config: RunConfig) -> None:
    with pytest.raises(ImpqError, match="cores"):
        run(replace(config, workers="9"))


def test_a_head_that_goes_away_leaves_a_run_that_resumes(config: RunConfig, tmp_path: Path) -> None:
    alone = run(config)
    config = replace(config, workers="2", output=str(tmp_path / "shared"), cache=True)
    (tmp_path / "impq.toml").write_text(config.to_toml())
    process = subprocess.Popen([sys.executable, "-m", "impq_core.cli", "run"], cwd=tmp_path, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    workers: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 240
        while not (logs := [*(tmp_path / "shared").glob("*/measurements.jsonl")]) or len(
                logs[0].read_text().splitlines()) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        leader = psutil.Process(process.pid)
        workers = [psutil.Process(pid) for pid in hands(process.pid)]
        assert {worker.nice() for worker in workers} == {leader.nice()}
        for worker in workers:
            worker.suspend()  # the run cannot end before its head is killed
        [head] = [child for child in leader.children(recursive=True) if child.name() == "gcs_server"]
        head.kill()
        said = process.communicate(timeout=120)[1]
    finally:
        process.kill()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
    [folder] = (tmp_path / "shared").iterdir()
    assert process.returncode == 1 and said.strip().splitlines()[-1].count("gone") == 1, said
    again = resume(folder, workers="0")
    assert bytes_of(again.folder) == bytes_of(alone.folder)
