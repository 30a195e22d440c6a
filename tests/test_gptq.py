"""The GPTQ backend on single linears."""

from __future__ import annotations

import pytest
import torch
from impq_gptq.backend import Gptq, Options

from impq_core.errors import ImpqError
from impq_core.interfaces import Statistics
from impq_core.space import LinearSpec

torch.manual_seed(0)
WEIGHT = torch.randn(96, 128) * 0.05
INPUTS = torch.randn(2000, 128) @ torch.randn(128, 128) * 0.2
STATISTICS = Statistics(INPUTS.T @ INPUTS, len(INPUTS))
SPEC = LinearSpec("block.linear", 96, 128)


def _error(backend: Gptq, bits: float) -> float:
    choice = next(c for c in backend.choices() if c.bits == bits)
    weight = backend.dequantize(backend.quantize(WEIGHT, choice, STATISTICS), SPEC)
    assert weight.shape == WEIGHT.shape and weight.dtype == torch.float32
    return float(((weight - WEIGHT) @ INPUTS.T).norm() / (WEIGHT @ INPUTS.T).norm())


def test_gptq_beats_rounding_where_inputs_are_correlated() -> None:
    nothing = Statistics(torch.eye(128), 1)
    backend = Gptq(Options(clip_search=False))
    choice = backend.choices()[2]
    plain = backend.dequantize(backend.quantize(WEIGHT, choice, nothing), SPEC)
    rounding = float(((plain - WEIGHT) @ INPUTS.T).norm() / (WEIGHT @ INPUTS.T).norm())
    assert _error(backend, 3) < 0.8 * rounding


def test_a_singular_hessian_says_how_it_was_damped() -> None:
    x = INPUTS[:4]
    variant = Gptq().quantize(WEIGHT, Gptq().choices()[1], Statistics(x.T @ x, 4))
    assert variant.record["damping"] >= 0.05


def test_awkward_shapes_are_refused_by_name() -> None:
    choice = Gptq().choices()[0]
    with pytest.raises(ImpqError, match=r"group size 64 does not divide the 96 inputs of a\.b; -o group_size=32 does"):
        Gptq().check(LinearSpec("a.b", 64, 96), choice)
    with pytest.raises(ImpqError, match=r"a\.b is 33 x 128"):
        Gptq().check(LinearSpec("a.b", 33, 128), choice)
    with pytest.raises(ValueError, match="group_size"):
        Options(group_size=17)
