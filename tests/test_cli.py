"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from apart import HEAVY, loaded_after

from impq_core.ledger import MeasurementLog
from impq_core.testing import tiny_model

ROOT = Path(__file__).parents[1]


def impq(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "impq_core.cli", *arguments], cwd=cwd, capture_output=True, text=True,
                          timeout=300)


@pytest.fixture
def tiny_arguments(tiny_llama: Path, texts: tuple[Path, Path]) -> list[str]:
    return ["run", "--estimator", "spqe", "--granularity", "block", "--model", str(tiny_llama),
            "--calibration", str(texts[0]), "--evaluation", str(texts[1]),
            "--calibration-windows", "8", "--calibration-length", "48", "--game-windows", "4",
            "--evaluation-windows", "6", "--evaluation-length", "48", "--dtype", "float32"]


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["plugins", "--options"], ["run", "--help"],
                                       ["run", "--estimator", "spqq"]])
def test_cheap_commands_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    script = "from impq_core.cli import main\nmain(sys.argv[1:])"
    assert loaded_after(script, (*HEAVY, "gptqmodel", "pyomo"), tmp_path, *arguments) == []


def test_debug_shows_where(tmp_path: Path) -> None:
    assert "Traceback" in impq("run", "--estimator", "spqq", "--debug", cwd=tmp_path).stderr


def test_a_run_prints_its_table_and_takes_impq_toml(tmp_path: Path, tiny_arguments: list[str]) -> None:
    (tmp_path / "impq.toml").write_text("bits = [3, 4]\n[options.backend]\ngrid = \"min-max\"\n"
                                        "[options.estimator]\npermutations = 4\n")
    # Divergence, because narrower widths may lower the loss of a random model, which is a further warning.
    done = impq(*tiny_arguments, "--backend", "auto-gptq", "--value", "kl", "--export", "recipe-auto-round",
                cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("note: auto-gptq is archived") and len(done.stderr.strip().splitlines()) == 1
    for word in ("4/3 bits with auto-gptq", "uniform 3", "random 3", "full-model forwards", "look at it: impq ui"):
        assert word in done.stdout
    [recipe] = tmp_path.glob("impq-runs/*/recipe-auto-round/layer_config.json")
    assert '"bits": 3' in recipe.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"impq.toml", "impq-runs", "mlartifacts",
                                                          "mlflow.db", "mlflow.db.lock"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_is_killed_and_its_log_is_whole(number: signal.Signals, code: int, tmp_path: Path,
                                                      tiny_arguments: list[str],
                                                      empty_store: Callable[[Path], None]) -> None:
    deep = tiny_model(tmp_path / "deep", blocks=16)  # so many picks that the run cannot end by itself in time
    arguments = [*tiny_arguments, "--model", str(deep), "--backend", "quanto", "-o", "permutations=20000"]
    empty_store(tmp_path / "mlflow.db")
    # A job in the background of a script inherits an ignored SIGINT; the run under test must not.
    process = subprocess.Popen([sys.executable, "-m", "impq_core.cli", *arguments], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None)
    try:
        deadline = time.monotonic() + 240
        while True:
            logs = list(tmp_path.glob("impq-runs/*/measurements.jsonl"))
            if logs and logs[0].read_text().count("\n") > 30:
                break
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code and err.strip().endswith("impq: stopped"), err
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        assert store.execute("select status from runs").fetchall() == [("KILLED",)], err
    text = logs[0].read_text()
    assert text.endswith("\n") and len(MeasurementLog.read(logs[0])[1]) == text.count("\n") - 1


def test_a_stop_that_a_library_turned_into_an_error_of_its_own_is_a_stop(tmp_path: Path, tiny_arguments: list[str],
                                                                         empty_store: Callable[[Path], None]) -> None:
    """As torch and safetensors do: C code that calls Python may clear its exception and raise another."""
    (tmp_path / "mine.py").write_text("""
import os, signal
from impq_core.hookspecs import Component, hookimpl
from impq_core.interfaces import Inspector
@hookimpl
def impq_estimators():
    return [Component("theirs", f"{__name__}:Theirs", "a part")]
class Theirs(Inspector):
    def inspect(self, probe, rng):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None
""")
    empty_store(tmp_path / "mlflow.db")
    stopped = impq(*tiny_arguments, "--plugin", "mine.py", "--estimator", "theirs", cwd=tmp_path)
    assert stopped.returncode == 143 and stopped.stderr.strip().endswith("impq: stopped"), stopped
    [kept] = tmp_path.glob("impq-runs/*/error.txt")
    assert "could not determine" in kept.read_text() and kept.read_text().strip().endswith("Terminated")
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        assert store.execute("select status from runs").fetchall() == [("KILLED",)]


def test_ui_serves_the_store(tmp_path: Path, empty_store: Callable[[Path], None]) -> None:
    import socket
    import urllib.request

    empty_store(tmp_path / "mlflow.db")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "impq_core.cli", "ui", "--port", str(port)], cwd=tmp_path,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.read() == b"OK"
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(1)
    finally:
        os.killpg(server.pid, signal.SIGKILL)


def test_the_readme_and_ci_agree() -> None:
    readme = (ROOT / "README.md").read_text()
    [main] = re.findall(r"<!-- main command -->\n```bash\n(.+)\n```", readme)
    [test] = re.findall(r"<!-- test command -->\n```bash\n(.+)\n```", readme)
    assert main.endswith("impq run --estimator spqe --backend gptq") and "tox" in test
    ci = ROOT / ".ci" / "run"
    before, runs, after = ci.read_text().partition('bash -c "$command"\n')
    assert runs and not after
    done = subprocess.run(["bash", "-c", before, ci], capture_output=True, text=True)  # prints what it would run
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{test}\n", "")
