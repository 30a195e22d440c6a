"""GPTQ's feedback of rounding errors for codes that are no affine grid.

Affine grids are rounded by ``impq_gptq.solver``. Here a column is rounded to whatever a function returns for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from impq_core.errors import ImpqError
from impq_core.interfaces import Statistics

BLOCK = 128
"""Columns between two updates of the columns to the right by a matrix product."""

Rounder = Callable[[torch.Tensor], Callable[[int, torch.Tensor], torch.Tensor]]
"""Given the columns (rows, count) of a part as they are when it is reached, with the errors of the parts before it
spread over them: a function that rounds column number ``i`` of the part, given as it is when it is reached, (rows,)."""


def hessian(statistics: Statistics | None, damping: float, backend: str) -> tuple[torch.Tensor, bool]:
    """The damped Hessian 2/N sum x xT, float64 (columns, columns), and whether a token reached the linear; if none
    did, it is the identity. Inputs that are always zero have the diagonal element 1 before the damping.

    Args:
        statistics: of the inputs.
        damping: share of the mean diagonal that is added to the diagonal.
        backend: name for the error.

    Raises:
        ImpqError: statistics are missing or not finite.
    """
    if statistics is None:
        raise ImpqError(f"backend {backend} needs activation statistics")
    gram = statistics.gram.double()
    if not torch.isfinite(gram).all():
        raise ImpqError(f"the inputs hold NaN or infinity, which backend {backend} cannot use; try --dtype float32")
    if statistics.tokens == 0 or not gram.diagonal().any():
        return torch.eye(len(gram), dtype=torch.float64, device=gram.device), False
    gram = gram * (2 / statistics.tokens)
    gram.diagonal().masked_fill_(gram.diagonal() == 0, 1)
    gram.diagonal().add_(damping * gram.diagonal().mean())
    return gram, True


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
