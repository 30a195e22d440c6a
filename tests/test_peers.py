"""Plans of other tools in benchmarks/peers.py: what they put out is read as widths, and scored beside impq's plans."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impq_core.errors import ImpqError, UsageError
from impq_core.testing import made_text, tiny_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # its scripts import each other as a script's neighbours

import peers  # noqa: E402
import peers_environment as environment  # noqa: E402
import peers_reading as reading  # noqa: E402
import peers_report  # noqa: E402

BLOCK = "model.layers.0"
LINEARS = [f"{BLOCK}.self_attn.q_proj", f"{BLOCK}.self_attn.k_proj", f"{BLOCK}.mlp.down_proj"]
WANTED = dict(zip(LINEARS, (2, 2, 4), strict=True))


def hook(name: str) -> str:
    return f"__nncf_hooks.post_hooks.{name.replace('.', ':')}:weight__0.0"


@pytest.mark.parametrize(("read", "raw"), [
    (reading.of_autoscheme, {name: {"bits": bits, "group_size": 64, "sym": False} for name, bits in WANTED.items()}),
    (reading.of_modelopt, [{"modules": LINEARS[:2], "bits": 2.0}, {"modules": LINEARS[2:], "bits": 4.0}]),
    (reading.of_nncf, {hook("model.embed_tokens"): "INT8AsymmetricWeightsDecompressor",
                       hook(LINEARS[0]): "INT4AsymmetricWeightsDecompressor",
                       hook(LINEARS[1]): "INT4SymmetricWeightsDecompressor",
                       hook(LINEARS[2]): "INT8AsymmetricWeightsDecompressor"}),
    (reading.of_threshold, {LINEARS[0]: -0.5, LINEARS[1]: 0.1, LINEARS[2]: 0.3}),
])
def test_the_widths_of_every_peer_are_read(read: Any, raw: Any) -> None:
    found = read(raw, linears=LINEARS, widths=[2, 3, 4], budget=3.0, sizes=dict.fromkeys(LINEARS, 64))
    assert reading.checked(found, LINEARS, [2, 3, 4], "peer") == WANTED


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 9)), min_size=1, max_size=7), st.floats(2.0, 4.0))
def test_the_threshold_is_the_smallest_within_the_budget(layers: list[tuple[int, int]], budget: float) -> None:
    names = [str(number) for number in range(len(layers))]
    scores, sizes = (dict(zip(names, values, strict=True)) for values in zip(*layers, strict=True))
    within = {}
    for threshold in sorted({*scores.values(), max(scores.values()) + 1}):
        widths = {name: 4 if scores[name] >= threshold else 2 for name in names}
        if sum(sizes[name] * widths[name] for name in names) <= budget * sum(sizes.values()):
            within[threshold] = widths
    assert reading.of_threshold(scores, sizes=sizes, widths=[2, 3, 4], budget=budget) == within[min(within)]


@pytest.mark.parametrize(("found", "named"), [
    ({name: 2 for name in LINEARS[:2]}, LINEARS[2]),
    ({**WANTED, "lm_head": 4}, "lm_head"),
    ({**WANTED, LINEARS[0]: 8}, "8 bits"),
])
def test_widths_that_are_no_plan_are_refused(found: reading.Widths, named: str) -> None:
    with pytest.raises(ImpqError, match=named):
        reading.checked(found, LINEARS, [2, 3, 4], "ModelOpt")


def test_a_decompressor_of_neither_width_is_refused() -> None:
    with pytest.raises(ImpqError, match=r"q_proj.*FP8Decompressor"):
        reading.of_nncf({hook(LINEARS[0]): "FP8Decompressor"}, linears=LINEARS, widths=[2, 4])


def test_every_peer_has_its_script() -> None:
    for script in (*(peer.script for peer in environment.PEERS), "rounding.py", "job.py"):
        compile((environment.SCRIPTS / script).read_text(), script, "exec")


def test_names_that_are_wrong_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="autoscheme"):
        peers.peer_named("autoschema")
    for text in ("nncf", f"nncf={tmp_path}", "ncf=" + sys.executable):
        with pytest.raises(UsageError):
            peers.interpreters([text])
    assert peers.interpreters([f"nncf={sys.executable}"]) == {"nncf": Path(sys.executable)}


def test_a_script_answers_once_and_its_failure_names_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    monkeypatch.setattr(environment, "SCRIPTS", scripts)
    (scripts / "job.py").write_text((BENCHMARKS / "peers_inside" / "job.py").read_text())
    script = scripts / "count.py"
    script.write_text("from job import run\nprint('asked')\n"
                      "run('numpy', lambda job: {'raw': job['budgets'], 'cost': {}})\n")
    peer = environment.PEERS[0]
    for _ in range(2):
        answer = environment.ask(peer, "count.py", {"budgets": [3.0]}, tmp_path / "kept", Path(sys.executable))
        assert answer["raw"] == [3.0] and answer["version"] == np.__version__ and answer["processor_seconds"] >= 0
        script.write_text("raise SystemExit('out of memory')\n")  # nobody asks again
    with pytest.raises(ImpqError, match=r"out of memory.*count-\w+\.log"):
        environment.ask(peer, "count.py", {"budgets": [2.5]}, tmp_path / "kept", Path(sys.executable))


def test_an_environment_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "first\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", failed)
    with pytest.raises(ImpqError, match=r"NNCF.*No matching distribution"):
        environment.python_of(environment.PEERS[2])


FAKE = """
from job import run

def ask(job):
    names = [name for name in job["linears"] if not any(name in group for group in job["tied"])]
    widths = dict.fromkeys(job["linears"], job["widths"][1])
    widths.update(dict.fromkeys(names[::2], job["widths"][0]))
    return {"raw": {str(budget): {name: {"bits": bits} for name, bits in widths.items()} for budget in job["budgets"]},
            "cost": {"forwards": 3, "backwards": 2}}

run("numpy", ask)
"""


def test_plans_are_scored_beside_impq_at_their_bytes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tool of two widths in place of the peers, a tiny model, and impq's plans from weights alone."""
    scripts, model = tmp_path / "scripts", tiny_model(tmp_path / "model", blocks=2)
    scripts.mkdir()
    (scripts / "job.py").write_text((BENCHMARKS / "peers_inside" / "job.py").read_text())
    (scripts / "fake_search.py").write_text(FAKE)
    monkeypatch.setattr(environment, "SCRIPTS", scripts)
    monkeypatch.setattr(peers, "PEERS", (environment.Peer("Fake", (), "fake_search.py", reading.of_autoscheme, None),))
    monkeypatch.setattr(peers, "KEPT", tmp_path / "kept")
    reports: list[list[str]] = []
    monkeypatch.setattr(peers, "write", lambda name, lines: reports.append(lines))
    for name, seed in (("calibration", 0), ("evaluation", 1)):
        (tmp_path / f"{name}.txt").write_text(made_text(seed, 3000))
    command = ["peers.py", "--model", str(model), "--backend", "hqq", "--peers", "fake", "--windows", "2",
               "--calibration-windows", "8", "--evaluation-windows", "3", "--length", "32",
               "--calibration", str(tmp_path / "calibration.txt"), "--evaluation", str(tmp_path / "evaluation.txt"),
               "--python", f"fake={sys.executable}"]
    monkeypatch.setattr(sys, "argv", command)
    peers.main()
    log = tmp_path / "kept" / "peers.jsonl"
    rows = list(map(json.loads, log.read_text().splitlines()))
    fakes = [row for row in rows if row["method"] == "Fake"]
    assert {(row["granularity"], row["budget"]) for row in fakes} == set(product(("linear", "group"), (2.5, 3.0)))
    ours = [row for row in rows if row["at"] == "Fake"]
    assert len(ours) == len(fakes)
    for fake in fakes:
        assert fake["passes"] == 7
        pair = next(row for row in ours if (row["granularity"], row["budget"]) == (fake["granularity"], fake["budget"]))
        assert pair["bytes"] <= fake["bytes"]
        plan = json.loads((tmp_path / "kept" / "peers" / model.name / f"fake-{fake['granularity']}-"
                           f"{fake['budget']:g}.plan.json").read_text())
        assert plan["bytes"] == fake["bytes"] and set(plan["layers"]) >= {LINEARS[0]}
        expected = np.mean(np.array(fake["nll"]) - np.array(pair["nll"]))
        assert any(f"{expected:+.3f}" in line for line in reports[0] if line.startswith("| Fake"))
    peers.main()
    assert log.read_text().splitlines() == [json.dumps(row) for row in rows]  # nothing is measured again
    assert reports[1][4:] == reports[0][4:]


def test_the_line_goes_through_the_uniform_models() -> None:
    rows = [{"method": f"uniform {bits}", "bytes": 100 * bits, "nll": [8.0 / bits, 1.0]} for bits in (4, 2)]
    assert peers_report.line_at(rows, 300).tolist() == [3.0, 1.0]
    assert peers_report.line_at(rows, 200).tolist() == [4.0, 1.0]
