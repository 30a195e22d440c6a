"""Keys and statistics of the benchmarks whose rows are no ``PlanRow``, on planted rows with values made by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.results import Score
from impq_core.testing import planted_estimate
from impq_core.types import Plan

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # its scripts import each other as neighbours

import bits_saved
import llama_cpp
import memory
import peers
import peers_anchor
import peers_environment
import peers_report
import quantizers
import tokens
import within
from keyed import Keyed
from uniform_line import line


def test_the_line_is_drawn_between_neighbours_and_refused_outside() -> None:
    sizes, losses = [200, 100, 150], [[1.0, 3.0], [5.0, 4.0], [2.0, 8.0]]
    for size, expected in ((100, [5.0, 4.0]), (125, [3.5, 6.0]), (150, [2.0, 8.0]), (160, [1.8, 7.0])):
        np.testing.assert_allclose(line(sizes, losses, size), expected)
    for outside in (99.9, 200.1):
        with pytest.raises(ImpqError):
            line(sizes, losses, outside)
    with pytest.raises(ImpqError):
        line([], [], 100)


def test_rows_of_another_key_are_kept_but_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first, other = Keyed(path, {"windows": (8, 16)}), Keyed(path, {"windows": (8, 24)})
    first.add(name="a", sizes=(1, 2))
    other.add(name="b")
    assert [row["name"] for row in Keyed(path, {"windows": [8, 16]}).rows()] == ["a"]
    assert [row["name"] for row in Keyed(path, {"windows": [8, 24]}).rows()] == ["b"]
    assert first.rows(name="a", sizes=(1, 2)) == first.rows() and not first.rows(name="b")
    assert len(path.read_text().splitlines()) == 2


PLANTED: dict[str, Any] = {
    "backend": "gptq", "weights": 1000, "text": "a text",
    "uniform": [{"name": "uniform 2", "bytes": 100, "windows": [4.0, 6.0]},
                {"name": "uniform 4", "bytes": 200, "windows": [2.0, 2.0]}],
    "plans": [{"budget": 2.5, "bytes": 120, "windows": [3.0, 3.2]},
              {"budget": 3.0, "bytes": 150, "windows": [1.0, 2.0]},
              {"budget": 3.5, "bytes": 180, "windows": [9.0, 9.0]}]}


def test_the_size_at_a_plans_loss_and_its_error() -> None:
    """The line falls from 5 to 2 over 100 bytes; the plan's 3.1 is met at 163.3 bytes, where the line has 2.733 and
    3.467: it is apart by -0.267 and 0.267, an error of 0.267 nats, or 8.89 bytes."""
    found = bits_saved.equal_loss(PLANTED, PLANTED["plans"][0])
    assert found is not None
    assert found.nbytes == pytest.approx(100 + 190 / 3)
    assert found.saved == pytest.approx(1 - 120 / (490 / 3))
    stderr = 4 / 15 / (3 / 100)
    assert found.saved_stderr == pytest.approx(120 / (490 / 3) ** 2 * stderr)
    assert [bits_saved.equal_loss(PLANTED, plan) for plan in PLANTED["plans"][1:]] == [None, None]


def test_the_page_of_saved_bits() -> None:
    given = Namespace(model="demo", estimator="fisher", calibration_windows=1)
    lines = bits_saved.report([PLANTED, {**PLANTED, "backend": "hqq"}], given)
    first, *beyond = [line for line in lines if line.startswith("| gptq")]
    assert first.endswith("| 26.5 ± 4.0 % | 0.35 |")
    assert all("beyond the line" in line for line in beyond)
    # At 120 bytes the line has 3.6 and 5.2.
    assert "-1.300 ± 0.700" in first
    assert [line.split(" | ")[4] for line in lines if line.startswith("| hqq | uniform")] == [
        "+0.000 ± 0.000", "+0.000 ± 0.000"]


def test_models_are_compared_with_gptqs_of_their_size() -> None:
    def result(name: str, bits: float, *nll: float) -> within.Result:
        return within.Result(name, "a text", bits, 1.0, Score(np.array(nll), 0.1, 0.9))

    done = [result("gptq 2", 2.0, 4.0, 6.0), result("gptq 4", 4.0, 2.0, 2.0), result("cmpq 2.5", 2.5, 3.0, 4.0),
            result("cmpq 5", 5.0, 1.0, 1.0), result(within.UNQUANTIZED, 16.0, 1.0, 1.0)]
    cells = {line.split(" | ")[0]: line.split(" | ")[6] for line in within.report(done) if line.startswith("| ")}
    assert cells["| cmpq 2.5"] == "-0.750 ± 0.250"
    assert cells["| cmpq 5"] == cells["| gptq 2"] == ""


def test_options_of_gptq_are_rows_by_their_options_not_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["demo text", "mine.txt"]

    def log(*names: str) -> Keyed:
        return Keyed(tmp_path / "rows.jsonl", {"texts": dict.fromkeys(names, "digest")})

    def scores(*nll: float) -> dict[str, Any]:
        return {text: {"windows": [value, value + 1], "kl": 0.5} for text, value in zip(texts, nll, strict=False)}

    first, other = quantizers.Setting("first", {"damping": 0.01}), quantizers.Setting("other", {"damping": 0.2})
    rows = log(*texts)
    rows.add(unquantized=True, scores=scores(2.0, 3.0))
    measured = {"width": "3", "seconds": 1.0, "bytes": 100, "weights": 200}
    rows.add(**other.facts, **measured, scores=scores(4.0, 6.0))
    rows.add(**first.facts, **measured, scores=scores(3.0, 7.0))
    log("demo text").add(unquantized=True, scores=scores(9.0))
    given = Namespace(model="demo", calibration_windows=1, evaluation_windows=2)
    monkeypatch.setattr(quantizers, "SETTINGS", (first, quantizers.Setting("renamed", other.options)))
    page = [line for line in quantizers._report(rows, given, texts, {}) if line.startswith("| ")]
    assert page[1:] == ["| first | 3.500 (+1.000) |  | 0.500 | 7.500 (+4.000) |  | 0.500 | 1 |",
                        "| renamed | 4.500 (+2.000) | +1.000 ± 0.000 | 0.500 | 6.500 (+3.000) | -1.000 ± 0.000 | 0.500 "
                        "| 1 |"]
    assert not log("demo text").rows(**first.facts)  # on one text, all is measured anew
    assert not rows.rows(**quantizers.Setting("first").facts)


def test_the_table_of_tokens_is_of_one_key(tmp_path: Path) -> None:
    facts = {"estimator": "guided-output", "windows": 4, "form": "feasible", "budget": 3.0, "kl": 0.5}
    for text, windows in (("a", 2), ("b", 3)):
        for draw in range(2):
            Keyed(tmp_path / "rows.jsonl", {"evaluation": text}).add(
                **facts, draw=draw, nll=[2.0 + draw, 4.0, 1.0][:windows], line=[3.0, 3.0, 3.0][:windows])
    rows = Keyed(tmp_path / "rows.jsonl", {"evaluation": "a"}).rows()
    [found] = [line for line in tokens.held_out(rows, [4, 8])]
    assert found == ["guided-output", "feasible", "3", "4", "2", "3.250", "+0.250 ± 0.750", "0.500"]


SPACE = planted_estimate(0, 2, (4, 2)).space
SCORE = Score(np.array([1.0, 2.0]), 0.1, 0.9, window_kl=np.array([0.1, 0.2]))


def stub(folder: Path) -> Any:
    """What ``peers.py`` asks of a model, with the same score for every plan."""
    text = Namespace(digest="text", ids=np.zeros((1, 4), np.int64))
    session = Namespace(runner=[0, 1], bank=Namespace(apply=lambda choices: None))
    prepared = Namespace(space=SPACE, evaluation="a text", calibration=text, source=Namespace(folder=folder),
                         parts=Namespace(backend=Namespace(nbytes=lambda linear, choice: 10)))
    bench = Namespace(prepared=prepared, session=session, evaluator=None, score=lambda plan: SCORE,
                      estimate=lambda config: (Namespace(forwards=1.0), None))
    bench.at = lambda config: bench
    return bench


def test_another_version_of_a_tool_is_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(SPACE, pick := SPACE.uniform(1), SPACE.bytes_of(pick))
    facts = {"passes": 1.0, "seconds": 1.0}
    given = Namespace(budgets="3", granularities="linear", estimators="fisher")
    evaluator = Namespace(score=lambda choices: SCORE)
    monkeypatch.setattr(peers, "ours_at", lambda *_: plan)
    rows: list[dict[str, Any]] = []
    models = 1 + len(SPACE.choices)
    for version, new in (("1.0", models + 3), ("1.0", 0), ("2.0", 2)):
        monkeypatch.setattr(peers, "plans_of", lambda *_, version=version: [(3.0, version, plan, facts)])
        bench = stub(tmp_path)
        bench.evaluator = evaluator
        found = list(peers.plan_rows(bench, RunConfig(), given, peers.PEERS[:1], tmp_path, {}, rows))
        assert len(found) == new
        rows += found
    name = peers.PEERS[0].name
    assert [(row["method"], row["at"]) for row in found] == [(name, ""), ("impq fisher", name)]
    page = peers_report.plan_table(rows, "linear", 3.0, "fisher")
    assert [line.split(" | ")[0] for line in page[2:-1]] == [f"| {name} 1.0", "| impq fisher", f"| {name} 2.0"]


def test_a_measured_anchor_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_anchor, "ask", lambda *_: {"version": "1.0", "weights": "absent"})
    given = Namespace(anchor="2", anchor_blocks=1, anchor_steps=9, backend="gptq", bits="2,4")
    done = [{"granularity": "anchor, 1 of 2 blocks", "budget": 2.0, "method": method}
            for method in ("impq gptq", "auto-round 1.0, 9 steps")]
    assert not list(peers_anchor.anchor_rows(stub(tmp_path), given, tmp_path, {}, done))
    given.anchor_steps = 8
    with pytest.raises(OSError, match="absent"):
        list(peers_anchor.anchor_rows(stub(tmp_path), given, tmp_path, {}, done))


def test_the_seconds_of_a_tool_contain_its_imports(tmp_path: Path) -> None:
    script, job = tmp_path / "script.py", tmp_path / "job.json"
    script.write_text("import time\nwhile time.process_time() < 0.4:\n    pass\nfrom job import run\n"
                      "run('numpy', lambda job: {})\n")
    job.write_text(json.dumps({"answer": str(tmp_path / "answer.json")}))
    subprocess.run([sys.executable, str(script), str(job)], check=True,
                   env={**os.environ, "PYTHONPATH": str(peers_environment.SCRIPTS)})
    assert json.loads((tmp_path / "answer.json").read_text())["processor_seconds"] >= 0.4


@pytest.mark.parametrize(("words", "page"), [
    ([], "llama_cpp.md"), (["--model", "/models/mine"], "llama_cpp-mine.md"),
    (["--model", "demo", "--model", "/models/mine"], "llama_cpp.md"), (["--output", "other.md"], "other.md"),
])
def test_the_page_of_another_model_is_named_after_it(words: list[str], page: str, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(sys, "argv", ["llama_cpp.py", *words])
    monkeypatch.setattr(llama_cpp, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(llama_cpp, "locate_model", lambda name: Namespace(folder=tmp_path))
    monkeypatch.setattr(llama_cpp, "widen", lambda *_: None)
    monkeypatch.setattr(llama_cpp, "report", lambda *_: [])
    monkeypatch.setattr(llama_cpp, "write", lambda name, lines: written.append(name))
    llama_cpp.main()
    assert set(written) == {page}


def test_both_versions_get_the_same_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], **given: Any) -> None:
        asked.append((command[command.index("--model"):], given["env"]["PYTHONPATH"]))
        Path(command[command.index("--measure") + 1]).write_text("{}")

    monkeypatch.setattr(subprocess, "run", run)
    case = memory.Case("demo", ("--memory", "3GB"))
    for code in (memory.CODE, tmp_path / "other"):
        memory.readings_of(case, code, tmp_path)
    (ours, here), (theirs, there) = asked
    assert ours[:2] == theirs[:2] and ours[4:] == theirs[4:] == ["--memory", "3GB"]
    assert here != there
