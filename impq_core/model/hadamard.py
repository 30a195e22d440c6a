"""Block-diagonal Hadamard rotations, in place, on matrices of any size."""

from __future__ import annotations

import torch

from impq_core.errors import UsageError

ORDERS = ("sequency", "sylvester")
"""Orders of the rows of a Hadamard matrix: by the number of sign changes, or as Sylvester constructs them."""

_AT_A_TIME = 2**24
"""Numbers that are in float64 at a time."""


def hadamard(size: int, order: str = "sequency") -> torch.Tensor:
    """An orthonormal Hadamard matrix, float64 (size, size). In both orders it is symmetric, and so its own inverse.

    Args:
        size: a power of two.
        order: one of ``ORDERS``; ``sequency`` is the Walsh matrix of GSR (arXiv 2505.03810).

    Raises:
        UsageError: the size is no power of two, or the order has another name.
    """
    if size < 1 or size & (size - 1):
        raise UsageError(f"a Hadamard block has a power of two as its size, not {size}")
    if order not in ORDERS:
        raise UsageError(f"unknown order '{order}' of a Hadamard matrix: give {' or '.join(ORDERS)}")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    if order == "sequency":
        changes = (matrix[:, 1:] != matrix[:, :-1]).sum(dim=1)
        matrix = matrix[changes.argsort()]
    return matrix.div(size**0.5)


def rotate_rows(matrix: torch.Tensor, block: torch.Tensor, gain: torch.Tensor | None = None) -> None:
    """Multiply, in place, each row by a gain, and then by the block-diagonal rotation on the right.

    Args:
        matrix: (rows, columns) of any strides and float type; computed in float64.
        block: orthonormal (size, size); the size divides the columns.
        gain: (columns,).
    """
    rows = max(1, _AT_A_TIME // matrix.shape[1])
    for part in torch.split(matrix, rows):
        values = part.double()
        if gain is not None:
            values = values * gain.double()
        part.copy_((values.reshape(len(values), -1, len(block)) @ block).flatten(1))


def rotate_columns(matrix: torch.Tensor, block: torch.Tensor) -> None:
    """Multiply, in place, each column (one number for each component of what is rotated) by the inverse rotation on the
    left: what the matrix writes is rotated as rows are by ``rotate_rows``.

    Args:
        matrix: (rows, columns); the size of the block divides the rows.
        block: orthonormal (size, size).
    """
    rotate_rows(matrix.T, block)
