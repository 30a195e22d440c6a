"""An export is the model's folder with the planned weights replaced: every other tensor and file is the model's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny
from safetensors import safe_open

from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.exports.export import evaluate_folder, export_run
from impq_core.runs.pipeline import run
from impq_core.testing import tiny_model
from impq_core.testing.tiny import byte_tokenizer

BASE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 259, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": 258}
OPTIONS = {"backend": {"group_size": 32, "symmetric": True, "grid": "min-max"}}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            found |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return found


def save(model: Any, folder: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def llama(folder: Path) -> Path:
    tiny_model(folder, blocks=2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))
    (folder / "LICENSE").write_text("terms")
    (folder / ".hidden").write_text("not a file of the model")
    return folder


def mixtral(folder: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    return save(MixtralForCausalLM(MixtralConfig(**BASE, num_local_experts=4, num_experts_per_tok=2)), folder)


def gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=512, vocab_size=259))
    model.config.tie_word_embeddings = True
    return save(model, folder)


def wrapper(folder: Path) -> Path:
    """A multimodal model whose text part is the causal language model."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = {**BASE, "head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
                                "mrope_section": [4, 2, 2]}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
              "patch_size": 8, "num_position_embeddings": 16}
    return save(Qwen3_5ForConditionalGeneration(Qwen3_5Config(
        text_config=text, vision_config=vision, image_token_id=255, video_token_id=254, vision_start_token_id=253,
        vision_end_token_id=252)), folder)


@pytest.mark.parametrize(("make", "name", "changes"), [
    (llama, "gptq", {}), (mixtral, "gptq", {"granularity": "expert", "exclude": ("*.experts.1",)}),
    (gpt2, "gptq", {"granularity": "linear", "exclude": ("*.1.attn.c_proj",)}),
    (wrapper, "compressed-tensors", {"granularity": "group"})])
def test_everything_but_the_planned_weights_is_the_models_own(make: Any, name: str, changes: dict[str, Any],
                                                              tiny_config: RunConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make(tmp_path / "model")
    result = run(replace(tiny_config, model=str(model), estimator="random", options=OPTIONS, **changes))
    export = export_run(result.folder, name, tmp_path / "export")
    before, after = tensors(model), tensors(export.folder)
    replaced = {key for key in before if key not in after}
    planned = {key for key, choice in result.plan.widths().items() if choice}
    assert len(replaced) == len(planned) and all(key.endswith(".weight") for key in replaced)
    prefixes = tuple(key.removesuffix("weight") for key in replaced)
    assert set(before) - replaced == set(before) & set(after)
    assert all(key.startswith(prefixes) for key in set(after) - set(before))
    for key in set(before) - replaced:
        assert torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype
    was, is_now = (json.loads((folder / "config.json").read_text()) for folder in (model, export.folder))
    assert is_now.pop("quantization_config") and is_now == was
    copied = {file.name for file in model.iterdir() if not file.name.startswith(".")} - {"config.json"}
    for file in copied - {"model.safetensors"}:
        assert (export.folder / file).read_bytes() == (model / file).read_bytes()
    assert not (export.folder / ".hidden").exists()
    again = evaluate_folder(export.folder)
    assert again.score is not None and export.score is not None and again.score.nll == export.score.nll


def test_floats_wider_than_the_run_are_stored_as_they_were_measured(tiny_config: RunConfig, tmp_path: Path) -> None:
    result = run(replace(tiny_config, estimator="random", dtype="bfloat16", options={}))
    export = export_run(result.folder, "gptq", tmp_path / "export")
    stored = tensors(export.folder)["model.embed_tokens.weight"]
    source = tensors(Path(tiny_config.model))["model.embed_tokens.weight"]
    assert source.dtype == torch.float32 and torch.equal(stored, source.bfloat16())
    assert json.loads((export.folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_experts_that_the_files_hold_fused_are_refused_before_anything_is_quantized(
        tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tiny("gpt_oss"), tmp_path / "model")
    result = run(replace(tiny_config, model=str(folder), estimator="random", options=OPTIONS))
    monkeypatch.setattr("impq_core.runs.session.Session.quantize_plan", None)
    with pytest.raises(ImpqError, match=r"no weight named model\.layers\.0\.mlp\.experts\.0\..* fused experts"):
        export_run(result.folder, "gptq", tmp_path / "export")
