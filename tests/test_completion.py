"""Completion in a shell, as click gives it to the shell, and in bash itself."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from impq_core.cli import cli
from impq_core.plugins import Plugins


def completed(line: str) -> dict[str, str]:
    """The completions of a line, by value, with their types."""
    *words, last = line.split(" ")
    complete = ShellComplete(cli, {}, "impq", "_IMPQ_COMPLETE")
    return {item.value: item.type for item in complete.get_completions(words, last)}


@pytest.mark.parametrize(("line", "values"), [
    ("comp", {"compare"}),
    ("run --estimator sp", {"spqe"}),
    ("sweep --estimator isolated,sp", {"isolated,spqe"}),
    ("run --backend gp", {"gptq"}),
    ("run --estimate-with hq", {"hqq"}),
    ("run --export comp", {"compressed-tensors"}),
    ("run --refiner sw", {"swaps"}),
    ("fit finished --surrogate covar", {"covariance"}),
    ("run --estimator spqe -o perm", {"permutations="}),
    ("run --estimator spqe -o estimator.perm", {"estimator.permutations="}),
    ("run --backend hqq -o backend.g", {"backend.group_size="}),
    ("run -o perm", set()),  # the default estimator has no such option
    ("run --model de", {"demo"}),
    ("run --estimator nothing", set()),
    ("cache p", {"prune"}),
    ("run --quie", {"--quiet"})])
def test_names_are_completed(line: str, values: set[str]) -> None:
    assert set(completed(line)) == values


def test_every_name_of_a_role_is_offered() -> None:
    for role in ("estimator", "surrogate", "allocator", "backend"):
        assert set(completed(f"run --{role} ")) == set(Plugins().names(role))
    assert set(completed("export somewhere ")) == set(Plugins().names("exporter"))


def test_run_folders_are_offered_the_latest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert completed("show ") == {"": "dir"}
    for name in ("impq-runs/20260101-1", "impq-runs/20260102-2", "mine"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "impq.toml").touch()
    (tmp_path / "impq-runs" / "other").mkdir()
    latest = ["impq-runs/20260102-2", "impq-runs/20260101-1"]
    assert list(completed("show ")) == ["mine", *latest]
    for command in ("show", "fit", "allocate", "export", "evaluate", "compare", "run --resume"):
        assert list(completed(f"{command} impq-runs/2026")) == latest
    assert list(completed("compare mine impq-runs/20260101")) == latest[1:]
    assert completed("show x") == {"x": "dir"}


def test_a_broken_plugin_file_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("raise ValueError")
    assert set(completed("run --plugin broken.py --estimator sp")) == {"spqe"}


@pytest.fixture
def command(tmp_path: Path) -> dict[str, str]:
    """A folder with the command in it, as the first one of the path."""
    script = tmp_path / "bin" / "impq"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom impq_core.cli import main\ntry:\n    main()\nfinally:\n"
                      "    heavy = {'torch', 'mlflow', 'transformers', 'matplotlib'} & set(sys.modules)\n"
                      "    print('heavy', sorted(heavy), file=sys.stderr)\n")
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}"}


def test_the_documented_line_works_in_bash(command: dict[str, str], tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    words = shlex.split("impq run --estimator spqe --backend hq")
    script = ('eval "$(_IMPQ_COMPLETE=bash_source impq)"\n'
              f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}\n_impq_completion impq\n"
              'echo "${COMPREPLY[@]}"')
    done = subprocess.run([bash, "-c", script], env=command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "hqq\n", done
    assert done.stderr.splitlines()[-1] == "heavy []"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_and_answers(shell: str, command: dict[str, str]) -> None:
    source = {**command, "_IMPQ_COMPLETE": f"{shell}_source"}
    script = subprocess.run(["impq"], env=source, capture_output=True, text=True)
    assert f"_IMPQ_COMPLETE={shell}_complete" in script.stdout
    words = {"COMP_WORDS": "impq run --backend hq", "COMP_CWORD": "3" if shell == "zsh" else "hq"}
    answer = subprocess.run(["impq"], env={**command, **words, "_IMPQ_COMPLETE": f"{shell}_complete"},
                            capture_output=True, text=True)
    assert "hqq" in answer.stdout and "gptq" not in answer.stdout
