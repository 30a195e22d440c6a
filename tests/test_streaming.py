"""Blocks that stay on disk until they work: the same numbers, and memory that does not grow with the model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import IDS, config_of
from safetensors.torch import load_file, save_file
from stopped import cut
from toy import BLOCKS, Toy
from transformers import AutoModelForCausalLM

from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError
from impq_core.exports.export import evaluate_folder, export_run
from impq_core.files import abandoned
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.demo import cache_folder
from impq_core.model.layers import layers_of
from impq_core.model.source import locate_model
from impq_core.plugins import Plugins
from impq_core.runs.footprint import MemoryPlan, memory, work_of
from impq_core.runs.layout import lay_out
from impq_core.runs.pipeline import resume, run
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session
from impq_core.testing import tiny_model
from impq_core.testing.device import device_there

CPU = torch.device("cpu")


def saved(kind: str, folder: Path) -> Path:
    """A tiny random model in several files."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.float32).save_pretrained(
        folder, max_shard_size="300KB")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gpt_oss", "qwen3_next"])
def test_a_streamed_model_is_the_resident_one(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Plain and transposed linears, experts one by one and fused in the files, blocks of several classes."""
    source = locate_model(str(saved(kind, tmp_path / "m")))
    resident = BlockwiseModel(source.load(dtype))
    (tmp_path / "scratch").mkdir()
    model, stored = source.load_streamed(dtype, CPU, tmp_path / "scratch")
    streamed = BlockwiseModel(model, stored=stored)
    assert streamed.placement.streamed and not resident.placement.streamed
    for runner in (resident, streamed):
        for layer in layers_of(runner.model, "linear"):
            module = runner.model.get_submodule(layer.linears[0].name)
            assert isinstance(module, torch.nn.Linear)
    ours, theirs = (runner.nll(runner.run_all(runner.embed(IDS)), IDS) for runner in (streamed, resident))
    np.testing.assert_array_equal(ours, theirs)
    names = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert names == {name for name, _ in model.named_parameters() if ".layers." in name or ".h." in name}
    compared = 0
    for name in names:
        linear = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("proj.weight") and isinstance(linear, torch.nn.Linear):
            other = resident.model.get_submodule(name.rpartition(".")[0])
            assert torch.equal(streamed.placement.original(linear), other.weight)
            compared += 1
    assert compared


def needed(config: RunConfig, streamed: bool) -> int:
    layout = lay_out(config, Plugins())
    stages = memory(layout, work_of(layout), MemoryPlan(streamed, 2**28)).values()
    return max(sum(size for name, size in sizes.items() if name != "weights_file") for sizes in stages)


@pytest.fixture
def config(tmp_path: Path, texts: tuple[Path, Path]) -> RunConfig:
    """A run on a model of eight blocks, and the memory in which it is streamed."""
    folder = tiny_model(tmp_path / "m", blocks=8)
    config = RunConfig(model=str(folder), backend="gptq", estimator="aumann-shapley", bits=(2, 4), device="cpu",
                       calibration=TextConfig(str(texts[0]), 8, 24), game_windows=4, refine=20,
                       evaluation=TextConfig(str(texts[1]), 4, 24), dtype="float32", tracking_uri="none",
                       output=str(tmp_path / "runs"), granularity="group",
                       options={"backend": {"grid": "min-max", "group_size": 32}, "estimator": {"nodes": 1}})
    resident, streamed = needed(config, False), needed(config, True)
    assert streamed < resident
    return replace(config, memory=f"{(resident + streamed) // 2}B")


def outcome(folder: Path) -> Mapping[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("estimate.npz", "gradients.jsonl", "measurements.jsonl",
                                                            "variants.json", "scores.jsonl", "evaluation.json")}


def plan_of(folder: Path) -> Any:
    return json.loads((folder / "plan.json").read_text())["layers"]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each session streams."""
    found: list[bool] = []
    load = Session._load

    def note(self: Session) -> BlockwiseModel:
        runner = load(self)
        found.append(runner.placement.streamed)
        return runner

    monkeypatch.setattr(Session, "_load", note)
    return found


def test_a_run_in_little_memory_has_the_results_of_one_in_much(config: RunConfig, streams: list[bool]) -> None:
    small = run(config)
    much = run(replace(config, memory="", cache=False))
    assert streams == [True, False]
    assert plan_of(small.folder) == plan_of(much.folder)
    ours, theirs = outcome(small.folder), outcome(much.folder)
    assert {name for name in ours if ours[name] != theirs[name]} == set()
    assert abandoned(cache_folder()) == []


def test_an_interrupted_run_goes_on_in_little_memory(config: RunConfig, streams: list[bool]) -> None:
    whole = outcome(run(replace(config, cache=False)).folder)
    for stage, done in (("quantize", 2), ("refine", 3), ("evaluate", 3)):
        folder = cut(replace(config, cache=stage == "evaluate"), stage, done)
        assert outcome(resume(folder).folder) == whole, stage
    assert all(streams)


def test_too_little_memory_is_refused_before_anything_is_loaded(config: RunConfig, streams: list[bool]) -> None:
    with pytest.raises(ImpqError, match=r"GB of memory are needed on cpu .* 0\.0 GB are given: give more --memory"):
        run(replace(config, memory="1MB"))
    with pytest.raises(ImpqError, match="memory '8 apples' is not understood"):
        prepare(replace(config, memory="8 apples"), Plugins())
    assert not streams


def test_what_stands_on_the_device_does_not_grow_with_the_blocks(tmp_path: Path) -> None:
    peaks = []
    for blocks in (3, 12):
        source = locate_model(str(tiny_model(tmp_path / str(blocks), blocks=blocks)))
        with device_there() as device, warnings.catch_warnings():
            (tmp_path / f"scratch{blocks}").mkdir()
            model, stored = source.load_streamed(torch.float32, device.device, tmp_path / f"scratch{blocks}")
            runner = BlockwiseModel(model, device.device, stored)
            hidden = runner.embed(IDS)
            device.forget()
            runner.nll(runner.run_all(hidden), IDS)
            peaks.append(device.peak - device.held)
    assert peaks[0] == peaks[1]


def test_a_block_stands_with_other_weights_until_the_last_that_uses_it_leaves() -> None:
    runner = BlockwiseModel(Toy())
    linear, own = runner.blocks[1].mix, runner.blocks[1].mix.weight
    runner.placement.replace(linear, lambda: torch.zeros_like(own))
    assert linear.weight is own
    with runner.placement.loaded(0, 1):
        assert not linear.weight.any() and torch.equal(runner.placement.original(linear), own)
        with runner.placement.loaded(1):
            assert not linear.weight.any()
        assert not linear.weight.any()
        with pytest.raises(AssertionError, match="a block is loaded"):
            runner.placement.replace(linear, None)
    assert linear.weight is own

    def fail() -> torch.Tensor:
        raise ImpqError("deleted")

    runner.placement.replace(runner.blocks[1].feed.down, fail)
    with pytest.raises(ImpqError, match="deleted"), runner.placement.loaded(1):
        pass
    assert linear.weight is own
    runner.placement.replace(runner.blocks[1].feed.down, None)
    with runner.placement.in_float32(), runner.placement.loaded(*range(BLOCKS)):
        assert not linear.weight.any()


def test_a_linear_that_two_blocks_share_stands_for_both() -> None:
    model = Toy()
    model.model.layers[2].mix = model.model.layers[0].mix
    runner = BlockwiseModel(model)
    own = runner.blocks[0].mix.weight
    runner.placement.replace(runner.blocks[0].mix, lambda: 2 * own)
    with runner.placement.loaded(2), runner.placement.loaded(0):
        pass
    with runner.placement.loaded(0):
        with runner.placement.loaded(2):
            assert torch.equal(runner.blocks[2].mix.weight, 2 * own)
        assert torch.equal(runner.blocks[0].mix.weight, 2 * own)
    assert runner.blocks[0].mix.weight is own


def test_an_export_is_read_in_little_memory_too(config: RunConfig, streams: list[bool], tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings and norms are the export's own: with others its loss is another."""
    monkeypatch.setattr("impq_core.runs.session.plan_memory",
                        lambda layout: MemoryPlan(bool(layout.config.memory), 2**28))
    result = run(replace(config, estimator="random", refine=0, options={"backend": config.options["backend"]}))
    exported = export_run(result.folder, "gptq", tmp_path / "export")
    assert exported.score is not None
    texts: dict[str, Any] = {"device": "cpu"}
    found = [evaluate_folder(exported.folder, memory=memory, **texts).score for memory in ("", config.memory)]
    file = exported.folder / "model.safetensors"
    tensors = load_file(file)
    for name in ("model.layers.2.input_layernorm.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name] * 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    found += [evaluate_folder(exported.folder, memory=memory, **texts).score for memory in ("", config.memory)]
    assert streams == [True, True, False, True, False, True]
    losses = [score.window_nll.tolist() for score in found if score is not None]
    assert losses[0] == losses[1] == exported.score.window_nll.tolist()
    assert losses[2] == losses[3] != losses[0]


def test_a_run_that_needed_too_much_goes_on_in_less(config: RunConfig, streams: list[bool]) -> None:
    much = replace(config, memory="")
    whole = outcome(run(much).folder)
    folder = cut(replace(much, cache=False), "quantize", 2)
    assert outcome(resume(folder, memory=config.memory).folder) == whole
    assert streams == [False, False, True]
