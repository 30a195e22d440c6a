"""Kernels on accelerators that give the same bits each time."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from impq_core.model.backward import token_weights
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.cost import flop_counter
from impq_core.model.device import repeatable, resolve_device
from impq_core.testing.device import StandIn

IDS = np.random.default_rng(0).integers(0, 64, (3, 8))


class Unrepeatable(torch.autograd.Function):
    """The identity, whose backward pass is refused as kernels of torch are that have no repeatable form."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if torch.get_deterministic_debug_mode() == 2:
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return gradient.clone()


def model_on(device: torch.device, attention: str = "eager") -> BlockwiseModel:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, attn_implementation=attention)
    return BlockwiseModel(LlamaForCausalLM(config).eval().requires_grad_(False).to(device), device)


def weights_of(runner: BlockwiseModel) -> dict[int, torch.Tensor]:
    return token_weights(runner, IDS, {i: block.mlp.down_proj for i, block in enumerate(runner.blocks)})


def test_the_mode_is_set_on_accelerators_alone_and_put_back() -> None:
    def modes() -> tuple[int, bool]:
        return torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory

    before = modes()
    with repeatable(torch.device("cpu"), strict=True):
        assert modes() == before
    for strict in (False, True):
        with pytest.raises(ZeroDivisionError), repeatable(torch.device("cuda"), strict):
            assert modes() == (1 + strict, False)
            with repeatable(torch.device("cuda"), not strict):
                assert modes() == (2 - strict, False)
            assert modes() == (1 + strict, False)
            raise ZeroDivisionError
        assert modes() == before


def test_products_of_cuda_are_repeatable_without_a_word_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    resolve_device("auto")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    resolve_device("auto")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "the user's is kept"


def test_gradients_are_taken_strictly_where_all_kernels_permit_it(device: StandIn) -> None:
    runner = model_on(device.device)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = weights_of(runner)
    assert runner.forward.strict and all(float(weight.sum()) > 0 for weight in found.values())


def test_an_operator_without_a_repeatable_kernel_is_named_once_and_used(device: StandIn) -> None:
    expected = weights_of(model_on(device.device))
    runner = model_on(device.device)
    runner.blocks[1].mlp.register_forward_hook(lambda module, args, output: Unrepeatable.apply(output))
    with pytest.warns(RuntimeWarning, match="may differ in their last bits.*cumsum_cuda_kernel") as told:
        found = weights_of(runner)
    assert len([warning for warning in told if "last bits" in str(warning.message)]) == 1
    assert not runner.forward.strict
    for block, weight in found.items():
        assert torch.equal(weight.cpu(), expected[block].cpu()), block
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        weights_of(runner)


def test_another_error_of_a_backward_pass_is_not_taken_for_it(device: StandIn) -> None:
    runner = model_on(device.device)

    class Broken(Unrepeatable):
        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of memory")

    runner.blocks[1].mlp.register_forward_hook(lambda module, args, output: Broken.apply(output))
    with pytest.raises(RuntimeError, match="out of memory"):
        weights_of(runner)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_attention_with_fewer_key_heads_costs_that_of_its_query_heads(heads: tuple[int, int]) -> None:
    queries, keys = heads
    query = torch.randn(2, queries, 8, 16, requires_grad=True)
    key = torch.randn(2, keys, 8, 16, requires_grad=True)
    with flop_counter() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True,
                                                               enable_gqa=queries != keys)
    assert counter.get_total_flops() == 2 * (2 * 2 * queries * 8 * 8 * 16)
    with flop_counter() as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * (2 * 2 * queries * 8 * 8 * 16)
