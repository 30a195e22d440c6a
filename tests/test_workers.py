"""Runs with workers: the same numbers with any number of them."""

from __future__ import annotations

import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stopped import Dies, bytes_of, forwards, rows_of, same_rows, with_crew

from impq_core.config import RunConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.game.readings import parts_of
from impq_core.keys import versions
from impq_core.ledger import MeasurementLog
from impq_core.model.backward import BATCH_TOKENS
from impq_core.plugins import Plugins
from impq_core.runs.grid import Sweep
from impq_core.runs.orders import order_of, workers_of
from impq_core.runs.pipeline import resume, run
from impq_core.runs.points import extend_curve
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session
from impq_core.runs.sweep import run_sweep
from impq_core.testing.crew import InProcess
from impq_core.trust import NO_TRUST
from impq_core.worker import Worker

CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "spqe": ({"value": "kl", "game_windows": 2, "surrogate": "covariance"}, {"losses", "score", "variants"}),
    "gradients": ({"estimator": "aumann-shapley", "granularity": "group", "options": {}},
                  {"gradients", "score", "variants"}),
    "unquantized": ({"estimator": "isolated", "prefix": "unquantized", "bits": ("2", "3", "4"),
                     "options": {"backend": {"grid": "min-max"}}}, {"losses", "score", "variants"}),
    "traces": ({"estimator": "hawq", "backend": "quanto", "options": {}}, {"gradients", "score", "variants"}),
    "refined": ({"estimator": "isolated", "refiner": "evolve", "refine": 8, "options": {}},
                {"losses", "score", "variants"}),
    "tested": ({"estimator": "isolated", "fallback": "yes", "options": {}}, {"losses", "score", "variants"}),
    "in sequence": ({"estimator": "random", "sequential": "yes", "options": {}}, {"score", "variants"}),
    "another's": ({"estimate_with": "quanto", "options": {"estimate_with": {"group_size": 32}}},
                  {"losses", "score", "variants"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_same_with_any_number_of_workers(case: str, tiny_config: RunConfig, monkeypatch,
                                                      tmp_path: Path) -> None:
    changes, kinds = CASES[case]
    config = replace(tiny_config, tracking_uri="none", **changes)
    if case in ("traces", "gradients"):  # two tasks
        config = replace(config, calibration=replace(config.calibration, windows=18, length=256))
    monkeypatch.setenv("IMPQ_CACHE", str(tmp_path / "alone"))
    alone = run(replace(config, threads=1))
    for count in (1, 2, 3) if case == "spqe" else (2,):
        monkeypatch.setenv("IMPQ_CACHE", str(tmp_path / str(count)))
        InProcess.carried.clear()
        shared = run(replace(config, workers=f"inprocess://{count}"), with_crew())
        assert set(InProcess.carried) == kinds
        if case == "tested":  # two scores on the windows that are held back, beside those of the table
            assert len(rows_of(alone.folder)["held-back.jsonl"][1]) == 2
            assert InProcess.carried["score"] == len(rows_of(alone.folder)["scores.jsonl"][1]) + 2
        assert bytes_of(shared.folder) == bytes_of(alone.folder)
        assert same_rows(alone.folder, shared.folder)
        assert forwards(shared.folder) == forwards(alone.folder)


def test_a_killed_run_goes_on_with_any_number_of_workers(tiny_config: RunConfig, variants: None) -> None:
    """Half of the answers are in the logs when the workers go away; the rest is measured with others, or here."""
    config = replace(tiny_config, tracking_uri="none", options={"estimator": {"permutations": 8}}, backend="quanto")
    whole = run(replace(config, threads=1))
    for count in ("0", "inprocess://3"):
        found = with_crew()
        found.watch(Dies(3))
        with pytest.raises(ImpqError, match="gone"):
            run(replace(config, workers="dies://2"), found)
        [folder] = [path for path in Path(config.output).iterdir() if not (path / "evaluation.json").exists()]
        kept = rows_of(folder)["measurements.jsonl"][1]
        assert 0 < len(kept) < len(rows_of(whole.folder)["measurements.jsonl"][1])
        again = resume(folder, with_crew(), workers=count)
        assert bytes_of(again.folder) == bytes_of(whole.folder)
        assert rows_of(again.folder) == rows_of(whole.folder)
        assert set(kept) <= set(rows_of(again.folder)["measurements.jsonl"][1])


def test_a_sweep_shares_its_work(tiny_config: RunConfig, monkeypatch, tmp_path: Path) -> None:
    config = replace(tiny_config, tracking_uri="none", backend="quanto", options={})
    varied = {"estimator": ("isolated", "aumann-shapley"), "budget": ("2.5bits", "3bits")}
    found = []
    for workers in ("0", "inprocess://2"):
        monkeypatch.setenv("IMPQ_CACHE", str(tmp_path / f"cache{workers[-1]}"))
        InProcess.carried.clear()
        found.append(run_sweep(Sweep(replace(config, threads=1, workers=workers), varied), with_crew()))
    assert set(InProcess.carried) == {"variants", "losses", "gradients", "score"}
    alone, shared = ({path.name: bytes_of(path) for path in (folder / "runs").iterdir()} for folder in found)
    assert len(alone) == 4 and alone == shared


@pytest.mark.parametrize("estimator", ["isolated", "spqe"])
def test_further_points_of_a_curve_share_their_work(estimator: str, tiny_config: RunConfig, tmp_path: Path) -> None:
    config = replace(tiny_config, tracking_uri="none", backend="quanto", threads=1, estimator=estimator,
                     options={} if estimator == "isolated" else {"estimator": {"permutations": 4}})
    whole, found = run(replace(config, workers="inprocess://2"), with_crew()).folder, []
    for workers in ("0", "inprocess://2", ""):  # the last ones are those of the run
        folder = tmp_path / f"run{len(found)}"
        shutil.copytree(whole, folder)
        for path in Path(os.environ["IMPQ_CACHE"]).glob("variants/*/score-*"):
            path.unlink()
        InProcess.carried.clear()
        extend_curve(folder, ["2.5bits", "3.5bits"], plugins=with_crew(), workers=workers)
        assert set(InProcess.carried) == (set() if workers == "0" else {"score"})
        found.append({path.name: bytes_of(path) for path in (folder / "runs").iterdir()})
    assert len(found[0]) == 2 and found[0] == found[1] == found[2]


@pytest.mark.parametrize(("name", "change"), [
    ("code", lambda order: {"key": {**order["key"], "code": "0" * 16}}),
    ("torch", lambda order: {"key": json.loads(json.dumps(order["key"]).replace(versions()["torch"], "1.0"))}),
    ("model digest", lambda order: {"key": {**order["key"], "deployed": {
        **order["key"]["deployed"], "model_digest": "0" * 16}}}),
    ("device", lambda order: {"key": json.loads(json.dumps(order["key"]).replace('"cpu"', '"cuda NVIDIA H100"'))}),
    ("processor", lambda order: {"processor": "AVX9"}),
    ("none.safetensors", lambda order: {"config": {**order["config"], "model": "/none.safetensors"}}),
])
def test_a_worker_that_differs_refuses_in_one_line(name: str, change, tiny_config: RunConfig, variants: None) -> None:
    plugins = Plugins()
    prepared = prepare(replace(tiny_config, estimator="isolated", options={}), plugins)
    order = order_of(prepared, plugins, NO_TRUST)
    task = {"kind": "losses", "game": "estimate", "set": 0, "picks": [[0, 1, 0, 1]]}
    assert len(Worker().carry_out(order, task)["losses"][0]) == 4
    with pytest.raises(ImpqError) as refused:
        Worker().carry_out({**order, **change(order)}, task)
    assert name in str(refused.value) and "\n" not in str(refused.value) and socket.gethostname() in str(refused.value)


def test_a_worker_keeps_its_model_for_another_order(tiny_config: RunConfig, variants: None) -> None:
    plugins, worker, found = Plugins(), Worker(), []
    task = {"kind": "losses", "game": "estimate", "set": 0, "picks": [[0, 1, 0, 1]]}
    for value in ("nll", "kl", "nll"):
        prepared = prepare(replace(tiny_config, estimator="isolated", options={}, value=value), plugins)
        found.append(worker.carry_out(order_of(prepared, plugins, NO_TRUST), task)["losses"])
        assert found[-1] == Worker().carry_out(order_of(prepared, plugins, NO_TRUST), task)["losses"]
    assert found[0] == found[2] != found[1]


def test_tasks_are_whole_batches() -> None:
    """A batch decides the last bits of a gradient, so parts must not cut one."""
    for windows, length in ((64, 256), (5, 2048), (7, 48), (100, 300)):
        parts, batch = parts_of(windows, length), max(1, BATCH_TOKENS // length)
        assert [first for first, _ in parts] == [0, *(stop for _, stop in parts[:-1])] and parts[-1][1] == windows
        assert all(first % batch == 0 for first, _ in parts)


@pytest.mark.parametrize("words", ["two", "-1", "ray:/host", "//host:1", "1.5"])
def test_wrong_numbers_of_workers_are_refused(words: str) -> None:
    with pytest.raises(UsageError, match="workers"):
        RunConfig(workers=words)


def test_workers_are_not_asked_about_another_text_than_the_run_s(tiny_config: RunConfig, variants: None,
                                                               tmp_path: Path) -> None:
    plugins, found = with_crew(), []
    prepared = prepare(replace(tiny_config, workers="inprocess://2", threads=1), plugins)
    assert prepared.calibration is not None
    text, picks = prepared.calibration.part(1, 5), np.eye(len(prepared.game_space), dtype=np.int64)
    with workers_of(prepared.config, plugins, NO_TRUST) as share:
        for one in (share, None):
            session = Session(prepared, plugins, share=one)
            session.quantize_for_game()
            log = MeasurementLog(tmp_path / f"{len(found)}.jsonl", prepared.losses_key(prepared.game_space, text))
            found.append(session.game(log, session.probe(text=text), text).losses(picks))
            log.close()
    np.testing.assert_array_equal(*found)
