"""The backend of high-impact parameter ratios (arXiv 2511.17801)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil, floor
from typing import TYPE_CHECKING

from impq_core.errors import ImpqError
from impq_core.interfaces import Statistics, Variant
from impq_core.space import Choice, LinearSpec
from impq_within.base import GroupedOptions, Mixture

if TYPE_CHECKING:
    import torch

RATIOS = (20, 10)
"""Percentages of wide channels that are listed, of the paper's candidates 2, 5, 10, 15 and 20."""

WIDTHS = (4, 3, 2)
"""Bits of the channels that are not wide."""

TOLERANCE = 1e-6
"""Part of a group by which a ratio's columns may exceed whole groups without a further one."""


@dataclass(frozen=True)
class Options(GroupedOptions):
    """Options of the backend of high-impact ratios.

    Args:
        impact: what ranks channels: ``gram``, the energy of a channel's inputs times that of its weights, or
            ``guided``, the Fisher diagonal, which takes a backward pass of the calibration text.
    """

    impact: str = "gram"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.impact not in ("gram", "guided"):
            raise ValueError(f"impact must be gram or guided, not {self.impact}")


class Ratio(Mixture):
    """Channels of high impact one bit wider than the rest (arXiv 2511.17801), with GPTQ in place of learned rounding.

    A choice is a width b and a share r of the channels, the columns c of a weight, that have b + 1 bits: ``2+10%``, of
    2.1 nominal bits. The wide channels are whole groups, so that a share is rounded up to the next one: of 576 channels
    in groups of 64 there are 64 wide ones at ``2+2%`` and at ``2+10%``, which are stored alike, and 128 at ``2+15%``.

    The impact of a channel is the diagonal of the Fisher matrix over its weights, ``sum_rt (g_rt x_tc)^2`` for the
    gradients g of the loss in the outputs r and the inputs x at tokens t (option ``impact=guided``), or, without
    gradients, ``sum_t x_tc^2 sum_r w_rc^2``, the default.

    Channels are chosen before anything is rounded, because the residual of GPTQ is its correction of other columns.
    GPTQ then rounds the wide part and, with its errors spread over the rest, the narrow part, with one Hessian
    (``impq_within.parts``). Stored are the codes, 16-bit scales and packed zeros of both parts, and the number of each
    column, 2 bytes if the linear is mixed. Without wide channels the codes are those of backend ``gptq``.
    """

    Options = Options
    default_bits = ("2", "2+20%", "3", "3+20%", "4")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Also gradients with option ``impact=guided``."""
        return super().needs | ({"gradients"} if self.options.impact == "guided" else set())

    def choices(self) -> tuple[Choice, ...]:
        """4 bits, and 3 and 2 bits with 20, 10 and 0 percent of wide channels, of the many that there are."""
        names = (f"{bits}+{ratio}%" if ratio else f"{bits}" for bits in WIDTHS for ratio in (*RATIOS, 0))
        return tuple(choice for name in names if (choice := self.choice(name)) and choice.bits <= WIDTHS[0])

    def choice(self, name: str) -> Choice | None:
        """2, 3 or 4 bits, or a mixture such as ``2+10%``, with up to two decimals and below 100%."""
        found = re.fullmatch(r"([234])(?:\+([0-9]{1,2}(?:\.[0-9]{1,2})?)%)?", name)
        if found is None:
            return None
        width, share = int(found[1]), float(found[2] or 0)
        return _choice(width, share / 100, self.options.group_size)

    def stand_in(self, linear: LinearSpec, choice: Choice) -> Choice:
        """The mixture with the share rounded up to whole groups of the linear's columns."""
        if linear.columns % choice.group_size:
            return choice
        width, wide = _wide(linear, choice)
        return _choice(width, wide / linear.columns, choice.group_size)

    def check(self, linear: LinearSpec, choice: Choice) -> None:
        """Raises ImpqError if groups do not divide the inputs."""
        if linear.columns % choice.group_size:
            raise ImpqError(f"backend ratio: group size {choice.group_size} does not divide the {linear.columns} "
                            f"inputs of {linear.name}")

    def nbytes(self, linear: LinearSpec, choice: Choice) -> int:
        """Bytes of both parts, and of 16-bit numbers of the columns if both have any, 32-bit above 32768 columns."""
        from impq_within.parts import part_bytes

        width, wide = _wide(linear, choice)
        total = sum(part_bytes(linear.rows, columns, bits, choice.group_size)
                    for bits, columns in ((width + 1, wide), (width, linear.columns - wide)))
        return total + linear.columns * (2 if linear.columns <= 2**15 else 4) * (0 < wide < linear.columns)

    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        """Choose the wide channels, then GPTQ.

        If no calibration token reached the linear, the impact of a channel is the energy of its weights, GPTQ is plain
        rounding, and the record has ``unreached``.

        Raises:
            ImpqError: there are no statistics, they are not finite, or lack the gradients that ``impact=guided`` needs.
        """
        import torch

        from impq_within.feedback import corrected, reached, required
        from impq_within.parts import Part, round_parts, settings_of, stored

        spec = LinearSpec("", *weight.shape)
        statistics = required(statistics, "ratio")
        width, wide = _wide(spec, choice)
        ranked = self._impact(weight, statistics).argsort(descending=True, stable=True)
        # In ascending order within a part, so that a linear without wide channels is that of GPTQ.
        parts = [Part(columns.sort().values, bits) for columns, bits in (
            (ranked[:wide], width + 1), (ranked[wide:], width)) if len(columns)]
        solutions = round_parts(corrected(weight, statistics, self.options.drift_strength), statistics, parts,
                                settings_of(choice.group_size, self.options.damping))
        tensors: dict[str, torch.Tensor] = {}
        for part, solution in zip(parts, solutions, strict=True):
            tensors |= stored(solution, part.bits, part.bits)
        if len(parts) == 2:
            order = torch.cat([part.columns for part in parts])
            tensors["order"] = order.to(torch.int16 if spec.columns <= 2**15 else torch.int32).cpu()
        return Variant(choice, tensors, {} if reached(statistics) else {"unreached": 1.0})

    def _impact(self, weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        """(columns,), the larger the more bits a channel deserves."""
        from impq_within.feedback import reached

        energy = weight.double().square().sum(0)
        if not reached(statistics):
            return energy
        if self.options.impact == "gram":
            return energy * statistics.gram.diagonal().double()
        if statistics.guided is None:
            raise ImpqError("backend ratio: impact=guided needs gradients of the calibration loss, which these "
                            "statistics lack; impact=gram does without")
        return statistics.guided.diagonal(dim1=-2, dim2=-1).double().sum(0)

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        """(code - zero) * scale of both parts, with the 16-bit scales that are stored."""
        import torch

        from impq_within.parts import restored

        width, wide = _wide(linear, variant.choice)
        parts = [restored(variant.tensors, bits, linear.rows, columns, bits)
                 for bits, columns in ((width + 1, wide), (width, linear.columns - wide)) if columns]
        if len(parts) == 1:
            return parts[0]
        weight = torch.empty(linear.rows, linear.columns, device=parts[0].device)
        weight[:, variant.tensors["order"].long()] = torch.cat(parts, dim=1)
        return weight


def _choice(width: int, share: float, group_size: int) -> Choice:
    """A share of all channels or of none is a plain width. The name's share is rounded down, so that the name means the
    same number of groups."""
    if share in (0, 1):
        return Choice(float(width + int(share)), group_size)
    return Choice(width + share, group_size, f"{width}+{floor(1e4 * share + TOLERANCE) / 100:g}%")


def _wide(linear: LinearSpec, choice: Choice) -> tuple[int, int]:
    """The width of a choice, and how many channels of a linear are one bit wider: whole groups."""
    width = floor(choice.bits)
    groups = ceil((choice.bits - width) * linear.columns / choice.group_size - TOLERANCE)
    return width, groups * choice.group_size
