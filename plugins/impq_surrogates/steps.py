"""Costs of width steps as costs of choices: choice k of a layer is its first k steps down."""

from __future__ import annotations

import numpy as np

from impq_core.space import FloatArray, SearchSpace


def from_steps(values: FloatArray) -> FloatArray:
    """Costs of steps (n, m-1) as costs of choices (n, m)."""
    return np.concatenate([np.zeros((len(values), 1)), values.cumsum(axis=1)], axis=1)


def from_quadratic(space: SearchSpace, linear: FloatArray, k: FloatArray) -> tuple[FloatArray, FloatArray]:
    """``a'q + q'Kq`` over step indicators q (n (m-1),), as the linear (n, m) and pairwise (n, m, n, m) terms of an
    estimate."""
    n, m = space.nbytes.shape
    steps = m - 1
    blocks = k.reshape(n, steps, n, steps)
    pairs = np.zeros((n, m, n, m))
    pairs[:, 1:, :, 1:] = blocks.cumsum(axis=1).cumsum(axis=3)  # a choice is the sum of its steps
    own = np.stack([np.diag(pairs[i, :, i]) for i in range(n)])  # (n, m): terms within a layer are linear
    pairs[np.arange(n), :, np.arange(n)] = 0.0
    return from_steps(linear.reshape(n, steps)) + own, pairs + pairs.transpose(2, 3, 0, 1)
