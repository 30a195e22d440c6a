"""The backend of llama.cpp's types, beyond its contract (test_conformance.py)."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from impq_gguf.backend import Gguf, Options
from impq_gguf.library import dequantize, library, number, quantize
from impq_gguf.types import TYPES, stored_as

from impq_core.config import RunConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.interfaces import Statistics
from impq_core.runs.pipeline import run
from impq_core.space import Choice, LinearSpec

QUICK = [name for name in TYPES if name not in ("IQ1_S", "IQ1_M", "IQ2_S", "IQ2_XS")]
"""Types whose tables are not built for seconds when they are first used."""


def random_weight(rows: int = 8, columns: int = 512) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


def uneven(columns: int = 512) -> torch.Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** 4 + 1e-3


def seen(squares: torch.Tensor, tokens: int = 500) -> Statistics:
    return Statistics(torch.diag(squares * tokens), tokens)


@pytest.mark.parametrize("name", TYPES)
def test_sizes_are_those_of_the_library_and_of_the_gguf_package(name: str) -> None:
    kind = GGMLQuantizationType[name]
    assert (TYPES[name].block, TYPES[name].nbytes) == GGML_QUANT_SIZES[kind]
    assert (library().ggml_blck_size(kind), library().ggml_type_size(kind)) == GGML_QUANT_SIZES[kind]
    if library().ggml_quantize_requires_imatrix(kind):
        assert TYPES[name].needs_importance
    choice = TYPES[name].choice
    assert choice.bits == 8 * TYPES[name].nbytes / TYPES[name].block and choice.name == name


@pytest.mark.parametrize("name", QUICK)
def test_what_is_unpacked_is_what_the_gguf_package_reads(name: str) -> None:
    weight = random_weight()
    packed = quantize(weight, name, uneven())
    read = gguf.quants.dequantize(packed.numpy(), GGMLQuantizationType[name])
    values = dequantize(packed, name, 512)
    assert np.array_equal(values.numpy(), read)
    assert float((values - weight).norm() / weight.norm()) < 0.6 or name.startswith("TQ")


@pytest.mark.parametrize("name", ["IQ2_XXS", "Q2_K", "IQ3_XXS", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_K", "Q5_K"])
def test_importance_lowers_the_error_of_important_inputs(name: str) -> None:
    weight, squares = random_weight(64), uneven()
    linear, choice = LinearSpec("a.b", 64, 512), TYPES[name].choice

    def error(statistics: Statistics) -> float:
        backend = Gguf()
        restored = backend.dequantize(backend.quantize(weight, choice, statistics), linear)
        return float(((restored - weight) ** 2 @ squares).sum())

    assert error(seen(squares)) < 0.9 * error(seen(torch.ones(512)))
    assert error(seen(squares * 2**20)) == error(seen(squares, 1000)) == error(seen(squares))  # only ratios matter


@pytest.mark.parametrize("name", [name for name in QUICK if name.startswith("IQ")])
@pytest.mark.parametrize("dead", [0.3, 1.0])
def test_inputs_that_are_always_zero_do_not_end_the_process(name: str, dead: float) -> None:
    squares = uneven() * (torch.rand(512, generator=torch.Generator().manual_seed(2)) >= dead)
    squares[:256] = 0.0  # a whole block
    for weight in (random_weight(64), random_weight(64).sign(), torch.zeros(4, 512)):
        variant = Gguf().quantize(weight, TYPES[name].choice, seen(squares))
        restored = Gguf().dequantize(variant, LinearSpec("a.b", len(weight), 512))
        assert torch.isfinite(restored).all()
        assert bool(variant.record.get("unreached")) == (dead == 1.0)


def test_a_linear_that_no_token_reached_has_even_importance() -> None:
    backend, weight, choice = Gguf(), random_weight(), TYPES["IQ3_XXS"].choice
    unreached = backend.quantize(weight, choice, Statistics(torch.zeros(512, 512), 0))
    even = backend.quantize(weight, choice, seen(torch.ones(512)))
    assert torch.equal(unreached.tensors["data"], even.tensors["data"])
    assert unreached.record == {"unreached": 1.0} and not even.record


def test_weights_and_inputs_that_cannot_be_stored_are_refused() -> None:
    with pytest.raises(ImpqError, match="Q4_K"):
        Gguf().quantize(random_weight() * 1e10, TYPES["Q4_K"].choice, seen(uneven()))
    with pytest.raises(ImpqError, match="float32"):
        Gguf().quantize(random_weight(), TYPES["Q4_K"].choice, seen(uneven() * torch.inf))
    with pytest.raises(ImpqError, match="statistics"):
        Gguf().quantize(random_weight(), TYPES["Q4_K"].choice, None)


@pytest.mark.parametrize(("columns", "stored"), [
    (512, {name: name for name in TYPES}),
    (576, {"IQ2_XXS": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0",
           "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
           "MXFP4": "MXFP4", "NVFP4": "NVFP4"}),
    (72, {**dict.fromkeys(TYPES, "F16"), "BF16": "BF16"}),
])
def test_rows_that_blocks_do_not_divide_are_stored_as_llama_cpp_stores_them(columns: int,
                                                                            stored: dict[str, str]) -> None:
    linear, backend = LinearSpec("a.b", 4, columns), Gguf()
    for name, expected in stored.items():
        choice = backend.stand_in(linear, TYPES[name].choice)
        assert choice.name == stored_as(name, columns).name == expected
        backend.check(linear, choice)
        assert backend.nbytes(linear, choice) == 4 * columns * choice.bits / 8
        assert backend.stand_in(linear, choice) == choice


def test_types_are_named_in_any_case_and_those_that_need_importance_say_so() -> None:
    assert Gguf().choice("iq2_xs") == TYPES["IQ2_XS"].choice
    assert Gguf().choice("Q4_K_M") is None
    plain = Gguf(Options(importance=False))
    assert not plain.needs and Gguf().needs
    with pytest.raises(UsageError, match="IQ3_XXS needs"):
        plain.choice("IQ3_XXS")
    assert [choice.name for choice in map(plain.choice, plain.default_bits) if choice] == list(plain.default_bits)
    assert all(not TYPES[choice.name].needs_importance for choice in plain.choices())


def test_threads_make_the_same_bits() -> None:
    weight, importance = random_weight(64), uneven()
    alone = {name: quantize(weight, name, importance) for name in ("IQ3_XXS", "Q4_K")}
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda name: (name, quantize(weight, name, importance)), ["IQ3_XXS", "Q4_K"] * 8))
    assert all(torch.equal(packed, alone[name]) for name, packed in together)


def test_a_library_of_other_types_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GGML_QUANT_SIZES, GGMLQuantizationType.Q4_K, (256, 140))
    number.cache_clear()
    with pytest.raises(ImpqError, match="Q4_K"):
        number("Q4_K")


def test_a_run_stores_stand_ins_with_their_bytes(tiny_config: RunConfig) -> None:
    """Rows of 64 and 128 weights: IQ4_XS is stored as IQ4_NL."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        result = run(replace(tiny_config, backend="gguf", bits=("Q8_0", "Q5_K", "iq4_xs"), options={}))
    assert result.plan and result.evaluation
    space = result.plan.space
    assert [choice.name for choice in space.choices] == ["Q8_0", "Q5_K", "IQ4_XS"]
    assert space.bits.tolist() == [[8.5, 6.0, 4.5]] * len(space)
    assert space.low_bytes == space.parameters * 4.5 / 8
    rows = {row.name: row for row in result.evaluation.rows}
    assert rows.keys() >= {"uniform Q8_0", "uniform Q5_K", "uniform IQ4_XS", "mix Q4_K_M"}
    assert rows["uniform IQ4_XS"].nbytes < rows["mix Q4_K_M"].nbytes < rows["uniform Q8_0"].nbytes
    assert Choice(8.5, 32, "Q8_0") in set(result.plan.widths().values()) | {space.choices[0]}
