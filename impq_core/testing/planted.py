"""Games with known answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np

from impq_core.interfaces import Probe
from impq_core.space import Choice, FloatArray, IntArray, LayerSpec, LinearSpec, SearchSpace
from impq_core.types import Measurements, SensitivityEstimate

if TYPE_CHECKING:
    import torch


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
        noise: standard deviation of the noise of a loss on a window, nats per token. A pick has the same noise on a
            window whenever it is measured.
        seed: seed of all noise.
        windows: number of windows of a set.
        probe: the probe, for estimators that inspect a model before they play.
        budget_bytes: budget of the plans; None if there is none.
        text_noise: standard deviation of the noise that a set of windows adds to the cost of every choice of every
            layer, nats per token. An additive game stays additive on each set, but its costs differ between sets.
        sets: number of sets of windows; None for no limit.
    """

    def __init__(self, space: SearchSpace, function: Callable[[IntArray], float], noise: float = 0.0, seed: int = 0,
                 windows: int = 8, probe: Probe | None = None, budget_bytes: int | None = None, text_noise: float = 0.0,
                 sets: int | None = None) -> None:
        self.space, self.budget_bytes = space, budget_bytes
        self._probe = probe
        self.set = 0
        self._function, self._noise, self._seed, self._count = function, noise, seed, windows
        self._text_noise, self._sets = text_noise, sets
        self.evaluations = 0
        self.tokens = 1000

    @property
    def forwards(self) -> float:
        """Cost so far; an evaluation counts one forward."""
        return float(self.evaluations)

    @property
    def probe(self) -> Probe:
        """The probe of the constructor."""
        assert self._probe is not None, "this planted game has no probe"
        return self._probe

    @property
    def reference_loss(self) -> float:
        """Mean over windows of the loss of the all-reference pick."""
        return float(self._windows(self.space.uniform(0)).mean())

    def expect(self, evaluations: int, wanted: Iterable[tuple[int, IntArray]] = ()) -> None:
        """Ignored: a planted game shows no progress and has no workers."""

    def redraw(self, number: int) -> int:
        """Continue on another set of windows, with other noise."""
        self.set = number % self._sets if self._sets else number
        return self.set

    def loss(self, pick: IntArray) -> float:
        """Loss of a pick above the reference."""
        return float(self.losses(pick[None])[0])

    def losses(self, picks: IntArray) -> FloatArray:
        """Losses of picks above the reference."""
        self.evaluations += len(picks)
        return np.array([self._windows(pick).mean() for pick in picks]) - self.reference_loss

    def window_losses(self, pick: IntArray) -> FloatArray:
        """Absolute loss of a pick on each window of the set."""
        self.evaluations += 1
        return self._windows(pick)

    def _windows(self, pick: IntArray) -> FloatArray:
        rng = np.random.default_rng([self._seed, self.set, *(int(k) for k in pick)])
        losses = self._function(pick) + self._noise * rng.normal(size=self._count)
        if self._text_noise:
            costs = np.random.default_rng([self._seed, self.set]).normal(size=self.space.nbytes.shape)
            losses = losses + self._text_noise * costs[np.arange(len(pick)), pick].sum()
        return losses


class PlantedProbe:
    """Implements ``Probe`` for an additive game: its slopes, and random weights with noise that halves with every bit.

    Args:
        truth: an additive estimate, which is the loss.
    """

    window_tokens = 10

    def __init__(self, truth: SensitivityEstimate) -> None:
        self.space, self.forwards, self._costs = truth.space, 0.0, truth.linear

    def slopes(self, at: FloatArray | None = None) -> FloatArray:
        """Slopes towards each choice at the shares ``at``, the same for each of four windows."""
        self.forwards += 3
        shares = np.eye(len(self.space.choices))[0] if at is None else np.asarray(at)
        return np.tile(self._costs - (self._costs * shares).sum(axis=1, keepdims=True), (4, 1, 1))

    def token_squares(self, at: FloatArray | None = None) -> FloatArray:
        """Squares of the slopes, as if a window were a token."""
        squares: FloatArray = self.slopes(at) ** 2
        return squares

    def absolute_slopes(self, at: FloatArray | None = None) -> FloatArray:
        """Absolute slopes towards the widest choice."""
        return np.abs(self.slopes(at)[:, :, 0])

    def weight(self, linear: LinearSpec) -> torch.Tensor:
        """A random weight, seeded by the linear's name."""
        import torch

        generator = torch.Generator().manual_seed(int.from_bytes(linear.name.encode()) % 2**31)
        return torch.randn(linear.rows, linear.columns, generator=generator)

    def variant(self, linear: LinearSpec, choice: Choice) -> torch.Tensor:
        """The weight with noise."""
        import torch

        noise = torch.randn(linear.rows, linear.columns, generator=torch.Generator().manual_seed(0))
        return self.weight(linear).add(noise, alpha=2.0**-choice.bits)

    def block_states(self) -> Iterator[tuple[int, list[torch.Tensor], list[torch.Tensor]]]:
        """Not implemented: there is no model."""
        raise NotImplementedError("a planted probe has no activations")

    def hessian_traces(self, rng: np.random.Generator) -> Mapping[LinearSpec, float]:
        """Not implemented: there is no model."""
        raise NotImplementedError("a planted probe has no Hessian")

    def first_outputs(self, weights: Callable[[LinearSpec], torch.Tensor] | None = None) -> Iterator[
            tuple[int, dict[LinearSpec, list[torch.Tensor]]]]:
        """Not implemented: there is no model."""
        raise NotImplementedError("a planted probe has no activations")

    def charging(self) -> AbstractContextManager[None]:
        """Counts nothing."""
        return nullcontext()

    def output_curvature(self, groups: int = 1) -> Iterator[tuple[LinearSpec, torch.Tensor]]:
        """Not implemented: there is no model."""
        raise NotImplementedError("a planted probe has no outputs")


def planted_estimate(seed: int, layers: int, bits: Sequence[float] = (4, 2), strength: float = 0.0,
                     rising: bool = False) -> SensitivityEstimate:
    """A random estimate of a planted space.

    Args:
        seed: seed of the draw.
        layers: number of layers.
        bits: the menu.
        strength: standard deviation of pair terms, of both signs; 0 for none.
        rising: whether every step down has a positive cost; if false, some costs are negative.
    """
    rng = np.random.default_rng(seed)
    space = planted_space(layers, bits)
    m = len(bits)
    steps = rng.uniform(0.05, 1.0, (layers, m - 1)) if rising else rng.normal(0.5, 0.5, (layers, m - 1))
    linear = np.concatenate([np.zeros((layers, 1)), steps.cumsum(axis=1)], axis=1)
    if not strength:
        return SensitivityEstimate(space, linear, method="planted")
    pairs = np.zeros((layers, m, layers, m))
    pairs[:, 1:, :, 1:] = rng.normal(size=(layers, m - 1, layers, m - 1)) * strength / np.sqrt(2)
    pairs += pairs.transpose(2, 3, 0, 1)
    pairs[np.arange(layers), :, np.arange(layers)] = 0
    return SensitivityEstimate(space, linear, pairs, method="planted")


def planted_loss(truth: SensitivityEstimate) -> Callable[[IntArray], float]:
    """The absolute loss of a pick in the game of an estimate: 3 nats per token above its prediction."""
    return lambda pick: 3.0 + float(truth.predict(pick)[0])


def planted_measurements(truth: SensitivityEstimate, permutations: int, noise: float = 0.0,
                         seed: int = 0) -> Measurements:
    """Losses of a planted game along random orders of demotion, each from all-widest to all-narrowest.

    Args:
        truth: the game.
        permutations: number of independent orders.
        noise: standard deviation of the noise of each loss but the reference's, nats per token.
        seed: seed of orders and noise.
    """
    rng, space = np.random.default_rng(seed), truth.space
    tickets = np.repeat(np.arange(len(space)), len(space.choices) - 1)
    length = len(tickets) + 1
    orders = np.stack([rng.permutation(tickets) for _ in range(permutations)])
    taken = np.eye(len(space), dtype=np.int64)[orders].cumsum(axis=1)
    picks = np.concatenate([np.zeros((permutations, 1, len(space)), dtype=np.int64), taken], axis=1)
    losses = truth.predict(picks.reshape(-1, len(space))) + noise * rng.normal(size=permutations * length)
    losses[::length] = 0.0
    path = np.repeat(np.arange(permutations), length)
    return Measurements(space, picks.reshape(-1, len(space)), losses, path, np.tile(np.arange(length), permutations),
                        path, tokens=1000, reference_loss=3.0, forwards=float(len(losses)))


def best_pick(estimate: SensitivityEstimate, budget: int) -> IntArray:
    """The pick (n,) of least predicted loss within a budget in bytes, by brute force."""
    space = estimate.space
    picks = np.array(list(itertools.product(range(len(space.choices)), repeat=len(space))))
    picks = picks[space.bytes_of_all(picks) <= budget]
    best: IntArray = picks[estimate.predict(picks).argmin()]
    return best


def least_loss(estimate: SensitivityEstimate, budget: int) -> float:
    """The least predicted loss of all picks within a budget in bytes."""
    return float(estimate.predict(best_pick(estimate, budget))[0])
