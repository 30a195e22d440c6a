"""What the doctor finds, and what it mends."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from pathlib import Path

import pytest

from impq_core.cli import main
from impq_core.config import RunConfig
from impq_core.doctor import examine
from impq_core.model.cache import shelves
from impq_core.plugins import Plugins
from impq_core.runs.folder import RunFolder
from impq_core.runs.pipeline import run
from impq_core.tracking.tracker import Tracker


def findings(config: RunConfig, fix: bool = False) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"ok": [], "note": [], "wrong": [], "fixed": []}
    for finding in examine(config.tracking_uri, Path(config.output), Plugins(), fix):
        found[finding.state].append(finding.what)
    return found


@pytest.fixture
def finished(tiny_config: RunConfig) -> Path:
    plugins = Plugins()
    plugins.watch(Tracker(tiny_config.tracking_uri, tiny_config.experiment))
    return run(tiny_config, plugins).folder


def test_nothing_is_wrong_with_what_has_finished(finished: Path, tiny_config: RunConfig) -> None:
    found = findings(tiny_config)
    assert not found["wrong"] and not found["fixed"] and len(found["ok"]) == 3


def test_an_orphan_is_found_and_closed(finished: Path, tiny_config: RunConfig) -> None:
    path = tiny_config.tracking_uri.removeprefix("sqlite:///")
    with sqlite3.connect(path) as store:
        store.execute("update runs set status = 'RUNNING'")
    with RunFolder(finished).locked():
        assert not findings(tiny_config)["wrong"]  # somebody is at work
    [wrong] = findings(tiny_config)["wrong"]
    assert "is RUNNING" in wrong
    [fixed] = findings(tiny_config, fix=True)["fixed"]
    assert "closed as KILLED" in fixed and not findings(tiny_config)["wrong"]
    with sqlite3.connect(path) as store:
        assert store.execute("select status from runs").fetchall() == [("KILLED",)]


def test_a_run_that_ended_early_is_a_note_with_what_to_do(finished: Path, tiny_config: RunConfig) -> None:
    (finished / "evaluation.json").unlink()
    [note] = findings(tiny_config)["note"]
    assert note == f"{finished} has an estimate and no plan: impq run --resume {finished} goes on"


def test_variants_of_other_code_and_leftovers_are_deleted(finished: Path, tiny_config: RunConfig, cache: Path) -> None:
    [shelf] = shelves()
    old = time.time() - 7200
    left = [shelf.folder / ".variant.x1", Path(tiny_config.output) / ".20260101.abc"]
    left[0].write_text("half")
    left[1].mkdir()
    for path in left:
        os.utime(path, (old, old))
    fresh = shelf.folder / ".variant.x2"
    fresh.write_text("somebody writes this now")
    assert len(findings(tiny_config)["wrong"]) == 2
    assert len(findings(tiny_config, fix=True)["fixed"]) == 2 and fresh.exists() and shelf.count
    about = json.loads((shelf.folder / "about.json").read_text())
    (shelf.folder / "about.json").write_text(json.dumps({**about, "code": "of last year"}))
    [note] = findings(tiny_config)["note"]
    assert "made by other code" in note
    assert findings(tiny_config, fix=True)["fixed"] and not shelves()


def test_the_command_says_what_it_sees(finished: Path, tiny_config: RunConfig, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    main(["doctor", "--runs", str(finished.parent)])
    assert "ok     impq " in capsys.readouterr().out
    (tmp_path / "mlflow.db").write_text("no database")
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 1 and "wrong  tracking store" in capsys.readouterr().out


def test_the_cache_is_listed_and_pruned(finished: Path, tiny_config: RunConfig,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    main(["cache"])
    assert "impq_gptq" in (said := capsys.readouterr().out) and " 84 " in said
    for arguments, left in ((["--older-than", "1"], 1), (["--model", "other"], 1), (["--older-than", "0"], 0)):
        main(["cache", "prune", *arguments])
        assert len(shelves()) == left
    main(["cache"])
    assert "no variants in" in capsys.readouterr().out
