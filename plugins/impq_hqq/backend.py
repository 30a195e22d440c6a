"""The HQQ backend: an adapter to the quantizer of hqq."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from impq_core.errors import ImpqError
from impq_core.interfaces import Backend, Statistics, Variant
from impq_core.space import Choice, LinearSpec

if TYPE_CHECKING:
    import torch

_PER_WORD = {8: (1, 1), 4: (2, 1), 3: (10, 4), 2: (4, 1), 1: (8, 1)}
"""Number of codes in a packed word, and bytes of the word, by bits."""


@dataclass(frozen=True)
class Options:
    """Options of the HQQ backend.

    Args:
        group_size: weights of a row that share a scale and a zero.
        optimize: optimise zeros by the half-quadratic solver (20 rounds, p = 0.7); false is plain rounding.
    """

    group_size: int = 64
    optimize: bool = True

    def __post_init__(self) -> None:
        if self.group_size < 8 or self.group_size % 8:
            raise ValueError(f"group_size must be a multiple of 8, not {self.group_size}")


class Hqq(Backend):
    """HQQ at 8, 4, 3, 2 and 1 bits, with groups along the inputs, and scales and zeros in 16 bits.

    On a CUDA device the library's solver computes in 16 bits, elsewhere in 32, so that variants differ a little.
    """

    Options = Options
    devices = frozenset({"cpu", "cuda", "mps", "xpu"})
    default_bits = ("2", "3", "4")

    def choices(self) -> tuple[Choice, ...]:
        """8, 4, 3, 2, 1 bits."""
        return tuple(Choice(float(bits), self.options.group_size) for bits in _PER_WORD)

    def choice(self, name: str) -> Choice | None:
        """A width by its name, such as ``3`` in groups of the option ``group_size``, or ``3@128``."""
        width, at, size = name.partition("@")
        found = super().choice(width)
        if found is None or not at:
            return found
        return found.in_groups(int(size)) if re.fullmatch("[1-9][0-9]{0,5}", size) and not int(size) % 8 else None

    def stand_in(self, linear: LinearSpec, choice: Choice) -> Choice:
        """For a width with a group size in its name, such as ``3@128``, the same width in the largest smaller groups
        that divide the inputs, if those named do not. The option ``group_size`` is one for all linears, which
        ``check`` refuses where it does not fit."""
        if choice.group_size == self.options.group_size or linear.columns % choice.group_size == 0:
            return choice
        size = next((size for size in range(choice.group_size - 8, 0, -8) if linear.columns % size == 0), 0)
        return (self.choice(f"{choice.bits:g}@{size}") if size else None) or choice

    def check(self, linear: LinearSpec, choice: Choice) -> None:
        """Raises ImpqError if groups do not divide the inputs, or do not fill the packed words."""
        if linear.columns % choice.group_size:
            raise ImpqError(f"backend hqq: group size {choice.group_size} does not divide the {linear.columns} inputs "
                            f"of {linear.name}")
        groups, codes = linear.parameters // choice.group_size, _PER_WORD[int(choice.bits)][0]
        if choice.bits != 3 and groups % codes:
            raise ImpqError(f"backend hqq: the {groups} groups of {linear.name} do not fill words of {codes} codes at "
                            f"{choice} bits")

    def nbytes(self, linear: LinearSpec, choice: Choice) -> int:
        """Bytes of the packed codes, and a 16-bit scale and zero for each group."""
        groups = linear.parameters // choice.group_size
        codes, word = _PER_WORD[int(choice.bits)]
        return ceil(groups / codes) * choice.group_size * word + groups * 4

    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        """Quantize without data."""
        import torch
        from hqq.core.quantize import Quantizer

        codes, meta = Quantizer.quantize(weight.clone(), nbits=int(choice.bits), group_size=choice.group_size, axis=1,
                                         optimize=self.options.optimize, device=str(weight.device),
                                         compute_dtype=torch.float32)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in
                   (("codes", codes), ("scale", meta["scale"].half()), ("zero", meta["zero"].half()))}
        if not all(torch.isfinite(tensors[name]).all() for name in ("scale", "zero")):
            raise ImpqError(f"HQQ's scales overflow 16 bits at {choice} bits")
        return Variant(choice, tensors)

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        """(code - zero) * scale, with the 16-bit scales and zeros that are stored."""
        import torch

        words, bits = variant.tensors["codes"], int(variant.choice.bits)
        codes = _PER_WORD[bits][0]
        values = torch.empty(len(words) * codes, words.shape[1], device=words.device)
        for part, groups in enumerate(values.chunk(codes)):  # the first in the highest bits
            groups.copy_((words >> bits * (codes - 1 - part)) & (2**bits - 1))
        values = values[:linear.parameters // variant.choice.group_size]  # the last words may be padded
        values.sub_(variant.tensors["zero"].float()).mul_(variant.tensors["scale"].float())
        return values.view(linear.rows, linear.columns)

    def stored_state(self, variant: Variant, linear: LinearSpec) -> dict[str, torch.Tensor]:
        """The state dict of an HQQLinear with this variant; every entry is a tensor."""
        import torch
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        module = HQQLinear(None, BaseQuantizeConfig(nbits=int(variant.choice.bits), axis=1,
                                                    group_size=variant.choice.group_size),
                           compute_dtype=torch.float16, device="cpu", initialize=False)
        module.W_q = torch.nn.Parameter(variant.tensors["codes"], requires_grad=False)
        module.meta = {**_meta(variant, linear), "scale": variant.tensors["scale"], "zero": variant.tensors["zero"]}
        return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def _meta(variant: Variant, linear: LinearSpec) -> dict[str, Any]:
    from hqq.core.quantize import Quantizer

    packing = Quantizer.bit_to_packing[int(variant.choice.bits)]
    return {"nbits": int(variant.choice.bits), "group_size": variant.choice.group_size, "axis": 1, "packing": packing,
            "unpack_view_dtype": Quantizer.unpack_view_dtype[packing], "view_as_float": False, "quant_scale": False,
            "quant_zero": False, "shape": _size(linear)}


def _size(linear: LinearSpec) -> torch.Size:
    import torch

    return torch.Size((linear.rows, linear.columns))
