"""Several processes on one fresh store and one fresh cache."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from apart import called

from impq_core.config import RunConfig

PROCESSES = 2


def test_runs_started_at_once_are_all_kept(tiny_config: RunConfig, tmp_path: Path, cache: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny_config, backend="quanto", options={"estimator": {"permutations": 2}})
    (tmp_path / "impq.toml").write_text(config.to_toml())
    processes = [subprocess.Popen([sys.executable, "-m", "impq_core.cli", "run"], cwd=tmp_path, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(PROCESSES)]
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES, said
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        statuses = [row[0] for row in store.execute("select status from runs")]
    assert statuses == ["FINISHED"] * PROCESSES
    folders = list(Path(tiny_config.output).iterdir())
    assert len(folders) == PROCESSES
    for name in ("estimate.npz", "plan.json", "evaluation.json", "measurements.jsonl"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
    [shelf] = (cache / "variants").iterdir()
    assert len(list(shelf.glob("*.safetensors"))) == 4 * 7 * 2 and not list(shelf.glob(".*"))
    assert not [text for text in said if "damaged" in text]
    monkeypatch.chdir(tmp_path)
    code, out, err = called(["doctor"])
    assert code == 0 and "wrong" not in out, (out, err)


@pytest.mark.parametrize("command", ["doctor", "cache"])
def test_an_empty_place_is_nothing_wrong(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = called([command])
    assert code == 0, (out, err)
    assert not (tmp_path / "mlflow.db").exists() and not (tmp_path / "impq-runs").exists()
