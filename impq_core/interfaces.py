"""The seams: what an estimator, a surrogate, an allocator and a backend must be. Imports no torch.

A plugin's class derives from one of these, carries its options as a frozen dataclass named ``Options`` (whose fields
become ``-o name=value`` and whose ``__post_init__`` raises ValueError where a value makes no sense), and imports
heavy libraries inside its methods, so that a typo is answered before they load.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from impq_core.errors import ImpqError, Malformed
from impq_core.space import Choice, FloatArray, IntArray, LinearSpec, SearchSpace
from impq_core.types import Measurements, Plan, SensitivityEstimate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NoOptions:
    """A part without options."""


def _checked(method: Callable[..., Any], kind: type) -> Callable[..., Any]:
    @functools.wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            answer = method(*args, **kwargs)
        except Malformed as error:
            raise ImpqError(f"{method.__module__}.{method.__qualname__} made what cannot be: {error}") from error
        if not isinstance(answer, kind):
            raise ImpqError(f"{method.__module__}.{method.__qualname__} returned {type(answer).__name__}, not "
                            f"{kind.__name__}: this is a bug of that plugin")
        return answer

    return checked


class Part:
    """What every pluggable part shares: options, and the care that its answers are of the kind they must be.

    Class attributes:
        Options: a frozen dataclass.
        answers: what the methods of the role return; a method that returns something else raises ImpqError.
    """

    Options: ClassVar[type] = NoOptions
    answers: ClassVar[Mapping[str, type]] = MappingProxyType({})

    def __init_subclass__(cls, **more: Any) -> None:
        """Checks what the methods answer, so that a wrong answer is met where it is made."""
        super().__init_subclass__(**more)
        for name, kind in cls.answers.items():
            if name in vars(cls):
                setattr(cls, name, _checked(vars(cls)[name], kind))

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    def check_space(self, space: SearchSpace) -> None:
        """Raises ImpqError where the options do not fit a space; asked before any weight is loaded."""


Drift = Callable[[Measurements], float]
"""How far the plan still moves: fed with all measurements so far, time after time, it answers what the plan of the time
before loses to the new one in the new estimate, nats per token; infinite the first time and where none can be made."""


def unknown_drift(measurements: Measurements) -> float:
    """Nobody plans: infinite."""
    return float("inf")


class Game(Protocol):
    """The cooperative game of an estimator: a model seen through the loss of a pick.

    Attributes:
        space: the choices on play.
        budget_bytes: what plans are wanted for; None where nobody said.
    """

    space: SearchSpace
    budget_bytes: int | None

    @property
    def probe(self) -> Probe:
        """The same model seen from inside; its forwards count as the game's."""

    @property
    def tokens(self) -> int:
        """Scored tokens behind each loss."""

    @property
    def reference_loss(self) -> float:
        """Absolute loss of the all-reference model, nats per token (measured on first use)."""

    @property
    def forwards(self) -> float:
        """Cost so far, in full-model forwards of its windows."""

    def expect(self, evaluations: int) -> None:
        """Tell whoever watches how many evaluations will have been asked for in all."""

    def loss(self, pick: IntArray) -> float:
        """Loss of one pick (n,), nats per token above the reference."""

    def losses(self, picks: IntArray) -> FloatArray:
        """Losses (N,) of picks (N, n), nats per token above the reference; all on disk when it returns."""

    def window_losses(self, pick: IntArray) -> FloatArray:
        """Absolute losses (windows,) of one pick, nats per token: what paired differences are made of."""

    def redraw(self, number: int) -> int:
        """Continue on another set of windows: the one with that number, modulo the number of sets, which is returned.
        Losses are above the reference on that set. A game starts on set 0."""


class Probe(Protocol):
    """What an inspector may look at: the model's weights, and the model over the calibration windows."""

    space: SearchSpace

    @property
    def window_tokens(self) -> int:
        """Scored tokens of a calibration window; raises ImpqError where there is no text."""

    @property
    def forwards(self) -> float:
        """Cost so far, in full-model forwards of the game's windows, however many are looked at; a backward counts
        two."""

    def weight(self, linear: LinearSpec) -> torch.Tensor:
        """The unquantized weight (rows, columns), float32."""

    def variant(self, linear: LinearSpec, choice: Choice) -> torch.Tensor:
        """The weight (rows, columns) at a choice, float32."""

    def block_states(self) -> Iterator[tuple[int, list[torch.Tensor], list[torch.Tensor]]]:
        """Each block's index, inputs and outputs, as batches (windows, length, width). Needs ``activations``."""

    def slopes(self, at: FloatArray | None = None) -> FloatArray:
        """First-order change of each window's loss when one layer moves. Needs ``gradients``.

        Args:
            at: where the model stands: shares (m,) of the choices, which every layer's weights are blended from; None
                is the unquantized model.

        Returns:
            float64 (windows, n, m), nats per token: ``[s, i, k]`` is the inner product of the gradient of window s's
            mean loss, in layer i's weights, and the way from where they stand to choice k.
        """

    def hessian_traces(self, rng: np.random.Generator) -> Mapping[LinearSpec, float]:
        """One random draw, right on average, of the trace of the Hessian of the mean loss in each linear's weight, at
        the unquantized weights: nats per token and squared unit of weight. Costs six forwards. Needs ``gradients``.
        """


class Inspector(Part, ABC):
    """Scores layers from weights, activations or gradients, without playing.

    Class attributes:
        needs: ``activations`` or ``gradients`` where it looks at those; calibration text is read only then.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    answers = MappingProxyType({"inspect": SensitivityEstimate})

    @abstractmethod
    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """The estimate for ``probe.space``; every random draw comes from ``rng``."""


class Estimator(Part, ABC):
    """Plays the game and makes its own estimate of what it measured."""

    answers = MappingProxyType({"estimate": SensitivityEstimate})

    @abstractmethod
    def estimate(self, game: Game, rng: np.random.Generator) -> SensitivityEstimate:
        """The estimate for ``game.space``; every random draw comes from ``rng``."""


class Sampler(Part, ABC):
    """Plays the game and only measures; the surrogate the user names turns measurements into an estimate."""

    answers = MappingProxyType({"sample": Measurements})

    @abstractmethod
    def sample(self, game: Game, rng: np.random.Generator, drift: Drift = unknown_drift) -> Measurements:
        """Play the game; every random draw comes from ``rng``, and ``drift`` tells when enough has been played."""


class Surrogate(Part, ABC):
    """Fits measured losses."""

    answers = MappingProxyType({"fit": SensitivityEstimate})

    @abstractmethod
    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        """The fitted estimate; raises ImpqError where the measurements cannot carry it."""


class Allocator(Part, ABC):
    """Turns an estimate into a plan; numpy in, numpy out."""

    answers = MappingProxyType({"allocate": Plan})

    @abstractmethod
    def allocate(self, estimate: SensitivityEstimate, budget_bytes: int) -> Plan:
        """The plan of least predicted loss found within the budget.

        Raises:
            ImpqError: the budget is below the smallest pick.
        """


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a linear's inputs looked like over the calibration text.

    Args:
        gram: float32 (columns, columns), the sum of x xT over tokens.
        tokens: how many inputs x were summed.
    """

    gram: torch.Tensor
    tokens: int


@dataclass(frozen=True, eq=False)
class Variant:
    """One linear at one width, packed: tensors exactly as stored, and what a backend wants to tell of the making."""

    choice: Choice
    tensors: Mapping[str, torch.Tensor]
    record: Mapping[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A quantized model on its way to files.

    Args:
        plan: the widths.
        variants: the stored form of every quantized linear, by module name. Like ``dense``, ``config`` and
            ``options`` it is empty for an exporter without ``backends``, for which nothing is quantized.
        dense: every other tensor of the model, by its name in the model.
        config: the model's own configuration, as its config.json has it.
        backend: name of the backend whose variants these are.
        options: that backend's options.
    """

    plan: Plan
    variants: Mapping[str, Variant]
    dense: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    backend: str
    options: Mapping[str, Any]


class Exporter(Part, ABC):
    """Writes a checkpoint in a format that other software reads.

    Class attributes:
        backends: whose variants it can write; empty where the widths are enough (recipes).
    """

    backends: ClassVar[frozenset[str]] = frozenset()

    def check(self, options: Mapping[str, Any]) -> None:
        """Raises ImpqError where a backend with these options makes variants that the format cannot hold."""

    @abstractmethod
    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write the files into an existing folder; the tokenizer is already there."""

    def restore(self, folder: Path, plan: Plan) -> Mapping[str, Variant]:
        """The variants that ``export`` wrote, by module name; raises ImpqError where a format holds no weights."""
        raise ImpqError(f"{type(self).__name__} writes a recipe, not weights: there is nothing to load")


class Refiner(Part, ABC):
    """Improves a plan by measuring others near it."""

    answers = MappingProxyType({"refine": Plan})

    @abstractmethod
    def refine(self, plan: Plan, estimate: SensitivityEstimate | None, game: Game, referee: Game, forwards: float,
               rng: np.random.Generator) -> Plan:
        """A plan within the same budget that is no worse.

        Args:
            plan: where to begin.
            estimate: what is known of the layers; None where the plan was given.
            game: proposals are measured on it.
            referee: the same model on windows that no proposal was made from; a plan is taken only where its loss
                there is less than the last one's by more than the standard error of the difference, paired over
                windows.
            forwards: what both may spend together, in full-model forwards of the game's windows.
            rng: every random draw comes from it.
        """


class Backend(Part, ABC):
    """Quantizes linears; the library it wraps does the work.

    Class attributes:
        default_bits: the menu played where the user names none.
        needs: ``activations`` where ``quantize`` wants Statistics.
    """

    answers = MappingProxyType({"quantize": Variant})
    default_bits: ClassVar[tuple[float, ...]]
    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def choices(self) -> tuple[Choice, ...]:
        """Every width on offer under these options, widest first."""

    @abstractmethod
    def check(self, linear: LinearSpec, choice: Choice) -> None:
        """Raises ImpqError, naming the linear, where its shape cannot be stored at this width."""

    @abstractmethod
    def nbytes(self, linear: LinearSpec, choice: Choice) -> int:
        """Exact bytes of the variant that ``quantize`` will return, scales and zeros included."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        """Quantize a weight (rows, columns), which is left untouched."""

    @abstractmethod
    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        """The weight (rows, columns) in float32 that a variant of this linear stands for."""
