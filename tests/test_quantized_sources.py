"""Models whose files are quantized already: dequantized by transformers, planned, exported at 16 bits, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tensors
from quantized_files import (
    Tensors,
    compressed,
    compressed_floats,
    fp8,
    fp8_whole,
    is_linear,
    mixture,
    mxfp4,
    mxfp8,
    rewritten,
)
from safetensors.torch import save_file
from wrappers import tiny_wrapper

from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.exports.export import evaluate_folder, export_run
from impq_core.model.names import file_names
from impq_core.model.source import ModelSource, locate_model
from impq_core.plugins import Plugins
from impq_core.runs.forecast import forecast_run
from impq_core.runs.pipeline import run
from impq_core.testing import tiny_model

Make = Callable[[Path], Tensors]

MADE: dict[str, Make] = {
    "fp8": fp8,
    "fp8, one block": lambda folder: fp8(folder, 128),
    "fp8, one scale": fp8_whole,
    "fp8, experts": lambda folder: fp8(folder, model=mixture),
    "fp8, image and text": lambda folder: fp8(folder, model=tiny_wrapper),
    "mxfp8": mxfp8,
    "mxfp4": mxfp4,
    "compressed-tensors": compressed,
    "compressed-tensors, 3 bits": lambda folder: compressed(folder, (3,)),
    "compressed-tensors, 2 to 8 bits": lambda folder: compressed(folder, (2, 3, 4, 8)),
    "compressed-tensors, floats": compressed_floats}


def unquantized(folder: Path, dense: Tensors) -> ModelSource:
    """The folder of a model as it would be if it had not been quantized."""
    plain = folder / "plain"
    plain.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    save_file(dense, plain / "model.safetensors", metadata={"format": "pt"})
    return locate_model(str(plain))


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantized_model_is_the_model_of_its_dequantized_weights(kind: str, tmp_path: Path) -> None:
    dense = {name: tensor.bfloat16() for name, tensor in MADE[kind](tmp_path).items()}
    source = locate_model(str(tmp_path))
    with pytest.warns(RuntimeWarning, match=rf"quantized already \({kind.partition(',')[0]}\).* to bfloat16"):
        skeleton = source.skeleton()
    source.check_weights()
    unpacked = dict(source.tensors())
    assert set(unpacked) == set(dense)
    for name, tensor in dense.items():
        assert torch.equal(unpacked[name], tensor), name
    plain = unquantized(tmp_path, dense)
    ids = torch.arange(24)[None]
    for dtype in (torch.float32, torch.bfloat16):
        model, other = source.load(dtype), plain.load(dtype)
        assert set(model.state_dict()) == set(skeleton.state_dict())
        assert file_names(model, model.state_dict()) == file_names(other, other.state_dict())
        for name, tensor in other.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        assert getattr(model.config, "quantization_config", None) is None
        with torch.no_grad():
            assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize("kind", ["fp8, experts", "fp8, image and text", "mxfp4", "compressed-tensors"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_dequantized_weights_can_be_on_disk(kind: str, tmp_path: Path) -> None:
    MADE[kind](tmp_path / "model")
    source = locate_model(str(tmp_path / "model"))
    whole = dict(source.load(torch.bfloat16).named_parameters())
    model, places = source.load_streamed(torch.bfloat16, torch.device("cpu"), tmp_path / "scratch")
    assert {name for name, _ in model.named_parameters()} == set(whole) and len(places) > len(whole) / 2
    for name, parameter in model.named_parameters():
        assert torch.equal(places[parameter].read({}) if parameter.is_meta else parameter, whole[name]), name


@pytest.mark.parametrize(("bits", "dtype"), [((4,), torch.float32), ((2, 4), torch.bfloat16)])
def test_weights_that_cannot_be_dequantized_to_a_file_are_refused(bits: tuple[int, ...], dtype: torch.dtype,
                                                                  tmp_path: Path) -> None:
    compressed(tmp_path, bits)
    with pytest.raises(ImpqError, match=r"cannot be dequantized to a file .* --dtype bfloat16"):
        locate_model(str(tmp_path)).load_streamed(dtype, torch.device("cpu"), tmp_path)


@pytest.mark.parametrize("make", [fp8, mxfp4, compressed])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_dry_run_reads_no_weight(make: Make, tiny_config: RunConfig, tmp_path: Path) -> None:
    make(tmp_path)
    config = replace(tiny_config, model=str(tmp_path), backend="hqq", options={"backend": {"group_size": 32}})
    whole = forecast_run(config).searches
    size = (tmp_path / "model.safetensors").stat().st_size
    (tmp_path / "model.safetensors").write_bytes(b"\0" * size)
    assert forecast_run(config).searches == whole


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "hqq", "torchao", "unheard-of"])
def test_methods_that_transformers_does_not_dequantize_are_refused_before_weights_are_read(
        method: str, tmp_path: Path) -> None:
    tiny_model(tmp_path)
    rewritten(tmp_path, dict, quant_method=method, bits=4)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ImpqError, match=rf"of method {method}, and transformers dequantizes only fp8, .*: give the"):
        locate_model(str(tmp_path)).skeleton()


def test_blocks_at_an_edge_are_refused(tmp_path: Path) -> None:
    """96 of 128 rows are two blocks of 64 and 32, and not of 48 and 48."""
    dense = fp8(tmp_path, 48)
    assert any(is_linear(name) and weight.shape[0] % 48 for name, weight in dense.items())
    with pytest.raises(ImpqError, match=r"_proj\.weight, whose \d+ rows or columns are no multiple of 48"):
        locate_model(str(tmp_path)).check_weights()


def test_a_code_that_is_no_number_is_refused(tmp_path: Path) -> None:
    def spoil(stored: Tensors) -> Tensors:
        stored["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[3, 3] = 0x7F
        return stored

    fp8(tmp_path)
    rewritten(tmp_path, spoil, quant_method="fp8", weight_block_size=[32, 32])
    with pytest.raises(ImpqError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        locate_model(str(tmp_path)).check_weights()


def test_a_tensor_that_no_weight_needs_is_refused(tmp_path: Path) -> None:
    fp8(tmp_path)
    rewritten(tmp_path, lambda tensors: {**tensors, "model.layers.0.self_attn.q_proj.odd": torch.ones(2)},
              quant_method="fp8", weight_block_size=[32, 32])
    with pytest.warns(RuntimeWarning), pytest.raises(ImpqError, match=r"no place for \(first: .*q_proj\.odd\)"):
        source = locate_model(str(tmp_path))
        source.skeleton()
        source.load(torch.float32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("make", [fp8, compressed_floats])
def test_an_export_holds_the_dequantized_weights_and_the_plan(make: Make, tiny_config: RunConfig,
                                                              tmp_path: Path) -> None:
    dense = make(tmp_path / "model")
    (tmp_path / "model" / "recipe.yaml").write_text("a description of the earlier quantization")
    kept = "model.layers.2.mlp.down_proj"
    options = {"backend": {"group_size": 32, "symmetric": True, "grid": "min-max"}}
    result = run(replace(tiny_config, model=str(tmp_path / "model"), estimator="random", options=options,
                         granularity="linear", exclude=(kept,)))
    export = export_run(result.folder, "gptq", tmp_path / "export", Plugins())
    stored = tensors(export.folder)
    planned = {f"{name}.weight" for name, choice in result.plan.widths().items() if choice}
    assert set(dense) - planned == set(dense) & set(stored)
    for name in set(dense) - planned:
        assert torch.equal(stored[name], dense[name].bfloat16())
    config = json.loads((export.folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq" and config["dtype"] == "bfloat16"
    assert not (export.folder / "recipe.yaml").exists()
    again = evaluate_folder(export.folder, Plugins())
    assert again.score is not None and export.score is not None and again.score.nll == export.score.nll


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_an_export_in_compressed_tensors_can_be_planned_again(tiny_config: RunConfig, tmp_path: Path) -> None:
    options: dict[str, Any] = {"backend": {"symmetric": True, "grid": "min-max"}}
    first = run(replace(tiny_config, estimator="random", granularity="linear", options=options))
    assert len(set(first.plan.pick.tolist())) == 2
    export = export_run(first.folder, "compressed-tensors", tmp_path / "export", Plugins())
    second = run(replace(tiny_config, model=str(export.folder), estimator="random", backend="hqq", bits=(4, 8),
                         budget="8bits", options={}))
    unquantized = second.evaluation.row("unquantized")
    assert export.score is not None and unquantized.score is not None
    assert unquantized.score.nll == pytest.approx(export.score.nll, abs=0.02)
