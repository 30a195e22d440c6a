"""The search space: layers, the players of the game, and the widths that they choose from.

One index system: layers ``i, j`` in ``range(n)``, choices ``k`` in ``range(m)``. Choice 0 is the widest and the
reference. A *pick* is an int array of shape (n,) with one choice for each layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from impq_core.errors import ImpqError

FUSED = MappingProxyType({"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")})
"""Linears that inference engines run as one, by the engines' name of it. They share a width below block level."""

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, order=True)
class Choice:
    """A width of a backend: ``bits`` per weight and a scale for each ``group_size`` weights of a row (0: each row)."""

    bits: float
    group_size: int

    def __str__(self) -> str:
        return f"{self.bits:g}"


@dataclass(frozen=True)
class LinearSpec:
    """A linear: its module name, ``rows`` (outputs) and ``columns`` (inputs)."""

    name: str
    rows: int
    columns: int

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


@dataclass(frozen=True)
class LayerSpec:
    """A player of the game: one or more linears of a block that share a width."""

    name: str
    block: int
    linears: tuple[LinearSpec, ...]

    @property
    def parameters(self) -> int:
        """Number of weights of all its linears."""
        return sum(linear.parameters for linear in self.linears)


@dataclass(frozen=True)
class Pinned:
    """A layer that does not play. Its bytes count.

    Args:
        layer: the layer.
        choice: the width that it stays at; None if it stays unquantized.
        nbytes: its stored bytes.
        low_bytes: its bytes at the narrowest width of the menu. With ``high_bytes``, its bytes at the widest, a nominal
            budget means the same bytes with and without pins.
    """

    layer: LayerSpec
    choice: Choice | None
    nbytes: int
    low_bytes: int
    high_bytes: int


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only copy."""
    array = array.copy()
    array.flags.writeable = False
    return array


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """Layers, choices and the bytes of each layer at each choice.

    Args:
        layers: n players.
        choices: m widths, widest first.
        nbytes: int64 (n, m), stored bytes, scales and zeros included.
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
        """Number of quantizable weights, those of pinned layers included."""
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
        """The playing layers, then the pinned ones."""
        return self.layers + tuple(pin.layer for pin in self.pinned)

    def assignment(self, pick: IntArray) -> list[Choice | None]:
        """The choice of each layer of ``everyone`` under a pick."""
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
        """Stored bytes of a model without pins at its narrowest and at its widest: the ends of the nominal line."""
        return (int(self.nbytes[:, -1].sum()) + sum(pin.low_bytes for pin in self.pinned),
                int(self.nbytes[:, 0].sum()) + sum(pin.high_bytes for pin in self.pinned))

    def nominal_bits(self, nbytes: float) -> float:
        """Nominal average width of a size, in bits: linear between the all-narrowest and the all-widest plan, which
        have their nominal widths (IMPQ, section on allocation)."""
        narrow, wide = self.choices[-1].bits, self.choices[0].bits
        low, high = self.line
        return narrow + (wide - narrow) * (nbytes - low) / (high - low) if high > low else float(narrow)

    def bits_per_weight(self, nbytes: float) -> float:
        """Stored bits per quantizable weight."""
        return 8.0 * nbytes / self.parameters

    def steps_taken(self, picks: IntArray) -> FloatArray:
        """Width steps of picks (N, n): float64 (N, n, m-1), 1 for each step that a pick has taken; choice k takes the
        first k steps."""
        return (picks[:, :, None] > np.arange(len(self.choices) - 1)).astype(np.float64)

    def check_pick(self, pick: IntArray) -> IntArray:
        """The pick as int64 (n,); raises ImpqError if it does not fit this space."""
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
        """Read the data of ``to_dict``; raises KeyError or TypeError if it is something else."""
        def layer(d: Mapping[str, Any]) -> LayerSpec:
            return LayerSpec(d["name"], d["block"], tuple(LinearSpec(**linear) for linear in d["linears"]))

        pinned = tuple(Pinned(layer(d["layer"]), Choice(**d["choice"]) if d["choice"] else None, d["nbytes"],
                              d["low_bytes"], d["high_bytes"]) for d in data["pinned"])
        return cls(tuple(layer(d) for d in data["layers"]), tuple(Choice(**c) for c in data["choices"]),
                   np.array(data["nbytes"], dtype=np.int64), pinned)
