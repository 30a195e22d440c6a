"""Architectures: their blocks and linears, and equality of a forward block by block with the model's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from impq_core.errors import ImpqError
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.layers import blocks_of, layers_of
from impq_core.model.source import locate_model
from impq_core.testing import ARCHITECTURES, tiny_model

IDS = np.random.default_rng(0).integers(0, 256, (70, 40))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("arch") / request.param, request.param, blocks=7)


def test_blocks_and_linears_are_found_without_weights(folder: Path) -> None:
    skeleton = locate_model(str(folder)).skeleton()
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert [name for name, _ in blocks_of(skeleton)] == [f"model.layers.{i}" for i in range(7)]
    by = {granularity: layers_of(skeleton, granularity) for granularity in ("block", "group", "linear")}
    assert len(by["block"]) == 7 and len(by["group"]) == 7 * 4
    assert len(by["linear"]) == 7 * (4 if folder.name == "phi3" else 7)
    names = {g: {spec.name for layer in layers for spec in layer.linears} for g, layers in by.items()}
    assert names["block"] == names["group"] == names["linear"]
    assert not any("head" in name or "embed" in name for name in names["block"])
    assert len({sum(layer.parameters for layer in layers) for layers in by.values()}) == 1
    if folder.name != "phi3":
        groups = {layer.name.split(".", 3)[3]: len(layer.linears) for layer in by["group"] if layer.block == 0}
        assert groups == {"self_attn.qkv": 3, "self_attn.o_proj": 1, "mlp.gate_up": 2, "mlp.down_proj": 1}


@torch.inference_mode()
def test_block_by_block_is_the_model(folder: Path) -> None:
    model = locate_model(str(folder)).load(torch.float32)
    runner = BlockwiseModel(model)
    ours = runner.nll(runner.run_all(runner.embed(IDS)), IDS)
    ids = torch.from_numpy(IDS)
    logits = model(input_ids=ids).logits
    theirs = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    np.testing.assert_allclose(ours.ravel(), theirs.numpy(), rtol=1e-4, atol=1e-4)


def test_a_model_that_does_more_between_its_blocks_is_refused(tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    model = locate_model(str(tiny_model(tmp_path / "m"))).load(torch.float32)
    plain = LlamaForCausalLM.forward

    def scaled(self: LlamaForCausalLM, **kwargs: object) -> object:
        out = plain(self, **kwargs)  # type: ignore[arg-type]
        out.logits = out.logits * 0.5
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(ImpqError, match="does more than run its blocks"):
        BlockwiseModel(model).embed(IDS)


def test_folders_that_hold_no_usable_model(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m")
    with pytest.raises(ImpqError, match="no such folder"):
        locate_model(str(tmp_path / "none"))
    (folder / "model.safetensors").rename(tmp_path / "kept")
    with pytest.raises(ImpqError, match=r"no \.safetensors weights"):
        locate_model(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ImpqError, match="only pickled weights"):
        locate_model(str(folder))
    (folder / "model.safetensors").write_bytes((tmp_path / "kept").read_bytes()[:-1000])
    with pytest.raises(ImpqError, match="cannot be loaded"):
        locate_model(str(folder)).load(torch.float32)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ImpqError, match="no causal language model"):
        locate_model(str(folder)).skeleton()
    (folder / "config.json").unlink()
    with pytest.raises(ImpqError, match=r"no config\.json"):
        locate_model(str(folder))


def test_missing_tensors_are_not_left_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ImpqError, match="lack 1 tensors"):
        locate_model(str(folder)).load(torch.float32)
