"""Evolutionary search by random exchanges of widths, which uses no estimate: the baseline at equal cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from impq_core.interfaces import Game, Refiner
from impq_core.space import IntArray
from impq_core.types import Plan, SensitivityEstimate
from impq_refine.judge import Incumbent

PATIENCE = 200
"""Random exchanges in a row without a new pick before the search ends."""


@dataclass(frozen=True)
class Options:
    """Options of the evolution.

    Args:
        offspring: mutants in a generation; the best may replace the parent.
        swaps: largest number of exchanges in a mutant.
    """

    offspring: int = 8
    swaps: int = 3

    def __post_init__(self) -> None:
        if self.offspring < 1 or self.swaps < 1:
            raise ValueError("offspring and swaps must be at least 1")


class Evolve(Refiner):
    """Evolutionary search after EvoPress (arXiv 2410.14649), from any start.

    Mutants differ from the parent by a few exchanges of one width step and are all measured. The best mutant of a
    generation is the next parent if it also wins on the referee's windows.
    """

    Options = Options
    takes_limits = True

    def refine(self, plan: Plan, estimate: SensitivityEstimate | None, game: Game, referee: Game, forwards: float,
               rng: np.random.Generator) -> Plan:
        """A plan within the budget, no worse on the referee's windows."""
        incumbent = Incumbent(plan.pick, game, referee, forwards)
        while incumbent.may_go_on:
            generation = self._generation(plan, incumbent, rng)
            if generation:
                incumbent.expect(generation)
            mutants: list[tuple[float, IntArray]] = []
            for pick in generation:
                if incumbent.may_go_on:
                    mutants.append((incumbent.measure(pick)[0], pick))
            if not mutants:
                break
            difference, best = min(mutants, key=lambda mutation: mutation[0])
            if difference < 0:
                incumbent.challenge(best)
        predicted = float(estimate.predict(incumbent.pick)[0]) if estimate else None
        return replace(plan, pick=incumbent.pick, predicted_loss=predicted, bound=None,
                       method=f"{plan.method} + evolve({incumbent.taken} taken)")

    def _generation(self, plan: Plan, incumbent: Incumbent, rng: np.random.Generator) -> list[IntArray]:
        """New picks; fewer than wanted if random exchanges find no others."""
        found: dict[bytes, IntArray] = {}
        idle = 0
        while len(found) < self.options.offspring and idle < PATIENCE:
            pick = mutant(plan, incumbent.pick, int(rng.integers(1, self.options.swaps + 1)), rng)
            if pick.tobytes() in incumbent.measured or pick.tobytes() in found:
                idle += 1
            else:
                found[pick.tobytes()] = pick
        return [*found.values()]


def mutant(plan: Plan, pick: IntArray, swaps: int, rng: np.random.Generator) -> IntArray:
    """A pick after up to ``swaps`` exchanges: a random layer takes the next narrower width, then other layers in random
    order take the next wider width if the pick still fits budget and limits. An exchange that does not fit at all, as a
    narrower width may cost more of what is limited, is left out."""
    last = len(plan.space.choices) - 1
    pick = pick.copy()
    for _ in range(swaps):
        candidates = np.flatnonzero(pick < last)
        if not len(candidates):
            break
        demoted = int(rng.choice(candidates))
        pick[demoted] += 1
        if not plan.admits(pick):
            pick[demoted] -= 1
            continue
        for layer in rng.permutation(len(pick)):
            if layer == demoted or pick[layer] == 0:
                continue
            pick[layer] -= 1
            if not plan.admits(pick):
                pick[layer] += 1
    return pick
