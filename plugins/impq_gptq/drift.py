"""The drift of a quantized prefix, and what a linear can repair of it.

Behind quantized layers a linear's input x is no longer the x_fp of the unquantized model. The drift is
D = sum (x_fp - x) xT over tokens. QEP (arXiv 2504.09629) moves the weight before it is quantized:
W + alpha W D (H + mean(diag H) I)^-1. GPTAQ (arXiv 2504.02692) moves the columns behind column j by w_j P_j, where
P = alpha triu(D VT, 1) V, while the column is rounded; V is that of ``impq_gptq.solver``.
"""

from __future__ import annotations

import torch

QEP_RIDGE = 1.0
"""Share of the Hessian's mean diagonal in the correction of QEP (lambda in its authors' code)."""


def gptaq(drift: torch.Tensor, inverse: torch.Tensor, order: torch.Tensor, factor: float) -> torch.Tensor:
    """P (columns, columns) of GPTAQ, in the order of the columns.

    Args:
        drift: see ``solver.sweep``.
        inverse: inverse Cholesky factor (columns, columns), V with rows and columns reversed.
        order: (columns,) of the columns.
        factor: alpha times the Hessian's factor.
    """
    upper = inverse.flip(0, 1)
    ordered = drift.index_select(0, order).index_select(1, order)
    return ((ordered @ upper.T).triu_(1) @ upper).mul_(factor)


def qep(drift: torch.Tensor, gram: torch.Tensor, strength: float) -> torch.Tensor:
    """alpha D (H + ridge)^-1 (columns, columns), the moves of QEP of each unit of weight."""
    ridged = gram.clone()
    ridged.diagonal().add_(QEP_RIDGE * gram.diagonal().mean())
    lower = torch.linalg.cholesky(ridged)
    return torch.cholesky_solve(drift.T, lower).T.mul_(strength).contiguous()
