"""Reference allocations, which use no measurement: a plan has to be better at the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from impq_core.greedy import promote_in_order
from impq_core.interfaces import Backend
from impq_core.space import Choice, IntArray, SearchSpace


def first_last_high(space: SearchSpace, budget: int) -> IntArray:
    """Promote blocks to the widest choice from both ends inwards, as far as the budget allows. Embedding and head, if
    they are layers, are in front of the first and behind the last.

    Raises:
        ImpqError: the budget is below the smallest plan.
    """
    order = np.argsort(depths(space), kind="stable")
    return promote_in_order(space, budget, np.repeat(order, len(space.choices) - 1))


def depths(space: SearchSpace) -> IntArray:
    """How far each layer (n,) is from the nearer end of the model, in blocks."""
    blocks = [layer.block for layer in space.everyone]
    first, last = min(0, *blocks), max(blocks)
    return np.array([min(layer.block - first, last - layer.block) for layer in space.layers], dtype=np.int64)


def random_plan(space: SearchSpace, budget: int, rng: np.random.Generator) -> IntArray:
    """Promote layers one step at a time in random order, as far as the budget allows.

    Raises:
        ImpqError: the budget is below the smallest plan.
    """
    return promote_in_order(space, budget, rng.permutation(np.repeat(np.arange(len(space)), len(space.choices) - 1)))


@dataclass(frozen=True)
class Mix:
    """A plan that other software makes by rules of its own.

    Args:
        name: what that software calls it.
        nbytes: stored bytes, those of unquantized linears included.
        choices: of each linear of the space by its name, as it is stored; None for one that stays unquantized.
    """

    name: str
    nbytes: int
    choices: Mapping[str, Choice | None]


def mixes_of(backend: Backend, space: SearchSpace) -> tuple[Mix, ...]:
    """The mixes of a backend whose bytes lie between those of the space's smallest and largest plan. Linears that stay
    unquantized in every plan of the space do so in the mixes, other pins do not count."""
    linears = [linear for layer in space.everyone for linear in layer.linears]
    dense = {linear for pin in space.pinned if pin.choice is None for linear in pin.layer.linears}
    found = []
    for name, choices in backend.mixes(linears).items():
        stored = {linear: None if linear in dense else backend.stand_in(linear, choices[linear.name])
                  for linear in linears}
        nbytes = sum(backend.nbytes(linear, choice) if choice else 2 * linear.parameters
                     for linear, choice in stored.items())
        if space.low_bytes <= nbytes <= space.high_bytes:
            found.append(Mix(name, nbytes, {linear.name: choice for linear, choice in stored.items()}))
    return tuple(found)
