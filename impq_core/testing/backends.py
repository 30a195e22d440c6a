"""Tests of the contract of ``Backend``, on single linears."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from impq_core.errors import ImpqError
from impq_core.exports.packed import LONGEST_NAME, MOST_TENSORS
from impq_core.interfaces import Backend, Statistics, Variant
from impq_core.parts import named_choice
from impq_core.space import Choice, LinearSpec
from impq_core.testing.part import PartSuite

if TYPE_CHECKING:
    import torch

AWKWARD = (LinearSpec("a.b", 32, 72), LinearSpec("a.b", 33, 64), LinearSpec("a.b", 33, 71))
"""Shapes that a group size or a packing may not fit."""

DEVICE_VARIABLE = "IMPQ_TEST_DEVICE"
"""Environment variable with the device that backends are tested on, such as cuda; the processor by default, and for
backends that do not work on that device."""


class BackendSuite(PartSuite):
    """Tests a ``Backend`` on random weights and correlated inputs, on the device of ``DEVICE_VARIABLE``.

    Class attributes:
        fine: upper limit of the relative output error of the widest choice.
        names: names of the choices to test, widest first; all that the backend lists by default.
    """

    part: ClassVar[type[Backend]]
    fine: ClassVar[float] = 0.02
    names: ClassVar[tuple[str, ...]] = ()

    def choices(self, linear: LinearSpec) -> list[Choice]:
        """The choices to test, as they are stored for a linear."""
        backend = self.make()
        named = [named_choice(backend, self.part.__name__, name) for name in self.names] or backend.choices()
        return list(dict.fromkeys(backend.stand_in(linear, choice) for choice in named))

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A weight (96, 128) and inputs (2000, 128), or another width than 128."""
        import torch

        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(96, 128, generator=generator) * 0.05
        return weight, torch.randn(2000, 128, generator=generator) @ torch.randn(128, 128, generator=generator) * 0.2

    def device(self) -> torch.device:
        """Where the backend is tested."""
        import torch

        device = torch.device(os.environ.get(DEVICE_VARIABLE) or "cpu")
        return device if device.type in self.part.devices else torch.device("cpu")

    def there(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``data`` on the device."""
        weight, inputs = self.data()
        return weight.to(self.device()), inputs.to(self.device())

    def unpack(self, variant: Variant, spec: LinearSpec) -> torch.Tensor:
        """The weight of a variant, unpacked on the device."""
        tensors = {name: tensor.to(self.device()) for name, tensor in variant.tensors.items()}
        weight: torch.Tensor = self.make().dequantize(replace(variant, tensors=tensors), spec)
        assert weight.device.type == self.device().type, f"dequantize returned a weight on the {weight.device}"
        return weight

    def statistics(self, inputs: torch.Tensor) -> Statistics | None:
        """The statistics for ``quantize``; None if ``needs`` is empty."""
        return Statistics(inputs.T @ inputs, len(inputs)) if self.make().needs else None

    def test_choices_are_widest_first_and_hold_the_default_menu(self) -> None:
        """Choices are in descending order and contain at least two of ``default_bits``, the menu without ``--bits``."""
        backend = self.make()
        bits = [choice.bits for choice in backend.choices()]
        assert bits == sorted(bits, reverse=True), "choices are not widest first"
        found = {choice for choice in map(backend.choice, backend.default_bits) if choice}
        assert len(found) >= 2, f"default_bits {backend.default_bits} names fewer than two choices"

    def test_more_bits_less_error(self) -> None:
        """The relative output error falls as bits grow."""
        weight, inputs = self.there()
        backend, spec, errors = self.make(), LinearSpec("block.linear", *weight.shape), []
        for choice in self.choices(spec):
            backend.check(spec, choice)
            restored = self.unpack(backend.quantize(weight, choice, self.statistics(inputs)), spec)
            errors.append(float(((restored - weight) @ inputs.T).norm() / (weight @ inputs.T).norm()))
        assert errors == sorted(errors) and errors[0] < self.fine, f"relative output errors, widest first: {errors}"

    def test_sizes_are_exact(self) -> None:
        """``nbytes`` returns the bytes that ``quantize`` stores, with scales and zeros; the variant has the choice."""
        weight, inputs = self.there()
        backend, spec = self.make(), LinearSpec("block.linear", *weight.shape)
        for choice in self.choices(spec):
            variant = backend.quantize(weight, choice, self.statistics(inputs))
            assert variant.choice == choice
            nbytes = backend.nbytes(spec, choice)
            assert variant.nbytes == nbytes, f"{choice} bits: stored {variant.nbytes} bytes, nbytes returned {nbytes}"

    def test_weights_come_back_in_shape(self) -> None:
        """``dequantize`` returns a contiguous, finite float32 weight, and the same one after a round trip through a
        file."""
        import torch
        from safetensors.torch import load, save

        weight, inputs = self.there()
        backend, spec = self.make(), LinearSpec("block.linear", *weight.shape)
        for choice in self.choices(spec):
            variant = backend.quantize(weight, choice, self.statistics(inputs))
            restored = self.unpack(variant, spec)
            assert restored.shape == weight.shape and restored.dtype == torch.float32 and restored.is_contiguous()
            assert torch.isfinite(restored).all(), f"{choice} bits: not finite"
            stored = load(save({name: tensor.contiguous() for name, tensor in variant.tensors.items()}))
            reloaded = self.unpack(type(variant)(choice, stored, variant.record), spec)
            assert torch.equal(restored, reloaded), f"{choice} bits: other weights after a round trip through a file"

    def test_the_same_weight_makes_the_same_variant_and_nothing_is_touched(self) -> None:
        """Two variants of one weight are equal bit for bit, and ``quantize`` changes neither weight nor statistics."""
        import torch

        weight, inputs = self.there()
        statistics, backend = self.statistics(inputs), self.make()
        before, gram = weight.clone(), inputs.T @ inputs
        for choice in self.choices(LinearSpec("block.linear", *weight.shape)):
            first, second = (backend.quantize(weight, choice, statistics) for _ in range(2))
            assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
        assert torch.equal(weight, before), "the weight was changed in place"
        assert statistics is None or torch.equal(statistics.gram, gram), "the statistics were changed in place"

    def test_linears_quantized_together_are_those_quantized_alone(self) -> None:
        """``quantize_together`` yields a variant for each linear and choice asked for, in order, equal bit for bit to
        that of ``quantize``, whatever else is asked for; it changes neither weights nor statistics."""
        import torch

        weight, inputs = self.there()
        statistics, backend = self.statistics(inputs), self.make()
        rows, columns = weight.shape
        weights = {LinearSpec("block.one", rows, columns): weight, LinearSpec("block.two", 64, columns): -weight[:64]}
        before = {linear: weight.clone() for linear, weight in weights.items()}
        everything = [(linear, choice) for linear in weights for choice in self.choices(linear)]
        for wanted in (everything, everything[1::2], everything[::-1], []):
            found = list(backend.quantize_together(weights, wanted, statistics))
            assert [(linear, variant.choice) for linear, variant in found] == wanted
            for linear, variant in found:
                alone = backend.quantize(weights[linear], variant.choice, statistics)
                assert set(variant.tensors) == set(alone.tensors) and variant.record == alone.record
                assert all(torch.equal(variant.tensors[name], alone.tensors[name]) for name in alone.tensors), (
                    f"{linear.name} at {variant.choice} bits: other bits than alone, if quantized with {wanted}")
        assert all(torch.equal(weights[linear], before[linear]) for linear in weights), "a weight was changed in place"
        assert statistics is None or torch.equal(statistics.gram, inputs.T @ inputs), "the statistics were changed"

    def test_variants_are_contiguous_in_host_memory(self) -> None:
        """The tensors of a variant are contiguous and on the CPU, which is among ``devices``; they are few, with short
        names."""
        weight, inputs = self.there()
        assert "cpu" in self.part.devices, "a backend must work in host memory"
        for choice in self.choices(LinearSpec("block.linear", *weight.shape)):
            tensors = self.make().quantize(weight, choice, self.statistics(inputs)).tensors
            for name, tensor in tensors.items():
                assert tensor.device.type == "cpu" and tensor.is_contiguous(), f"{name} at {choice} bits"
            # The size of a file of format impq is promised for no more.
            assert len(tensors) <= MOST_TENSORS and max(map(len, tensors)) <= LONGEST_NAME, list(tensors)

    def test_awkward_shapes_are_exact_or_refused_by_name(self) -> None:
        """If a shape cannot be stored, ``check`` raises an ImpqError that names the linear; a shape that it accepts is
        stored in exactly ``nbytes``. The stand-in of a width has its bits."""
        import torch

        backend = self.make()
        for spec in AWKWARD:
            for choice in filter(None, map(backend.choice, (*backend.default_bits, *self.names))):
                stored = backend.stand_in(spec, choice)
                assert stored.bits == choice.bits or not choice.is_width, f"{choice} bits: {stored.bits} for {spec}"
                assert backend.stand_in(spec, stored) == stored, f"a stand-in for {choice} of {spec} has another one"
            for choice in self.choices(spec):
                try:
                    backend.check(spec, choice)
                except ImpqError as error:
                    assert spec.name in str(error), f"the error does not name the linear: {error}"
                    continue
                weight = torch.randn(spec.rows, spec.columns, generator=torch.Generator().manual_seed(0))
                eye = torch.eye(spec.columns, device=self.device())
                variant = backend.quantize(weight.to(self.device()), choice, self.statistics(eye))
                assert variant.nbytes == backend.nbytes(spec, choice), f"{spec} at {choice} bits"
                assert self.unpack(variant, spec).shape == (spec.rows, spec.columns)

    def test_a_variant_is_the_same_weight_wherever_it_is_unpacked(self) -> None:
        """``dequantize`` returns the same weight on the device and in host memory, but for the rounding of 16-bit
        products: exports and forwards on other machines have the weights that were measured."""
        import torch

        weight, inputs = self.there()
        backend, spec = self.make(), LinearSpec("block.linear", *weight.shape)
        for choice in self.choices(spec):
            variant = backend.quantize(weight, choice, self.statistics(inputs))
            here, there = backend.dequantize(variant, spec), self.unpack(variant, spec).cpu()
            assert torch.allclose(here, there, rtol=2**-10, atol=1e-6), f"{choice} bits: {(here - there).abs().max()}"
