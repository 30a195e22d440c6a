"""Backends, beyond their contract (test_conformance.py): awkward groups, their libraries as the reference, and what
other code may rely on if a plugin breaks the contract."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from impq_gptq.backend import Gptq
from impq_hqq.backend import Hqq
from impq_quanto.backend import Quanto

from impq_core.errors import ImpqError
from impq_core.interfaces import Variant
from impq_core.space import Choice, LinearSpec
from impq_core.testing.rounding import Rounding

SHAPES = ((96, 256), (64, 576), (8, 64), (16, 640))


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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hqq_unpacks_what_the_library_unpacks(shape: tuple[int, int]) -> None:
    from hqq.core.quantize import Quantizer

    backend, spec = Hqq(), LinearSpec("a.b", *shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for choice in backend.choices():
        codes, meta = Quantizer.quantize(weight, nbits=int(choice.bits), group_size=64, axis=1, device="cpu",
                                         compute_dtype=torch.float32)
        variant = backend.quantize(weight, choice, None)
        assert torch.equal(variant.tensors["codes"], codes)
        stored = {**meta, **{name: variant.tensors[name].float() for name in ("scale", "zero")}}
        library = Quantizer.dequantize(codes, {**stored, "compute_dtype": torch.float32})
        assert torch.equal(backend.dequantize(variant, spec), library), f"{choice} bits"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quanto_stores_and_unpacks_what_the_library_does(shape: tuple[int, int],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    import optimum.quanto as quanto
    from optimum.quanto.tensor import packed

    def unpack(held: Any) -> torch.Tensor:  # the library's own operation would compile C++
        parts = [(held._data >> shift) & (2**held.bits - 1) for shift in range(0, 8, held.bits)]
        return torch.cat(parts)

    monkeypatch.setattr(packed.PackedTensor, "unpack", unpack)
    backend, spec = Quanto(), LinearSpec("a.b", *shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for choice in backend.choices()[1:]:
        qtype = {4: quanto.qint4, 2: quanto.qint2}[int(choice.bits)]
        variant = backend.quantize(weight, choice, None)
        group = spec.parameters // variant.tensors["scale"].numel()
        scale, shift = quanto.MaxOptimizer()(weight.half(), qtype, axis=0, group_size=group)
        library = quanto.quantize_weight(weight.half(), qtype, 0, scale, shift, group, optimized=False)
        assert torch.equal(variant.tensors["codes"], library._data._data) and torch.equal(
            variant.tensors["scale"], library._scale) and torch.equal(variant.tensors["shift"], library._shift)
        assert torch.equal(backend.dequantize(variant, spec), library.dequantize().float()), f"{choice} bits"


def test_quanto_overrides_no_operation_of_the_library() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variant = Quanto().quantize(torch.randn(64, 128), Quanto().choices()[1], None)
        Quanto().dequantize(variant, LinearSpec("a.b", 64, 128))


def test_by_default_linears_are_quantized_one_by_one_and_an_error_names_the_linear() -> None:
    class Picky(Rounding):
        def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Any) -> Variant:
            if len(weight) == 5:
                raise ImpqError("five rows")
            return super().quantize(weight, choice, statistics)

    weights = {LinearSpec(f"a.{rows}", rows, 8): torch.randn(rows, 8) for rows in (4, 5)}
    four, five = weights
    choice = Picky().choices()[0]
    found = Picky().quantize_together(weights, [(four, choice), (five, choice)], None)
    assert next(found)[0] == four
    with pytest.raises(ImpqError, match=r"^a\.5: five rows$"):
        next(found)


@pytest.mark.parametrize("item", [None, (), (LinearSpec("a.b", 4, 8), "variant"), [1, 2]], ids=str)
def test_a_backend_that_yields_another_type_is_named(item: Any) -> None:
    class Wrong(Rounding):
        def quantize_together(self, weights: Any, wanted: Any, statistics: Any) -> Iterator[Any]:
            yield item

    with pytest.raises(ImpqError, match=r"Wrong\.quantize_together yielded .*bug of that plugin"):
        list(Wrong().quantize_together({}, [], None))
