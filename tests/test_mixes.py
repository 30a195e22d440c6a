"""llama.cpp's mixes: the types that llama-quantize deals out, and their rows in the table of references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from impq_gguf.backend import Gguf
from impq_gguf.mixes import BASE, deal
from impq_gguf.types import TYPES, stored_as

from impq_core.config import RunConfig
from impq_core.errors import UsageError
from impq_core.model.cache import shelves
from impq_core.plugins import build_options
from impq_core.runs.pipeline import run
from impq_core.space import LinearSpec

HIDDEN = 512


def linears(blocks: int = 32, heads_per_key: int = 4, experts: int = 0, head: bool = True,
            hidden: int = HIDDEN) -> list[LinearSpec]:
    """A Llama, Mistral or Mixtral with embeddings and head."""
    keys, inner = hidden // heads_per_key, 2 * hidden - 96 * (hidden != HIDDEN)
    found = [LinearSpec("model.embed_tokens", 1000, hidden)]
    for block in range(blocks):
        attention = [("q_proj", hidden), ("k_proj", keys), ("v_proj", keys), ("o_proj", hidden)]
        found += [LinearSpec(f"model.layers.{block}.self_attn.{name}", rows, hidden) for name, rows in attention]
        for part in [f"experts.{number}." for number in range(experts)] or [""]:
            found += [LinearSpec(f"model.layers.{block}.mlp.{part}{name}", *shape) for name, shape in (
                ("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)), ("down_proj", (hidden, inner)))]
    return [*found, LinearSpec("lm_head", 1000, hidden)] if head else found


@pytest.mark.parametrize(("mix", "model", "counts"), [
    # As llama.cpp prints them for published files.
    ("Q4_K_M", {}, {"Q4_K": 193, "Q6_K": 33}),
    ("Q4_K_S", {}, {"Q4_K": 217, "Q5_K": 8, "Q6_K": 1}),
    ("Q5_K_M", {}, {"Q5_K": 193, "Q6_K": 33}),
    ("Q3_K_S", {}, {"Q3_K": 225, "Q6_K": 1}),
    ("Q3_K_M", {"heads_per_key": 1}, {"Q3_K": 129, "Q4_K": 92, "Q5_K": 4, "Q6_K": 1}),
    ("Q3_K_L", {"heads_per_key": 1}, {"Q3_K": 129, "Q5_K": 96, "Q6_K": 1}),
    ("Q2_K", {}, {"Q2_K": 129, "Q3_K": 64, "Q4_K": 32, "Q6_K": 1}),
    ("Q2_K", {"heads_per_key": 1}, {"Q2_K": 129, "Q3_K": 96, "Q6_K": 1}),
    ("IQ3_M", {}, {"IQ3_S": 157, "Q4_K": 68, "Q6_K": 1}),
    # As llama_model_quantize deals them out in a dry run with an importance matrix.
    ("IQ2_M", {}, {"IQ2_S": 156, "IQ3_S": 37, "Q4_K": 32, "Q5_K": 1}),
    ("IQ2_XS", {}, {"IQ2_XS": 188, "Q2_K": 5, "Q4_K": 32, "Q5_K": 1}),
    ("IQ3_XXS", {}, {"IQ3_XXS": 96, "IQ2_S": 64, "IQ3_S": 33, "Q4_K": 32, "Q5_K": 1}),
    ("IQ4_XS", {}, {"IQ4_XS": 193, "Q5_K": 32, "Q6_K": 1}),
    ("Q8_0", {}, {"Q8_0": 226}),
    ("Q3_K_M", {"blocks": 80, "heads_per_key": 2}, {"Q3_K": 321, "Q4_K": 155, "Q5_K": 85, "Q6_K": 1}),
    ("IQ2_XXS", {"blocks": 80, "heads_per_key": 2}, {"IQ2_XXS": 470, "Q2_K": 91, "Q5_K": 1}),
    ("Q2_K", {"blocks": 80, "heads_per_key": 2}, {"Q2_K": 321, "Q3_K": 160, "Q5_K": 80, "Q6_K": 1}),
    ("Q3_K_M", {"blocks": 16, "experts": 8}, {"Q3_K": 49, "Q8_0": 32, "Q5_K": 17, "Q4_K": 15, "Q6_K": 1}),
    ("IQ2_M", {"blocks": 16, "experts": 8}, {"IQ2_S": 62, "Q4_K": 32, "Q5_K": 17, "IQ3_S": 3}),
    ("IQ3_M", {"blocks": 16, "experts": 8}, {"IQ3_S": 57, "Q8_0": 32, "Q5_K": 16, "Q4_K": 8, "Q6_K": 1}),
    ("Q4_K_M", {"blocks": 18, "hidden": 320, "heads_per_key": 5}, {"Q5_0": 109, "Q8_0": 19}),
    ("IQ3_M", {"blocks": 18, "hidden": 320, "heads_per_key": 5}, {"IQ4_NL": 89, "Q5_0": 38, "Q8_0": 1}),
    ("Q2_K", {"blocks": 18, "hidden": 320, "heads_per_key": 5}, {"Q4_0": 109, "Q5_0": 18, "Q8_0": 1}),
])
def test_a_mix_has_as_many_tensors_of_a_type_as_llama_cpp_makes(mix: str, model: dict[str, int],
                                                                counts: dict[str, int]) -> None:
    found = linears(**model)
    types = deal(mix, found)
    stored = {linear.name: stored_as(types[linear.name], linear.columns).name for linear in found}
    assert Counter(kind for name, kind in stored.items() if "experts" not in name or "experts.0." in name) == counts


def test_the_larger_types_of_q4_k_m_are_at_the_ends_and_in_every_third_block_between() -> None:
    types = deal("Q4_K_M", linears()[::-1])  # in any order
    better = [block for block in range(32) if types[f"model.layers.{block}.mlp.down_proj"] == "Q6_K"]
    assert better == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert all(types[f"model.layers.{block}.self_attn.v_proj"] == ("Q6_K" if block in better else "Q4_K")
               for block in range(32))


def test_experts_of_a_block_share_a_type_and_eight_of_them_raise_attention() -> None:
    for experts in (8, 16):
        types = deal("Q4_K_M", linears(8, experts=experts))
        for block in range(8):
            downs = {types[f"model.layers.{block}.mlp.experts.{number}.down_proj"] for number in range(experts)}
            assert downs == {"Q6_K" if block in (0, 3, 6, 7) else "Q4_K"}
            attention = [types[f"model.layers.{block}.self_attn.{name}_proj"] for name in "qkvo"]
            assert attention == (["Q4_K", "Q8_0", "Q8_0", "Q5_K"] if experts == 8
                                 else ["Q4_K", "Q4_K", downs.pop(), "Q4_K"])


def test_other_names_of_the_same_parts_get_the_same_types() -> None:
    def phi(block: int) -> list[LinearSpec]:
        return [LinearSpec(f"model.layers.{block}.self_attn.qkv_proj", HIDDEN + HIDDEN // 2, HIDDEN),
                LinearSpec(f"model.layers.{block}.self_attn.o_proj", HIDDEN, HIDDEN),
                LinearSpec(f"model.layers.{block}.mlp.gate_up_proj", 2048, HIDDEN),
                LinearSpec(f"model.layers.{block}.mlp.down_proj", HIDDEN, 1024)]

    def gpt(block: int) -> list[LinearSpec]:
        return [LinearSpec(f"transformer.h.{block}.attn.c_attn", 3 * HIDDEN, HIDDEN),
                LinearSpec(f"transformer.h.{block}.attn.c_proj", HIDDEN, HIDDEN),
                LinearSpec(f"transformer.h.{block}.mlp.c_fc", 2048, HIDDEN),
                LinearSpec(f"transformer.h.{block}.mlp.c_proj", HIDDEN, 2048)]

    def kinds(model: Sequence[LinearSpec], mix: str) -> list[str]:
        types = deal(mix, model)
        return [types[linear.name] for linear in model]

    assert kinds(phi(0), "Q2_K") == ["Q4_K", "Q3_K", "Q2_K", "Q3_K"]  # four query heads share a key head
    assert kinds(gpt(0), "Q2_K") == ["Q3_K", "Q3_K", "Q2_K", "Q3_K"]
    nested = [replace(linear, name=linear.name.replace("model.", "model.language_model.", 1)) for linear in linears(4)]
    assert kinds(nested, "IQ3_M") == kinds(linears(4), "IQ3_M")


def test_embeddings_that_are_also_the_head_have_its_type() -> None:
    assert deal("Q4_K_M", linears(head=False))["model.embed_tokens"] == "Q6_K"
    assert deal("IQ2_XS", linears(head=False))["model.embed_tokens"] == "Q5_K"
    assert deal("Q4_K_M", [LinearSpec("lm_head", 1000, 576)])["lm_head"] == "Q8_0"  # no multiple of 256


@pytest.mark.parametrize("mix", BASE)
def test_every_mix_deals_types_that_exist(mix: str) -> None:
    for importance in (True, False):
        for model in (linears(80), linears(2, 1, experts=8), linears(2, experts=4)):
            assert set(deal(mix, model, importance).values()) <= TYPES.keys()


def test_mixes_that_need_importance_are_left_out_without_it() -> None:
    names = "Q4_K_M,IQ3_M,IQ2_M"
    assert list(Gguf(Gguf.Options(mixes=names)).mixes(linears(2))) == ["Q4_K_M", "IQ3_M", "IQ2_M"]
    assert list(Gguf(Gguf.Options(importance=False, mixes=names)).mixes(linears(2))) == ["Q4_K_M", "IQ3_M"]
    assert not Gguf(Gguf.Options(mixes="none")).mixes(linears(2))
    with pytest.raises(UsageError, match="Q4_K_M"):
        build_options(Gguf, "backend", "gguf", {"mixes": "Q4_KM"})


def test_a_run_measures_the_mixes_within_its_menu_and_makes_no_variant_again_for_others(
        tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny_config, backend="gguf", bits=("Q8_0", "Q5_0"),
                     options={"backend": {"mixes": "Q4_K_M,Q8_0,Q4_0"}})
    first = run(config)
    assert first.evaluation and first.plan
    rows = {row.name: row for row in first.evaluation.rows}
    assert [name for name in rows if name.startswith("mix")] == ["mix Q4_K_M", "mix Q8_0"]  # Q4_0 is smaller than Q5_0
    assert rows["mix Q8_0"].nbytes == rows["uniform Q8_0"].nbytes
    assert (rows["mix Q8_0"].window_nll == rows["uniform Q8_0"].window_nll).all()
    widths = deal("Q4_K_M", [linear for layer in first.plan.space.layers for linear in layer.linears])
    # Rows of 64 and 128: Q5_0 stands in for Q4_K, and Q8_0 for Q6_K.
    expected = sum(linear.parameters * (8.5 if widths[linear.name] == "Q6_K" else 5.5) / 8
                   for layer in first.plan.space.layers for linear in layer.linears)
    assert rows["mix Q4_K_M"].nbytes == expected
    assert not (rows["mix Q4_K_M"].window_nll == rows["uniform Q8_0"].window_nll).any()

    def refuse(*arguments: object) -> None:
        raise AssertionError("a variant is made again")

    monkeypatch.setattr(Gguf, "quantize", refuse)
    again = run(replace(config, options={"backend": {"mixes": "Q4_K_M"}}))
    assert again.evaluation and len(shelves()) == 1
    assert (again.evaluation.row("mix Q4_K_M").window_nll == rows["mix Q4_K_M"].window_nll).all()
    assert [row.name for row in again.evaluation.rows if row.kind == "mix"] == ["mix Q4_K_M"]
