"""The smoke run on an accelerator: its exit code and its answers, with processes of planted results."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from impq_core.errors import ImpqError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # its scripts import each other as neighbours

import gpu
import gpu_report
import gpu_steps

RIGHT = {"ok": True, "seconds": 1.0}


def planted(monkeypatch: pytest.MonkeyPatch, answers: Mapping[str, Any]) -> None:
    """Let a step write an answer and return a code, or take too long."""
    def run(command: list[str], **_: Any) -> Any:
        name, out = command[command.index("--step") + 1], Path(command[command.index("--out") + 1])
        answer, code = answers.get(name, (RIGHT, 0))
        if answer is not None:
            (out / f"{name}.json").write_text(json.dumps(answer))
        if code is None:
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize(("answer", "code", "expected", "error"), [
    (RIGHT, 0, 0, ""), ({"ok": False, "seconds": 1.0}, 0, 1, ""),
    ({"ok": False, "error": "KeyError: x", "seconds": 1.0}, 0, 1, "KeyError: x"),
    (None, -9, 1, "exit code -9"), (RIGHT, -11, 1, "exit code -11"), (None, None, 1, "not done after 200 s"),
    (None, 0, 1, "exit code 0"),
])
def test_the_exit_code_is_zero_only_if_every_step_is_right(
        answer: Any, code: int | None, expected: int, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "losses.json").write_text(json.dumps({**RIGHT, "earlier": True}))
    planted(monkeypatch, {"losses": (answer, code)})
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == expected
    kept = json.loads((tmp_path / "losses.json").read_text())
    assert "earlier" not in kept and error in kept.get("error", "") and kept["ok"] == (not expected)
    state = "done" if not expected else "FAILED" if error else "WRONG"
    assert f"losses: {state}" in capsys.readouterr().out


def test_an_unknown_step_is_refused_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--steps", "plans,looses"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "'looses'" in line and "'losses'" in line


def test_some_steps_alone_name_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, {})
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--steps", "losses"]) == 0
    assert {path.name for path in tmp_path.glob("*.json")} == {"machine.json", "losses.json"}


@pytest.mark.parametrize("machine", [None, {"error": "broken", "ok": False}])
def test_a_report_without_a_machine_is_refused(machine: Any, tmp_path: Path) -> None:
    if machine:
        (tmp_path / "machine.json").write_text(json.dumps(machine))
    with pytest.raises(ImpqError, match="machine"):
        gpu_report.report(tmp_path)
    assert gpu.main(["--report", "--out", str(tmp_path)]) == 1


def test_a_step_that_fails_answers_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("no such kernel")

    monkeypatch.setattr(gpu, "STEPS", {"plans": gpu.Step(broken, 9)})
    assert gpu.main(["--out", str(tmp_path), "--steps", "plans", "--step", "plans"]) == 0
    answer = json.loads((tmp_path / "plans.json").read_text())
    assert answer["error"] == "ValueError: no such kernel" and not answer["ok"] and answer["seconds"] >= 0


@pytest.mark.parametrize(("changed", "right"), [
    ({}, True), ({"bytes_equal": False}, False), ({"losses_apart": 2e-3}, False), ({"unpacked_apart": 2e-3}, False),
    ({"backend": "hqq", "losses_apart": 5e-3}, True), ({"backend": "hqq", "losses_apart": 5e-2}, False),
    ({"losses_apart": float("nan")}, False), ({"plans_equal": False}, True),
])
def test_losses_on_two_devices_are_near(changed: dict[str, Any], right: bool) -> None:
    row = {"backend": "gptq", "bytes_equal": True, "losses_apart": 1e-6, "unpacked_apart": 0.0, "plans_equal": True}
    assert gpu_steps.near({**row, **changed}) is right


@pytest.mark.parametrize(("step", "code"), [("suites", 0), ("suites", 1), ("commands", 0), ("commands", 3)])
def test_suites_and_commands_are_right_if_all_exit_with_zero(step: str, code: int, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    codes = iter([code])  # the others exit with 0

    def run(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, next(codes, 0), "1 passed", "a line")

    monkeypatch.setattr(subprocess, "run", run)
    assert getattr(gpu_steps, step)("cpu", True, tmp_path)["ok"] is (code == 0)


@pytest.mark.parametrize("changed", ["", "first", "second", "killed"])
def test_runs_are_repeated_if_every_bit_is_the_same(changed: str, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "_run", lambda words, place: place)
    monkeypatch.setattr(gpu_steps, "_killed", lambda words, place: (place, 3))
    monkeypatch.setattr(gpu_steps, "_results", lambda place: {
        "plan": place.suffix.encode() if place.name == f"hawq-auto.{changed}" else b"same"})
    found = gpu_steps.repeat("cpu", True, tmp_path)
    assert found["ok"] is (not changed)
    assert len(found["rows"]) == 4
