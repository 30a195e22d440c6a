"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from impq_core.ledger import MeasurementLog
from impq_core.testing import tiny_model

ROOT = Path(__file__).parents[1]


def impq(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "impq_core.cli", *arguments], cwd=cwd, capture_output=True, text=True,
                          timeout=300)


@pytest.fixture
def tiny_arguments(tiny_llama: Path, texts: tuple[Path, Path]) -> list[str]:
    return ["run", "--model", str(tiny_llama), "--calibration", str(texts[0]), "--evaluation", str(texts[1]),
            "--calibration-windows", "8", "--calibration-length", "48", "--game-windows", "4",
            "--evaluation-windows", "6", "--evaluation-length", "48", "-o", "clip_search=false"]


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["plugins", "--options"], ["run", "--help"],
                                       ["run", "--estimator", "spqq"]])
def test_cheap_commands_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    script = ("import sys\nfrom impq_core.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
              "print('HEAVY', sorted({'torch', 'mlflow', 'transformers', 'gptqmodel', 'pyomo'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert "HEAVY []" in done.stdout, done


BAD = [
    # arguments, exit code, what the line says
    (["rnu"], 2, "unknown command 'rnu' (did you mean 'run'?)"),
    (["run", "--estimater", "spqe"], 2, "--estimator"),
    (["run", "--estimator", "spqq"], 2, "unknown estimator 'spqq' (did you mean 'spqe'?)"),
    (["run", "--backend", "gtpq"], 2, "unknown backend 'gtpq' (did you mean 'gptq'?)"),
    (["run", "--export", "gtpq"], 2, "unknown exporter 'gtpq' (did you mean 'gptq'?)"),
    (["run", "--export", "gptq", "--backend", "hqq"], 1, "not of hqq"),
    (["run", "--export", "compressed-tensors"], 1, "run with -o symmetric=true"),
    (["fit", "./nowhere"], 1, "no run whose losses can be fitted"),
    (["fit", "./nowhere", "--surrogate", "regresion"], 2, "did you mean 'regression'"),
    (["export", "./nowhere", "gptq"], 1, "no run folder"),
    (["export", "./nowhere", "gtpq"], 2, "did you mean 'gptq'"),
    (["evaluate", "./nowhere"], 1, "no folder that impq exported"),
    (["run", "--estimate-with", "qanto"], 2, "unknown backend 'qanto' (did you mean 'quanto'?)"),
    (["run", "--estimate-with", "quanto", "--bits", "3,4"], 2, "backend 'quanto' has no 3 bits (it has: 2, 4, 8)"),
    (["run", "--estimate-with", "hqq", "-o", "group_size=32"], 2, "write backend.group_size or estimate_with."),
    (["run", "-o", "estimate_with.group_size=32"], 2, "this run has no 'estimate_with'"),
    (["tiny", "--estimate-with", "quanto", "--pin", "model.layers.0=3"], 2, "Quanto has no 3 bits"),
    (["run", "--refine", "-3"], 2, "refine is a number of forwards"),
    (["run", "--refine", "10", "--refiner", "swap"], 2, "unknown refiner 'swap' (did you mean 'swaps'?)"),
    (["run", "--refine", "10", "--game-windows", "40"], 2, "need 80 of them, not 64"),
    (["run", "-o", "moves=3"], 2, "none of the chosen parts has an option 'moves'"),
    (["run", "--surrogate", "covarianze"], 2, "did you mean 'covariance'"),
    (["run", "--allocator", "greedyish"], 2, "unknown allocator 'greedyish' (did you mean 'greedy'?)"),
    (["run", "-o", "permutation=3"], 2, "did you mean 'permutations'"),
    (["run", "-o", "permutations=ten"], 2, "takes int, not 'ten'"),
    (["run", "-o", "permutations=3"], 2, "must be even"),
    (["run", "-o", "permutations"], 2, "-o takes NAME=VALUE"),
    (["run", "-o", "group_size=17"], 2, "group_size must be"),
    (["run", "--time-limit", "0"], 2, "must be positive"),
    (["run", "--bits", "2,5"], 2, "has no 5 bits (it has: 2, 3, 4, 8)"),
    (["run", "--bits", "two"], 2, "--bits takes widths"),
    (["run", "--pin", "model.layers.0=four"], 2, "--pin takes PATTERN=WIDTH"),
    (["run", "--bits", "4"], 2, "at least two widths"),
    (["run", "--budget", "5bits"], 2, "2bits to 4bits"),
    (["run", "--budget", "lots"], 2, "write 3.0bits, 3.25bpw"),
    (["run", "--dtype", "float16"], 2, "did you mean 'bfloat16'"),
    (["run", "--value", "kld"], 2, "unknown value 'kld' (did you mean 'kl'?)"),
    (["run", "--granularity", "layer"], 2, "unknown granularity 'layer'"),
    (["run", "--config", "none.toml"], 2, "cannot read none.toml"),
    (["run", "--config", "typo.toml"], 2, "unknown key 'estimater' (did you mean 'estimator'?)"),
    (["run", "--plugin", "none.py"], 2, "plugin file none.py"),
    (["run", "--calibration-length", "1"], 2, "at least 1 window of 2 tokens"),
    (["run", "--game-windows", "65"], 2, "game_windows"),
    (["run", "--probe-windows", "65"], 2, "probe_windows must be 1 to the 64 calibration windows, or 0 for all"),
    (["run", "-o", "settle=-1"], 2, "settle and truncate must not be negative"),
    (["run", "--estimator", "coarse-to-fine", "-o", "share=0"], 2, "share must be above 0"),
    (["run", "--surrogate", "regression", "-o", "prior=nowhere.npz"], 1, "prior nowhere.npz is no estimate"),
    (["run", "--model", "./none"], 1, "model ./none: no such folder"),
    (["run", "--model", "hollow"], 1, "no .safetensors weights"),
    (["run", "--model", "pickled"], 1, "only pickled weights"),
    (["run", "--calibration", "none.txt"], 1, "text none.txt: no such file"),
    (["run", "--calibration", "empty.txt"], 1, "text empty.txt is empty"),
    (["run", "--evaluation", "paper.docx"], 2, "only .txt"),
    (["run", "--tracking-uri", "http://127.0.0.1:9"], 1, "does not answer"),
    (["run", "--tracking-uri", "sqlite:////nowhere/at/all.db"], 1, "missing or cannot be written"),
    (["run", "--tracking-uri", "./mlruns"], 1, "not understood"),
    (["ui"], 1, "there is no store"),
    # These need the model's shapes or its tokenizer, and still no weights:
    (["tiny", "--estimator", "isolated", "-o", "base=5"], 2, "base=5 is none of the widths played (4, 3, 2)"),
    (["tiny", "--granularity", "linear", "--allocator", "exhaustive"], 1, "make 2.29e+13 plans"),
    (["tiny", "--budget", "1GB"], 2, "outside what these widths can reach"),
    (["tiny", "--pin", "model.layer.0=4"], 2, "matches no layer (layers are called like model.layers.0)"),
    (["tiny", "--pin", "*.q_proj=4"], 2, "only part of layer model.layers.0: use a finer --granularity"),
    (["tiny", "--pin", "model.layers.0=5"], 2, "has no 5 bits"),
    (["tiny", "--pin", "*=4"], 2, "nothing is left to plan"),
    (["tiny", "--pin", "model.layers.0=4", "--exclude", "model.layers.?"], 2, "in two ways"),
    (["tiny", "--pin", "model.layers.[012]=8", "--budget", "2.5bits"], 2, "outside what these widths can reach"),
    (["tiny", "--exclude", "nothing*"], 2, "matches no layer"),
    (["tiny", "--budget", "9bpw"], 2, "bpw to"),
    (["tiny", "-o", "group_size=128"], 1, "does not divide the 64 inputs of model.layers.0.self_attn.q_proj"),
    (["tiny", "--calibration", "short.txt"], 1, "enough for 0 windows"),
    (["tiny", "--output", "/dev/null/x"], 1, "cannot be written"),
    (["tiny", "--plan", "none.json"], 1, "cannot read a plan"),
]


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, tiny_arguments: list[str]) -> None:
    (tmp_path / "typo.toml").write_text("estimater = 'spqe'")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text("{}")
    tiny_model(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    before = sorted(tmp_path.rglob("*"))
    for arguments, code, said in BAD:
        full = [*tiny_arguments, *arguments[1:]] if arguments[0] == "tiny" else arguments
        done = impq(*full, cwd=tmp_path)
        line = done.stderr.strip()
        assert done.returncode == code and said in line, (arguments, done)
        assert line.startswith("impq: ") and "\n" not in line and "Traceback" not in line, (arguments, line)
        assert sorted(tmp_path.rglob("*")) == before, arguments


def test_debug_shows_where(tmp_path: Path) -> None:
    assert "Traceback" in impq("run", "--estimator", "spqq", "--debug", cwd=tmp_path).stderr


def test_a_run_prints_its_table_and_takes_impq_toml(tmp_path: Path, tiny_arguments: list[str]) -> None:
    (tmp_path / "impq.toml").write_text("bits = [3, 4]\n[options.estimator]\npermutations = 4\n")
    done = impq(*tiny_arguments, "--backend", "auto-gptq", "--export", "recipe-auto-round", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("note: auto-gptq is archived") and len(done.stderr.strip().splitlines()) == 1
    for word in ("4/3 bits with auto-gptq", "uniform 3", "random 3", "full-model forwards", "look at it: impq ui"):
        assert word in done.stdout
    [recipe] = tmp_path.glob("impq-runs/*/recipe-auto-round/layer_config.json")
    assert '"bits": 3' in recipe.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"impq.toml", "impq-runs", "mlartifacts", "mlflow.db",
                                                          "mlflow.db.lock"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_is_killed_and_its_log_is_whole(number: signal.Signals, code: int, tmp_path: Path,
                                                      tiny_arguments: list[str]) -> None:
    deep = tiny_model(tmp_path / "deep", blocks=16)  # so many picks that the run cannot end by itself in time
    arguments = [*tiny_arguments, "--model", str(deep), "-o", "permutations=20000"]
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


def test_ui_serves_the_store(tmp_path: Path, tiny_arguments: list[str]) -> None:
    import socket
    import urllib.request

    assert impq(*tiny_arguments, "-o", "permutations=2", cwd=tmp_path).returncode == 0
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
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
