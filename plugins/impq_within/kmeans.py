"""Weighted k-means of many short lists of numbers at once."""

from __future__ import annotations

import torch

ROUNDS = 50
"""Most rounds of Lloyd's algorithm."""

CHUNK = 2**22
"""Numbers that are sorted together; bounds the memory, about 40 bytes a number."""


@torch.no_grad()
def centroids(values: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    """Lloyd's algorithm in one dimension, for each line of numbers by itself: minimises ``sum w (v - c(v))^2`` over
    ``count`` centroids, where c(v) is the nearest one, from the weighted quantiles (2i + 1) / 2 count.

    In one dimension a cluster is an interval, so that, with the numbers sorted and their prefix sums kept, a round
    costs two look-ups for each cluster and none for each number. A cluster without weight keeps its centroid.

    Args:
        values: (lines, numbers), finite.
        weights: (lines, numbers), not negative; a number of weight 0 has no influence.
        count: centroids of a line.

    Returns:
        float32 (lines, count), in ascending order in each line.
    """
    most = max(1, CHUNK // max(1, values.shape[1]))
    return torch.cat([_lloyd(some.double(), weight.double(), count)
                      for some, weight in zip(values.split(most), weights.split(most), strict=True)])


def nearest(values: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """The number of the nearest of each line's centroids.

    Args:
        values: (lines, numbers).
        centres: (lines, count), in ascending order in each line.

    Returns:
        int64 (lines, numbers).
    """
    return torch.searchsorted((centres[:, 1:] + centres[:, :-1]) / 2, values.contiguous())


def _lloyd(values: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    values, order = values.sort(dim=1, stable=True)
    weights = weights.gather(1, order)
    mass, moment = (torch.nn.functional.pad(part.cumsum(1), (1, 0)) for part in (weights, weights * values))
    values, mass = values.contiguous(), mass.contiguous()
    shares = (torch.arange(count, dtype=torch.float64, device=values.device) + 0.5) / count
    first = torch.searchsorted(mass[:, 1:].contiguous(), mass[:, -1:] * shares).clamp_(max=values.shape[1] - 1)
    centres = values.gather(1, first)
    for _ in range(ROUNDS):
        cuts = torch.searchsorted(values, (centres[:, 1:] + centres[:, :-1]) / 2)
        ends = torch.nn.functional.pad(cuts, (0, 1), value=values.shape[1])
        starts = torch.nn.functional.pad(cuts, (1, 0))
        held = mass.gather(1, ends) - mass.gather(1, starts)
        means = (moment.gather(1, ends) - moment.gather(1, starts)) / held
        moved = torch.where(held > 0, means, centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres.sort(dim=1).values.float()
