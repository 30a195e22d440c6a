"""The steps of ``gpu.py``. Each takes the name of a device, whether shapes are small, and a folder; it returns what is
written as JSON, with ``ok``: whether it is right."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import torch
from common import PACKAGES
from gpu_blocks import block, memory

from impq_core.budget import Budget
from impq_core.config import RunConfig, TextConfig
from impq_core.interfaces import Allocator, Sampler, Surrogate
from impq_core.model.demo import demo_path
from impq_core.model.device import hardware, resolve_device
from impq_core.model.source import locate_model
from impq_core.plugins import Plugins
from impq_core.runs.pipeline import run
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session
from impq_core.space import IntArray
from impq_core.testing import PlantedGame, planted_estimate, tiny_model

__all__ = ["block", "commands", "losses", "machine", "memory", "plans", "repeat", "suites"]

MENUS: Mapping[str, tuple[str, ...]] = {"gptq": ("2", "3", "4"), "hqq": ("2", "3", "4"), "quanto": ("2", "4", "8")}
QUANTIZED = 2
"""Blocks of the real model that are quantized."""

RTOL: Mapping[str, float] = {"gptq": 1e-3, "hqq": 2e-2, "quanto": 1e-3}
"""Of losses on two devices, float32, by backend. HQQ iterates on sums that devices make in other orders, so that a few
percent of its codes differ."""

TESTS = Path(__file__).parents[1] / "tests"
IMPQ = (sys.executable, "-m", "impq_core.cli")
RUN = ("--calibration-windows", "8", "--calibration-length", "64", "--game-windows", "4", "--evaluation-windows", "4",
       "--evaluation-length", "64", "--tracking-uri", "none")


def machine(device: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Versions and hardware."""
    found = resolve_device(device)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"hardware": hardware(found), "cores": os.cpu_count(), "date": str(date.today()), "versions": versions,
            "python": sys.version.split()[0], "cuda": torch.version.cuda, "ok": True}


def texts(folder: Path) -> tuple[Path, Path]:
    """A calibration and an evaluation text, of the standard library's documentation."""
    text = "\n".join(topics.topics.values())
    paths = folder / "calibration.txt", folder / "evaluation.txt"
    for path, part in zip(paths, (text[:len(text) // 2], text[len(text) // 2:]), strict=True):
        path.write_text(part)
    return paths


def plans(device: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Plans of a planted game whose losses are computed on either device."""
    truth = planted_estimate(0, 24, (4, 2), strength=0.05, rising=True)
    plugins = Plugins()
    sampler, surrogate, allocator = (plugins.load(role, name, kind) for role, name, kind in (
        ("estimator", "spqe", Sampler), ("surrogate", "regression", Surrogate), ("allocator", "qp", Allocator)))
    picks, found = [], []
    for where in (torch.device("cpu"), resolve_device(device)):
        game = PlantedGame(truth.space, _loss_on(where, truth))
        measured = sampler(sampler.Options(permutations=16)).sample(game, np.random.default_rng(0))
        budget = Budget.parse("3bits").resolve(truth.space)
        picks.append(allocator().allocate(surrogate().fit(measured), budget).pick)
        found.append(measured.losses)
    equal = bool(np.array_equal(*picks))
    return {"equal": equal, "ok": equal, "losses_apart": float(np.abs(found[0] - found[1]).max())}


def _loss_on(device: torch.device, truth: Any) -> Any:
    """The loss of a planted game, computed on a device in float32."""
    n, m = truth.linear.shape
    linear = torch.tensor(truth.linear, dtype=torch.float32, device=device).flatten()
    pairs = torch.tensor(truth.pairwise, dtype=torch.float32, device=device).reshape(n * m, n * m)

    def loss(pick: IntArray) -> float:
        chosen = torch.tensor(np.eye(m)[pick], dtype=torch.float32, device=device).flatten()
        return float(3.0 + chosen @ linear + chosen @ pairs @ chosen / 2)

    return loss


def losses(device: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Bytes, unpacked weights, losses and plans of the same models on both devices."""
    models = {f"tiny {kind}": str(tiny_model(folder / kind, kind)) for kind in ("llama", "gemma2")}
    if demo_path().is_dir() and not tiny:
        models["SmolLM2-135M"] = "demo"
    calibration, evaluation = texts(folder)
    rows = []
    for shown, name in models.items():
        blocks = locate_model(name).skeleton().config.num_hidden_layers
        for backend, bits in MENUS.items():
            config = RunConfig(
                model=name, backend=backend, bits=bits, granularity="group", estimator="aumann-shapley",
                exclude=tuple(f"model.layers.{block}.*" for block in range(QUANTIZED, blocks)), partial=True,
                dtype="float32", calibration=TextConfig(str(calibration), 8, 128), game_windows=4, cache=False,
                evaluation=TextConfig(str(evaluation), 2, 128), tracking_uri="none", output=str(folder / "runs"),
                options={"backend": {"group_size": 32}} if backend != "quanto" else {})
            rows.append({"model": shown, "blocks": blocks, **_both(config, device)})
            print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows, "ok": all(map(near, rows))}


def near(row: Mapping[str, Any]) -> bool:
    """Whether a model has the same bytes and nearly the same losses and unpacked weights on both devices."""
    most = RTOL[row["backend"]]
    return bool(row["bytes_equal"]) and row["losses_apart"] <= most and row["unpacked_apart"] <= most


def _both(config: RunConfig, device: str) -> dict[str, Any]:
    (first, ours), (second, theirs) = (_measured(replace(config, device=where)) for where in ("cpu", device))
    equal, apart = _compared(first, second)
    picks = [run(replace(config, device=where), Plugins()).plan for where in ("cpu", device)]
    assert picks[0] is not None and picks[1] is not None
    return {"backend": config.backend, "bits": list(config.bits or ()), "bytes": first.bank.nbytes,
            "bytes_equal": first.bank.nbytes == second.bank.nbytes, "elements_equal": equal, "unpacked_apart": apart,
            "losses_apart": float(np.abs(theirs / ours - 1).max()),
            "plans_equal": bool(np.array_equal(picks[0].pick, picks[1].pick))}


def _measured(config: RunConfig) -> tuple[Session, np.ndarray]:
    plugins = Plugins()
    prepared = prepare(config, plugins)
    session = Session(prepared, plugins)
    session.quantize_deployed()
    picks = np.random.default_rng(0).integers(0, len(prepared.space.choices), (6, len(prepared.space)))
    game = session.game()
    return session, np.append(game.losses(picks) + game.reference_loss, game.reference_loss)


def _compared(first: Session, second: Session) -> tuple[float, float]:
    """The share of equal elements of all stored tensors of two banks; and the largest difference, relative to the
    largest weight of its linear, of the first's variants unpacked on the device of either."""
    equal = total = 0
    apart = 0.0
    for layer in first.prepared.space.layers:
        for linear in layer.linears:
            for choice in first.prepared.space.choices:
                stored = first.bank.stored(linear, choice)
                for name, tensor in stored.tensors.items():
                    equal += int((tensor == second.bank.stored(linear, choice).tensors[name]).sum())
                    total += tensor.numel()
                here = first.bank.variant(linear, choice)
                there = {name: tensor.to(second.device) for name, tensor in stored.tensors.items()}
                unpacked = second.bank.backend.dequantize(replace(stored, tensors=there), linear).cpu()
                apart = max(apart, float((here - unpacked).abs().max() / here.abs().max()))
    return equal / total, apart


def repeat(device: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Whether a run that is repeated, and one that is killed and resumed, gives the same bits."""
    model = tiny_model(folder / "model", blocks=4)
    calibration, evaluation = texts(folder)
    rows = []
    cases = [("aumann-shapley", "auto", ()), ("aumann-shapley", "float32", ()), ("hawq", "auto", ()),
             ("spqe", "auto", ("-o", "permutations=16"))]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        runs = []
        for estimator, dtype, options in cases:
            words = ["run", "--model", str(model), "--device", device, "--dtype", dtype, "--estimator", estimator,
                     "--granularity", "linear", "--bits", "2,3,4", "--calibration", str(calibration), "--evaluation",
                     str(evaluation), "-o", "grid=min-max", "-o", "group_size=32", *options, *RUN]
            place = folder / f"{estimator}-{dtype}"
            runs.append([pool.submit(_run, words, place.with_suffix(".first")),
                         pool.submit(_run, words, place.with_suffix(".second")),
                         pool.submit(_killed, words, place.with_suffix(".killed"))])
        for (estimator, dtype, _), (one, two, three) in zip(cases, runs, strict=True):
            first, (killed, logged) = _results(one.result()), three.result()
            repeated, resumed = (_differences(first, _results(made)) for made in (two.result(), killed))
            rows.append({"estimator": estimator, "dtype": dtype, "repeated": repeated, "resumed": resumed,
                         "logged_when_killed": logged})
            print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows, "ok": not any(row["repeated"] or row["resumed"] for row in rows)}


def _run(words: Sequence[str], place: Path) -> Path:
    """A run in a cache of its own, so that every variant is made anew; returns its folder."""
    place.mkdir()
    subprocess.run([*IMPQ, *words, "--output", str(place / "runs")], check=True, cwd=place,
                   env={**os.environ, "IMPQ_CACHE": str(place / "cache")})
    [made] = [path for path in (place / "runs").iterdir() if (path / "impq.toml").exists()]
    return made


def _killed(words: Sequence[str], place: Path) -> tuple[Path, int]:
    """A run that is ended by SIGKILL when it has logged some losses or gradients, and is then resumed; the rows that
    were logged."""
    place.mkdir()
    env = {**os.environ, "IMPQ_CACHE": str(place / "cache")}
    process = subprocess.Popen([*IMPQ, *words, "--output", str(place / "runs")], cwd=place, env=env)
    kept = 0
    while process.poll() is None and kept < 3:
        logs = [*place.glob("runs/*/measurements.jsonl"), *place.glob("runs/*/gradients.jsonl")]
        kept = max((path.read_bytes().count(b"\n") for path in logs), default=0)
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    [made] = [path for path in (place / "runs").iterdir() if (path / "impq.toml").exists()]
    subprocess.run([*IMPQ, "run", "--resume", str(made)], check=True, cwd=place, env=env)
    return made, kept


def _results(made: Path) -> dict[str, bytes]:
    """The numbers of a run, without times and names."""
    found: dict[str, bytes] = {}
    for name in ("measurements.jsonl", "gradients.jsonl"):
        if (made / name).exists():
            found[name] = b"\n".join((made / name).read_bytes().splitlines()[1:])  # the first line is the key
    with np.load(made / "estimate.npz") as arrays:
        found |= {f"estimate {name}": arrays[name].tobytes() for name in arrays.files}
    plan = json.loads((made / "plan.json").read_text())
    found["plan"] = json.dumps(plan.get("layers", plan), sort_keys=True).encode()
    evaluation = json.loads((made / "evaluation.json").read_text())
    found["evaluation"] = json.dumps(re.findall(r'"window_nll": \[[^]]*\]', json.dumps(evaluation))).encode()
    return found


def _differences(first: Mapping[str, bytes], second: Mapping[str, bytes]) -> list[str]:
    """Names of results that are not the same, bit for bit."""
    return [name for name in first if first[name] != second.get(name)]


def suites(device: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """The suites of all backends on the device, and the tests of devices."""
    kind = resolve_device(device).type
    found = {}
    for name, words in {"backends": ["test_conformance.py", "-k", "Gptq or Hqq or Quanto or Cmpq or Ratio or Slim"],
                        "devices": ["test_device.py"]}.items():
        done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words], cwd=TESTS,
                              env={**os.environ, "IMPQ_TEST_DEVICE": kind}, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        print(done.stdout, done.stderr, flush=True)
        found[name] = {"code": done.returncode, "summary": next(
            (line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), "no tests"),
                       "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))][:20]}
    return {**found, "ok": not any(suite["code"] for suite in found.values())}


def commands(device: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Rotate, run, quantize in sequence, export and evaluate a tiny model."""
    model = tiny_model(folder / "model", blocks=3)
    calibration, evaluation = texts(folder)
    common = ["--calibration", str(calibration), "--evaluation", str(evaluation), *RUN]
    made: dict[str, Any] = {}

    def call(name: str, *words: str) -> None:
        start = time.monotonic()
        done = subprocess.run([*IMPQ, *words], cwd=folder, capture_output=True, text=True,
                              env={**os.environ, "IMPQ_CACHE": str(folder / "cache")})
        print(name, done.stdout, done.stderr, flush=True)
        made[name] = {"code": done.returncode, "seconds": round(time.monotonic() - start, 1),
                      "said": done.stderr.strip().splitlines()[-1:] if done.returncode else []}

    def of_backend(backend: str, options: Sequence[str]) -> None:
        out = folder / backend
        call(f"run {backend}", "run", "--model", str(model), "--device", device, "--backend", backend, "--bits",
             "2,4", *options, "--output", str(out), *common)
        for path in out.glob("*/impq.toml"):
            for form in (backend, "dense", "impq"):
                call(f"export {form} of {backend}", "export", str(path.parent), form, "--device", device)
            call(f"evaluate {backend}", "evaluate", str(path.parent / "dense"), "--device", device)

    def of_rotated() -> None:
        call("rotate", "rotate", str(model), "--to", str(folder / "rotated"), "--block", "32")
        call("run of the rotated model in sequence", "run", "--model", str(folder / "rotated"), "--device", device,
         "--estimator", "guided-output", "--granularity", "linear", "--sequential", "-o", "group_size=32", "--output",
         str(folder / "sequential"), *common)

    def others() -> None:
        call("doctor", "doctor")
        call("run of clado with kl", "run", "--model", str(model), "--device", device, "--value", "kl", "--estimator",
         "clado", "-o", "group_size=32", "--output", str(folder / "kl"), *common)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        done = [pool.submit(of_backend, "gptq", ["-o", "group_size=32"]), pool.submit(of_backend, "quanto", []),
                pool.submit(of_backend, "hqq", ["-o", "group_size=32"]), pool.submit(of_rotated), pool.submit(others)]
        for future in done:
            future.result()
    return {"commands": dict(sorted(made.items())), "ok": not any(got["code"] for got in made.values())}
