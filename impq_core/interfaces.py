"""The base classes of parts: estimator, surrogate, allocator, refiner, backend, exporter. Imports no torch.

A search space has n layers and m choices; a *pick* (n,) has the number of a choice for each layer, 0 being the widest.
Costs are counted in *forwards*: one forward is the whole model over the windows of the game (``model/cost.py``).

A plugin's class derives from one of these. Its options are a frozen dataclass named ``Options``: each field is an
option ``-o name=value``, and ``__post_init__`` raises ValueError if a value is invalid. Heavy libraries are imported
inside the methods, so that a typo on the command line is reported before they load.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from impq_core.errors import ImpqError, InvalidArrays
from impq_core.space import Choice, FloatArray, IntArray, LinearSpec, SearchSpace
from impq_core.types import Measurements, Plan, SensitivityEstimate
from impq_core.workload import Workload

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NoOptions:
    """The options of a part that has none."""


class InputFile(str):
    """Type of an option that names a file the part reads; empty for none.

    The path is made absolute when the options are built, so that a run can be resumed from any folder, and the file's
    digest is part of the run's identity.
    """


NO_FILE = InputFile()
"""Default of an option that names no file."""


def _checked(method: Callable[..., Any], returns: tuple[type, ...]) -> Callable[..., Any]:
    """A wrapper of a method that raises ImpqError if the result is of none of the types, or if the method raises
    InvalidArrays."""
    name = f"{method.__module__}.{method.__qualname__}"

    @functools.wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            result = method(*args, **kwargs)
        except InvalidArrays as error:
            raise ImpqError(f"{name} built an invalid result: {error}") from error
        if not isinstance(result, returns):
            expected = " or ".join(kind.__name__ for kind in returns)
            raise ImpqError(f"{name} returned {type(result).__name__}, not {expected}: this is a bug of that plugin")
        return result

    return checked


def _checked_items(method: Callable[..., Iterable[Any]], kinds: tuple[type, ...]) -> Callable[..., Iterator[Any]]:
    """A wrapper of a method that yields tuples. It raises ImpqError if an item is not a tuple of these types."""
    name = f"{method.__module__}.{method.__qualname__}"

    @functools.wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for item in method(*args, **kwargs):
            found = tuple(type(part) for part in item) if isinstance(item, tuple) else (type(item),)
            if len(found) != len(kinds) or not all(map(issubclass, found, kinds)):
                shown, expected = (", ".join(kind.__name__ for kind in types) for types in (found, kinds))
                raise ImpqError(f"{name} yielded {shown}, not ({expected}): this is a bug of that plugin")
            yield item

    return checked


class Part:
    """Base class of all pluggable parts: it holds the options, and checks the types that the methods return.

    Class attributes:
        Options: a frozen dataclass.
        returns: the return types of the role's methods, by method name.
        yields: the types in the tuples that the role's generators yield, by method name.
    """

    Options: ClassVar[type] = NoOptions
    returns: ClassVar[Mapping[str, tuple[type, ...]]] = MappingProxyType({})
    yields: ClassVar[Mapping[str, tuple[type, ...]]] = MappingProxyType({})

    def __init_subclass__(cls, **more: Any) -> None:
        """Wraps the methods in ``returns`` and ``yields``, so that a wrong type is reported at the method."""
        super().__init_subclass__(**more)
        for name, kinds in cls.returns.items():
            if name in vars(cls):
                setattr(cls, name, _checked(vars(cls)[name], kinds))
        for name, kinds in cls.yields.items():
            if name in vars(cls):
                setattr(cls, name, _checked_items(vars(cls)[name], kinds))

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    def check_space(self, space: SearchSpace) -> None:
        """Called before any weight is loaded; raises ImpqError if the options do not fit the space."""


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

    def expect(self, evaluations: int) -> None:
        """Report the expected total number of evaluations to the observers."""

    def loss(self, pick: IntArray) -> float:
        """Loss of one pick (n,), nats per token above the reference."""

    def losses(self, picks: IntArray) -> FloatArray:
        """Losses (N,) of N picks (N, n), nats per token above the reference; returns when the losses are on disk."""

    def window_losses(self, pick: IntArray) -> FloatArray:
        """Absolute losses (windows,) of one pick, nats per token, for differences paired over windows."""

    def redraw(self, number: int) -> int:
        """Continue on another set of windows: the one with that number, modulo the number of sets, which is returned.
        Losses are above the reference on that set. A game starts on set 0."""


class Probe(Protocol):
    """Weights, activations and gradients of the model over the calibration windows."""

    space: SearchSpace

    @property
    def window_tokens(self) -> int:
        """Scored tokens of a calibration window; raises ImpqError if there is no text."""

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

    def slopes(self, at: FloatArray | None = None) -> FloatArray:
        """First-order change of each window's loss if one layer changes. Needs ``gradients``.

        Args:
            at: blend weights (m,) of the choices: each layer's weights are set to this weighted sum of its variants.
                None is the unquantized model.

        Returns:
            float64 (windows, n, m), nats per token: ``[s, i, k]`` is the inner product of the gradient of window s's
            mean loss with respect to layer i's weights, and the weights at choice k minus the current weights.
        """

    def hessian_traces(self, rng: np.random.Generator) -> Mapping[LinearSpec, float]:
        """An unbiased random estimate (Hutchinson) of the trace of the Hessian of the mean loss with respect to each
        linear's weight, at the unquantized weights: nats per token and squared unit of weight. Costs about eight
        forwards of the windows that it reads. Needs ``gradients``.
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


class Surrogate(Part, ABC):
    """Fits an estimate to measured losses."""

    returns = MappingProxyType({"fit": (SensitivityEstimate,)})

    @abstractmethod
    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        """The fitted estimate; raises ImpqError if the measurements are too few or not finite."""


class Allocator(Part, ABC):
    """Turns an estimate into a plan."""

    returns = MappingProxyType({"allocate": (Plan,)})

    @abstractmethod
    def allocate(self, estimate: SensitivityEstimate, budget_bytes: int) -> Plan:
        """The plan of least predicted loss that was found within the budget.

        Raises:
            ImpqError: the budget is below the smallest pick.
        """


@dataclass(frozen=True, eq=False)
class Statistics:
    """Second moments of a linear's inputs over the calibration text.

    Args:
        gram: float32 (columns, columns), the sum of x xT over tokens.
        tokens: number of inputs x in the sum.
    """

    gram: torch.Tensor
    tokens: int


@dataclass(frozen=True, eq=False)
class Variant:
    """A linear at a width, packed.

    Args:
        choice: the width.
        tensors: exactly as stored.
        record: numbers that the backend reports about the quantization, such as the damping used.
    """

    choice: Choice
    tensors: Mapping[str, torch.Tensor]
    record: Mapping[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A quantized model for an exporter.

    The keys of ``widths``, ``specs`` and ``variants`` are the names of weights in the model's files without
    ``.weight``. ``plan`` has the names of modules in the model; for most architectures the two are the same.

    Args:
        plan: the plan.
        widths: the choice of every linear; None for those that stay unquantized.
        specs: name in the model and shape of every linear.
        variants: the packed form of every quantized linear; empty except in ``Exporter.export``.
        dense: every other tensor of the model's files, by its name there; on the meta device except in
            ``Exporter.export``, and empty if the exporter has no ``backends`` (a recipe).
        config: the model's configuration, as its config.json has it.
        backend: name of the backend that made the variants.
        options: that backend's options.
        files: the folder with the model's files: tokenizer, generation settings ...
    """

    plan: Plan
    widths: Mapping[str, Choice | None]
    specs: Mapping[str, LinearSpec]
    variants: Mapping[str, Variant]
    dense: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    backend: str
    options: Mapping[str, Any]
    files: Path


class Exporter(Part, ABC):
    """Writes a checkpoint in a format that other software reads.

    Formats whose tensors are in one safetensors file derive from ``exports.checkpoint.SafetensorsExporter``, which has
    ``file_bytes``, ``files`` and ``dense``. A recipe needs ``export`` alone.

    Class attributes:
        backends: names of the backends whose variants it writes; empty for a recipe, which needs the widths alone.
        alignment: tensors in its files begin at a multiple of this many bytes.
        holds_ends: whether it holds a quantized embedding and head.
        copies: patterns (glob) of the names of the model's files that are copied into the folder before ``export``.
    """

    backends: ClassVar[frozenset[str]] = frozenset()
    holds_ends: ClassVar[bool] = False
    alignment: ClassVar[int] = 1
    copies: ClassVar[tuple[str, ...]] = ("*",)

    def check(self, options: Mapping[str, Any]) -> None:
        """Raises ImpqError if the format cannot hold the variants of a backend with these options."""

    def file_bytes(self, checkpoint: Checkpoint) -> int:
        """The most bytes of the ``files`` that ``export`` writes for a checkpoint, from shapes and types alone. Called
        before anything is quantized.

        Raises:
            ImpqError: the format cannot hold this model, or it holds no weights.
        """
        raise ImpqError(f"{type(self).__name__} writes a recipe, not weights: there is no file to measure")

    @abstractmethod
    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write the files into an existing folder, which has the files of ``copies`` already if the format holds
        weights."""

    def files(self, folder: Path) -> Sequence[Path]:
        """The files with tensors that ``export`` wrote; none for a recipe."""
        return ()

    def restore(self, folder: Path, checkpoint: Checkpoint) -> Mapping[str, Variant]:
        """The variants that ``export`` wrote, by the names of ``checkpoint``.

        Raises:
            ImpqError: the format holds no weights, or the file lacks a tensor.
        """
        raise ImpqError(f"{type(self).__name__} writes a recipe, not weights: there is nothing to load")

    def dense(self, folder: Path, checkpoint: Checkpoint) -> Mapping[str, Callable[[], torch.Tensor]]:
        """Functions that read the unquantized tensors which ``export`` wrote one to one, by their names in the model's
        files, and in the form that they have there.

        Raises:
            ImpqError: the format holds no weights, or the file is missing or damaged.
        """
        raise ImpqError(f"{type(self).__name__} writes a recipe, not weights: there is nothing to load")


class Refiner(Part, ABC):
    """Improves a plan by measuring other plans near it."""

    returns = MappingProxyType({"refine": (Plan,)})

    @abstractmethod
    def refine(self, plan: Plan, estimate: SensitivityEstimate | None, game: Game, referee: Game, forwards: float,
               rng: np.random.Generator) -> Plan:
        """The start, or a plan within its budget that ``referee`` accepted.

        Args:
            plan: the start.
            estimate: costs of the layers; None if the user gave the plan (``--plan``).
            game: proposals are measured on it.
            referee: the same model on windows that no proposal was chosen by. A plan is accepted only if its loss
                there is below the current plan's by more than the standard error of the difference, paired over
                windows.
            forwards: the limit for both games together, in full-model forwards of the game's windows.
            rng: the source of every random draw.
        """


class Backend(Part, ABC):
    """Quantizes linears, usually by a library.

    Class attributes, or properties if they depend on the options:
        default_bits: names of the choices of the menu if the user gives no ``--bits``; uniform references are of these.
        needs: ``activations`` if ``quantize`` needs Statistics.
        devices: types of the devices on which ``quantize`` and ``dequantize`` work, as torch names them. Weights and
            statistics are given, and variants unpacked, on the device of the run if its type is among them, else in
            host memory.
    """

    returns = MappingProxyType({"quantize": (Variant,)})
    yields = MappingProxyType({"quantize_together": (LinearSpec, Variant)})
    default_bits: ClassVar[tuple[str, ...]]
    needs: ClassVar[frozenset[str]] = frozenset()
    devices: ClassVar[frozenset[str]] = frozenset({"cpu"})

    @abstractmethod
    def choices(self) -> tuple[Choice, ...]:
        """The choices under these options, widest first."""

    def choice(self, name: str) -> Choice | None:
        """The choice of a name; None if there is none. A backend overrides it if it has more choices than it lists,
        such as any group size."""
        return next((choice for choice in self.choices() if choice.name.lower() == name.lower()), None)

    def stand_in(self, linear: LinearSpec, choice: Choice) -> Choice:
        """The choice that is stored for a linear in place of one that does not exist for its shape; by default the
        choice itself. The other methods are given only choices that this one returned."""
        return choice

    def variant_options(self) -> Mapping[str, Any]:
        """The options that decide a variant: variants are kept, and losses continued, only for equal ones. By default
        all."""
        return asdict(self.options)

    def mixes(self, linears: Sequence[LinearSpec]) -> Mapping[str, Mapping[str, Choice]]:
        """Plans that other software makes for a model by rules of its own, as references beside the user's. By default
        none.

        Args:
            linears: all linears of the model.

        Returns:
            The choice of each linear, by the linear's name, by the mix's name.
        """
        return {}

    def read_types(self, file: Path, linears: Sequence[LinearSpec]) -> Mapping[str, str]:
        """The name of the choice of each linear, by the linear's name, in a file that other software made. Optional.

        Args:
            file: a file of the same model.
            linears: all linears of the model.

        Raises:
            ImpqError: the file cannot be read, or is of another model; by default, the backend reads no files.
        """
        raise ImpqError(f"{type(self).__module__}.{type(self).__qualname__} reads no plans from files of other "
                        "software")

    @abstractmethod
    def check(self, linear: LinearSpec, choice: Choice) -> None:
        """Raises ImpqError, which names the linear, if its shape cannot be stored at this width."""

    @abstractmethod
    def nbytes(self, linear: LinearSpec, choice: Choice) -> int:
        """Exact bytes of the variant that ``quantize`` returns, scales and zeros included."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        """Quantize a weight (rows, columns), which is not changed. The variant's tensors are contiguous and in host
        memory, also if the weight is on a device.

        Several calls may run at a time, each in a thread of its own with one torch thread. They must not share state or
        draw from a global generator of random numbers."""

    def quantize_together(self, weights: Mapping[LinearSpec, torch.Tensor],
                          wanted: Sequence[tuple[LinearSpec, Choice]],
                          statistics: Statistics | None) -> Iterator[tuple[LinearSpec, Variant]]:
        """Quantize linears that share their inputs, such as q, k and v. Optional: a backend overrides it if one pass
        serves several linears or widths; the default calls ``quantize`` for one pair after another.

        A variant's bits must be those of ``quantize``, whatever else is in ``wanted``: a resumed run asks only for the
        variants that it lacks.

        Args:
            weights: the weight (rows, columns) of each linear; not changed.
            wanted: the linears and widths to quantize.
            statistics: of the inputs that all of them share.

        Yields:
            The linear and its variant, for each pair of ``wanted``, in its order.

        Raises:
            ImpqError: a linear cannot be quantized; the message names it.
        """
        for linear, choice in wanted:
            try:
                variant = self.quantize(weights[linear], choice, statistics)
            except ImpqError as error:
                raise ImpqError(f"{linear.name}: {error}") from error
            yield linear, variant

    @abstractmethod
    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        """The weight (rows, columns) of a variant of this linear, float32, on the device of the variant's tensors."""
