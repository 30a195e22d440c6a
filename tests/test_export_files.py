"""An export is the model's folder with the planned weights replaced: every other tensor and file is the model's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny
from checkpoints import gpt2, llama, mixtral, save, tensors, wrapper

from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.exports.export import evaluate_folder, export_run
from impq_core.runs.pipeline import run

OPTIONS = {"backend": {"group_size": 32, "symmetric": True, "grid": "min-max"}}


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
