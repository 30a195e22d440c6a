"""GGUF files: llama.cpp computes in them what transformers computes in the model, and their bytes are the promise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wrappers
from architectures import with_large_weights
from gguf import GGUFReader
from gguf_files import save, unquantized, written
from impq_gguf.exporter import GgufExporter
from impq_gguf.layout import Layout
from impq_gguf.names import ARCHITECTURES
from llamacpp import Model
from transformers import AutoModelForMultimodalLM

from impq_core.errors import ImpqError
from impq_core.model.source import locate_model
from impq_core.space import Choice, LinearSpec
from impq_core.testing.tiny import byte_tokenizer

IDS = np.concatenate([[256], np.random.default_rng(0).integers(0, 256, 39)])

F16_GELU = 4e-3
"""Difference of log-probabilities that llama.cpp's table of GELU, in float16, makes after a few blocks."""

class InParts(GgufExporter):
    part_bytes = 4 * 10**6


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().log_softmax(-1).numpy()


def expected(folder: Path, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Log-probabilities by transformers."""
    model = locate_model(str(folder)).load(dtype).float()
    with torch.no_grad():
        return log_probabilities(model(input_ids=torch.from_numpy(IDS)[None]).logits[0].numpy())


def computed(file: Path) -> np.ndarray:
    """Log-probabilities by llama.cpp."""
    with Model(file, len(IDS)) as model:
        return log_probabilities(model.logits(IDS))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_llama_cpp_computes_what_transformers_does(kind: str, tmp_path: Path) -> None:
    model = save(kind, tmp_path / "model")
    found = computed(written(unquantized(model), tmp_path / "export"))
    tolerance = F16_GELU if any("gelu" in name for name in ARCHITECTURES[kind].activations) else 5e-5
    np.testing.assert_allclose(found, expected(model), rtol=0.0, atol=tolerance)


FACTORS = [1.0 + 0.1 * number for number in range(8)]
THETA = {"rope_type": "default", "rope_theta": 10000.0}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": {**THETA, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    ("llama", {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 4.0}}),
    ("llama", {"rope_parameters": {**THETA, "rope_type": "yarn", "factor": 4.0,
                                   "original_max_position_embeddings": 16}, "max_position_embeddings": 64}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", {"head_dim": 32, "rope_parameters": {**THETA, "rope_theta": 1e6}}),
    ("qwen3", {"rope_parameters": {**THETA, "rope_type": "yarn", "factor": 4.0,
                                   "original_max_position_embeddings": 16}, "max_position_embeddings": 64}),
    ("gemma3_text", {"rope_parameters": {"full_attention": {**THETA, "rope_type": "linear", "factor": 8.0},
                                         "sliding_attention": THETA}}),
    ("phi3", {"rope_parameters": {**THETA, "rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS,
                                  "original_max_position_embeddings": 128, "partial_rotary_factor": 1.0},
              "original_max_position_embeddings": 128}),
]


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_rotary_embeddings_biases_and_tied_heads(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = save(kind, tmp_path / "model", settings)
    plain = save(kind, tmp_path / "plain")
    found, right = computed(written(unquantized(model), tmp_path / "export")), expected(model)
    np.testing.assert_allclose(found, right, rtol=0.0, atol=F16_GELU if kind.startswith("gemma") else 5e-5)
    assert np.abs(right - expected(plain)).max() > 0.02  # the setting matters


def test_a_large_file_is_split_into_parts_that_llama_cpp_finds(tmp_path: Path) -> None:
    model = save("llama", tmp_path / "model", {"hidden_size": 256, "intermediate_size": 512})
    first = written(unquantized(model), tmp_path / "export", InParts)
    parts = GgufExporter().files(tmp_path / "export")
    assert first == parts[0] and len(parts) > 1 and max(part.stat().st_size for part in parts) < 4.1e6
    assert [part.name for part in parts] == [f"model-{number:05}-of-{len(parts):05}.gguf"
                                             for number in range(1, len(parts) + 1)]
    np.testing.assert_allclose(computed(first), expected(model), rtol=0.0, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrices_have_the_dtype_of_the_run(dtype: torch.dtype, tmp_path: Path) -> None:
    model = save("qwen3_moe", tmp_path / "model")
    file = written(unquantized(model, dtype), tmp_path / "export")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    name = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert kinds["token_embd.weight"] == kinds["blk.0.ffn_up_exps.weight"] == name
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    # llama.cpp rounds activations to the type of the weights.
    np.testing.assert_allclose(computed(file), expected(model, dtype), rtol=0.0, atol=0.2)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt_neox", {}, "gpt_neox"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
    ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "layer_types"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar"),
    ("llama", {"rope_parameters": {**THETA, "rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("stablelm", {"qk_layernorm": True}, "layernorm"),
]


@pytest.mark.parametrize(("kind", "settings", "named"), REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused(kind: str, settings: dict[str, Any], named: str,
                                                    tmp_path: Path) -> None:
    checkpoint = unquantized(save(kind, tmp_path / "model", settings))
    with pytest.raises(ImpqError, match=named) as error:
        GgufExporter().file_bytes(replace(checkpoint, config=checkpoint.config | settings))
    assert "\n" not in str(error.value)


def test_llama_cpp_refuses_tensors_that_it_does_not_read(tmp_path: Path) -> None:
    checkpoint = unquantized(save("llama", tmp_path / "model"))
    more = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32, device="meta")}  # of another shape
    with pytest.raises(ImpqError, match=r"does not load .*blk\.0\.attn_q\.bias"):
        GgufExporter().file_bytes(replace(checkpoint, dense=checkpoint.dense | more))


@pytest.mark.parametrize("kind", ["gemma3", "llava", "mistral3"])
def test_the_language_model_of_a_multimodal_model(kind: str, tmp_path: Path) -> None:
    wrapper, config = tmp_path / "model", wrappers.config_of(kind)
    if kind == "gemma3":
        config.text_config.layer_types = ["sliding_attention"] * config.text_config.num_hidden_layers
    with_large_weights(AutoModelForMultimodalLM, config).save_pretrained(wrapper)
    byte_tokenizer().save_pretrained(wrapper)
    checkpoint = unquantized(wrapper)
    exporter = GgufExporter()
    (tmp_path / "export").mkdir()
    with pytest.warns(RuntimeWarning, match="language model alone: .* multi_modal_projector"):
        exporter.export(checkpoint, tmp_path / "export")
    [file] = exporter.files(tmp_path / "export")
    assert file.stat().st_size == exporter.file_bytes(checkpoint)
    restored = exporter.dense(tmp_path / "export", checkpoint)
    assert {name for name in checkpoint.dense if "language_model" in name} == set(restored)
    window = 16  # the models' sliding window
    with Model(file, window) as model:
        found = log_probabilities(model.logits(IDS[:window]))
    np.testing.assert_allclose(found, expected(wrapper)[:window], rtol=0.0, atol=F16_GELU)


def test_experts_of_a_block_share_a_type(tmp_path: Path) -> None:
    checkpoint = unquantized(save("mixtral", tmp_path / "model"))
    widths = {name.removesuffix(".weight"): Choice(8.5, 32, "Q8_0") for name in checkpoint.dense if ".experts." in name}
    specs = {name: LinearSpec(name, *checkpoint.dense[f"{name}.weight"].shape) for name in widths}
    dense = {name: tensor for name, tensor in checkpoint.dense.items() if name.removesuffix(".weight") not in widths}
    same = replace(checkpoint, widths=widths, specs=specs, dense=dense)
    [stack] = [tensor for tensor in Layout.of(same).tensors if tensor.name == "blk.0.ffn_gate_exps.weight"]
    assert (stack.kind, stack.shape) == ("Q8_0", (4, 128, 64)) and stack.nbytes == 4 * 128 * 2 * 34
    odd = next(name for name in widths if ".layers.0." in name and name.endswith("w1"))
    with pytest.raises(ImpqError, match=r"Q4_0, Q8_0 for blk\.0\.ffn_gate_exps\.weight: plan with --granularity group"):
        Layout.of(replace(same, widths=widths | {odd: Choice(4.5, 32, "Q4_0")}))


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path: Path) -> None:
    checkpoint = unquantized(save("llama", tmp_path / "model"))
    file = written(checkpoint, tmp_path / "export")
    other = written(unquantized(save("phi3", tmp_path / "other")), tmp_path / "more").read_bytes()
    for content in (file.read_bytes()[:100_000], b"GGUF", b"not a file of llama.cpp", other):
        file.write_bytes(content)
        with pytest.raises(ImpqError, match=r"model\.gguf") as error:
            for read in GgufExporter().dense(file.parent, checkpoint).values():
                read()
        assert "\n" not in str(error.value)
