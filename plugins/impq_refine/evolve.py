"""Evolution by random exchanges: a search without any estimate, as a baseline at equal cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from impq_core.interfaces import Game, Refiner
from impq_core.space import IntArray, SearchSpace
from impq_core.types import Plan, SensitivityEstimate
from impq_refine.judge import Incumbent

PATIENCE = 200
"""Random exchanges in a row without a new pick before the search ends."""


@dataclass(frozen=True)
class Options:
    """Options of the evolution.

    Args:
        offspring: mutants of a generation; the best of them may replace the parent.
        swaps: most exchanges in a mutant.
    """

    offspring: int = 8
    swaps: int = 3

    def __post_init__(self) -> None:
        if self.offspring < 1 or self.swaps < 1:
            raise ValueError("offspring and swaps must be at least 1")


class Evolve(Refiner):
    """Evolutionary search after EvoPress (arXiv 2410.14649), from any start: mutants differ from the parent by a few
    exchanges of one width step, are all measured, and the best one that also wins before the referee is the next
    parent."""

    Options = Options

    def refine(self, plan: Plan, estimate: SensitivityEstimate | None, game: Game, referee: Game, forwards: float,
               rng: np.random.Generator) -> Plan:
        """A plan within the budget, no worse on the referee's windows."""
        incumbent = Incumbent(plan.pick, game, referee, forwards)
        while incumbent.may_go_on:
            born: list[tuple[float, IntArray]] = []
            idle = 0
            while len(born) < self.options.offspring and idle < PATIENCE and incumbent.may_go_on:
                swaps = int(rng.integers(1, self.options.swaps + 1))
                pick = mutant(plan.space, incumbent.pick, plan.budget_bytes, swaps, rng)
                if pick.tobytes() in incumbent.seen:
                    idle += 1
                    continue
                born.append((incumbent.measure(pick)[0], pick))
            if not born:
                break
            gain, best = min(born, key=lambda mutation: mutation[0])
            if gain < 0:
                incumbent.challenge(best)
        predicted = float(estimate.predict(incumbent.pick)[0]) if estimate else None
        return replace(plan, pick=incumbent.pick, predicted_loss=predicted, bound=None,
                       method=f"{plan.method} + evolve({incumbent.taken} taken)")


def mutant(space: SearchSpace, pick: IntArray, budget: int, swaps: int, rng: np.random.Generator) -> IntArray:
    """A pick with up to ``swaps`` random layers a step narrower and, after each, others a step wider while the budget
    lasts."""
    last = len(space.choices) - 1
    pick = pick.copy()
    for _ in range(swaps):
        down = np.flatnonzero(pick < last)
        if not len(down):
            break
        lowered = int(rng.choice(down))
        pick[lowered] += 1
        for layer in rng.permutation(len(pick)):
            if layer == lowered or pick[layer] == 0:
                continue
            pick[layer] -= 1
            if space.bytes_of(pick) > budget:
                pick[layer] += 1
    return pick
