"""llama.cpp's types of quantized tensors: names, blocks, stand-ins. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from impq_core.space import Choice


@dataclass(frozen=True)
class GgmlType:
    """A type of llama.cpp. A row is a sequence of blocks, which hold their scales.

    Args:
        name: as the ``gguf`` package and llama.cpp write it.
        block: weights of a block.
        nbytes: bytes of a block.
        stand_in: name of the type that llama.cpp takes if ``block`` does not divide a row; empty if it has none.
        needs_importance: whether llama-quantize refuses the type without an importance matrix.
    """

    name: str
    block: int
    nbytes: int
    stand_in: str = ""
    needs_importance: bool = False

    @cached_property
    def choice(self) -> Choice:
        """The choice of this type: its true bits a weight, and its block as the group."""
        return Choice(8 * self.nbytes / self.block, self.block, self.name)


_ALL = (
    # More bytes first; at the same bytes, the smaller error on a Gaussian weight first.
    GgmlType("F16", 1, 2),
    GgmlType("BF16", 1, 2),
    GgmlType("Q8_0", 32, 34),
    GgmlType("Q6_K", 256, 210, "Q8_0"),
    GgmlType("Q5_1", 32, 24),
    GgmlType("Q5_K", 256, 176, "Q5_1"),
    GgmlType("Q5_0", 32, 22),
    GgmlType("Q4_1", 32, 20),
    GgmlType("Q4_K", 256, 144, "Q5_0"),
    GgmlType("IQ4_NL", 32, 18),
    GgmlType("Q4_0", 32, 18),
    GgmlType("NVFP4", 64, 36),
    GgmlType("IQ4_XS", 256, 136, "IQ4_NL"),
    GgmlType("MXFP4", 32, 17),
    GgmlType("IQ3_S", 256, 110, "IQ4_NL"),
    GgmlType("Q3_K", 256, 110, "Q4_0"),
    GgmlType("IQ3_XXS", 256, 98, "IQ4_NL", needs_importance=True),
    GgmlType("Q2_K", 256, 84, "Q4_0"),
    GgmlType("IQ2_S", 256, 82, "IQ4_NL", needs_importance=True),
    GgmlType("IQ2_XS", 256, 74, "IQ4_NL", needs_importance=True),
    GgmlType("IQ2_XXS", 256, 66, "IQ4_NL", needs_importance=True),
    GgmlType("TQ2_0", 256, 66, "Q4_0"),
    GgmlType("IQ1_M", 256, 56, "IQ4_NL", needs_importance=True),
    GgmlType("TQ1_0", 256, 54, "Q4_0"),
    GgmlType("IQ1_S", 256, 50, "IQ4_NL", needs_importance=True),
)

TYPES: Mapping[str, GgmlType] = MappingProxyType({kind.name: kind for kind in _ALL})
"""Every type that a linear can be stored in, by name, best first.

Not among them: Q1_0 and Q2_0, which the ``gguf`` package cannot read, F32, and types of llama.cpp's own computations.
TQ1_0 and TQ2_0 are for models with ternary weights; on others they are far worse than IQ types of their size.
"""


def stored_as(name: str, columns: int) -> GgmlType:
    """The type in which llama.cpp stores a tensor with rows of ``columns`` weights if it is asked for type ``name``.

    It is the type itself if its block divides the row, else its stand-in, else F16 (``tensor_type_fallback`` in
    llama.cpp's src/llama-quant.cpp; llama-quantize refuses types for which it has no stand-in, F16 is taken here).
    Older releases of llama.cpp take IQ4_NL for Q2_K and Q3_K, which has the same bytes as Q4_0.
    """
    kind = TYPES[name]
    if columns % kind.block and kind.stand_in:
        kind = TYPES[kind.stand_in]
    return TYPES["F16"] if columns % kind.block else kind
