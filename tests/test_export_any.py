"""Formats for every backend: `impq` gives back the variants and the model, `dense` the quantized values at 16 bits."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import gpt2, mixtral, promise, tensors, wrapper
from damage import ROUNDS, WAYS
from safetensors import safe_open

import impq_core
from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.exports.export import evaluate_folder, export_run
from impq_core.exports.packed import load_quantized
from impq_core.plugins import Plugins
from impq_core.results import Exported, RunResult
from impq_core.runs.pipeline import run
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session
from impq_core.testing import tiny_model

IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 40)))
BACKENDS: dict[str, dict[str, Any]] = {
    "quanto": {"backend": "quanto", "bits": ("2", "4", "8"), "options": {}},
    "hqq": {"backend": "hqq", "bits": ("2", "2@32", "3"), "options": {}},
    "gptq": {"backend": "gptq", "bits": ("2", "3@32", "4"), "options": {"backend": {"grid": "min-max"}}},
    "cmpq": {"backend": "cmpq", "bits": ("2.25", "3"), "options": {}},
    "ratio": {"backend": "ratio", "bits": ("2", "2+25%", "3"), "options": {}},
    "slim": {"backend": "slim", "bits": ("2", "3", "4"), "options": {}},
    "gguf": {"backend": "gguf", "bits": ("Q8_0", "Q4_K", "IQ4_NL"), "options": {"backend": {"mixes": "none"}}}}


def quantized(result: RunResult) -> Session:
    """The session of an export: the plan quantized in sequence."""
    config = replace(result.config, plan=str(result.folder / "plan.json"))
    session = Session(prepare(config, Plugins()), Plugins())
    assert session.prepared.plan is not None
    session.quantize_plan(session.prepared.plan)
    session.bank.apply(session.prepared.space.assignment(session.prepared.plan.pick))
    return session


def same(one: Exported, other: Exported) -> bool:
    assert one.score is not None and other.score is not None
    return one.score.to_dict() == other.score.to_dict()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits.float()
        return found


def session_logits(session: Session) -> torch.Tensor:
    runner = session.runner
    with runner.placement.loaded(*range(len(runner))):
        return logits(runner.model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_and_dense_files_hold_what_was_measured(backend: str, tiny_config: RunConfig, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen3", blocks=2)
    result = run(replace(tiny_config, model=str(model), granularity="linear", estimator="random", budget="90%",
                         exclude=("*.1.mlp.down_proj",), **BACKENDS[backend]))
    session = quantized(result)
    packed, dense = (export_run(result.folder, name, tmp_path / name) for name in ("impq", "dense"))
    again = {export.format: evaluate_folder(export.folder) for export in (packed, dense)}
    for export in (packed, dense):
        assert same(again[export.format], export)
        assert export.file_bytes <= promise(result, export.format) <= 1.5 * export.file_bytes  # mostly header

    with safe_open(packed.folder / "impq.safetensors", framework="pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    widths, specs, before = result.plan.widths(), {}, tensors(model)
    for layer in result.plan.space.everyone:
        specs |= {spec.name: spec for spec in layer.linears}
    total = 0
    for name, choice in widths.items():
        if choice is None:
            continue
        variant = session.bank.stored(specs[name], choice)
        for part, tensor in variant.tensors.items():
            stored = found.pop(f"{name}.weight.{part}")
            assert torch.equal(stored, tensor) and stored.dtype == tensor.dtype
            total += stored.numel() * stored.element_size()
    left = sum(2 * specs[name].parameters for name, choice in widths.items() if choice is None)
    assert total + left == result.plan.nbytes
    assert set(found) == set(before) - {f"{name}.weight" for name, choice in widths.items() if choice}
    assert all(torch.equal(found[name], before[name]) for name in found)

    ours = session_logits(session)
    loaded = impq_core.load_quantized(packed.folder)
    assert type(loaded).__name__ == "Qwen3ForCausalLM" and loaded.dtype == torch.float32
    assert torch.equal(logits(loaded), ours)
    from transformers import AutoModelForCausalLM

    stock, unquantized = (AutoModelForCausalLM.from_pretrained(folder) for folder in (dense.folder, model))
    apart, step = ((logits(other) - ours).abs().max() for other in (stock, unquantized))
    exact = backend in ("gptq", "cmpq")  # whose values are 16-bit numbers anyway
    assert apart < 0.02 * step and (apart == 0) == exact
    values = tensors(dense.folder)
    assert set(values) == set(before)
    for name, choice in widths.items():
        if choice:
            stored = values[f"{name}.weight"]
            assert stored.dtype == torch.float16 and torch.equal(
                stored, session.bank.variant(specs[name], choice).half())
    assert not (dense.folder / "impq.safetensors").exists() and not (packed.folder / "model.safetensors").exists()
    with pytest.raises(OSError, match=r"model\.safetensors"):  # not a model of random weights
        AutoModelForCausalLM.from_pretrained(packed.folder)
    with pytest.raises(ImpqError, match="method impq"):
        run(replace(tiny_config, model=str(packed.folder)))


@pytest.mark.parametrize(("make", "changes"), [
    (mixtral, {"granularity": "expert", "exclude": ("*.experts.1",)}),
    (gpt2, {"granularity": "linear", "exclude": ("*.1.attn.c_proj",)}), (wrapper, {"granularity": "group"})])
def test_renamed_transposed_and_fused_weights(make: Callable[[Path], Path], changes: dict[str, Any],
                                              tiny_config: RunConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make(tmp_path / "model")
    result = run(replace(tiny_config, model=str(model), estimator="random", backend="hqq", dtype="bfloat16",
                         options={"backend": {"group_size": 32}}, **changes))
    packed, dense = (export_run(result.folder, name, tmp_path / name) for name in ("impq", "dense"))
    for export in (packed, dense):
        assert same(evaluate_folder(export.folder), export)
    assert packed.score is not None and dense.score is not None and packed.score.nll == dense.score.nll  # bfloat16
    loaded = load_quantized(packed.folder)
    stock = type(loaded).from_pretrained(dense.folder)
    assert loaded.dtype == stock.dtype and torch.equal(logits(loaded), logits(stock))
    unquantized = type(loaded).from_pretrained(model, dtype=loaded.dtype)
    assert not torch.equal(logits(loaded), logits(unquantized))
    assert {key: tensor.shape for key, tensor in tensors(dense.folder).items()} == {
        key: tensor.shape for key, tensor in tensors(model).items()}


@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # the pair of gemma2 is tied
def test_quantized_embeddings_and_heads(kind: str, tiny_config: RunConfig, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", kind, blocks=2, vocabulary=320)
    result = run(replace(tiny_config, model=str(model), estimator="random", backend="hqq", quantize_embeddings=True,
                         budget="18%", whole=True, options={"backend": {"group_size": 32}}))
    assert result.plan.file_bytes is not None
    packed, dense = (export_run(result.folder, name, tmp_path / name) for name in ("impq", "dense"))
    for export in (packed, dense):
        assert same(evaluate_folder(export.folder), export)
    assert packed.file_bytes <= result.plan.file_bytes < dense.file_bytes
    assert torch.equal(logits(load_quantized(packed.folder)), session_logits(quantized(result)))
    assert not any(key.endswith(("embed_tokens.weight", "lm_head.weight")) for key in _keys(packed.folder))


def _keys(folder: Path) -> list[str]:
    with safe_open(folder / "impq.safetensors", framework="pt") as file:
        return list(file.keys())


def test_a_whole_budget_is_that_of_the_formats_of_the_backend(tiny_config: RunConfig, tmp_path: Path) -> None:
    result = run(replace(tiny_config, estimator="random", budget="30%", whole=True, options={}))
    export = export_run(result.folder, "gptq", tmp_path / "gptq")
    assert result.plan.file_bytes == promise(result, "gptq") and export.file_bytes <= result.plan.file_bytes
    assert export_run(result.folder, "impq", tmp_path / "impq").file_bytes <= result.plan.file_bytes
    assert export_run(result.folder, "dense", tmp_path / "dense").file_bytes > result.plan.file_bytes


def test_values_that_overflow_are_refused(tiny_config: RunConfig, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", blocks=2)
    from safetensors.torch import save_file

    whole = tensors(model)
    whole["model.layers.1.mlp.up_proj.weight"] *= 2.5e5
    save_file(whole, model / "model.safetensors", metadata={"format": "pt"})
    result = run(replace(tiny_config, model=str(model), estimator="random", backend="hqq", options={}))
    with pytest.raises(ImpqError, match=r"layers\.1\.mlp\.up_proj overflow float16.*bfloat16"):
        export_run(result.folder, "dense", tmp_path / "dense")


@pytest.fixture(scope="module")
def kept(texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import _tiny_config

    folder = tmp_path_factory.mktemp("kept")
    model = tiny_model(folder / "model", blocks=2)
    result = run(replace(_tiny_config(model, texts, folder), estimator="random", backend="quanto", options={}))
    return export_run(result.folder, "impq", folder / "export").folder


def _drop(folder: Path, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"][key]
    (folder / "config.json").write_text(json.dumps(config))


def _tensor(folder: Path, key: str, value: torch.Tensor | None) -> None:
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "impq.safetensors")
    if value is None:
        del held[key]
    else:
        held[key] = value
    save_file(held, folder / "impq.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(("damage", "named"), [
    (lambda folder: (folder / "config.json").unlink(), "config.json"),
    (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    (lambda folder: (folder / "config.json").write_text('{"quantization_config": 1}'), "config.json"),
    (lambda folder: (folder / "config.json").write_text("{}"), "no quantization_config"),
    (lambda folder: _drop(folder, "format"), "format None"),
    (lambda folder: _drop(folder, "backend"), "config.json"),
    (lambda folder: _drop(folder, "linears"), "config.json"),
    (lambda folder: (folder / "impq.safetensors").unlink(), "impq.safetensors"),
    (lambda folder: (folder / "impq.safetensors").write_bytes(b"x" * 100), "impq.safetensors"),
    (lambda folder: _tensor(folder, f"{UP}.weight.codes", None), UP),
    (lambda folder: _tensor(folder, f"{UP}.weight.codes", torch.zeros(3, dtype=torch.uint8)), UP),
    (lambda folder: _tensor(folder, "model.norm.weight", None), "model.norm.weight"),
    (lambda folder: _tensor(folder, "model.norm.weight", torch.ones(3)), "model.norm.weight"),
    (lambda folder: _tensor(folder, "model.more.weight", torch.ones(3)), "model.more.weight")])
def test_damaged_folders_are_errors_of_one_line(damage: Callable[[Path], object], named: str, kept: Path,
                                                tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "export")
    damage(tmp_path / "export")
    with pytest.raises(ImpqError) as caught:
        load_quantized(tmp_path / "export")
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "impq.safetensors"])
def test_damaged_bytes_are_errors_of_one_line(name: str, kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "export")
    whole, refused = (kept / name).read_bytes(), 0
    for way in WAYS[Path(name).suffix]:
        rng = random.Random(f"{name} {way.__name__}")
        for _ in range(ROUNDS):
            (tmp_path / "export" / name).write_bytes(way(whole, rng))
            try:
                load_quantized(tmp_path / "export")
            except ImpqError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused
