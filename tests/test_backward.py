"""Gradients in the outputs of linears, and the curvature from them, against autograd on the whole model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from impq_core.game.probe import ModelProbe
from impq_core.model.backward import token_weights
from impq_core.model.bank import Bank
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.layers import layers_of, search_space
from impq_core.model.quantize import fill_bank
from impq_core.model.source import locate_model
from impq_core.model.text import Windows
from impq_core.testing import tiny_model
from impq_core.testing.rounding import Rounding

WINDOWS = Windows(np.random.default_rng(0).integers(0, 256, (6, 24)), "test", "random bytes")


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = tiny_model(tmp_path_factory.mktemp("backward") / "m", request.param)
    return locate_model(str(folder)).load(torch.float32)


def by_autograd(model: PreTrainedModel, names: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs (tokens, columns), and gradients (tokens, rows) of the sum over all tokens of the loss."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name: str) -> torch.utils.hooks.RemovableHandle:
        def forward(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            output.retain_grad()
            seen[name] = args[0].detach(), output
        return model.get_submodule(name).register_forward_hook(forward)

    handles = [hook(name) for name in names]
    embedding = model.get_input_embeddings().weight
    embedding.requires_grad_(True)
    ids = torch.from_numpy(WINDOWS.ids)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    embedding.requires_grad_(False)
    embedding.grad = None
    for handle in handles:
        handle.remove()
    found = {}
    for name, (inputs, output) in seen.items():
        assert output.grad is not None
        found[name] = inputs.flatten(0, 1), output.grad.flatten(0, 1)
    return found


@pytest.mark.parametrize("room", [2**28, 0])
def test_token_weights_are_mean_squares_of_the_losss_gradient(model: PreTrainedModel, room: int) -> None:
    names = [f"model.layers.{block}.{name}" for block in range(3) for name in ("self_attn.k_proj", "mlp.down_proj")]
    runner = BlockwiseModel(model, room=room)
    found = token_weights(runner, WINDOWS.ids, {name: model.get_submodule(name) for name in names}, groups=2)
    for name, (_, gradient) in by_autograd(model, names).items():
        half = gradient.shape[1] // 2
        expected = torch.stack([gradient[:, :half].square().mean(1), gradient[:, half:].square().mean(1)], dim=1)
        np.testing.assert_allclose(found[name].numpy(), expected.numpy(), rtol=2e-3, atol=1e-9)
        assert not found[name].reshape(6, 24, 2)[:, -1].any() and found[name].any()  # nothing follows the last token


@pytest.mark.parametrize("room", [2**28, 0])
def test_the_curvature_is_the_gram_of_inputs_weighted_by_squared_gradients(model: PreTrainedModel, room: int) -> None:
    runner, backend = BlockwiseModel(model, room=room), Rounding()
    space = search_space(layers_of(model, "linear"), backend, backend.choices()[:2], exclude=("*.1.*",))
    probe = ModelProbe(space, Bank(runner, space.everyone, backend), runner, WINDOWS, value="kl")
    found: dict[str, torch.Tensor] = {}
    for linear, gram in probe.output_curvature(groups=3):
        found[linear.name] = found.get(linear.name, torch.zeros(())) + gram
    assert set(found) == {layer.linears[0].name for layer in space.layers}
    assert 3.0 < probe.forwards < 6.0
    for name, (inputs, gradient) in by_autograd(model, list(found)).items():
        for part, gram in zip(gradient.tensor_split(3, dim=1), found[name], strict=True):
            expected = (inputs * part.square().mean(1, keepdim=True)).T @ inputs / (6 * 23)
            np.testing.assert_allclose(gram.numpy(), expected.numpy(), rtol=5e-3, atol=1e-3 * float(expected.max()))


def test_squares_and_absolute_slopes_are_those_of_the_gradients_of_tokens_and_weights(model: PreTrainedModel) -> None:
    runner, backend = BlockwiseModel(model), Rounding()
    space = search_space(layers_of(model, "group"), backend, backend.choices()[:2], exclude=("*.1.*",))
    bank = Bank(runner, space.everyone, backend)
    fill_bank(bank, runner, None, [space.choices] * len(space) + [()] * len(space.pinned), lambda done, total: None)
    probe = ModelProbe(space, bank, runner, WINDOWS)
    at = np.random.default_rng(1).dirichlet([1, 1], len(space))
    squares, absolute = probe.token_squares(at), probe.absolute_slopes(at)
    assert squares.shape == (6, len(space), 2) and absolute.shape == (6, len(space))
    expected, sums = np.zeros_like(squares), np.zeros_like(absolute)
    linears = {spec.name: (i, spec) for i, layer in enumerate(space.layers) for spec in layer.linears}
    original = {name: model.get_submodule(name).weight.detach().clone() for name in linears}
    for name, (i, spec) in linears.items():
        weight = sum(share * bank.variant(spec, choice) for choice, share in zip(space.choices, at[i], strict=True))
        model.get_submodule(name).weight.data.copy_(weight)
    try:
        for name, (inputs, gradient) in by_autograd(model, list(linears)).items():
            (i, spec), now = linears[name], model.get_submodule(name).weight.detach()
            for k, choice in enumerate(space.choices):
                change = bank.variant(spec, choice) - now
                tokens = ((inputs @ change.T) * gradient).sum(dim=1).square().reshape(6, 24)
                expected[:, i, k] += tokens.sum(dim=1).numpy() / 23
            for window in range(6):
                rows = slice(24 * window, 24 * (window + 1))
                step = gradient[rows].T @ inputs[rows] / 23 * (original[name] - now)
                sums[window, i] += float(step.abs().sum())
    finally:
        for name, weight in original.items():
            model.get_submodule(name).weight.data.copy_(weight)
    np.testing.assert_allclose(squares, expected, rtol=1e-2, atol=1e-3 * expected.max())
    np.testing.assert_allclose(absolute, sums, rtol=1e-2)
