"""Forwards that begin at a block: when they may, and that they are the model's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from toy import BLOCKS, WIDTH, Toy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from impq_core.errors import ImpqError
from impq_core.model.arguments import leaves, unlike
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


@pytest.mark.parametrize("hands", ["text", "nested", "dict", "kept dict", "cache"])
def test_blocks_that_hand_a_state_to_each_other_are_run_from_the_first(hands: str) -> None:
    model = Toy(hands=hands)
    runner = BlockwiseModel(model)
    hidden = runner.embed(IDS)
    assert runner.partial == (hands in ("text", "nested"))  # made by the model in front of its blocks
    losses = plainly(model)
    for block in range(BLOCKS):
        hidden = runner.run(block, hidden)
    np.testing.assert_allclose(runner.nll(hidden, IDS), losses, rtol=1e-4, atol=1e-4)


def test_a_state_that_no_argument_shows_is_found_by_its_logits() -> None:
    model = Toy()
    first, last = model.model.layers[0], model.model.layers[-1]
    own = type(first).forward

    def keep(hidden_states: torch.Tensor) -> torch.Tensor:
        first.seen = own(first, hidden_states)
        return first.seen

    first.forward = keep
    last.forward = lambda hidden_states: own(last, hidden_states + first.seen)
    runner, losses = BlockwiseModel(model), plainly(model)
    assert runner.nll(runner.run(BLOCKS - 1, runner.embed(IDS)), IDS) == pytest.approx(losses, abs=1e-4)
    assert not runner.partial


def test_logits_that_depend_on_other_positions_are_refused() -> None:
    model = Toy()
    own = type(model.model.norm).forward
    model.model.norm.forward = lambda hidden: own(model.model.norm, hidden).cumsum(dim=1)
    with pytest.raises(ImpqError, match="logits of Toy depend on more"):
        BlockwiseModel(model).embed(IDS)


def test_released_architectures_that_share_keys_and_values_are_run_from_the_first_block() -> None:
    config = CONFIG_MAPPING["gemma4_unified_text"](
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, global_head_dim=16, num_global_key_value_heads=2, sliding_window=16,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 3, pad_token_id=258)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    runner = BlockwiseModel(model)
    losses = runner.nll(runner.run_all(runner.embed(IDS)), IDS)
    assert runner.forward.handed == "shared_kv_states" and not runner.partial
    np.testing.assert_allclose(losses, plainly(model), rtol=1e-4, atol=1e-4)


def test_what_makes_two_calls_unlike() -> None:
    mask, other = torch.zeros(2, 2), torch.ones(2, 2)

    def differing(a: dict[str, Any], b: dict[str, Any]) -> str:
        return unlike(leaves((), a), leaves((), b))

    alike = {"mask": mask, "pair": (mask, [None, 1.5]), "masks": {"full": mask}, "cached": False}
    assert differing(alike, {**alike, "mask": mask.clone()}) == ""
    for name, value in (("mask", other), ("mask", mask.double()), ("mask", torch.zeros(2, 3)), ("mask", None),
                        ("pair", (mask, [None, 2.5])), ("pair", (mask,)), ("masks", {"full": other}), ("masks", {}),
                        ("cached", 0)):
        assert differing(alike, {**alike, name: value}) == name
    holder = object()
    assert differing({"state": holder}, {"state": holder}) == "state"  # it may have changed since
    assert differing({}, {"more": None}) == differing({"more": None}, {}) == "more"
    assert unlike(leaves((mask,), {}), leaves((other,), {})) == "argument 1"


def test_checks_are_made_once_and_read_few_tokens() -> None:
    model, tokens = Toy(), []
    for block in model.model.layers:
        block.mix.register_forward_pre_hook(lambda module, args: tokens.append(args[0].numel() // WIDTH))
    runner = BlockwiseModel(model)
    runner.embed(IDS)
    behind = BLOCKS - BLOCKS // 2
    assert sum(tokens) <= 2 * (BLOCKS + behind) * IDS.shape[1]  # two texts of one window: plainly, and from the middle
    tokens.clear()
    runner.embed(IDS[::-1].copy())
    assert tokens == []
