"""``impq plugins new`` writes working plugins, and the example plugin is one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from scenes import World

from impq_core.errors import UsageError
from impq_core.plugins import Plugins
from impq_core.skeleton import SUMMARIES, files_of, write_plugin

EXAMPLE = Path(__file__).parents[1] / "examples" / "impq-example-plugin"
KINDS = ("estimator", "allocator", "backend")


def test_the_example_plugin_is_what_is_written() -> None:
    files = files_of("example", KINDS)
    if os.environ.get("IMPQ_WRITE_DOCS") == "1":
        for name, content in files.items():
            (EXAMPLE / name).parent.mkdir(parents=True, exist_ok=True)
            (EXAMPLE / name).write_text(content)
    assert {name: (EXAMPLE / name).read_text() for name in files} == files
    strangers = {str(path.relative_to(EXAMPLE)) for path in EXAMPLE.rglob("*.*") if path.is_file()} - set(files)
    assert not [name for name in strangers if "__pycache__" not in name and "egg-info" not in name
                and not name.startswith((".", "build"))]


def test_every_kind_passes_its_own_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_plugin("my-own", list(SUMMARIES), Plugins())
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "impq-my-own"],
                          env={**os.environ, "PYTHONPATH": "impq-my-own"}, capture_output=True, text=True)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["impq-my-own"]


@pytest.mark.parametrize("kind", SUMMARIES)
def test_a_single_file_of_every_kind_runs(kind: str, world: World) -> None:
    world.reset()
    written = world.ask(f"plugins new my_{kind}.py --kind {kind}")
    assert (written.code, written.touched) == (0, (f"my_{kind}.py",)), written
    chosen = f"--refine 20 --refiner my-{kind}" if kind == "refiner" else f"--{kind} my-{kind}"
    bits = "--bits 2,8" if kind == "backend" else ""
    answer = world.ask(f"run --plugin my_{kind}.py {chosen} {bits} --tracking-uri none --game-windows 4")
    assert answer.code == 0 and "plan:" in answer.out, answer


def test_nothing_is_written_where_something_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "impq-there").mkdir()
    (tmp_path / "there.py").touch()
    for target, kinds, reason in (
            ("Mine", ["estimator"], "no name"), ("spqe", ["estimator"], "already, from impq:spqe"),
            ("mine", ["estimatr"], "did you mean 'estimator'"), ("there", ["backend"], "exists already"),
            ("there.py", ["backend"], "exists already"), ("mine.py", ["backend", "refiner"], "holds one part"),
            ("nowhere/mine.py", ["backend"], "no folder nowhere")):
        with pytest.raises(UsageError, match=reason):
            write_plugin(target, kinds, Plugins())
    assert {path.name for path in tmp_path.iterdir()} == {"impq-there", "there.py"}
