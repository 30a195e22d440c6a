"""Costs of plans beside their bytes, such as milliseconds a token: what a meter found, and limits on it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from impq_core.errors import ImpqError, UsageError, nearest
from impq_core.space import BoolArray, Choice, FloatArray, IntArray, LayerSpec, SearchSpace, frozen
from impq_core.units import parse_amount, shown

UNQUANTIZED = "unquantized"
"""In files, the name of the form of a layer that is not quantized."""

_ROUNDING = 1e-9
"""Margin of limits for rounding errors of sums, relative to the limit."""


@dataclass(frozen=True, eq=False)
class Cost:
    """A cost of the plans of a search space, in the unit of a meter. The cost of a pick is the sum over its layers, and
    ``fixed``.

    Args:
        name: such as ``latency``.
        unit: such as ``ms``.
        meter: name of the meter.
        values: float64 (n, m), of each layer at each choice, not negative. They need not fall along the choices.
        fixed: of pinned layers and of all that is no layer.
        stderr: float64 (n, m), standard errors of ``values``; None if they are exact.
        fixed_stderr: that of ``fixed``.
        limit: the most that a plan may take; infinite if the cost is only reported.

    Raises:
        ImpqError: a shape is wrong, or a value is negative or not finite.
    """

    name: str
    unit: str
    meter: str
    values: FloatArray
    fixed: float = 0.0
    stderr: FloatArray | None = None
    fixed_stderr: float = 0.0
    limit: float = math.inf

    def __post_init__(self) -> None:
        for name in ("values", "stderr"):
            array = getattr(self, name)
            if array is None:
                continue
            array = frozen(np.asarray(array, dtype=np.float64))
            object.__setattr__(self, name, array)
            if array.ndim != 2 or array.shape != self.values.shape or not (np.isfinite(array) & (array >= 0)).all():
                raise ImpqError(f"meter '{self.meter}': {name} of {self.name} have to be finite numbers from 0, one "
                                "for each layer and choice")
        if not (math.isfinite(self.fixed) and self.fixed >= 0 and math.isfinite(self.fixed_stderr)):
            raise ImpqError(f"meter '{self.meter}': the constant part of {self.name} has to be a finite number from 0")

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return math.isfinite(self.limit)

    @property
    def most(self) -> float:
        """The limit, with a margin for rounding errors of sums; searches keep to it."""
        return self.limit * (1 + _ROUNDING)

    def keeps(self, picks: IntArray) -> BoolArray:
        """Whether picks (N, n) keep the limit, bool (N,); twice the margin is left to sums in another order."""
        kept: BoolArray = self.of_all(picks) <= self.limit * (1 + 2 * _ROUNDING)
        return kept

    def of(self, pick: IntArray) -> float:
        """The cost of a pick (n,)."""
        return float(self.of_all(np.asarray(pick)[None])[0])

    def of_all(self, picks: IntArray) -> FloatArray:
        """The costs (N,) of picks (N, n)."""
        costs: FloatArray = self.fixed + self.values[np.arange(len(self.values)), picks].sum(axis=1)
        return costs

    def error(self, pick: IntArray) -> float:
        """Standard error of ``of``, as if all errors had one sign: layers of one shape share a reading, so that their
        errors are equal."""
        if self.stderr is None:
            return self.fixed_stderr
        return self.fixed_stderr + float(self.stderr[np.arange(len(self.stderr)), pick].sum())

    def grown(self, pick: IntArray) -> FloatArray:
        """Cost added (n, m) by moving one layer of a pick (n,) to each choice."""
        added: FloatArray = self.values - self.values[np.arange(len(pick)), pick][:, None]
        return added

    def room(self, pick: IntArray) -> float:
        """What is left below the limit by a pick (n,); negative if it exceeds the limit."""
        return self.most - self.of(pick)

    def describe(self, pick: IntArray) -> str:
        """The cost of a pick with its error and its limit: ``latency 8.71 ± 0.05 ms (limit 9 ms)``."""
        error = self.error(pick)
        number = shown(self.of(pick), self.unit)
        if error:
            digits, unit = number.split(" ", 1)
            number = f"{digits} ± {shown(error, self.unit).split(' ', 1)[0]} {unit}"
        return f"{self.name} {number}" + (f" (limit {shown(self.limit, self.unit)})" if self.is_limited else "")

    def to_plan(self, pick: IntArray) -> dict[str, Any]:
        """Plain data for a plan file."""
        return {"value": self.of(pick), "stderr": self.error(pick), "unit": self.unit, "meter": self.meter,
                "limit": self.limit if self.is_limited else None}


def fit(space: SearchSpace, picks: IntArray, budget: int, limits: Sequence[Cost] = ()) -> BoolArray:
    """Whether each pick (N, n) is within a budget in bytes and within all limits, bool (N,)."""
    within: BoolArray = space.bytes_of_all(picks) <= budget
    for cost in limits:
        within = within & cost.keeps(picks)
    return within


def fits(space: SearchSpace, pick: IntArray, budget: int, limits: Sequence[Cost] = ()) -> bool:
    """Whether a pick (n,) is within a budget in bytes and within all limits."""
    return bool(fit(space, np.asarray(pick)[None], budget, limits)[0])


def limited(costs: Iterable[Cost]) -> tuple[Cost, ...]:
    """The costs with a limit."""
    return tuple(cost for cost in costs if cost.is_limited)


@dataclass(frozen=True, eq=False)
class Metering:
    """What a meter found for a model: a cost of every layer in every form, kept in the run's folder.

    Args:
        meter: name of the meter.
        cost: name of the cost.
        unit: of the numbers.
        values: by name of the layer, and by name of the choice or ``UNQUANTIZED``, the cost and its standard error;
            what the meter does not know is left out.
        rest: of all that is no layer, as far as the meter knows it.
        rest_stderr: standard error of ``rest``.
        notes: lines that say what was counted and how.
    """

    meter: str
    cost: str
    unit: str
    values: Mapping[str, Mapping[str, tuple[float, float]]]
    rest: float = 0.0
    rest_stderr: float = 0.0
    notes: tuple[str, ...] = ()

    def on(self, space: SearchSpace, limit: float = math.inf) -> Cost:
        """The cost of the plans of a space.

        Raises:
            ImpqError: the meter does not know a layer at a choice.
        """
        table = np.array([[self._known(layer, choice) for choice in space.choices] for layer in space.layers])
        pins = [self._known(pin.layer, pin.choice) for pin in space.pinned]
        stderr = table[:, :, 1] if (table[:, :, 1] > 0).any() else None
        return Cost(self.cost, self.unit, self.meter, table[:, :, 0], self.rest + sum(value for value, _ in pins),
                    stderr, self.rest_stderr + sum(error for _, error in pins), limit)

    def _known(self, layer: LayerSpec, choice: Choice | None) -> tuple[float, float]:
        name = choice.name if choice else UNQUANTIZED
        if name not in self.values.get(layer.name, {}):
            raise ImpqError(f"meter '{self.meter}' knows no {self.cost} of layer {layer.name} "
                            + (f"at {choice}" if choice else "unquantized"))
        return self.values[layer.name][name]

    def of(self, layers: Sequence[str], assignment: Sequence[Choice | None]) -> float | None:
        """The cost of an allocation.

        Args:
            layers: names of layers or linears.
            assignment: the choice of each; None if it stays unquantized.

        Returns:
            The cost; None if the meter does not know a part of it.
        """
        names = [choice.name if choice else UNQUANTIZED for choice in assignment]
        found = [self.values.get(layer, {}).get(name) for layer, name in zip(layers, names, strict=True)]
        return None if None in found else self.rest + sum(value[0] for value in found if value)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"meter": self.meter, "cost": self.cost, "unit": self.unit, "rest": self.rest,
                "rest_stderr": self.rest_stderr, "notes": list(self.notes),
                "values": {layer: {name: list(value) for name, value in forms.items()}
                           for layer, forms in self.values.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Metering:
        """Read the data of ``to_dict``; raises KeyError, TypeError or ValueError if it is something else."""
        values = {str(layer): {str(name): (float(value), float(error)) for name, (value, error) in forms.items()}
                  for layer, forms in data["values"].items()}
        return cls(str(data["meter"]), str(data["cost"]), str(data["unit"]), values, float(data["rest"]),
                   float(data["rest_stderr"]), tuple(map(str, data["notes"])))


def with_limits(costs: Iterable[Cost], limits: Mapping[str, str]) -> tuple[Cost, ...]:
    """The costs with limits.

    Args:
        costs: of a space.
        limits: texts such as ``9ms``, by the name of the cost.

    Raises:
        UsageError: a limit is no amount, or is on a cost that there is not.
    """
    found = {cost.name: cost for cost in costs}
    for name, text in limits.items():
        if name not in found:
            raise UsageError(f"--limit {name}={text}: no meter of this run has the cost '{name}'{nearest(name, found)}")
        found[name] = replace(found[name], limit=parse_amount(text, found[name].unit, f"--limit {name}"))
    return tuple(found.values())
