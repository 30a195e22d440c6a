"""Exports: what stock software loads is the model that was measured, and its bytes are the plan's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from impq_gptq.compressed import CompressedTensorsExporter
from impq_gptq.exporter import module_pattern
from safetensors import safe_open

from impq_core.config import RunConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.export import evaluate_folder, export_run
from impq_core.parts import Parts
from impq_core.pipeline import RunResult, run
from impq_core.plugins import Plugins
from impq_core.source import locate_model
from impq_core.testing import tiny_model

IDS = np.random.default_rng(0).integers(0, 256, (2, 40))

STOCK = """
import os, sys
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
import numpy as np, torch
from gptqmodel import BACKEND, GPTQModel
torch.set_num_threads(1)
ids = torch.from_numpy(np.load(sys.argv[1]))
for folder in sys.argv[2:]:
    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH)
    with torch.no_grad():
        np.save(folder + "/logits.npy", model.model(input_ids=ids).logits.float().numpy())
assert not any(name.startswith("impq") for name in sys.modules)
"""


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square of a difference, relative to the first."""
    return float(np.sqrt(((a - b) ** 2).mean() / (a**2).mean()))


def _quiet(done: int, total: int) -> None:
    """Nobody watches."""


def _mixed_run(config: RunConfig, folder: Path) -> RunResult:
    """A run whose plan mixes 4, 3 and 2 bits over single linears."""
    result = run(replace(config, model=str(folder), estimator="random", allocator="greedy", bits=(2, 3, 4),
                         granularity="linear", dtype="bfloat16", exclude=("*.11.mlp.down_proj",),
                         budget="3bits", options={"backend": {"clip_search": False}}))
    assert set(result.plan.pick.tolist()) == {0, 1, 2}
    return result


def test_gptqmodel_loads_what_was_measured(tiny_config: RunConfig, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    exported = {}
    for architecture in ("llama", "qwen3", "gemma2"):
        result = _mixed_run(tiny_config, tiny_model(tmp_path / architecture, architecture, blocks=12))
        exported[architecture] = result, export_run(str(result.folder), "gptq", tmp_path / f"{architecture}-gptq",
                                                    Plugins(), _quiet)
    folders = [str(e.folder) for _, e in exported.values()]
    done = subprocess.run([sys.executable, "-c", STOCK, str(tmp_path / "ids.npy"), *folders], capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for result, export in exported.values():
        again = evaluate_folder(str(export.folder), Plugins())
        assert again.score.nll == export.score.nll and again.score.kl == export.score.kl
        # The same weights in a plain model: dequantized, in the dtype that GPTQModel computes in.
        ours = _plain_logits(export.folder, result)
        theirs = np.load(export.folder / "logits.npy")
        # bfloat16 keeps 8 bits, and GPTQModel rounds the scales to it too: a per cent or two after 12 blocks, where
        # the unquantized model is off by far more.
        unquantized = locate_model(result.config.model).load(torch.bfloat16)
        with torch.no_grad():
            other = unquantized(input_ids=torch.from_numpy(IDS)).logits.float().numpy()
        assert _apart(ours, theirs) < 0.03 < 0.1 < _apart(ours, other)
        with safe_open(export.folder / "model.safetensors", framework="pt") as file:
            sizes = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        packed = sum(t.numel() * t.element_size() for name, t in sizes.items()
                     if name.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx"))
        excluded = sizes["model.layers.11.mlp.down_proj.weight"]
        assert packed + 2 * excluded.numel() == result.plan.nbytes


def _plain_logits(folder: Path, result: RunResult) -> np.ndarray:
    from impq_gptq.exporter import GptqExporter

    from impq_core.export import _dense

    model = locate_model(result.config.model).load(torch.bfloat16)
    backend = Parts.build(result.config, Plugins()).backend
    variants = GptqExporter().restore(folder, result.plan)
    model.load_state_dict(_dense(folder, set(variants)), strict=False)
    for layer in result.plan.space.layers:
        for spec in layer.linears:
            weight = backend.dequantize(variants[spec.name], spec)
            model.get_submodule(spec.name).weight.data = weight.bfloat16()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS)).logits.float().numpy()


TRANSFORMERS = """
import sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
with torch.no_grad():
    np.save(sys.argv[2] + "/logits.npy", model(input_ids=torch.from_numpy(np.load(sys.argv[1]))).logits.numpy())
assert not any(name.startswith("impq") for name in sys.modules)
"""


def test_stock_transformers_loads_compressed_tensors(tiny_config: RunConfig, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    options = {"backend": {"clip_search": False, "symmetric": True}}
    result = run(replace(tiny_config, model=str(tiny_model(tmp_path / "m", blocks=12)), estimator="random",
                         bits=(2, 3, 4, 8), granularity="linear", budget="4bits", exclude=("*.11.mlp.down_proj",),
                         options=options))
    export = export_run(str(result.folder), "compressed-tensors", tmp_path / "out", Plugins(), _quiet)
    again = evaluate_folder(str(export.folder), Plugins())
    assert again.score.nll == export.score.nll and again.score.kl == export.score.kl
    fewer = evaluate_folder(str(export.folder), Plugins(), evaluation_windows=3, evaluation=None)
    assert fewer.text == again.text.replace("6 windows", "3 windows")
    done = subprocess.run([sys.executable, "-c", TRANSFORMERS, str(tmp_path / "ids.npy"), str(export.folder)],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    model = locate_model(result.config.model).load(torch.float32)
    backend = Parts.build(result.config, Plugins()).backend
    variants = CompressedTensorsExporter().restore(export.folder, result.plan)
    for layer in result.plan.space.layers:
        for spec in layer.linears:
            model.get_submodule(spec.name).weight.data = backend.dequantize(variants[spec.name], spec)
    with torch.no_grad():
        ours = model(input_ids=torch.from_numpy(IDS)).logits.numpy()
    assert _apart(ours, np.load(export.folder / "logits.npy")) < 2e-3  # products of 16-bit scales round to 11 bits


def test_patterns_match_one_module_and_no_other() -> None:
    pattern = module_pattern("model.layers.1.mlp.up_proj").removeprefix("+:")
    assert re.match(pattern, "model.layers.1.mlp.up_proj")
    for other in ("model.layers.10.mlp.up_proj", "model.layers.1.mlp.up_proj_b", "modelXlayers.1.mlp.up_proj"):
        assert not re.match(pattern, other)


def test_recipes_name_every_linear_with_its_width(tiny_config: RunConfig, tmp_path: Path) -> None:
    result = run(replace(tiny_config, granularity="linear", estimator="random", exclude=("model.layers.3*",),
                         options={"backend": {"clip_search": False}}))
    files = {"recipe-gptqmodel": "dynamic.json", "recipe-auto-round": "layer_config.json",
             "recipe-llama.cpp": "tensor-types.txt"}
    written = {}
    for name, file in files.items():
        export_run(str(result.folder), name, tmp_path / name, Plugins(), _quiet)
        written[name] = (tmp_path / name / file).read_text()
    bits = {layer.name: int(result.plan.space.choices[k].bits)
            for layer, k in zip(result.plan.space.layers, result.plan.pick, strict=True)}
    dynamic = json.loads(written["recipe-gptqmodel"])
    rounds = json.loads(written["recipe-auto-round"])
    assert len(dynamic) == len(rounds) == 28
    for name, width in bits.items():
        assert dynamic[module_pattern(name)]["bits"] == rounds[name]["bits"] == width
    assert dynamic[module_pattern("model.layers.3.mlp.up_proj").replace("+", "-")] == {}
    assert rounds["model.layers.3.mlp.up_proj"] == {"bits": 16}
    lines = dict(line.split("=") for line in written["recipe-llama.cpp"].splitlines())
    assert lines[r"^blk\.0\.attn_q\.weight$"] == f"q{bits['model.layers.0.self_attn.q_proj']}_k"
    assert lines[r"^blk\.3\.ffn_down\.weight$"] == "f16" and len(lines) == 28
    with pytest.raises(ImpqError, match="a recipe, not weights"):
        evaluate_folder(str(tmp_path / "recipe-gptqmodel"), Plugins())


def test_what_cannot_be_exported_or_loaded(tiny_config: RunConfig, tmp_path: Path) -> None:
    result = run(replace(tiny_config, estimator="random", backend="hqq", options={}))
    found = Plugins()
    with pytest.raises(UsageError, match="did you mean 'gptq'"):
        export_run(str(result.folder), "gtpq", tmp_path / "x", found, _quiet)
    with pytest.raises(ImpqError, match="holds variants of auto-gptq, gptq, not of hqq"):
        export_run(str(result.folder), "gptq", tmp_path / "x", found, _quiet)
    asymmetric = run(replace(tiny_config, estimator="random", options={"backend": {"clip_search": False}}))
    with pytest.raises(ImpqError, match="symmetric=true"):
        export_run(str(asymmetric.folder), "compressed-tensors", tmp_path / "x", found, _quiet)
    with pytest.raises(ImpqError, match="no run folder"):
        export_run(str(tmp_path), "gptq", tmp_path / "x", found, _quiet)
    with pytest.raises(ImpqError, match="not empty"):
        export_run(str(result.folder), "recipe-auto-round", result.folder, found, _quiet)
    for folder in (tmp_path, result.folder, tmp_path / "none"):
        with pytest.raises(ImpqError, match="no folder that impq exported"):
            evaluate_folder(str(folder), found)
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x.*"))
