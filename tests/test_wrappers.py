"""Multimodal models: their language model is planned and exported, all else stays as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import BLOCKS, survey
from checkpoints import tensors
from impq_hqq.backend import Hqq, Options
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForMultimodalLM
from wrappers import KINDS, config_of, tiny, tiny_wrapper

from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.exports.export import evaluate_folder, export_run
from impq_core.model.layers import blocks_of, layers_of
from impq_core.model.shapes import Shapes
from impq_core.model.source import locate_model
from impq_core.plugins import Plugins
from impq_core.results import RunResult
from impq_core.runs.pipeline import run
from impq_core.testing.tiny import byte_tokenizer

SOME = ("gemma3", "gemma4", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "mistral3", "llava", "internvl",
        "llama4", "paligemma", "voxtral")
OPTIONS = {"backend": {"group_size": 32, "symmetric": True, "grid": "min-max"}}
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 190, (2, 24)))


@pytest.mark.parametrize("kind", SOME)
def test_the_language_model_inside_is_quantized_and_measured(kind: str) -> None:
    model = tiny(kind)
    text = set(model.get_decoder().modules())
    blocks = [block for _, block in blocks_of(model)]
    assert len(blocks) == BLOCKS and text.issuperset(blocks)
    row = survey(model, Hqq(Options(group_size=16)))
    assert row.share > 0.98 and row.partial


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_are_those_of_the_text_decoder_even_if_the_encoder_is_larger(kind: str) -> None:
    try:
        config = config_of(kind)
        with torch.device("meta"):
            model = AutoModelForMultimodalLM.from_config(config)
    except Exception as error:
        pytest.skip(f"no tiny configuration: {type(error).__name__}")
    inside = set(model.get_decoder().modules())
    others = [name for name, module in model.named_modules()
              if isinstance(module, torch.nn.ModuleList) and module not in inside]
    name = blocks_of(model)[0][0].rpartition(".")[0]
    assert name not in others and len(blocks_of(model)) == config.get_text_config(decoder=True).num_hidden_layers


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl", "voxtral"])
def test_encoders_and_projectors_are_counted(kind: str) -> None:
    model = tiny(kind)
    shapes = Shapes.of(model, layers_of(model, "linear"))
    text = ("model.language_model.", "lm_head.")
    assert 0 < shapes.encoders == sum(parameter.numel() for name, parameter in model.named_parameters()
                                      if not name.startswith(text))


def exported(kind: str, name: str, config: RunConfig, folder: Path) -> tuple[RunResult, Path]:
    """The run and the export of a tiny multimodal model in ``folder``/model."""
    model = tiny_wrapper(folder / "model", kind)
    result = run(replace(config, model=str(model), estimator="random", granularity="linear", options=OPTIONS))
    return result, export_run(result.folder, name, folder / "export", Plugins()).folder


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl", "mistral3"])
def test_an_export_is_the_multimodal_model_with_the_planned_weights_replaced(kind: str, tiny_config: RunConfig,
                                                                             tmp_path: Path) -> None:
    result, folder = exported(kind, "compressed-tensors", tiny_config, tmp_path)
    model = tmp_path / "model"
    before, after = tensors(model), tensors(folder)
    widths = result.plan.widths()
    assert len(set(before) - set(after)) == len(widths) and set(result.plan.pick.tolist()) == {0, 1}
    for name in set(before) & set(after):
        assert torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype
    rest = sum(tensor.numel() for name, tensor in before.items() if name in after)
    assert result.rest_bytes == 4 * rest
    was, is_now = (json.loads((path / "config.json").read_text()) for path in (model, folder))
    groups = is_now.pop("quantization_config")["config_groups"].values()
    assert is_now == was and {name for group in groups for name in group["targets"]} == set(widths)
    for file in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        assert (folder / file).read_bytes() == (model / file).read_bytes()
    theirs = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert set(widths) < {name for name, _ in theirs.named_modules()}
    ours = AutoModelForMultimodalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        apart = (theirs(IDS).logits - ours(IDS).logits).abs().max()
        for name in widths:
            assert hasattr(theirs.get_submodule(name), "quantization_scheme")
            ours.get_submodule(name).weight.data = theirs.get_submodule(name).weight.data
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-4)
    assert apart > 0.01
    again = evaluate_folder(folder, Plugins())
    score = json.loads((folder / "impq.json").read_text())["score"]
    assert again.score is not None and again.score.nll == score["nll"]


def test_the_gptq_format_has_widths_by_both_names(tiny_config: RunConfig, tmp_path: Path) -> None:
    result, folder = exported("mistral3", "gptq", tiny_config, tmp_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    names = {key.removeprefix("+:^").removesuffix("$").replace("\\", "") for key in config["dynamic"]}
    for name, choice in result.plan.widths().items():
        in_file = name.replace("model.language_model.", "language_model.model.")
        assert choice is not None and (choice.bits == config["bits"]) == (name not in names)
        assert (name in names) == (in_file in names)


@pytest.mark.parametrize("name", ["hqq", "quanto"])
def test_formats_that_are_loaded_by_the_names_of_modules_do_not_hold_files_with_other_names(
        name: str, tiny_config: RunConfig, tmp_path: Path) -> None:
    model = tiny_wrapper(tmp_path / "model")
    result = run(replace(tiny_config, model=str(model), backend=name, estimator="random", options={}))
    with pytest.raises(ImpqError, match=rf"'{name}' .* \(language_model\.model\..* for model\.language_model\.layers"):
        export_run(result.folder, name, tmp_path / "export", Plugins())
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(("name", "says"), [
    ("language_model.model.layers.7.x.weight", r"no place for \(first: .*layers\.7\.x\.weight"),
    ("vision_tower.odd.weight", r"no place for \(first: .*vision_tower\.odd\.weight"),
    ("vision_tower.ln_pre.weight", r"lack 1 tensors \(first: model\.vision_tower\.ln_pre\.weight")])
def test_all_parts_of_the_files_are_checked(name: str, says: str, tmp_path: Path) -> None:
    stored = tensors(tiny_wrapper(tmp_path))
    if stored.pop(name, None) is None:
        stored[name] = torch.ones(4)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ImpqError, match=says):
        locate_model(str(tmp_path)).check_weights()


def test_a_package_that_an_encoder_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*arguments: object, **more: object) -> None:
        raise ImportError("VisionModel requires the timm library")

    source = locate_model(str(tiny_wrapper(tmp_path)))
    monkeypatch.setattr(AutoModelForMultimodalLM, "from_config", lacking)
    with pytest.raises(ImpqError, match=r"needs a package that is not installed: .*timm"):
        source.skeleton()


def test_a_model_that_needs_images_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("instructblip").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ImpqError, match=r"does not run on text alone: .* needs pixel_values"):
        locate_model(str(tmp_path)).skeleton()
