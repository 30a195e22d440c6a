"""Whole runs on the stand-in for an accelerator: no operator mixes devices, and every result is that of the processor,
bit for bit."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from impq_core.config import RunConfig, TextConfig
from impq_core.exports.export import evaluate_folder, export_run
from impq_core.interfaces import Backend
from impq_core.plugins import Plugins
from impq_core.runs.pipeline import run
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session
from impq_core.testing import tiny_model
from impq_core.testing.device import NAME, StandIn, device_there

BACKENDS: Mapping[str, dict[str, Any]] = {"gptq": {"grid": "min-max", "group_size": 32}, "hqq": {"group_size": 32},
                                          "quanto": {}, "rounding": {}}

PLUGIN = """
from impq_core.hookspecs import Component, hookimpl

@hookimpl
def impq_backends():
    return [Component("rounding", "impq_core.testing.rounding:Rounding")]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """By architecture."""
    return {name: _eager(tmp_path_factory.mktemp("models"), name) for name in ("llama", "gemma2")}


@pytest.fixture(scope="module")
def tied(models: Mapping[str, Path]) -> Path:
    """A model whose head is its embeddings."""
    return models["gemma2"]


def _eager(folder: Path, architecture: str) -> Path:
    """A model with attention that is written out in plain operators: fused kernels of the processor are its own."""
    tiny_model(folder, architecture, blocks=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "eager"}))
    return folder


@pytest.fixture
def base(texts: tuple[Path, Path], tmp_path: Path) -> RunConfig:
    """A configuration that lacks its model."""
    return RunConfig(bits=(2, 4), backend="rounding", estimator="random", allocator="greedy", granularity="group",
                     calibration=TextConfig(str(texts[0]), 4, 16), game_windows=2,
                     evaluation=TextConfig(str(texts[1]), 2, 16), dtype="float32", device="cpu", tracking_uri="none",
                     output=str(tmp_path / "runs"), cache=False)


@pytest.fixture
def plugins(tmp_path: Path) -> Plugins:
    file = tmp_path / "rounding_plugin.py"
    file.write_text(PLUGIN)
    return Plugins((file,))


def readings(config: RunConfig, plugins: Plugins) -> dict[str, Any]:
    """Everything that estimators, plans and tables read of a model, as arrays of the host."""
    prepared = prepare(config, plugins)
    session = Session(prepared, plugins)
    assert session.device == prepared.device and session.device.type == config.device
    session.quantize_for_game()
    space, bank, found = prepared.space, session.bank, {}
    for layer in space.layers:
        for linear in layer.linears:
            for choice in space.choices:
                for name, tensor in bank.stored(linear, choice).tensors.items():
                    assert tensor.device.type == "cpu", "packed variants are kept on the host"
                    found[f"{linear.name} {choice} {name}"] = tensor.numpy()
    picks = np.random.default_rng(1).integers(0, len(space.choices), (3, len(space)))
    for value in ("nll", "kl"):
        played = session.with_prepared(replace(prepared, config=replace(prepared.config, value=value)))
        game, probe = played.game(), played.probe()
        found[f"losses {value}"] = np.append(game.losses(picks), game.reference_loss)
        found[f"windows {value}"] = game.window_losses(picks[0])
        found[f"slopes {value}"] = probe.slopes(None if value == "nll" else np.array([0.5, 0.5]))
        found[f"forwards {value}"] = np.array([game.forwards, probe.forwards])
    traces = session.probe().hessian_traces(np.random.default_rng(3))
    found["traces"] = np.array(list(traces.values()))
    found["states"] = np.array([[float(state.float().square().sum()) for state in outputs]
                                for _, _, outputs in session.probe().block_states()])
    score = session.evaluator().score(space.assignment(picks[0]))
    found["score"] = np.array([*score.window_nll, score.kl, score.top1])
    return found


def assert_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)


@pytest.mark.parametrize(("architecture", "backend", "ends"), [
    *(("llama", backend, False) for backend in BACKENDS), ("llama", "rounding", True),
    ("gemma2", "rounding", False), ("gemma2", "rounding", True)])
def test_every_reading_is_that_of_the_processor(architecture: str, backend: str, ends: bool,
                                                models: Mapping[str, Path], base: RunConfig, plugins: Plugins) -> None:
    """What a backend does is the same in every architecture."""
    config = replace(base, model=str(models[architecture]), backend=backend, estimator="aumann-shapley",
                     quantize_embeddings=ends, options={"backend": BACKENDS[backend]})
    expected = readings(config, plugins)
    with device_there() as device:
        found = readings(replace(config, device=device.name), plugins)
        assert _worked(device)
    assert_same(found, expected)
    gc.collect()
    assert device.held == 0, "a tensor of the device is kept after its last use"


@pytest.mark.parametrize("estimator", ["spqe", "aumann-shapley", "lim", "zscore", "hawq"])
def test_the_run_of_every_kind_of_estimator_is_that_of_the_processor(estimator: str, tied: Path, base: RunConfig,
                                                                     plugins: Plugins) -> None:
    """Estimators that play, and estimators that read gradients, activations, weights or curvature."""
    given = replace(base, model=str(tied), estimator=estimator, granularity="block",
                    options={"estimator": {"permutations": 2} if estimator == "spqe" else {}})
    expected = run(given, plugins)
    with device_there() as device:
        found = run(replace(given, device=device.name), plugins)
        assert _worked(device)
    assert found.plan is not None and expected.plan is not None
    np.testing.assert_array_equal(found.plan.pick, expected.plan.pick)
    assert found.measured_loss == expected.measured_loss and found.forwards == expected.forwards
    assert found.evaluation is not None and expected.evaluation is not None
    for ours, theirs in zip(found.evaluation.rows, expected.evaluation.rows, strict=True):
        assert ours.name == theirs.name and ours.nll == theirs.nll


OPTIONS: Mapping[str, dict[str, Any]] = {"spqe": {"permutations": 2}, "gamma": {"steps": 2}}


@pytest.mark.parametrize("estimator", sorted(Plugins().names("estimator")))
def test_the_estimate_of_every_estimator_is_that_of_the_processor(estimator: str, tied: Path, base: RunConfig,
                                                                  plugins: Plugins) -> None:
    given = replace(base, model=str(tied), estimator=estimator, granularity="linear",
                    options={"estimator": OPTIONS.get(estimator, {})})
    expected = run(given, plugins, only_estimate=True)
    with device_there() as device:
        found = run(replace(given, device=device.name), plugins, only_estimate=True)
    assert found.estimate is not None
    for name in ("linear", "pairwise"):
        np.testing.assert_array_equal(getattr(found.estimate, name), getattr(expected.estimate, name))


@pytest.mark.parametrize("backend", ["gptq", "hqq", "quanto", "cmpq", "ratio", "slim"])
def test_variants_made_on_a_device_are_those_of_the_processor(backend: str, tied: Path, base: RunConfig,
                                                              plugins: Plugins,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends that work on devices, as if they named this one."""
    made = plugins.load("backend", backend, Backend)
    options = {} if backend in ("quanto", "cmpq") else {"group_size": 32}
    config = replace(base, model=str(tied), backend=backend, bits=(), options={"backend": options}, partial=True,
                     exclude=("model.layers.1.*", "*.mlp.*"))
    given: list[str] = []
    own = made.quantize_together

    def quantize_together(self: Backend, weights: Any, *rest: Any) -> Any:
        given.extend(weight.device.type for weight in weights.values())
        return own(self, weights, *rest)

    def variants(config: RunConfig) -> dict[str, Any]:
        session = Session(prepare(config, plugins), plugins)
        session.quantize_deployed()
        space, bank = session.prepared.space, session.bank
        found = {f"{linear.name} {choice} {name}": tensor.numpy() for layer in space.layers for linear in layer.linears
                 for choice in space.choices for name, tensor in bank.stored(linear, choice).tensors.items()}
        return found | {f"{linear.name} {choice}": bank.variant(linear, choice).cpu().numpy() for layer in space.layers
                        for linear in layer.linears for choice in space.choices}

    expected = variants(config)
    with device_there(float64=True) as device:
        monkeypatch.setattr(made, "devices", made.devices | {device.name})
        monkeypatch.setattr(made, "quantize_together", quantize_together)
        found = variants(replace(config, device=device.name))
    assert set(given) == {NAME}
    assert_same(found, expected)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "rounding"])
def test_exports_are_those_of_the_processor(backend: str, tied: Path, base: RunConfig, plugins: Plugins,
                                            tmp_path: Path) -> None:
    config = replace(base, model=str(tied), backend=backend, options={"backend": BACKENDS[backend]})
    result = run(config, plugins)
    made = {}
    for device in ("cpu", NAME):
        with device_there():
            export = export_run(result.folder, backend, tmp_path / device, plugins, device=device)
            again = evaluate_folder(export.folder, plugins, device=device)
        assert export.score is not None and again.score is not None
        made[device] = ({file.name: file.read_bytes() for file in export.folder.iterdir() if file.name != "impq.json"},
                        export.score.window_nll.tolist(), again.score.window_nll.tolist())
    assert made["cpu"] == made[NAME]


def test_variants_of_another_device_have_another_identity(tied: Path, base: RunConfig, plugins: Plugins) -> None:
    config = replace(base, model=str(tied))
    cpu = prepare(config, plugins)
    with device_there() as device:
        other = prepare(replace(config, device=device.name), plugins)
        assert other.config.device == f"{NAME}:0"
        assert {change.name for change in other.deployed_key.diff(cpu.deployed_key.to_dict())} == {"device"}
        assert other.key.digest != cpu.key.digest
        assert prepare(replace(config, device="auto"), plugins).config.device == f"{NAME}:0"


def _worked(device: StandIn) -> bool:
    """Whether the device multiplied matrices, and did not only hold tensors."""
    return any(name.startswith(("aten.mm", "aten.addmm", "aten.bmm", "aten.linear")) for name in device.calls)
