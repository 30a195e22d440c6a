"""GPTQ of a weight whose columns fall into parts of different widths.

A column's rounding error is spread over the columns behind it. With the parts in an order, the best correction of all
columns R behind a part A is ``dW_R = -dW_A H_AR inv(H_RR)``, and what A costs after it is
``tr(dW_A S dW_A')`` with the Schur complement ``S = H_AA - H_AR inv(H_RR) H_RA``. So each part is an ordinary GPTQ
problem with the Hessian S, which ``impq_gptq.solver`` solves, and together they are one sweep over all columns with one
Hessian, up to the order of the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from impq_gptq import backend as gptq
from impq_gptq.solver import Job, Settings, Solution, sweep

from impq_core.interfaces import Statistics
from impq_within.codes import bytes_of, pack, unpack
from impq_within.feedback import Rounder, hessian, inverse_factor, reached, spread

RESIDUAL_DAMPING = 1e-6
"""Damping of a part's Hessian, which is damped already."""

MEAN_STEPS = 32
"""Steps of the mean of a group with one bit, in its half distance."""


@dataclass(frozen=True, eq=False)
class Part:
    """Columns of one width.

    Args:
        columns: int64 (count,), their numbers in the weight; whole groups.
        bits: their width.
    """

    columns: torch.Tensor
    bits: int


def settings_of(group_size: int, damping: float) -> Settings:
    """How the solver rounds: as the backend ``gptq`` does by default, in these groups with this damping."""
    return replace(gptq.settings_of(gptq.Options(damping=damping)), group_size=group_size)


def round_parts(weight: torch.Tensor, statistics: Statistics, parts: Sequence[Part],
                settings: Settings) -> list[Solution]:
    """Quantize parts of a weight one after another.

    Args:
        weight: (rows, columns); not changed.
        statistics: of the inputs; if no token reached the linear, GPTQ is plain rounding.
        parts: the parts in the order of rounding; together all columns. A single one is rounded as the backend ``gptq``
            rounds a linear.
        settings: of the solver.

    Returns:
        A solution for each part.
    """
    if len(parts) == 1:
        return sweep([Job(weight, parts[0].bits)], statistics.gram if reached(statistics) else None,
                     max(1, statistics.tokens), settings)
    damped, left = hessian(statistics, settings.damping), weight.double()
    solutions = []
    for number, part in enumerate(parts):
        own = part.columns
        behind = torch.cat([later.columns for later in parts[number + 1:]] or [own[:0]])
        residual, correction = schur(damped, own, behind)
        if part.bits == 1:
            solution = _two_values(left[:, own], residual, settings.group_size)
        else:
            # Two tokens make the solver's Hessian, 2 / tokens times the gram, the one that is given.
            solution, = sweep([Job(left[:, own].float(), part.bits)], residual.float(), 2,
                              replace(settings, damping=RESIDUAL_DAMPING))
        error = left[:, own] - values(solution, settings.group_size).double()
        left[:, behind] += error @ correction
        solutions.append(solution)
    return solutions


def plainly_rounded(weight: torch.Tensor, bits: int, settings: Settings) -> torch.Tensor:
    """The weight (rows, columns) on the grid that GPTQ starts from, each element at the nearest point."""
    if bits > 1:
        return values(sweep([Job(weight, bits)], None, 1, settings)[0], settings.group_size)
    groups = weight.view(len(weight), -1, settings.group_size)
    middle, half = _middle_and_half(groups)
    return torch.where(groups > middle, middle + half, middle - half).view_as(weight)


def _middle_and_half(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two values m - s and m + s of groups of weights (..., group size): m and s, both (..., 1), as stored."""
    mean = groups.mean(-1, keepdim=True)
    half = (groups - mean).abs().mean(-1, keepdim=True).half().to(groups.dtype).clamp_(min=torch.finfo(torch.half).tiny)
    return (mean / half * MEAN_STEPS).round_().clamp_(-128, 127) / MEAN_STEPS * half, half


def _two_values(weight: torch.Tensor, hessian: torch.Tensor, group_size: int) -> Solution:
    """GPTQ of a part (rows, columns) at one bit. With the middle m and the half distance s of a group, the scale is 2 s
    and the zero (1 - m / s) / 2."""
    codes, grids = torch.empty(weight.T.shape, dtype=torch.uint8, device=weight.device), []

    def rounder(start: int) -> Rounder:
        def begin(group: torch.Tensor) -> Callable[[int, torch.Tensor], torch.Tensor]:
            middle, half = (part[:, 0] for part in _middle_and_half(group))
            grids.append((2 * half, (1 - middle / half) / 2))

            def round_column(column: int, values: torch.Tensor) -> torch.Tensor:
                codes[start + column] = values > middle
                return torch.where(values > middle, middle + half, middle - half)

            return round_column

        return begin

    spread(weight, inverse_factor(hessian), [(group_size, rounder(start))
                                             for start in range(0, weight.shape[1], group_size)])
    scales, zeros = (torch.stack(part) for part in zip(*grids, strict=True))
    return Solution(codes, scales, zeros, 0.0, 0.0)


def schur(hessian: torch.Tensor, own: torch.Tensor, behind: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The Hessian (own, own) of columns if those behind them are free to correct their errors, and what the correction
    of those behind is, (own, behind), by one unit of error in each."""
    if not len(behind):
        return hessian[own][:, own], hessian[own][:, behind]
    across = hessian[behind][:, own]
    correction = torch.cholesky_solve(across, torch.linalg.cholesky(hessian[behind][:, behind]))
    return hessian[own][:, own] - across.T @ correction, correction.T


def values(solution: Solution, group_size: int) -> torch.Tensor:
    """The weight (rows, columns) of a solution, float32, with scales as they are stored."""
    scales, zeros = (part.repeat_interleave(group_size, dim=0) for part in (solution.scales.half().float(),
                                                                             solution.zeros))
    return ((solution.codes - zeros) * scales).T


def part_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Bytes of a part: codes, and a 16-bit scale and a zero of ``bits`` bits for each group of each row."""
    groups = rows * columns // group_size
    return bytes_of(rows * columns, bits) + 2 * groups + bytes_of(groups, bits) if columns else 0


def stored(solution: Solution, bits: int, zero_bits: int) -> dict[str, torch.Tensor]:
    """The tensors of a part, in host memory, with zeros of ``zero_bits``; at one bit a zero z is stored as the byte
    ``128 + 32 (1 - 2 z)``."""
    zeros = 128 + MEAN_STEPS * (1 - 2 * solution.zeros) if bits == 1 else solution.zeros
    tensors = {f"codes_{bits}": pack(solution.codes.T, bits), f"scales_{bits}": solution.scales.T.half(),
               f"zeros_{bits}": pack(zeros.T.round().to(torch.uint8), zero_bits)}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def restored(tensors: Mapping[str, torch.Tensor], bits: int, rows: int, columns: int, zero_bits: int) -> torch.Tensor:
    """The weight of a part, float32 (rows, columns)."""
    scales = tensors[f"scales_{bits}"].float()
    zeros = unpack(tensors[f"zeros_{bits}"], zero_bits, tuple(scales.shape)).float()
    if bits == 1:
        zeros = (1 - (zeros - 128) / MEAN_STEPS) / 2
    codes = unpack(tensors[f"codes_{bits}"], bits, (*scales.shape, columns // scales.shape[1])).float()
    return codes.sub_(zeros[..., None]).mul_(scales[..., None]).view(rows, columns)
