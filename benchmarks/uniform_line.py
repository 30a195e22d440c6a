"""The straight line between models of neighbouring sizes, such as the uniform ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from impq_core.errors import ImpqError
from impq_core.space import FloatArray


def line(sizes: Sequence[float], losses: Sequence[Sequence[float] | FloatArray], size: float) -> FloatArray:
    """Losses (windows,) on the line at a size, interpolated window by window.

    Args:
        sizes: of the models, in any order: stored bytes, or bits a weight.
        losses: of each model, (windows,).
        size: in the unit of ``sizes``.

    Raises:
        ImpqError: the size lies outside those of the models, or there are none.
    """
    if not sizes or not min(sizes) <= size <= max(sizes):
        raise ImpqError(f"no two uniform models enclose the size {size}: measure them first")
    order = np.argsort(sizes)
    windows = np.array(losses, float)[order].T
    return np.array([np.interp(size, np.array(sizes)[order], each) for each in windows])
