"""Games whose answers are known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from impq_core.interfaces import Probe
from impq_core.space import Choice, FloatArray, IntArray, LayerSpec, LinearSpec, SearchSpace
from impq_core.types import SensitivityEstimate


def planted_space(layers: int, bits: Sequence[float] = (4, 2), columns: int = 64) -> SearchSpace:
    """A space of ``layers`` single-linear layers, each twice as large as its even neighbour, without overhead bytes."""
    specs = tuple(LayerSpec(f"blocks.{i}", i, (LinearSpec(f"blocks.{i}.linear", 64 * (1 + i % 2), columns),))
                  for i in range(layers))
    choices = tuple(Choice(float(b), 64) for b in sorted(bits, reverse=True))
    return SearchSpace(specs, choices, np.array([[int(s.parameters * c.bits / 8) for c in choices] for s in specs]))


class PlantedGame:
    """Implements ``Game`` with a function of the pick in place of a model.

    Args:
        space: the space.
        function: absolute loss of a pick (n,), nats per token.
        noise: standard deviation of what each of the windows adds to it; the same for a pick whenever it is asked.
        seed: of that noise.
        windows: how many there are.
        probe: what is seen from inside, for estimators that look before they play.
        budget_bytes: what plans are wanted for.
    """

    def __init__(self, space: SearchSpace, function: Callable[[IntArray], float], noise: float = 0.0, seed: int = 0,
                 windows: int = 8, probe: Probe | None = None, budget_bytes: int | None = None) -> None:
        self.space, self.budget_bytes = space, budget_bytes
        self._probe = probe
        self.set = 0
        self._function, self._noise, self._seed, self._count = function, noise, seed, windows
        self.evaluations = 0
        self.tokens = 1000

    @property
    def forwards(self) -> float:
        """An evaluation counts one."""
        return float(self.evaluations)

    @property
    def probe(self) -> Probe:
        """What was given."""
        assert self._probe is not None, "this planted game was given no probe"
        return self._probe

    @property
    def reference_loss(self) -> float:
        """The function at the all-reference pick."""
        return float(self._windows(self.space.uniform(0)).mean())

    def expect(self, evaluations: int) -> None:
        """Nobody watches."""

    def redraw(self, number: int) -> None:
        """Other noise."""
        self.set = number

    def loss(self, pick: IntArray) -> float:
        """The function, above the reference."""
        return float(self.losses(pick[None])[0])

    def losses(self, picks: IntArray) -> FloatArray:
        """The function of each pick, above the reference."""
        self.evaluations += len(picks)
        return np.array([self._windows(pick).mean() for pick in picks]) - self.reference_loss

    def window_losses(self, pick: IntArray) -> FloatArray:
        """The function of a pick, with each window's noise."""
        self.evaluations += 1
        return self._windows(pick)

    def _windows(self, pick: IntArray) -> FloatArray:
        rng = np.random.default_rng([self._seed, self.set, *(int(k) for k in pick)])
        return self._function(pick) + self._noise * rng.normal(size=self._count)


def planted_estimate(seed: int, layers: int, bits: Sequence[float] = (4, 2),
                     strength: float = 0.0) -> SensitivityEstimate:
    """A random estimate of a planted space, with pair terms of both signs and this standard deviation (0: none)."""
    rng = np.random.default_rng(seed)
    space = planted_space(layers, bits)
    m = len(bits)
    linear = np.concatenate([np.zeros((layers, 1)), rng.normal(0.5, 0.5, (layers, m - 1)).cumsum(axis=1)], axis=1)
    if not strength:
        return SensitivityEstimate(space, linear, method="planted")
    pairs = np.zeros((layers, m, layers, m))
    pairs[:, 1:, :, 1:] = rng.normal(size=(layers, m - 1, layers, m - 1)) * strength / np.sqrt(2)
    pairs += pairs.transpose(2, 3, 0, 1)
    pairs[np.arange(layers), :, np.arange(layers)] = 0
    return SensitivityEstimate(space, linear, pairs, method="planted")


def least_loss(estimate: SensitivityEstimate, budget: int) -> float:
    """The least predicted loss of all picks within a budget in bytes, by looking at every one."""
    space = estimate.space
    picks = np.array(list(itertools.product(range(len(space.choices)), repeat=len(space))))
    fits = np.array([space.bytes_of(pick) <= budget for pick in picks])
    return float(estimate.predict(picks[fits]).min())
