"""Plans of backend gguf in llama.cpp: the exported file computes the measured model, but for the rounding of
activations that llama.cpp does before it multiplies by quantized weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from impq_gguf.types import TYPES
from llamacpp import Model
from test_gguf_export import save
from torch import nn

from impq_core.config import RunConfig, TextConfig
from impq_core.exports.export import evaluate_folder, export_run
from impq_core.interfaces import Exporter
from impq_core.model.outline import outline
from impq_core.model.source import locate_model
from impq_core.model.text import draw_windows
from impq_core.parts import Parts, load_exporter
from impq_core.plugins import Plugins
from impq_core.results import Exported, RunResult
from impq_core.runs.pipeline import run

BITS = ("Q8_0", "Q5_K", "IQ4_XS", "Q3_K")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}
GEMMA = {"query_pre_attn_scalar": 64}


def to_q8(inputs: torch.Tensor, block: int) -> torch.Tensor:
    """Inputs (..., columns) as llama.cpp rounds them: to 8 bits with a scale for each block, which is in float16 in
    blocks of 32 (Q8_0), and of the sign of the largest input in blocks of 256 (Q8_K)."""
    parts = inputs.reshape(*inputs.shape[:-1], -1, block)
    largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    scale = -largest / 127 if block == 256 else largest.abs() / 127
    codes = torch.where(scale == 0, 0.0, parts / scale).round().clamp(max=127)
    return (codes * (scale if block == 256 else scale.half().float())).reshape(inputs.shape)


class Measured:
    """The model of a plan in transformers, from the variants of an exported folder."""

    def __init__(self, result: RunResult, folder: Path) -> None:
        source, backend = locate_model(result.config.model), Parts.build(result.config, Plugins()).backend
        self.exporter: Exporter = load_exporter("gguf", "gguf", {}, Plugins())
        self.checkpoint = outline(source, source.without_weights(), result.plan, "gguf", backend, torch.float32)
        self.variants = self.exporter.restore(folder, self.checkpoint)
        self.model = source.load(torch.float32)
        for name, variant in self.variants.items():
            spec = self.checkpoint.specs[name]
            self.model.get_submodule(spec.name).weight.data = backend.dequantize(variant, spec)

    def log_probabilities(self, ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.model(input_ids=torch.from_numpy(ids)[None]).logits[0].double().log_softmax(-1).numpy()

    def round_activations(self) -> None:
        """Round the inputs of quantized linears from now on, as llama.cpp does for their types."""
        for name, variant in self.variants.items():
            block = 256 if TYPES[variant.choice.name].block == 256 else 32
            linear = self.model.get_submodule(self.checkpoint.specs[name].name)
            if isinstance(linear, nn.Embedding):  # looked up, not multiplied, unless it is the head too
                if self.model.lm_head.weight is not linear.weight:
                    continue
                linear = self.model.lm_head
            linear.register_forward_pre_hook(lambda _, inputs, block=block: (to_q8(inputs[0], block),))


Exports = Callable[..., tuple[RunResult, Exported]]


@pytest.fixture
def exports(tiny_config: RunConfig, tmp_path: Path) -> Exports:
    """A function that runs and exports a tiny model."""
    def export(kind: str, **more: object) -> tuple[RunResult, Exported]:
        model = save(kind, tmp_path / "model", WIDE | (GEMMA if kind.startswith("gemma") else {}))
        settings: dict[str, Any] = {"granularity": "group", **more}
        result = run(replace(tiny_config, model=str(model), backend="gguf", bits=BITS, budget="70%",
                             estimator="random", options={}, **settings))
        return result, export_run(result.folder, "gguf", tmp_path / "export")
    return export


@pytest.mark.parametrize(("kind", "ends"), [("llama", True), *(pytest.param(
    kind, ends, marks=pytest.mark.llamacpp) for kind, ends in (
        ("qwen3", False), ("gemma2", True), ("gemma3_text", False), ("phi3", False), ("mixtral", False),
        ("qwen3_moe", False)))])
def test_the_exported_file_computes_the_measured_model(kind: str, ends: bool, exports: Exports) -> None:
    """With ``ends``, embedding and head are quantized too, which are one weight in Gemma."""
    result, export = exports(kind, quantize_embeddings=ends)
    again = evaluate_folder(export.folder)
    assert export.score is not None and again.score is not None
    assert again.score.nll == pytest.approx(export.score.nll, abs=1e-6)
    measured = Measured(result, export.folder)
    assert len({variant.choice.name for variant in measured.variants.values()}) > 1
    assert measured.exporter.file_bytes(measured.checkpoint) == export.file_bytes
    ids = np.concatenate([[256], np.random.default_rng(0).integers(0, 256, 47)])
    with Model(measured.exporter.files(export.folder)[0], len(ids)) as model:
        theirs = torch.from_numpy(model.logits(ids)).double().log_softmax(-1).numpy()
    exact = measured.log_probabilities(ids)
    measured.round_activations()
    rounded = measured.log_probabilities(ids)

    def nll(found: np.ndarray) -> float:
        return -float(found[np.arange(len(ids) - 1), ids[1:]].mean())

    def apart(found: np.ndarray) -> float:
        """Median over positions: where an expert's score is close to another's, the rounding can change experts."""
        return float(np.median(np.sqrt(((found - theirs) ** 2).mean(axis=1))))

    assert ends == any("embed" in name for name in measured.variants)
    assert nll(exact) == pytest.approx(nll(theirs), abs=0.05)
    assert apart(rounded) < 0.7 * apart(exact) < 0.04 * theirs.std()


def test_only_what_llama_cpp_users_need_is_in_the_folder(exports: Exports, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "LICENSE").write_text("terms")
    result, export = exports("qwen2")
    assert sorted(file.name for file in export.folder.iterdir()) == ["LICENSE", "impq.json", "model.gguf", "plan.json"]
    recipe = export_run(result.folder, "recipe-llama.cpp", tmp_path / "recipe").folder / "tensor-types.txt"
    lines = dict(line.split("=") for line in recipe.read_text().splitlines())
    kinds = {name: variant.choice.name for name, variant in Measured(result, export.folder).variants.items()}
    assert len(lines) == len(kinds) == 14
    for block in range(2):
        for ours, theirs in (("self_attn.q_proj", "attn_q"), ("mlp.down_proj", "ffn_down")):
            name = rf"^blk\.{block}\.{theirs}\.weight$"
            assert lines[name] == kinds[f"model.layers.{block}.{ours}"].lower()
            assert re.match(name, f"blk.{block}.{theirs}.weight")


@pytest.mark.llamacpp
def test_the_real_model(tmp_path: Path) -> None:
    """The demo model, most of whose rows take llama.cpp's stand-ins: windows of the evaluation, and a continuation."""
    text = TextConfig("demo", 4, 256)
    result = run(RunConfig(model="demo", backend="gguf", bits=BITS, budget="70%", estimator="random", calibration=text,
                           evaluation=text, game_windows=2, dtype="float32", output=str(tmp_path / "runs")))
    export = export_run(result.folder, "gguf", tmp_path / "export")
    measured = Measured(result, export.folder)
    assert measured.exporter.file_bytes(measured.checkpoint) == export.file_bytes
    windows = draw_windows(text, "evaluation", locate_model("demo").tokenizer(), 49152).ids
    differences, places = [], np.arange(windows.shape[1] - 1)
    with Model(measured.exporter.files(export.folder)[0], windows.shape[1]) as model:
        for ids in windows:
            theirs = torch.from_numpy(model.logits(ids)).double().log_softmax(-1).numpy()
            differences.append((measured.log_probabilities(ids) - theirs)[places, ids[1:]])
        prompt = windows[0][:64].tolist()
        found = list(prompt)
        for _ in range(16):
            found.append(int(model.logits(found)[-1].argmax()))
    print(f"token log-probabilities: root mean square {np.sqrt(np.mean(np.square(differences))):.4f}, "
          f"mean {np.mean(differences):.5f}")
    assert np.sqrt(np.mean(np.square(differences))) < 0.1 and abs(np.mean(differences)) < 0.01
    continued = measured.model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0].tolist()
    assert continued[:72] == found[:72]
