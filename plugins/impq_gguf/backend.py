"""The backend of llama.cpp's types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impq_core.errors import ImpqError, UsageError, nearest
from impq_core.interfaces import Backend, Statistics, Variant
from impq_core.space import Choice, LinearSpec
from impq_gguf.mixes import BASE, deal
from impq_gguf.types import TYPES, stored_as

if TYPE_CHECKING:
    import torch

FLOOR = 1e-6
"""Smallest importance of an input, relative to the mean. llama.cpp's quantizers may end the process if a whole block
has no importance."""


@dataclass(frozen=True)
class Options:
    """Options of the backend of llama.cpp's types.

    Args:
        importance: weight the squared error of each input by its mean square over the calibration text, which
            llama.cpp calls an importance matrix; false quantizes without text, which IQ1, IQ2 and IQ3_XXS types do not
            allow.
        mixes: llama.cpp's mixes that a plan is compared with, by name and with commas between, or ``none``. One whose
            size is outside the menu is left out.
    """

    importance: bool = True
    mixes: str = "Q2_K,Q3_K_M,Q4_K_M,IQ3_M"

    def __post_init__(self) -> None:
        for name in self.names_of_mixes:
            if name not in BASE:
                raise ValueError(f"llama.cpp has no mix '{name}'{nearest(name, BASE)}")

    @property
    def names_of_mixes(self) -> tuple[str, ...]:
        """The mixes, by name."""
        names = tuple(name.strip().upper() for name in self.mixes.split(",") if name.strip())
        return () if names == ("NONE",) else names


class Gguf(Backend):
    """llama.cpp's types, IQ1_S (1.6 bits) to F16, quantized and unpacked by llama.cpp's own code.

    A choice is a type by its name in llama.cpp; its bits are the stored bits a weight, scales included. K- and IQ-types
    have blocks of 256 weights along a row: linears with other rows are stored as llama.cpp's stand-ins (``stored_as``).

    The default menu: each of its types has the smallest error of its size, and about twice the output error of the type
    above, which is 1.25, 1.2 and 0.75 bits larger. On a Gaussian weight of 256 x 2048 with uneven inputs, relative
    output error: Q5_K 0.032, IQ4_XS 0.069, IQ3_XXS 0.126, IQ2_XS 0.223; on down projections of SmolLM2-135M, and text
    that the importance was not read from: IQ4_XS 0.054, IQ3_XXS 0.128, IQ2_XS 0.217.
    """

    Options = Options

    @property
    def default_bits(self) -> tuple[str, ...]:  # type: ignore[override]
        """Q5_K, IQ4_XS, IQ3_XXS, IQ2_XS; without importance Q5_K, IQ4_XS, Q3_K, Q2_K."""
        return ("Q5_K", "IQ4_XS", *(("IQ3_XXS", "IQ2_XS") if self.options.importance else ("Q3_K", "Q2_K")))

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Activations, unless option ``importance`` is false."""
        return frozenset({"activations"} if self.options.importance else ())

    def choices(self) -> tuple[Choice, ...]:
        """Every type, best first; without importance, every type that does not need it."""
        return tuple(kind.choice for kind in TYPES.values() if self.options.importance or not kind.needs_importance)

    def choice(self, name: str) -> Choice | None:
        """The type of a name, in upper or lower case; None if there is none.

        Raises:
            UsageError: the type needs importance, and option ``importance`` is false.
        """
        kind = TYPES.get(name.upper())
        if kind and kind.needs_importance and not self.options.importance:
            raise UsageError(f"backend gguf: type {kind.name} needs the importance of inputs: leave out "
                             "-o importance=false, or take a type such as Q2_K or IQ3_S")
        return kind.choice if kind else None

    def stand_in(self, linear: LinearSpec, choice: Choice) -> Choice:
        """The type in which llama.cpp stores a linear of this shape if it is asked for ``choice``."""
        return stored_as(choice.name, linear.columns).choice

    def variant_options(self) -> Mapping[str, Any]:
        """``importance``: the names of mixes decide no variant."""
        return {"importance": self.options.importance}

    def mixes(self, linears: Sequence[LinearSpec]) -> Mapping[str, Mapping[str, Choice]]:
        """The mixes of option ``mixes`` as llama-quantize deals them out; without importance, those that it makes
        without."""
        found = {}
        for mix in self.options.names_of_mixes:
            types = deal(mix, linears, self.options.importance)
            stored = [stored_as(types[linear.name], linear.columns) for linear in linears]
            if self.options.importance or not any(kind.needs_importance for kind in stored):
                found[mix] = {name: TYPES[kind].choice for name, kind in types.items()}
        return found

    def read_types(self, file: Path, linears: Sequence[LinearSpec]) -> Mapping[str, str]:
        """The types in a GGUF file."""
        from impq_gguf.importer import read_types

        return read_types(file, linears)

    def check(self, linear: LinearSpec, choice: Choice) -> None:
        """Raises ImpqError if the type's block does not divide the inputs, which is true of no stand-in."""
        if linear.columns % choice.group_size:
            raise ImpqError(f"backend gguf: blocks of {choice.group_size} weights of type {choice} do not divide the "
                            f"{linear.columns} inputs of {linear.name}")

    def nbytes(self, linear: LinearSpec, choice: Choice) -> int:
        """Bytes of the blocks of all rows."""
        return linear.parameters // choice.group_size * TYPES[choice.name].nbytes

    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        """The weight in a type, with the mean squares of the inputs as importance.

        If no calibration token reached the linear, all inputs have the same importance, and the record has
        ``unreached``.

        Raises:
            ImpqError: statistics are missing or not finite, or the weights overflow the type's 16-bit scales.
        """
        from impq_gguf.library import quantize

        importance, record = None, {}
        if self.options.importance:
            importance, reached = _importance(statistics)
            record = {} if reached else {"unreached": 1.0}
        return Variant(choice, {"data": quantize(weight.float().contiguous(), choice.name, importance)}, record)

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        """The values that llama.cpp computes from the stored blocks."""
        from impq_gguf.library import dequantize

        return dequantize(variant.tensors["data"], variant.choice.name, linear.columns)


def _importance(statistics: Statistics | None) -> tuple[torch.Tensor, bool]:
    """Mean squares of the inputs relative to their mean, float32 (columns,), at least ``FLOOR``: only ratios matter.
    And whether a token reached the linear; if none did, all are 1."""
    import torch

    if statistics is None:
        raise ImpqError("backend gguf needs activation statistics")
    squares = statistics.gram.diagonal().double()
    if not torch.isfinite(squares).all():
        raise ImpqError("the inputs hold NaN or infinity, which have no importance; try --dtype float32")
    reached = statistics.tokens > 0 and bool(squares.any())
    relative = (squares / squares.mean()).clamp_min(FLOOR) if reached else torch.ones_like(squares)
    return relative.float().contiguous(), reached
