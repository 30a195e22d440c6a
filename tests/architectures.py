"""Tiny random models of every text decoder that transformers has, and what impq makes of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from impq_core.errors import ImpqError, one_line
from impq_core.game.probe import ModelProbe
from impq_core.interfaces import Backend
from impq_core.model.bank import Bank
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.forward import OwnForward
from impq_core.model.layers import coverage, layers_of, search_space, unstorable
from impq_core.model.linears import to_linears
from impq_core.model.quantize import fill_bank
from impq_core.model.text import Windows
from impq_core.space import SearchSpace

BLOCKS = 4
STEP = 1e-4
IDS = np.random.default_rng(0).integers(0, 256, (3, 24))

SIZES: dict[str, Any] = {
    "vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "max_position_embeddings": 512,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "attention_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), BLOCKS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp", "n_inner"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
                     "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "moe_num_shared_experts",
                     "moe_layer_start_index", "decoder_sparse_step", "num_dense_layers"), 1),
    "num_key_value_heads": 2, "head_dim": 16, "n_positions": 512, "max_seq_len": 512, "context_length": 512,
    "sliding_window": 16, "rotary_dim": 8, "state_size": 16, "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 259, "query_pre_attn_scalar": 16, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_kv_shared_layers": 0,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_d_state": 16, "mamba_d_head": 16, "mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_dt_rank": 8,
    "laurel_rank": 16, "altup_num_inputs": 2, "index_topk": 8, "index_head_dim": 32, "index_n_heads": 2,
    "expansion_ratio": 2, "use_mamba_kernels": False, "attention_chunk_size": 16, "global_head_dim": 16}
"""Settings of the tiny models, for the configurations that have them."""

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [128] * 4,
                     "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_expand": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "falcon_h1": {"mamba_d_ssm": 128},
    "mamba": {"intermediate_size": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "falcon": {"alibi": False, "multi_query": True, "new_decoder_architecture": False},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    **{kind: {"num_key_value_heads": 4} for kind in (
        "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "youtu",
        "minicpm3", "longcat_flash", "dots3_note_text", "hy_v4")},
    **{kind: {"layer_types": ["linear_attention", "full_attention"] * 2} for kind in (
        "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "bailing_hybrid", "kimi_linear")},
}
"""Further settings, by model type."""

def config_of(kind: str) -> Any:
    """The configuration of a tiny model of a type."""
    defaults = CONFIG_MAPPING[kind]().to_dict()
    return CONFIG_MAPPING[kind](**{**{name: value for name, value in SIZES.items() if name in defaults},
                                   **SPECIAL.get(kind, {})})


def tiny(kind: str) -> PreTrainedModel:
    """A tiny random model of a type. Raises ValueError if it is not tiny."""
    return with_large_weights(AutoModelForCausalLM, config_of(kind))


def with_large_weights(loader: Any, config: Any) -> PreTrainedModel:
    """A random model of a configuration, with weights that are larger than those of an initialisation.

    Args:
        loader: a class of transformers that makes models.
        config: the configuration.

    Raises:
        ValueError: the model is not tiny.
    """
    with torch.device("meta"):
        size = loader.from_config(config).num_parameters()
    if size > 2e7:
        raise ValueError(f"{size} parameters are not tiny")
    torch.manual_seed(0)
    model: PreTrainedModel = loader.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.1)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Row:
    """A tiny model of an architecture, quantized and measured.

    Args:
        share: of the weights in the blocks that are quantized.
        partial: whether a forward can begin at a block.
    """

    share: float
    partial: bool


def survey(model: PreTrainedModel, backend: Backend) -> Row:
    """Quantize a model and compare its losses and slopes with those of the plain forward.

    Raises:
        ImpqError: impq refuses the architecture.
        AssertionError: a loss or a slope differs.
    """
    ids = torch.from_numpy(IDS)
    untouched = OwnForward(model, ())(ids)
    model = to_linears(model)
    torch.testing.assert_close(OwnForward(model, ())(ids), untouched, rtol=1e-3, atol=1e-3)
    choices = tuple(choice for choice in backend.choices() if choice.bits in (8, 2))
    layers = layers_of(model, "group")
    dense = unstorable(layers, backend, choices)
    covered = coverage(model, layers, dense)
    covered.require(type(model).__name__, dense)
    space = search_space(layers, backend, choices, dense=dense)
    runner = BlockwiseModel(model)
    bank = Bank(runner, space.everyone, backend)
    hidden = runner.embed(IDS)
    fill_bank(bank, runner, IDS if backend.needs else None,
              [choices] * len(space) + [()] * len(space.pinned), lambda done, total: None)
    for choice in (None, *choices):
        bank.apply([choice] * len(space) + [None] * len(space.pinned))
        plain = plain_losses(runner.forward, ids)
        np.testing.assert_allclose(runner.nll(runner.run_all(hidden), IDS), plain, rtol=1e-3, atol=1e-3)
    check_slopes(space, bank, runner)
    return Row(covered.share, runner.partial)


def plain_losses(forward: OwnForward, ids: torch.Tensor) -> np.ndarray:
    """Negative log-likelihoods (windows, length - 1) by the plain forward, nats."""
    logits = forward(ids)[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").numpy()


def check_slopes(space: SearchSpace, bank: Bank, runner: BlockwiseModel) -> None:
    """Compare the slopes along all layers' changes together with a difference of losses, window by window. A window in
    which the difference changes an expert that a token is routed to is no measure; one at least is."""
    windows = Windows(IDS, "random", "random bytes")
    wide, narrow = space.choices
    at = np.array([0.98, 0.02])
    slopes = ModelProbe(space, bank, runner, windows).slopes(at)
    ends = []
    for share in (0.02 + STEP, 0.02 - STEP):
        for layer in range(len(space)):
            bank.blend(layer, {wide: 1 - share, narrow: share})
        ends.append(plain_losses(runner.forward, torch.from_numpy(IDS)).mean(axis=1, dtype=np.float64))
    moved = (slopes[:, :, 1] - slopes[:, :, 0]).sum(axis=1)
    differences = (ends[0] - ends[1]) / (2 * STEP)
    assert np.isclose(moved, differences, rtol=0.1, atol=0.05).any(), (moved, differences)


def line_of(kind: str, backend: Backend, make: Callable[[str], PreTrainedModel] = tiny) -> str:
    """A line for a table: the share of the weights that is quantized, or why there is none."""
    try:
        model = make(kind)
        OwnForward(model, ())(torch.from_numpy(IDS))
    except Exception as error:
        return f"no tiny model: {one_line(error, 100)}"
    try:
        row = survey(model, backend)
    except ImpqError as error:
        return f"refused: {error}"
    return f"{100 * row.share:.0f} %" + ("" if row.partial else ", whole forwards")


KINDS = tuple(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in {
    *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus",
    "blenderbot", "blenderbot-small", "camembert", "data2vec-text", "electra", "ernie", "marian", "mbart",
    "megatron-bert", "moshi", "musicgen", "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "reformer",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper", "xlm", "xlm-roberta",
    "xlm-roberta-xl", "xlnet", "xmod"})
"""Model types of text decoders."""
