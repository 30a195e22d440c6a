"""Tests of the contract of ``Meter``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from impq_core.interfaces import Form, Meter, Stored
from impq_core.space import Choice, LayerSpec, LinearSpec
from impq_core.testing.part import PartSuite


class MeterSuite(PartSuite):
    """Tests a ``Meter`` on the forms of a few layers.

    Class attributes:
        choices: choices that the meter knows, at least two.
        shapes: (rows, columns) of the linears.
        exact: whether repeated readings are equal to the last bit; if not, they agree within ``tolerance``.
        tolerance: largest ratio of two readings of one form.
    """

    part: ClassVar[type[Meter]]
    choices: ClassVar[tuple[Choice, ...]] = (Choice(4, 64), Choice(2, 64))
    shapes: ClassVar[tuple[tuple[int, int], ...]] = ((64, 64), (128, 64))
    exact: ClassVar[bool] = True
    tolerance: ClassVar[float] = 10.0

    def forms(self) -> tuple[Form, ...]:
        """Three layers: one of each of two shapes, and one that holds both of their linears; each at every choice, and
        unquantized."""
        linears = [LinearSpec(f"blocks.{at}.linear", *shape) for at, shape in enumerate(self.shapes)]
        layers = [*(LayerSpec(f"blocks.{at}", at, (linear,)) for at, linear in enumerate(linears)),
                  LayerSpec("both", len(linears), tuple(linears))]

        def stored(linear: LinearSpec, choice: Choice | None) -> Stored:
            return Stored(linear, choice, round(linear.parameters * (choice.bits if choice else 16) / 8))

        return tuple(Form(layer, choice, tuple(stored(linear, choice) for linear in layer.linears))
                     for layer in layers for choice in (*self.choices, None))

    def read(self, forms: Sequence[Form]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """The values of forms."""
        meter = self.make()
        meter.check(self.choices)
        readings = meter.read(forms, "float32", lambda done, total: None)
        assert len(readings.values) == len(forms), "there is not one reading for each form"
        assert readings.stderr is None or len(readings.stderr) == len(forms)
        return np.array(readings.values)

    def test_costs_have_a_name_and_a_unit(self) -> None:
        """Cost and unit are words, as ``--limit COST=AMOUNT`` needs them."""
        meter = self.make()
        for name in (meter.cost, meter.unit):
            assert isinstance(name, str) and name and "=" not in name and " " not in name, f"{name!r} is no word"

    def test_every_layer_at_every_choice_has_a_cost(self) -> None:
        """Readings of quantized layers are finite and positive."""
        forms = self.forms()
        for form, value in zip(forms, self.read(forms), strict=True):
            if form.choice:
                assert np.isfinite(value) and value > 0, f"{form.layer.name} at {form.choice} costs {value}"

    def test_a_layer_costs_what_its_linears_do(self) -> None:
        """A layer of two linears costs what two layers of one linear do."""
        forms = self.forms()
        values = self.read(forms).reshape(3, len(self.choices) + 1)[:, :-1]
        assert np.allclose(values[0] + values[1], values[2]), "a layer's cost is not the sum of those of its linears"

    def test_readings_repeat(self) -> None:
        """Two readings are alike, whatever the order of the forms."""
        forms = self.forms()
        first, second = self.read(forms), self.read(forms[::-1])[::-1]
        known = ~np.isnan(first)
        assert (known == ~np.isnan(second)).all(), "a form is known in one order and not in another"
        if self.exact:
            assert np.array_equal(first[known], second[known]), "two readings differ"
        ratios = np.maximum(first[known], second[known]) / np.minimum(first[known], second[known])
        assert (ratios <= self.tolerance).all(), f"two readings differ by a factor of {ratios.max():.1f}"
