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
from gguf import GGMLQuantizationType, GGUFReader
from gguf_files import save, unquantized, written
from impq_gguf.types import TYPES
from llamacpp import Model
from torch import nn

from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError
from impq_core.exports.export import check_formats, evaluate_folder, export_run
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
        settings: dict[str, Any] = {"granularity": "group", "bits": BITS, **more}
        result = run(replace(tiny_config, model=str(model), backend="gguf", budget="70%",
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


def test_a_file_of_another_plan_is_not_measured(exports: Exports) -> None:
    """Here one whose types take the same bytes."""
    _, export = exports("llama", bits=("Q8_0", "Q3_K"))
    found = {tensor.name: tensor for tensor in GGUFReader(export.folder / "model.gguf", "r+").tensors}
    changed = next(tensor for tensor in found.values() if tensor.tensor_type.name == "Q3_K")
    changed.field.parts[4][0] = GGMLQuantizationType.IQ3_S
    del found
    with pytest.raises(ImpqError, match=rf"{re.escape(changed.name)} is IQ3_S"):
        evaluate_folder(export.folder)


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


@pytest.mark.parametrize(("kind", "granularity", "named"), [("gpt_neox", "block", "gpt_neox"),
                                                            ("mixtral", "expert", "--granularity group")])
def test_a_format_that_will_not_hold_the_plan_is_refused_before_the_run(
        kind: str, granularity: str, named: str, tiny_config: RunConfig, tmp_path: Path) -> None:
    config = replace(tiny_config, model=str(save(kind, tmp_path / "model")), backend="gguf", bits=("Q8_0", "Q4_0"),
                     granularity=granularity, options={})
    with pytest.raises(ImpqError, match=named):
        check_formats(config, ["gguf"], Plugins())
    check_formats(config, ["recipe-gptqmodel"], Plugins())
    check_formats(replace(config, model=str(save("llama", tmp_path / "other"))), ["gguf"], Plugins())


@pytest.mark.llamacpp
def test_the_real_model(tmp_path: Path) -> None:
    """The demo model, most of whose rows take llama.cpp's stand-ins.

    After a few linears the rounding of activations is noise: two programs that round alike differ as much as one that
    rounds from one that does not, but their mean loss is the same.
    """
    text = TextConfig("demo", 2, 256)
    result = run(RunConfig(model="demo", backend="gguf", bits=("Q6_K", "IQ4_XS"), budget="75%", estimator="random",
                           calibration=text, evaluation=text, game_windows=1, dtype="float32",
                           output=str(tmp_path / "runs")))
    export = export_run(result.folder, "gguf", tmp_path / "export")
    measured = Measured(result, export.folder)
    assert measured.exporter.file_bytes(measured.checkpoint) == export.file_bytes
    windows = draw_windows(text, "evaluation", locate_model("demo").tokenizer(), 49152).ids
    places, prompt = np.arange(windows.shape[1] - 1), windows[0][:64].tolist()
    with Model(measured.exporter.files(export.folder)[0], windows.shape[1]) as model:
        theirs = [torch.from_numpy(model.logits(ids)).double().log_softmax(-1).numpy() for ids in windows]
        answer = continued(model, prompt, 16)

    def differences() -> np.ndarray:
        return np.array([(measured.log_probabilities(ids) - found)[places, ids[1:]]
                         for ids, found in zip(windows, theirs, strict=True)])

    exact = differences()
    ours = measured.log_probabilities(np.array(answer))[len(prompt) - 1:-1]
    behind = ours.max(axis=1) - ours[np.arange(16), answer[len(prompt):]]
    measured.round_activations()
    rounded = differences()
    noise = float(rounded.std()) / np.sqrt(rounded.size)
    print(f"token log-probabilities: root mean square of differences {np.sqrt((exact**2).mean()):.3f}, mean "
          f"{exact.mean():.4f}, {rounded.mean():.4f} with rounded activations, standard error {noise:.4f}; tokens of "
          f"the answer are at most {behind.max():.2f} nats behind ours, {(behind == 0).sum()} of 16 are ours")
    assert abs(exact.mean()) < 0.05 and exact.std() < 0.25 and abs(rounded.mean()) < 4 * noise
    assert behind.max() < 0.5


def continued(model: Model, prompt: list[int], count: int) -> list[int]:
    """A prompt and the ``count`` most probable tokens after it, by llama.cpp."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits(tokens)[-1].argmax()))
    return tokens


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mixtral"])
def test_an_unquantized_file_gives_the_same_answers(kind: str, tmp_path: Path) -> None:
    folder = save(kind, tmp_path / "model")
    file, prompt = written(unquantized(folder), tmp_path / "export"), [256, *range(65, 80)]
    with torch.no_grad():
        ours = locate_model(str(folder)).load(torch.float32).generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=-1)[0].tolist()
    with Model(file, 64) as model:
        assert continued(model, prompt, 24) == ours
