"""Replay of blocks with recorded arguments: architectures that are supported, and those that are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from toy import BLOCKS, Toy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from impq_core.errors import ImpqError
from impq_core.model.arguments import Call, unlike
from impq_core.model.blockwise import BlockwiseModel

IDS = np.random.default_rng(0).integers(0, 256, (7, 40))


def plainly(model: Any) -> np.ndarray:
    """The negative log-likelihood of each token by the model's own forward, each window alone."""
    with torch.no_grad():
        logits = torch.cat([model(input_ids=ids[None]).logits for ids in torch.from_numpy(IDS)])
    targets = torch.from_numpy(IDS)[:, 1:].flatten()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none").view(len(IDS), -1).numpy()


@pytest.mark.parametrize("hands", ["", "position"])
@pytest.mark.parametrize("per_batch", [1, 3])
def test_losses_over_several_batches_are_the_models_own(hands: str, per_batch: int,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("impq_core.model.blockwise.BATCH_TOKENS", per_batch * IDS.shape[1])
    model = Toy(experts=True, hands=hands)
    runner = BlockwiseModel(model)
    assert len(runner) == BLOCKS
    losses = runner.nll(runner.run_all(runner.embed(IDS)), IDS)
    np.testing.assert_allclose(losses, plainly(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("hands", "named"), [
    ("text", "gain"), ("dict", "shared_states"), ("kept dict", "shared_states"), ("cache", "past"), ("nested", "seen")])
def test_arguments_that_depend_on_the_text_or_hold_a_state_are_refused(hands: str, named: str) -> None:
    runner = BlockwiseModel(Toy(hands=hands))
    for _ in range(2):  # asking again is no way around it
        with pytest.raises(ImpqError, match=f"Toy gives its blocks '{named}'"):
            runner.embed(IDS)


def test_blocks_of_a_released_architecture_that_share_keys_and_values_are_refused() -> None:
    config = CONFIG_MAPPING["gemma4_unified_text"](
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, global_head_dim=16, num_global_key_value_heads=2, sliding_window=16,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 3, pad_token_id=258)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(ImpqError, match="gives its blocks 'shared_kv_states'"):
        BlockwiseModel(model).embed(IDS)


def test_what_makes_two_calls_unlike() -> None:
    mask, other = torch.zeros(2, 2), torch.ones(2, 2)

    def differing(a: dict[str, Any], b: dict[str, Any]) -> str | None:
        return unlike(Call((), a).leaves(), Call((), b).leaves())

    alike = {"mask": mask, "pair": (mask, [None, 1.5]), "masks": {"full": mask}, "cached": False}
    assert differing(alike, {**alike, "mask": mask.clone()}) is None
    for name, value in (("mask", other), ("mask", mask.double()), ("mask", torch.zeros(2, 3)), ("mask", None),
                        ("pair", (mask, [None, 2.5])), ("pair", (mask,)), ("masks", {"full": other}), ("masks", {}),
                        ("cached", 0)):
        assert differing(alike, {**alike, name: value}) == name
    holder = object()
    assert differing({"state": holder}, {"state": holder}) == "state"  # it may have changed since
    assert differing({}, {"more": None}) == differing({"more": None}, {}) == "more"
    assert unlike(Call((mask,), {}).leaves(), Call((other,), {}).leaves()) == "argument 2"


def test_checks_cost_little_and_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("impq_core.model.blockwise.BATCH_TOKENS", 3 * IDS.shape[1])
    model, windows = Toy(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: windows.append(len(args[0])))
    runner = BlockwiseModel(model)
    runner.embed(IDS)
    # Two texts of one window, then the full batch: forward and replay; the last batch is of one window again.
    assert windows == [1, 1, 1, 3, 3]
    windows.clear()
    runner.embed(IDS[::-1].copy())
    assert windows == []
