"""Backends, which quantize linears, and what they read and make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from impq_core.errors import ImpqError
from impq_core.interfaces.part import Part
from impq_core.space import Choice, LinearSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Statistics:
    """Second moments of a linear's inputs over the calibration text.

    Args:
        gram: float32 (columns, columns), the sum of x xT over tokens.
        tokens: number of inputs x in the sum.
        guided: float32 (row groups, columns, columns), the same sum with each token weighted by the mean square of the
            loss's gradient in the outputs of a row group (GuidedQuant, arXiv 2505.07004, section 3), divided by the
            mean weight; None if the backend does not need ``gradients``.
        drift: float32 (columns, columns), the sum of (x_fp - x) xT over the same tokens, where x_fp is the input in the
            unquantized model; None if the layers in front are not those of a plan, or the tokens of both models cannot
            be paired, as behind the router of a mixture.
    """

    gram: torch.Tensor
    tokens: int
    guided: torch.Tensor | None = None
    drift: torch.Tensor | None = None


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


class Backend(Part, ABC):
    """Quantizes linears, usually by a library.

    Class attributes, or properties if they depend on the options:
        default_bits: names of the choices of the menu if the user gives no ``--bits``; uniform references are of these.
        needs: ``activations`` if ``quantize`` needs Statistics, ``gradients`` if it needs their ``guided``, ``drift``
            if it uses their ``drift``.
        row_groups: number of row groups of ``guided``, each of neighbouring rows.
        stages: whether a plan that is quantized in sequence collects a block's statistics anew behind each of its
            linears, in the order of the forward.
        devices: types of the devices on which ``quantize`` and ``dequantize`` work, as torch names them. Weights and
            statistics are given, and variants unpacked, on the device of the run if its type is among them, else in
            host memory.
    """

    returns = MappingProxyType({"quantize": (Variant,)})
    yields = MappingProxyType({"quantize_together": (LinearSpec, Variant)})
    default_bits: ClassVar[tuple[str, ...]]
    needs: ClassVar[frozenset[str]] = frozenset()
    row_groups: ClassVar[int] = 1
    stages: ClassVar[bool] = False
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
        choice itself. The stand-in of a width, such as ``3@128``, has as many bits. The other methods are given only
        choices that this one returned."""
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
