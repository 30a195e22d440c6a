"""The correction of drift, and GPTQ's feedback of rounding errors for codes that are no affine grid.

Affine grids are rounded by ``impq_gptq.solver``. Here a column is rounded to whatever a function returns for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from impq_gptq.drift import qep

from impq_core.errors import ImpqError
from impq_core.interfaces import Statistics

BLOCK = 128
"""Columns between two updates of the columns to the right by a matrix product."""

Rounder = Callable[[torch.Tensor], Callable[[int, torch.Tensor], torch.Tensor]]
"""Given the columns (rows, count) of a part as they are when it is reached, with the errors of the parts before it
spread over them: a function that rounds column number ``i`` of the part, given as it is when it is reached, (rows,)."""


def required(statistics: Statistics | None, backend: str) -> Statistics:
    """The statistics; raises ImpqError, with the backend's name, if they are missing or not finite."""
    if statistics is None:
        raise ImpqError(f"backend {backend} needs activation statistics")
    if not torch.isfinite(statistics.gram).all():
        raise ImpqError(f"the inputs hold NaN or infinity, which backend {backend} cannot use; try --dtype float32")
    return statistics


def reached(statistics: Statistics) -> bool:
    """Whether a token reached the linear."""
    return statistics.tokens > 0 and bool(statistics.gram.diagonal().any())


def hessian(statistics: Statistics, damping: float) -> torch.Tensor:
    """The damped Hessian 2/N sum x xT, float64 (columns, columns); the identity if no token reached the linear. Inputs
    that are always zero have the diagonal element 1 before the damping.

    Args:
        statistics: of the inputs.
        damping: share of the mean diagonal that is added to the diagonal.
    """
    if not reached(statistics):
        return torch.eye(len(statistics.gram), dtype=torch.float64, device=statistics.gram.device)
    damped = statistics.gram.double() * (2 / statistics.tokens)
    damped.diagonal().masked_fill_(damped.diagonal() == 0, 1)
    damped.diagonal().add_(damping * damped.diagonal().mean())
    return damped


def corrected(weight: torch.Tensor, statistics: Statistics, strength: float) -> torch.Tensor:
    """A weight that makes up for the drift of its inputs (QEP, arXiv 2504.09629): ``W + alpha W D inv(H)``.

    Args:
        weight: (rows, columns); not changed.
        statistics: of the inputs; without ``drift`` the weight is returned.
        strength: alpha.
    """
    if statistics.drift is None or not strength or not reached(statistics):
        return weight.float()
    return torch.addmm(weight.float(), weight.float(), qep(statistics.drift, statistics.gram, strength))


def inverse_factor(damped: torch.Tensor) -> torch.Tensor:
    """U, upper triangular, with UT U the inverse of a damped Hessian (columns, columns). Square of U[c, c]: the inverse
    of the second derivative of the loss in column c if all columns behind it are free."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


@torch.no_grad()
def spread(weight: torch.Tensor, factor: torch.Tensor, parts: Sequence[tuple[int, Rounder]]) -> torch.Tensor:
    """Round the columns of a weight one after another, and spread each one's error over those behind it (GPTQ,
    arXiv 2210.17323).

    Args:
        weight: (rows, columns), in the order of rounding; not changed.
        factor: ``inverse_factor`` in the same order.
        parts: number of columns and rounder of each part; together all columns.

    Returns:
        The rounded weight, float32 (rows, columns).
    """
    left, factor, start = weight.float().T.contiguous(), factor.float(), 0
    rounded = torch.empty_like(left)
    for size, rounder in parts:
        round_column = rounder(left[start:start + size].T)
        for first in range(start, start + size, BLOCK):
            stop = min(first + BLOCK, start + size)
            errors = torch.empty_like(left[first:stop])
            for column in range(first, stop):
                rounded[column] = round_column(column - start, left[column])
                errors[column - first] = (left[column] - rounded[column]) / factor[column, column]
                left[column:stop].addr_(factor[column, column:stop], errors[column - first], alpha=-1)
            left[stop:].addmm_(factor[first:stop, stop:].T, errors, alpha=-1)
        start += size
    return rounded.T
