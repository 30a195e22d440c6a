"""Findings of ``impq doctor``, and its repairs."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from impq_core.cli import main
from impq_core.config import RunConfig
from impq_core.doctor import examine
from impq_core.errors import ImpqError
from impq_core.files import scratch_folder
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
    assert not found["wrong"] and not found["fixed"] and len(found["ok"]) == 6


def test_an_orphan_is_found_and_closed(finished: Path, tiny_config: RunConfig) -> None:
    path = tiny_config.tracking_uri.removeprefix("sqlite:///")
    with sqlite3.connect(path) as store:
        store.execute("update runs set status = 'RUNNING'")
    with RunFolder(finished).locked():
        assert not findings(tiny_config)["wrong"]  # another process works in it
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


KILLED = """
import os, pathlib, sys
from impq_core import files
where, name, kind = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if kind == "folder":
    with files.scratch_folder(where, name) as scratch:
        (scratch / "half").mkdir()
        os.kill(os.getpid(), 9)
files._replace(where / name, lambda file: os.kill(os.getpid(), 9))
"""


def kill_in(folder: Path, name: str, kind: str) -> Path:
    """A temporary folder of a process that was killed while it wrote into it."""
    before = set(folder.iterdir())
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder), name, kind]).returncode == -9
    [path] = set(folder.iterdir()) - before
    return path


def age(path: Path, seconds: float) -> None:
    moment = time.time() - seconds
    for item in (path, *path.rglob("*")):
        os.utime(item, (moment, moment), follow_symlinks=False)


def test_only_what_dead_processes_left_is_deleted(finished: Path, tiny_config: RunConfig, cache: Path) -> None:
    [shelf] = shelves()
    output = Path(tiny_config.output)
    for place in ("models", "texts"):
        (cache / place).mkdir()
    left = [kill_in(shelf.folder, "variant", "file"), kill_in(finished, "plan.json", "file"),
            kill_in(output, "20260101", "folder"), kill_in(output.parent, "mlflow.db", "folder"),
            kill_in(cache / "models", "smollm2", "folder"), kill_in(cache / "texts", "c4", "folder")]
    assert len(findings(tiny_config)["wrong"]) == 4  # a file may still be written to
    for path in left:
        age(path, 7200)
    assert len(findings(tiny_config)["wrong"]) == 6
    files = shelf.count
    with scratch_folder(output, "of a process at work") as busy:
        age(busy, 1e6)
        assert len(findings(tiny_config, fix=True)["fixed"]) == 6 and busy.is_dir()
    assert not any(path.exists() for path in left) and shelf.count == files and not findings(tiny_config)["wrong"]
    assert (finished / "plan.json").is_file()


def test_nothing_else_is_ever_deleted(finished: Path, tiny_config: RunConfig, cache: Path, tmp_path: Path) -> None:
    output = Path(tiny_config.output)
    outside = tmp_path / "outside"
    kept = [output / ".git" / "config", output / ".ssh" / "id", output / ".venv.abc" / "marker",
            output.parent / ".mlflow.db.swp", output.parent / ".mlflow.db.backup" / "file",
            cache / "models" / "tmp-mine" / "weights", cache / "texts" / "tmp.txt",
            cache / "variants" / "photos" / "about.json", finished / ".notes" / "a.txt",
            output / ".another.impq-unfinished" / "file", outside / ".impq-unfinished"]
    for file in kept:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    (outside / ".impq-unfinished").write_text('{"made_by": "impq", "for": "a trap"}')
    (output / ".link.impq-unfinished").symlink_to(outside)
    (output / ".file.impq-unfinished").symlink_to(kept[0])
    scratch = kill_in(output, "run", "folder")  # holds a link out of itself
    (scratch / "link").symlink_to(outside)
    age(output.parent, 1e7)
    age(cache, 1e7)
    main(["cache", "prune", "--model", "other"])
    assert len(findings(tiny_config, fix=True)["fixed"]) == 1 and not scratch.exists()
    assert all(file.exists() for file in kept)
    main(["cache", "prune", "--all"])
    assert all(file.exists() for file in kept)


def test_variants_of_other_code_are_kept_and_those_long_unused_are_reported(finished: Path,
                                                                            tiny_config: RunConfig) -> None:
    [shelf] = shelves()
    about = json.loads((shelf.folder / "about.json").read_text())
    (shelf.folder / "about.json").write_text(json.dumps({**about, "code": "of another environment"}))
    found = findings(tiny_config, fix=True)
    assert not found["fixed"] and not found["note"] and len(shelves()) == 1
    age(shelf.folder, 40 * 86400)
    found = findings(tiny_config, fix=True)
    [note] = found["note"]
    assert note.endswith("impq cache prune --older-than 30") and not found["fixed"] and len(shelves()) == 1


def test_shelves_without_a_mark_are_known_by_their_keys(finished: Path) -> None:
    [shelf] = shelves()
    about = json.loads((shelf.folder / "about.json").read_text())
    assert about.pop("format") == "impq-variants/1"
    (shelf.folder / "about.json").write_text(json.dumps(about))
    assert [old.folder for old in shelves()] == [shelf.folder]
    for content in (json.dumps({"model": "x"}), json.dumps({**about, "format": "another/1"}), "[]", "{"):
        (shelf.folder / "about.json").write_text(content)
        assert not shelves()
        with pytest.raises(ImpqError, match="not deleted"):
            shelf.remove()
    assert shelf.folder.is_dir()


def test_runs_of_another_machine_are_not_closed(finished: Path, tiny_config: RunConfig) -> None:
    with sqlite3.connect(tiny_config.tracking_uri.removeprefix("sqlite:///")) as store:
        store.execute("update runs set status = 'RUNNING'")
        store.execute("update tags set value = 'elsewhere' where key = 'impq.host'")
    found = findings(tiny_config, fix=True)
    assert not found["wrong"] and not found["fixed"]


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
    for arguments, left in ((["--older-than", "1"], 1), (["--model", "other"], 1), (["--all", "--older-than", "30"], 1),
                            (["--all", "--model", "other"], 1), (["--older-than", "0", "--model", "other"], 1),
                            (["--older-than", "0", "--model", tiny_config.model], 0)):
        main(["cache", "prune", *arguments])
        assert len(shelves()) == left
    main(["cache"])
    assert "no variants in" in capsys.readouterr().out
