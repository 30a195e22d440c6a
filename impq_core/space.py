"""The search space: layers, the players of the game, and the widths that they choose from.

One index system: layers ``i, j`` in ``range(n)``, choices ``k`` in ``range(m)``. Choice 0 is the widest, the one of
most bytes, and the reference. A *pick* is an int array of shape (n,) with one choice for each layer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Choice:
    """A form in which a backend stores weights.

    Args:
        bits: nominal bits a weight.
        group_size: weights of a row that share a scale; 0 if a row has one.
        name: what users call it, such as ``3``, ``3@128`` (in groups of 128) or ``Q4_K``; the bits by default.

    Raises:
        ValueError: the name has other characters than letters, digits and ``._@+%-``.
    """

    bits: float
    group_size: int
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or f"{self.bits:g}")
        if not re.fullmatch(r"[\w.@+%-]+", self.name, re.ASCII):
            raise ValueError(f"the name of a choice has letters, digits and ._@+%- only, not '{self.name}'")

    def __str__(self) -> str:
        return self.name

    def in_groups(self, group_size: int) -> Choice:
        """The same width in other groups: ``3@128``."""
        return self if group_size == self.group_size else Choice(self.bits, group_size, f"{self.bits:g}@{group_size}")

    @property
    def is_width(self) -> bool:
        """Whether its name is its bits, with or without its group size."""
        return self.name in (f"{self.bits:g}", f"{self.bits:g}@{self.group_size}")

    def replaces(self, other: Choice) -> bool:
        """Whether it stores what ``other`` does. A width in groups has a name with and without its group size, by the
        backend's options; any other name stands for one form, in upper or lower case."""
        alike = self.name.lower() == other.name.lower() or (self.is_width and other.is_width)
        return alike and (self.bits, self.group_size) == (other.bits, other.group_size)

    def to_plan(self) -> dict[str, Any]:
        """Plain data for a plan file, in which users edit bits and group sizes: a width has no further name there."""
        data = asdict(self)
        return {key: data[key] for key in ("bits", "group_size")} if self.is_width else data

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Choice:
        """Read the data of ``asdict`` or ``to_plan``; files of 0.3 and before have no names. Raises KeyError, TypeError
        or ValueError."""
        return cls(float(data["bits"]), int(data["group_size"]), str(data.get("name") or ""))


def in_bits(*names: str) -> str:
    """Names of choices for a reader: ``2/3@128/4 bits``, ``IQ2_XS/Q4_K``."""
    return "/".join(names) + unit_of(names)


def unit_of(names: Sequence[str]) -> str:
    """What follows the names of choices: `` bits`` if all are widths, else nothing."""
    return " bits" if _are_widths(names) else ""


def narrowest_first(names: Sequence[str]) -> tuple[str, ...]:
    """The names of a menu, which a resolved configuration has widest first; widths by their numbers in any order."""
    return tuple(sorted(names, key=lambda name: float(name.partition("@")[0])) if _are_widths(names)
                 else reversed(names))


def _are_widths(names: Sequence[str]) -> bool:
    return all(re.fullmatch(r"[0-9.]+(@[0-9]+)?", name) for name in names)


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
    """A player of the game: one or more linears of a block that share a width. The input embedding is one at block -1,
    and the head at the block behind the last; each has one linear, with a row for each token."""

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
        choices: m widths, in the order of their bytes, widest first.
        nbytes: int64 (n, m), stored bytes, scales and zeros included.
        pinned: layers that do not play.
        bits: float64 (n, m), nominal bits a weight of what each layer stores; those of the choices by default. They
            differ if a choice does not exist for a layer's shape, so that another is stored.

    Raises:
        ImpqError: the shapes disagree, a name repeats, or the bytes of a layer rise along the choices.
    """

    layers: tuple[LayerSpec, ...]
    choices: tuple[Choice, ...]
    nbytes: IntArray
    pinned: tuple[Pinned, ...] = ()
    bits: FloatArray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", frozen(np.asarray(self.nbytes, dtype=np.int64)))
        bits = [choice.bits for choice in self.choices] if self.bits is None else self.bits
        object.__setattr__(self, "bits", frozen(np.broadcast_to(np.asarray(bits, dtype=np.float64), self.nbytes.shape)))
        if self.nbytes.shape != (len(self.layers), len(self.choices)) or not self.layers or not self.choices:
            raise ImpqError(f"a space of {len(self.layers)} layers and {len(self.choices)} choices cannot have sizes "
                            f"of shape {self.nbytes.shape}")
        if len({choice.name for choice in self.choices}) != len(self.choices):
            raise ImpqError("two choices of a search space share a name")
        names = [layer.name for layer in self.layers] + [pin.layer.name for pin in self.pinned]
        if len(set(names)) != len(names):
            raise ImpqError("two layers of a search space share a name")
        if (self.nbytes <= 0).any():
            raise ImpqError("a layer takes no bytes")
        for layer, step in np.argwhere(np.diff(self.nbytes, axis=1) > 0)[:1]:
            wide, narrow = self.choices[step], self.choices[step + 1]
            raise ImpqError(f"{wide} takes more bytes than {narrow} in all layers together, but fewer in "
                            f"{self.layers[layer].name}: leave one of the two out of --bits")

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

    @property
    def ends(self) -> tuple[float, float]:
        """Nominal widths of the model at its narrowest and at its widest, bits a weight."""
        weights = np.array([layer.parameters for layer in self.layers], dtype=np.float64)
        narrow, wide = (weights @ self.bits[:, [-1, 0]] / weights.sum()).tolist()
        return narrow, wide

    def nominal_bits(self, nbytes: float) -> float:
        """Nominal average width of a size, in bits: linear between the all-narrowest and the all-widest plan, which
        have their nominal widths (IMPQ, section on allocation)."""
        (narrow, wide), (low, high) = self.ends, self.line
        return narrow + (wide - narrow) * (nbytes - low) / (high - low) if high > low else float(narrow)

    def bits_per_weight(self, nbytes: float) -> float:
        """Stored bits per quantizable weight."""
        return 8.0 * nbytes / self.parameters

    @property
    def rounding_errors(self) -> FloatArray:
        """Squared error of uniform rounding by layer and choice, float64 (n, m): ``4^-bits``, shifted and scaled to 0
        at the widest and 1 at the narrowest choice; 0 if all choices are stored alike. Of choices of equal nominal
        bits, one with more scales counts as wider by the bits that these take."""
        stored = 8.0 * self.nbytes / np.array([[layer.parameters] for layer in self.layers])
        alike = self.bits[:, :, None] == self.bits[:, None, :]
        scales = stored - np.where(alike, stored[:, None, :], np.inf).min(axis=2)
        errors = 4.0 ** -(self.bits + scales)
        errors = errors - errors[:, :1]
        spread = errors[:, -1:]
        relative: FloatArray = np.divide(errors, spread, out=np.zeros_like(errors), where=spread != 0)
        return relative

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
                "nbytes": self.nbytes.tolist(), "pinned": [asdict(pin) for pin in self.pinned],
                "bits": self.bits.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchSpace:
        """Read the data of ``to_dict``; raises KeyError or TypeError if it is something else."""
        def layer(d: Mapping[str, Any]) -> LayerSpec:
            return LayerSpec(d["name"], d["block"], tuple(LinearSpec(**linear) for linear in d["linears"]))

        pinned = tuple(Pinned(layer(d["layer"]), Choice.of(d["choice"]) if d["choice"] else None, d["nbytes"],
                              d["low_bytes"], d["high_bytes"]) for d in data["pinned"])
        return cls(tuple(layer(d) for d in data["layers"]), tuple(map(Choice.of, data["choices"])),
                   np.array(data["nbytes"], dtype=np.int64), pinned, data.get("bits"))  # type: ignore[arg-type]
