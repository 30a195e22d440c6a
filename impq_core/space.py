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
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, order=True)
class Choice:
    """A width a backend can store a linear at: ``bits`` a weight in groups of ``group_size`` weights (0: a row)."""

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


@dataclass(frozen=True)
class Pinned:
    """A layer that does not play: it stays at a choice (None: unquantized), and its bytes count.

    ``low_bytes`` and ``high_bytes`` are what it would take at the menu's ends, so that a nominal budget means the same
    bytes with and without pins.
    """

    layer: LayerSpec
    choice: Choice | None
    nbytes: int
    low_bytes: int
    high_bytes: int


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
        pinned: layers that do not play.

    Raises:
        ImpqError: the shapes disagree, a name repeats, or a narrower choice is larger than a wider one.
    """

    layers: tuple[LayerSpec, ...]
    choices: tuple[Choice, ...]
    nbytes: IntArray
    pinned: tuple[Pinned, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", frozen(np.asarray(self.nbytes, dtype=np.int64)))
        if self.nbytes.shape != (len(self.layers), len(self.choices)) or not self.layers or not self.choices:
            raise ImpqError(f"a space of {len(self.layers)} layers and {len(self.choices)} choices cannot have sizes "
                            f"of shape {self.nbytes.shape}")
        if list(self.choices) != sorted(self.choices, reverse=True) or len(set(self.choices)) != len(self.choices):
            raise ImpqError("choices must be distinct and ordered from the widest to the narrowest")
        names = [layer.name for layer in self.layers] + [pin.layer.name for pin in self.pinned]
        if len(set(names)) != len(names):
            raise ImpqError("two layers of a search space share a name")
        if (self.nbytes <= 0).any() or (np.diff(self.nbytes, axis=1) > 0).any():
            raise ImpqError("a narrower width must not take more bytes than a wider one")

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def parameters(self) -> int:
        """Quantizable weights, those of pinned layers included."""
        return sum(layer.parameters for layer in (*self.layers, *(pin.layer for pin in self.pinned)))

    @property
    def fixed_bytes(self) -> int:
        """Stored bytes of the pinned layers."""
        return sum(pin.nbytes for pin in self.pinned)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of layers, choices and sizes. Losses are continued, and estimates taken, only for an equal one."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def everyone(self) -> tuple[LayerSpec, ...]:
        """The layers, then the pinned ones."""
        return self.layers + tuple(pin.layer for pin in self.pinned)

    def assignment(self, pick: IntArray) -> list[Choice | None]:
        """The choice of each of ``everyone`` under a pick."""
        return [*(self.choices[k] for k in pick), *(pin.choice for pin in self.pinned)]

    def uniform(self, choice: int) -> IntArray:
        """The pick (n,) that gives every layer the same choice."""
        return np.full(len(self), choice, dtype=np.int64)

    def bytes_of(self, pick: IntArray) -> int:
        """Stored bytes of a pick (n,), pinned layers included."""
        return int(self.bytes_of_all(np.asarray(pick)[None])[0])

    def bytes_of_all(self, picks: IntArray) -> IntArray:
        """Stored bytes (N,) of picks (N, n), pinned layers included."""
        sizes: IntArray = self.fixed_bytes + self.nbytes[np.arange(len(self)), picks].sum(axis=1)
        return sizes

    def carry_over(self, nbytes: int, other: SearchSpace) -> int:
        """A size of this space as a size of another: at the same place between all-narrowest and all-widest."""
        place = (nbytes - self.low_bytes) / max(1, self.high_bytes - self.low_bytes)
        return round(other.low_bytes + place * (other.high_bytes - other.low_bytes))

    @property
    def low_bytes(self) -> int:
        """Stored bytes of the all-narrowest pick."""
        return self.fixed_bytes + int(self.nbytes[:, -1].sum())

    @property
    def high_bytes(self) -> int:
        """Stored bytes of the all-widest pick."""
        return self.fixed_bytes + int(self.nbytes[:, 0].sum())

    @property
    def line(self) -> tuple[int, int]:
        """Bytes of a model without pins at all-narrowest and at all-widest: the ends of the nominal line."""
        return (int(self.nbytes[:, -1].sum()) + sum(pin.low_bytes for pin in self.pinned),
                int(self.nbytes[:, 0].sum()) + sum(pin.high_bytes for pin in self.pinned))

    def nominal_bits(self, nbytes: float) -> float:
        """Place of a size on the paper's line, on which all-low and all-high are their nominal widths."""
        narrow, wide = self.choices[-1].bits, self.choices[0].bits
        low, high = self.line
        return narrow + (wide - narrow) * (nbytes - low) / (high - low) if high > low else float(narrow)

    def bits_per_weight(self, nbytes: float) -> float:
        """True stored bits per quantizable weight."""
        return 8.0 * nbytes / self.parameters

    def steps_taken(self, picks: IntArray) -> FloatArray:
        """(N, n, m-1): 1 where a pick of (N, n) has taken a width step, 0 elsewhere; choice k takes the first k."""
        return (picks[:, :, None] > np.arange(len(self.choices) - 1)).astype(np.float64)

    def check_pick(self, pick: IntArray) -> IntArray:
        """The pick as int64 (n,); raises ImpqError where it does not fit this space."""
        pick = np.asarray(pick, dtype=np.int64)
        if pick.shape != (len(self),) or (pick < 0).any() or (pick >= len(self.choices)).any():
            raise ImpqError(f"a pick for this space is {len(self)} numbers in 0..{len(self.choices) - 1}")
        return pick

    def check_budget(self, budget: int) -> None:
        """Raises ImpqError if a budget in bytes is below the smallest plan."""
        if budget < self.low_bytes:
            raise ImpqError(f"a budget of {budget} bytes is below the smallest plan, {self.low_bytes} bytes")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"layers": [asdict(layer) for layer in self.layers], "choices": [asdict(c) for c in self.choices],
                "nbytes": self.nbytes.tolist(), "pinned": [asdict(pin) for pin in self.pinned]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchSpace:
        """From ``to_dict``'s data; raises KeyError or TypeError where it is none."""
        def layer(d: Mapping[str, Any]) -> LayerSpec:
            return LayerSpec(d["name"], d["block"], tuple(LinearSpec(**one) for one in d["linears"]))

        pinned = tuple(Pinned(layer(d["layer"]), Choice(**d["choice"]) if d["choice"] else None, d["nbytes"],
                              d["low_bytes"], d["high_bytes"]) for d in data["pinned"])
        return cls(tuple(layer(d) for d in data["layers"]), tuple(Choice(**c) for c in data["choices"]),
                   np.array(data["nbytes"], dtype=np.int64), pinned)
