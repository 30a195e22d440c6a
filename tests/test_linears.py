"""All that holds a weight matrix becomes a linear, and the model computes what it did."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from architectures import IDS, tiny
from safetensors import safe_open
from torch import nn

from impq_core.errors import ImpqError
from impq_core.model.linears import to_linears
from impq_core.model.names import file_names
from impq_core.model.source import locate_model
from impq_core.testing import tiny_model
from impq_core.testing.tiny import byte_tokenizer

MIXTURES = ("mixtral", "gpt_oss", "llama4_text", "granitemoe", "jamba", "deepseek_v3")


@torch.inference_mode()
@pytest.mark.parametrize("kind", [*MIXTURES, "gpt2"])
def test_the_model_computes_what_it_did(kind: str) -> None:
    model, ids = tiny(kind), torch.from_numpy(IDS)
    before = model(input_ids=ids).logits
    weights = sum(parameter.numel() for parameter in model.parameters())
    stores = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert to_linears(model) is model
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    assert weights == sum(parameter.numel() for parameter in model.parameters())
    assert {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} == stores  # no copy
    assert not [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "conv" not in name]


def test_the_skeleton_has_the_same_linears() -> None:
    for kind in MIXTURES:
        model = tiny(kind)
        skeleton = to_linears(copy.deepcopy(model).to("meta"))
        shapes = [{name: module.weight.shape for name, module in each.named_modules() if isinstance(module, nn.Linear)}
                  for each in (skeleton, to_linears(model))]
        assert shapes[0] == shapes[1]


def test_experts_that_compute_something_else_are_refused() -> None:
    model = tiny("mixtral")
    experts = model.model.layers[1].mlp.experts
    own = type(experts).forward
    try:
        type(experts).forward = lambda self, *args: 2 * own(self, *args)
        with pytest.raises(ImpqError, match=r"experts of MixtralForCausalLM .* compute more"):
            to_linears(model)
    finally:
        type(experts).forward = own


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_have_the_names_of_the_files_that_hold_them_one_by_one(kind: str, tmp_path: Path) -> None:
    tiny(kind).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = locate_model(str(tmp_path)).load(torch.float32)
    names = file_names(model, model.state_dict())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    held = {name: names[name] for name in model.state_dict() if names.get(name) in stored}
    assert all(torch.equal(tensor, stored[held[name]]) for name, tensor in model.state_dict().items() if name in held)
    experts = {name for name in model.state_dict() if ".experts." in name}
    assert (experts <= set(held)) == (kind not in ("gpt_oss", "llama4_text", "granitemoe"))  # those store them fused
    assert len(set(held.values())) == len(held)


def test_dense_models_stay_as_they_are(tmp_path: Path) -> None:
    model = locate_model(str(tiny_model(tmp_path / "m"))).load(torch.float32)
    modules = dict(model.named_modules())
    assert dict(to_linears(model).named_modules()) == modules
