"""What every backend must do, on single linears."""

from __future__ import annotations

import pytest
import torch
from impq_gptq.backend import Gptq
from impq_hqq.backend import Hqq
from impq_quanto.backend import Quanto

from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.interfaces import Backend, Statistics
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.space import LinearSpec

SPEC = LinearSpec("block.linear", 96, 128)


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=generator) * 0.05
    inputs = torch.randn(2000, 128, generator=generator) @ torch.randn(128, 128, generator=generator) * 0.2
    return weight, inputs


@pytest.fixture(params=["gptq", "gptq symmetric=true", "gptq group_size=32 group_aware=false", "gptq clip_search=false",
                        "hqq", "hqq optimize=false group_size=32", "quanto", "quanto group_size=32"])
def backend(request: pytest.FixtureRequest) -> Backend:
    name, *options = request.param.split()
    return Parts.build(RunConfig(backend=name, options={"backend": dict(o.split("=") for o in options)}),
                       Plugins()).backend


def test_more_bits_less_error_exact_sizes_same_result_and_nothing_touched(
        backend: Backend, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, inputs = data
    statistics = Statistics(inputs.T @ inputs, len(inputs))
    before, gram = weight.clone(), statistics.gram.clone()
    errors = []
    for choice in backend.choices():
        backend.check(SPEC, choice)
        first, second = (backend.quantize(weight, choice, statistics if backend.needs else None) for _ in range(2))
        assert first.choice == choice and first.nbytes == backend.nbytes(SPEC, choice)
        assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
        back = backend.dequantize(first, SPEC)
        assert back.shape == weight.shape and back.dtype == torch.float32 and back.is_contiguous()
        errors.append(float(((back - weight) @ inputs.T).norm() / (weight @ inputs.T).norm()))
    assert errors == sorted(errors) and errors[0] < 0.02, errors
    assert torch.equal(weight, before) and torch.equal(statistics.gram, gram)
    assert {choice.bits for choice in backend.choices()} >= set(backend.default_bits)


def test_awkward_shapes_are_refused_by_name_or_exact(backend: Backend) -> None:
    spec = LinearSpec("a.b", 32, 72)
    for choice in backend.choices():
        try:
            backend.check(spec, choice)
        except ImpqError as error:
            assert "of a.b" in str(error)
            continue
        variant = backend.quantize(torch.randn(32, 72), choice, None)
        assert variant.nbytes == backend.nbytes(spec, choice)
        assert backend.dequantize(variant, spec).shape == (32, 72)


def test_groups_that_do_not_divide_are_refused_or_lowered() -> None:
    for kind in (Gptq, Hqq):
        backend = kind()
        with pytest.raises(ImpqError, match=r"of a\.b"):
            backend.check(LinearSpec("a.b", 64, 96), backend.choices()[-1])
    quanto, four = Quanto(), Quanto().choices()[1]
    for columns, groups in ((576, 6), (1536, 12), (160, 5), (200, 1), (128, 1)):
        assert quanto.nbytes(LinearSpec("a.b", 64, columns), four) == 64 * columns // 2 + 64 * groups * 4
        variant = quanto.quantize(torch.randn(64, columns), four, None)
        assert variant.tensors["scale"].numel() == 64 * groups


def test_sizes_of_odd_row_counts_are_exact_or_refused(backend: Backend) -> None:
    spec = LinearSpec("a.b", 33, 64)
    for choice in backend.choices():
        try:
            backend.check(spec, choice)
        except ImpqError:
            continue
        variant = backend.quantize(torch.randn(33, 64), choice, Statistics(torch.eye(64), 1))
        assert variant.nbytes == backend.nbytes(spec, choice)
        assert backend.dequantize(variant, spec).shape == (33, 64)
