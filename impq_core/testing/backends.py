"""What every backend must do, on single linears."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from impq_core.errors import ImpqError
from impq_core.interfaces import Backend, Statistics
from impq_core.space import LinearSpec
from impq_core.testing.part import PartSuite

if TYPE_CHECKING:
    import torch

AWKWARD = (LinearSpec("a.b", 32, 72), LinearSpec("a.b", 33, 64), LinearSpec("a.b", 33, 71))
"""Shapes that groups or packing may not divide."""


class BackendSuite(PartSuite):
    """A ``Backend`` on random weights, and inputs that depend on each other.

    Class attributes:
        fine: relative error of the outputs that its widest choice stays below.
    """

    part: ClassVar[type[Backend]]
    fine: ClassVar[float] = 0.02

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A weight (96, 128) and inputs (2000, 128)."""
        import torch

        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(96, 128, generator=generator) * 0.05
        return weight, torch.randn(2000, 128, generator=generator) @ torch.randn(128, 128, generator=generator) * 0.2

    def statistics(self, inputs: torch.Tensor) -> Statistics | None:
        """What ``quantize`` is given: nothing where ``needs`` is empty."""
        return Statistics(inputs.T @ inputs, len(inputs)) if self.part.needs else None

    def test_choices_are_widest_first_and_hold_the_default_menu(self) -> None:
        """``--bits`` takes any of them; where it is not given, ``default_bits`` are played."""
        choices = self.make().choices()
        assert list(choices) == sorted(choices, reverse=True), "choices are not widest first"
        offered = {choice.bits for choice in choices}
        assert len(set(self.part.default_bits) & offered) >= 2, f"default_bits {self.part.default_bits} of {offered}"

    def test_more_bits_less_error(self) -> None:
        """Relative error of the outputs."""
        weight, inputs = self.data()
        backend, spec, errors = self.make(), LinearSpec("block.linear", *weight.shape), []
        for choice in backend.choices():
            backend.check(spec, choice)
            back = backend.dequantize(backend.quantize(weight, choice, self.statistics(inputs)), spec)
            errors.append(float(((back - weight) @ inputs.T).norm() / (weight @ inputs.T).norm()))
        assert errors == sorted(errors) and errors[0] < self.fine, f"from the widest on: {errors}"

    def test_sizes_are_exact(self) -> None:
        """``nbytes`` says what ``quantize`` stores, scales, zeros and everything else; so does ``choice``."""
        weight, inputs = self.data()
        backend, spec = self.make(), LinearSpec("block.linear", *weight.shape)
        for choice in backend.choices():
            variant = backend.quantize(weight, choice, self.statistics(inputs))
            assert variant.choice == choice
            told = backend.nbytes(spec, choice)
            assert variant.nbytes == told, f"{choice} bits: stored {variant.nbytes} bytes, nbytes says {told}"

    def test_weights_come_back_in_shape(self) -> None:
        """Float32, contiguous, finite, and the same from what was written to a file and read."""
        import torch
        from safetensors.torch import load, save

        weight, inputs = self.data()
        backend, spec = self.make(), LinearSpec("block.linear", *weight.shape)
        for choice in backend.choices():
            variant = backend.quantize(weight, choice, self.statistics(inputs))
            back = backend.dequantize(variant, spec)
            assert back.shape == weight.shape and back.dtype == torch.float32 and back.is_contiguous()
            assert torch.isfinite(back).all(), f"{choice} bits: not finite"
            stored = load(save({name: tensor.contiguous() for name, tensor in variant.tensors.items()}))
            again = backend.dequantize(type(variant)(choice, stored, variant.record), spec)
            assert torch.equal(back, again), f"{choice} bits: other weights after a round trip through a file"

    def test_the_same_weight_makes_the_same_variant_and_nothing_is_touched(self) -> None:
        """Bit for bit; weight and statistics stay as they were."""
        import torch

        weight, inputs = self.data()
        statistics, backend = self.statistics(inputs), self.make()
        before, gram = weight.clone(), inputs.T @ inputs
        for choice in backend.choices():
            first, second = (backend.quantize(weight, choice, statistics) for _ in range(2))
            assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
        assert torch.equal(weight, before), "the weight was changed in place"
        assert statistics is None or torch.equal(statistics.gram, gram), "the statistics were changed in place"

    def test_awkward_shapes_are_exact_or_refused_by_name(self) -> None:
        """``check`` raises an ImpqError that names the linear where a shape cannot be stored; what it lets pass is
        stored in the bytes that were told."""
        import torch

        backend = self.make()
        for spec in AWKWARD:
            for choice in backend.choices():
                try:
                    backend.check(spec, choice)
                except ImpqError as error:
                    assert spec.name in str(error), f"the linear is not named: {error}"
                    continue
                weight = torch.randn(spec.rows, spec.columns, generator=torch.Generator().manual_seed(0))
                variant = backend.quantize(weight, choice, self.statistics(torch.eye(spec.columns)))
                assert variant.nbytes == backend.nbytes(spec, choice), f"{spec} at {choice} bits"
                assert backend.dequantize(variant, spec).shape == (spec.rows, spec.columns)
