"""Estimators, and what they measure with: the game and the probe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from impq_core.interfaces.part import Part
from impq_core.space import Choice, FloatArray, IntArray, LinearSpec, SearchSpace
from impq_core.types import Measurements, SensitivityEstimate
from impq_core.workload import Workload

if TYPE_CHECKING:
    import torch


Drift = Callable[[Measurements], float]
"""The predicted loss of the previous plan minus that of the new plan, in nats per token. Each call takes all
measurements so far and makes a plan from them; both plans are scored with the new estimate. Infinite at the first call,
and if no plan can be made."""


def unknown_drift(measurements: Measurements) -> float:
    """The drift if no plan is made: infinite."""
    return float("inf")


class Game(Protocol):
    """The cooperative game of an estimator: the loss of a model at a pick.

    Attributes:
        space: the layers and choices in play.
        budget_bytes: the budget of the plan that the estimate is for; None if it is unknown.
    """

    space: SearchSpace
    budget_bytes: int | None

    @property
    def probe(self) -> Probe:
        """The weights, activations and gradients of the same model; its forwards count as the game's."""

    @property
    def tokens(self) -> int:
        """Scored tokens behind each loss."""

    @property
    def reference_loss(self) -> float:
        """Absolute loss of the all-reference model, nats per token (measured on first use)."""

    @property
    def forwards(self) -> float:
        """Cost so far, in full-model forwards of its windows."""

    def expect(self, evaluations: int, wanted: Iterable[tuple[int, IntArray]] = ()) -> None:
        """Report the expected total number of evaluations to the observers.

        Args:
            evaluations: the number.
            wanted: picks (N, n) that will be measured, each with the number of a set of windows (``redraw``), if they
                are known: workers measure them in advance, side by side. What is measured and not asked for later costs
                time, and no forwards.
        """

    def loss(self, pick: IntArray) -> float:
        """Loss of one pick (n,), nats per token above the reference."""

    def losses(self, picks: IntArray) -> FloatArray:
        """Losses (N,) of N picks (N, n), nats per token above the reference; returns when the losses are on disk."""

    def window_losses(self, pick: IntArray) -> FloatArray:
        """Absolute losses (windows,) of one pick, nats per token, for differences paired over windows. Their mean is
        the loss; if only some tokens are scored, a window with more of them has a larger share of it."""

    def redraw(self, number: int) -> int:
        """Continue on another set of windows: the one with that number, modulo the number of sets, which is returned.
        Losses are above the reference on that set. A game starts on set 0."""


class Probe(Protocol):
    """Weights, activations and gradients of the model over the calibration windows."""

    space: SearchSpace

    @property
    def window_tokens(self) -> int:
        """Scored tokens of a calibration window, on average; raises ImpqError if there is no text."""

    @property
    def forwards(self) -> float:
        """Cost so far, in forwards of the game's windows, even if the probe reads more or fewer windows. Slopes cost
        about four forwards of the windows that they are read on: forward, each block once more, backward, and gradients
        of the weights."""

    def weight(self, linear: LinearSpec) -> torch.Tensor:
        """The unquantized weight (rows, columns), float32; not to be changed."""

    def variant(self, linear: LinearSpec, choice: Choice) -> torch.Tensor:
        """The weight (rows, columns) at a choice, float32."""

    def block_states(self) -> Iterator[tuple[int, list[torch.Tensor], list[torch.Tensor]]]:
        """Each block's index, inputs and outputs, as batches (windows, length, width). Needs ``activations``."""

    def first_outputs(self, weights: Callable[[LinearSpec], torch.Tensor] | None = None) -> Iterator[
            tuple[int, dict[LinearSpec, list[torch.Tensor]]]]:
        """The index of each block, and the outputs of the linears that run first on the same input (in most models
        query, key and value, behind the norm), as batches (windows, length, rows). Costs the blocks' share of a
        forward. Needs ``activations``.

        Args:
            weights: returns the weight (rows, columns), on any device, that a linear of a block has instead of the
                unquantized one.
        """

    def charging(self) -> AbstractContextManager[None]:
        """The context in which an estimator's own matrix products are counted in ``forwards``."""

    def slopes(self, at: FloatArray | None = None) -> FloatArray:
        """First-order change of each window's loss if one layer changes. Needs ``gradients``.

        Args:
            at: blend weights (m,) of the choices, or (n, m), of its own for each layer: a layer's weights are set to
                this weighted sum of its variants. None is the unquantized model.

        Returns:
            float64 (windows, n, m), nats per token: ``[s, i, k]`` is the inner product of the gradient of window s's
            mean loss with respect to layer i's weights, and the weights at choice k minus the current weights.
        """

    def token_squares(self, at: FloatArray | None = None) -> FloatArray:
        """What the slopes are for single tokens, squared: the diagonal of the empirical Fisher matrix over tokens, at
        the model's current weights. Costs about three forwards of the windows, and for each choice one of their
        linears. Needs ``gradients``.

        Args:
            at: as for ``slopes``.

        Returns:
            float64 (windows, n, m), nats per token: ``[s, i, k]`` is the mean over the scored tokens of window s of
            ``(g_t . dW x_t)^2``, summed over the linears of layer i, with x_t the input of the linear, g_t the gradient
            of the token-summed negative log-likelihood in its output (whatever the run's value), and dW the weights at
            choice k minus the current weights.
        """

    def absolute_slopes(self, at: FloatArray | None = None) -> FloatArray:
        """Sums over the weights of ``|gradient (W - V)|`` with W the unquantized weights and V the current ones, at
        which the gradient is taken. Costs about four forwards of the windows. Needs ``gradients``; raises ImpqError if
        embedding or head play.

        Args:
            at: as for ``slopes``.

        Returns:
            float64 (windows, n), nats per token.
        """

    def hessian_traces(self, rng: np.random.Generator) -> Mapping[LinearSpec, float]:
        """An unbiased random estimate (Hutchinson) of the trace of the Hessian of the mean loss with respect to each
        linear's weight, at the unquantized weights: nats per token and squared unit of weight. Costs about eight
        forwards of the windows that it reads. Needs ``gradients``.
        """

    def output_curvature(self, groups: int = 1) -> Iterator[tuple[LinearSpec, torch.Tensor]]:
        """The curvature of the loss in the outputs of each linear inside a block, with respect to its weight, at the
        unquantized weights (GuidedQuant, arXiv 2505.07004). Costs about three forwards of the windows that it reads,
        and the products x x'. Needs ``gradients``.

        With x_t the linear's input, z_t its output at token t, and L the token-summed negative log-likelihood (whatever
        the run's value: a divergence from the unquantized model is flat there), ``s_tg`` is the mean over the rows of
        group g of ``(dL/dz_t)^2``, and ``H_g = sum_t s_tg x_t x_t' / T`` over the T scored tokens. Then
        ``1/2 sum_g tr(dW_g H_g dW_g')`` is the second-order cost of a change dW, nats per token, if the gradients of
        tokens and of rows are independent.

        Args:
            groups: number of groups G that the rows of a linear are split into, in order.

        Yields:
            A linear and float32 (G, columns, columns), linear by linear from the last block to the first. A linear may
            come several times, of which the sum counts, or never, which is 0.
        """


_WORKLOAD = {"workload": (Workload, type(None))}
"""Return types of ``Estimator.workload``."""


class Estimator(Part, ABC):
    """Estimates what each choice of each layer costs. Derive from ``Inspector``, ``GameEstimator`` or ``Sampler``.

    Class attributes:
        default_granularity: the size of a layer under ``--granularity auto``.
        needs_surrogate: whether ``measure`` returns ``Measurements``, which the run's surrogate fits.
    """

    default_granularity: ClassVar[str] = "block"
    needs_surrogate: ClassVar[bool] = False
    returns = MappingProxyType({"measure": (SensitivityEstimate, Measurements), **_WORKLOAD})

    @property
    def reads_text(self) -> bool:
        """Whether ``measure`` uses calibration text. If not, there may be no game."""
        return True

    def workload(self, space: SearchSpace, sets: int) -> Workload | None:
        """The losses, gradients and activations that ``measure`` will read under these options, for ``--dry-run``. Of
        an estimator that stops early under some condition, the most that it may read. None if that is unknown, which
        is the default. Optional.

        Args:
            space: the space that the estimate will be for.
            sets: number of sets of windows that ``Game.redraw`` chooses from.
        """
        return None

    @abstractmethod
    def measure(self, game: Game | None, probe: Probe, rng: np.random.Generator,
                drift: Drift = unknown_drift) -> SensitivityEstimate | Measurements:
        """The estimate for ``probe.space``, or the measurements that a surrogate fits.

        Args:
            game: the game on calibration windows; None only if ``reads_text`` is false.
            probe: the same model from inside.
            rng: the source of every random draw.
            drift: how much the plan still changes, see ``Drift``.
        """


class Inspector(Estimator):
    """Scores layers from weights, activations or gradients, without playing the game.

    Class attributes:
        needs: ``activations`` or ``gradients`` if ``inspect`` reads those; calibration text is read only then.
    """

    default_granularity = "group"
    needs: ClassVar[frozenset[str]] = frozenset()
    returns = MappingProxyType({"inspect": (SensitivityEstimate,), **_WORKLOAD})

    @property
    def reads_text(self) -> bool:
        """True if ``needs`` is not empty."""
        return bool(self.needs)

    @abstractmethod
    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """The estimate for ``probe.space``; every random draw comes from ``rng``."""

    def measure(self, game: Game | None, probe: Probe, rng: np.random.Generator,
                drift: Drift = unknown_drift) -> SensitivityEstimate | Measurements:
        """``inspect(probe, rng)``."""
        return self.inspect(probe, rng)


class GameEstimator(Estimator):
    """Plays the game and makes its own estimate from the losses."""

    returns = MappingProxyType({"estimate": (SensitivityEstimate,), **_WORKLOAD})

    @abstractmethod
    def estimate(self, game: Game, rng: np.random.Generator) -> SensitivityEstimate:
        """The estimate for ``game.space``; every random draw comes from ``rng``."""

    def measure(self, game: Game | None, probe: Probe, rng: np.random.Generator,
                drift: Drift = unknown_drift) -> SensitivityEstimate | Measurements:
        """``estimate(game, rng)``."""
        assert game is not None
        return self.estimate(game, rng)


class Sampler(Estimator):
    """Plays the game and returns the losses; the run's surrogate fits them."""

    needs_surrogate = True
    returns = MappingProxyType({"sample": (Measurements,), **_WORKLOAD})

    @abstractmethod
    def sample(self, game: Game, rng: np.random.Generator, drift: Drift = unknown_drift) -> Measurements:
        """The losses of the picks that the sampler chose.

        Every random draw comes from ``rng``; ``drift`` can be used to stop early."""

    def measure(self, game: Game | None, probe: Probe, rng: np.random.Generator,
                drift: Drift = unknown_drift) -> SensitivityEstimate | Measurements:
        """``sample(game, rng, drift)``."""
        assert game is not None
        return self.sample(game, rng, drift)
