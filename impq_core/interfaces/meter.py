"""Meters, which give every layer in every form a cost beside its bytes, such as milliseconds a token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from impq_core.errors import InvalidArrays
from impq_core.interfaces.part import Part
from impq_core.space import Choice, FloatArray, LayerSpec, LinearSpec, frozen


@dataclass(frozen=True)
class Stored:
    """A linear as it is stored.

    Args:
        linear: name and shape.
        choice: the choice that the backend stores for its shape; None if it is not quantized.
        nbytes: stored bytes.
        reads: how often a generated token reads the whole weight on average: 1, the share of chosen experts for a
            routed expert, and one row of all for an input embedding that is not also the head.
    """

    linear: LinearSpec
    choice: Choice | None
    nbytes: int
    reads: float = 1.0


@dataclass(frozen=True)
class Form:
    """A layer at a choice.

    Args:
        layer: the layer.
        choice: the choice as the menu names it; None if the layer is not quantized.
        linears: its linears as they are stored.
    """

    layer: LayerSpec
    choice: Choice | None
    linears: tuple[Stored, ...]


@dataclass(frozen=True, eq=False)
class Readings:
    """What a meter found, in its unit.

    Args:
        values: float64 (forms,), NaN for a form that the meter does not know.
        stderr: float64 (forms,), standard errors; None if the values are exact.
        rest: of all that is no linear, if the meter knows it.
        rest_stderr: standard error of ``rest``.
        notes: lines for the reader: what was counted, and how.

    Raises:
        InvalidArrays: the shapes disagree, or a value is negative or infinite.
    """

    values: FloatArray
    stderr: FloatArray | None = None
    rest: float = 0.0
    rest_stderr: float = 0.0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("values", "stderr"):
            if getattr(self, name) is not None:
                array = frozen(np.asarray(getattr(self, name), dtype=np.float64))
                object.__setattr__(self, name, array)
                if array.ndim != 1 or array.shape != self.values.shape or np.isinf(array).any() or (array < 0).any():
                    raise InvalidArrays(f"{name} of readings are numbers from 0, or NaN, one for each form")
        if not (np.isfinite([self.rest, self.rest_stderr]).all() and min(self.rest, self.rest_stderr) >= 0):
            raise InvalidArrays("the rest of readings and its error are finite numbers from 0")


class Meter(Part, ABC):
    """Gives a cost to layers at choices, before any weight is loaded: measured, computed or read from a file.

    The cost of a plan is the sum over its layers and ``Readings.rest``. A run reads a meter once, and keeps what it
    found in its folder.

    Class attributes, or properties if they depend on the options:
        cost: name of the cost, as in ``--limit latency=9ms``.
        unit: of the numbers: ``ms``, ``bytes`` or any other.
    """

    returns = MappingProxyType({"read": (Readings,)})
    cost: ClassVar[str]
    unit: ClassVar[str]

    def check(self, choices: Sequence[Choice]) -> None:
        """Called when the menu is known, before a model is looked at; raises ImpqError if the meter cannot know its
        choices, or if a file that it reads is wrong. By default nothing."""

    @abstractmethod
    def read(self, forms: Sequence[Form], dtype: str, progress: Callable[[int, int], None]) -> Readings:
        """The costs of forms.

        Args:
            forms: every layer at every choice, and what is not quantized.
            dtype: type of the numbers that are not quantized, such as ``bfloat16``.
            progress: called with the number of finished parts of the work, and the number of all parts.

        Raises:
            ImpqError: the costs cannot be found; the message says why.
        """
