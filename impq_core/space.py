"""The players of the game and the widths they choose from.

One index system: layers ``i, j`` in ``range(n)``, choices ``k`` in ``range(m)``. Choice 0 is the widest and the
reference. A *pick* is an int array of shape (n,), one choice a layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from impq_core.errors import ImpqError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, order=True)
class Choice:
    """A width a backend can store a linear at: ``bits`` a weight in groups of ``group_size`` weights."""

    bits: float
    group_size: int

    def __str__(self) -> str:
        return f"{self.bits:g}"


@dataclass(frozen=True)
class LinearSpec:
    """One linear: its module name and its shape, ``rows`` outputs by ``columns`` inputs."""

    name: str
    rows: int
    columns: int

    @property
    def parameters(self) -> int:
        """Weights."""
        return self.rows * self.columns


@dataclass(frozen=True)
class LayerSpec:
    """A player of the game: linears of one block that share a width."""

    name: str
    block: int
    linears: tuple[LinearSpec, ...]

    @property
    def parameters(self) -> int:
        """Weights of all its linears."""
        return sum(linear.parameters for linear in self.linears)


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that cannot be written to."""
    array = array.copy()
    array.flags.writeable = False
    return array


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """Which layers may take which choices, and what each costs.

    Args:
        layers: n players.
        choices: m widths, widest first.
        nbytes: int64 (n, m), bytes as the backend stores them, scales and zeros included.

    Raises:
        ImpqError: the shapes disagree, a name repeats, or a narrower choice is larger than a wider one.
    """

    layers: tuple[LayerSpec, ...]
    choices: tuple[Choice, ...]
    nbytes: IntArray

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", frozen(np.asarray(self.nbytes, dtype=np.int64)))
        if self.nbytes.shape != (len(self.layers), len(self.choices)) or not self.layers or not self.choices:
            raise ImpqError(f"a space of {len(self.layers)} layers and {len(self.choices)} choices cannot have sizes "
                            f"of shape {self.nbytes.shape}")
        if list(self.choices) != sorted(self.choices, reverse=True) or len(set(self.choices)) != len(self.choices):
            raise ImpqError("choices must be distinct and ordered from the widest to the narrowest")
        if len({layer.name for layer in self.layers}) != len(self.layers):
            raise ImpqError("two layers of a search space share a name")
        if (self.nbytes <= 0).any() or (np.diff(self.nbytes, axis=1) > 0).any():
            raise ImpqError("a narrower width must not take more bytes than a wider one")

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def parameters(self) -> int:
        """Quantizable weights."""
        return sum(layer.parameters for layer in self.layers)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of layers, choices and sizes: an estimate of another space is refused by it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def uniform(self, choice: int) -> IntArray:
        """The pick (n,) that gives every layer the same choice."""
        return np.full(len(self), choice, dtype=np.int64)

    def bytes_of(self, pick: IntArray) -> int:
        """Stored bytes of a pick."""
        return int(self.nbytes[np.arange(len(self)), pick].sum())

    @property
    def low_bytes(self) -> int:
        """Stored bytes of the all-narrowest pick."""
        return int(self.nbytes[:, -1].sum())

    @property
    def high_bytes(self) -> int:
        """Stored bytes of the all-widest pick."""
        return int(self.nbytes[:, 0].sum())

    def nominal_bits(self, nbytes: float) -> float:
        """Place of a size on the paper's line, on which all-low and all-high are their nominal widths."""
        low, high = self.choices[-1].bits, self.choices[0].bits
        if self.high_bytes == self.low_bytes:
            return float(low)
        return low + (high - low) * (nbytes - self.low_bytes) / (self.high_bytes - self.low_bytes)

    def bits_per_weight(self, nbytes: float) -> float:
        """True stored bits per quantizable weight."""
        return 8.0 * nbytes / self.parameters

    def check_pick(self, pick: IntArray) -> IntArray:
        """The pick as int64 (n,); raises ImpqError where it does not fit this space."""
        pick = np.asarray(pick, dtype=np.int64)
        if pick.shape != (len(self),) or (pick < 0).any() or (pick >= len(self.choices)).any():
            raise ImpqError(f"a pick for this space is {len(self)} numbers in 0..{len(self.choices) - 1}")
        return pick

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"layers": [asdict(layer) for layer in self.layers], "choices": [asdict(c) for c in self.choices],
                "nbytes": self.nbytes.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchSpace:
        """From ``to_dict``'s data; raises KeyError or TypeError where it is none."""
        layers = tuple(LayerSpec(d["name"], d["block"], tuple(LinearSpec(**one) for one in d["linears"]))
                       for d in data["layers"])
        return cls(layers, tuple(Choice(**c) for c in data["choices"]), np.array(data["nbytes"], dtype=np.int64))
