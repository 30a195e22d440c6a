"""The GPTQ backend: the solver of this package, in the file format of gptqmodel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from impq_core.errors import ImpqError
from impq_core.interfaces import Backend, Statistics, Variant
from impq_core.space import Choice, LinearSpec

if TYPE_CHECKING:
    import torch

    from impq_gptq.solver import Settings, Solution


TENSORS = ("qweight", "qzeros", "scales", "g_idx")
"""Names of the tensors that gptqmodel stores for a linear."""

GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
"""Group sizes that the format has kernels for."""

GRIDS = ("hessian", "weight-error", "min-max")
"""Values of the option ``grid``."""

IN_SEQUENCE = ("drift", "drift_strength", "true_sequential")
"""Options without effect on the variants of a bank."""

HESSIANS = ("plain", "guided")
"""Values of the option ``hessian``."""

CORRECTIONS = ("gptaq", "qep", "none")
"""Values of the option ``drift``."""

CHUNK = 2**16
"""Weights that are unpacked together on a CPU, so that they stay in its cache."""


@dataclass(frozen=True)
class Options:
    """Options of the GPTQ backend.

    Args:
        group_size: weights of a row that share a scale and a zero.
        symmetric: fix zeros at the middle of the range, which some file formats need; asymmetric quantization is more
            accurate at 2 and 3 bits.
        group_aware: the group-aware order of columns (arXiv 2505.14638), which has most of the gain of act-order and
            needs no stored order.
        grid: how a group's scale and zero are chosen: ``hessian`` for the least error as GPTQ's objective counts it,
            ``weight-error`` for the least squared error of the weights, as gptqmodel's clip search, or ``min-max`` for
            the whole range. Zeros are whole numbers, which is what the file format stores.
        hessian: ``plain`` counts the squared error of every token and output alike; ``guided`` weighs tokens by the
            squared gradient of the loss in the linear's outputs (GuidedQuant, arXiv 2505.07004), for ``row_groups``
            groups of rows, each with a Hessian of its own.
        row_groups: see ``hessian``.
        damping: share of the Hessian's mean diagonal that is added to its diagonal, raised in steps of 0.01 if the
            Hessian cannot be factored.
        drift: how a linear corrects the drift of the quantized layers in front of it, if a plan is quantized in
            sequence: ``gptaq`` (arXiv 2504.02692), ``qep`` (arXiv 2504.09629) or ``none``.
        drift_strength: alpha of that correction, from 0 to 1.
        true_sequential: if a plan is quantized in sequence, collect the statistics of a linear behind the quantized
            linears of its own block, too.
    """

    group_size: int = 64
    symmetric: bool = False
    group_aware: bool = True
    grid: str = "hessian"
    hessian: str = "plain"
    row_groups: int = 1
    damping: float = 0.05
    drift: str = "gptaq"
    drift_strength: float = 0.25
    true_sequential: bool = True

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be {', '.join(map(str, GROUP_SIZES))}, not {self.group_size}")
        if not 0 < self.damping < 1:
            raise ValueError(f"damping must lie between 0 and 1, not {self.damping}")
        for name, values in (("grid", GRIDS), ("drift", CORRECTIONS), ("hessian", HESSIANS)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be {', '.join(values)}, not {getattr(self, name)!r}")
        if self.hessian == "guided" and self.drift != "none":
            raise ValueError("hessian=guided needs drift=none: the drift is not weighted by gradients")
        if self.row_groups < 1 or (self.row_groups > 1 and self.hessian != "guided"):
            raise ValueError("row_groups must be at least 1, and more than 1 only with hessian=guided")
        if not 0 <= self.drift_strength <= 1:
            raise ValueError(f"drift_strength must lie between 0 and 1, not {self.drift_strength}")


class Gptq(Backend):
    """GPTQ at 8, 4, 3 and 2 bits, packed as gptqmodel stores it (qweight, qzeros, scales, g_idx; format gptq_v2).

    Linears that share their inputs are quantized together, at all their widths, see ``impq_gptq.solver``. The solver
    and ``dequantize`` consist of torch operations that all ``devices`` have.
    """

    Options = Options
    devices = frozenset({"cpu", "cuda", "mps", "xpu"})
    default_bits = ("2", "3", "4")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Activations, their drift if it is corrected, and gradients if they weigh the tokens."""
        more = {"drift": self.options.drift != "none", "gradients": self.options.hessian == "guided"}
        return frozenset({"activations", *(name for name, needed in more.items() if needed)})

    @property
    def row_groups(self) -> int:  # type: ignore[override]
        """The option of this name."""
        return self.options.row_groups

    @property
    def stages(self) -> bool:  # type: ignore[override]
        """The option ``true_sequential``."""
        return self.options.true_sequential

    def variant_options(self) -> Mapping[str, Any]:
        """All but what only a plan that is quantized in sequence is made with."""
        return {name: value for name, value in asdict(self.options).items() if name not in IN_SEQUENCE}

    def choices(self) -> tuple[Choice, ...]:
        """8, 4, 3, 2 bits."""
        return tuple(Choice(float(bits), self.options.group_size) for bits in (8, 4, 3, 2))

    def choice(self, name: str) -> Choice | None:
        """A width by its name, such as ``3`` in groups of the option ``group_size``, or ``3@128``."""
        width, at, size = name.partition("@")
        found = super().choice(width)
        if found is None or not at:
            return found
        return found.in_groups(int(size)) if size in map(str, GROUP_SIZES) else None

    def stand_in(self, linear: LinearSpec, choice: Choice) -> Choice:
        """For a width with a group size in its name, such as ``3@128``, the same width in the largest smaller groups
        that divide the inputs, if those named do not. The option ``group_size`` is one for all linears, which
        ``check`` refuses where it does not fit."""
        if choice.group_size == self.options.group_size or linear.columns % choice.group_size == 0:
            return choice
        fits = [size for size in GROUP_SIZES if size < choice.group_size and linear.columns % size == 0]
        return (self.choice(f"{choice.bits:g}@{fits[-1]}") if fits else None) or choice

    def check(self, linear: LinearSpec, choice: Choice) -> None:
        """Raises ImpqError if groups do not divide the inputs, or inputs or outputs are no multiples of 32."""
        if linear.columns % choice.group_size:
            fits = [size for size in (128, 64, 32, 16) if linear.columns % size == 0]
            raise ImpqError(f"backend gptq: group size {choice.group_size} does not divide the {linear.columns} inputs "
                            f"of {linear.name}"
                            + (f"; -o group_size={fits[0]} does, and {choice.bits:g}@{fits[0]}" if fits else ""))
        if linear.columns % 32 or linear.rows % 32:
            raise ImpqError(f"backend gptq: {linear.name} is {linear.rows} x {linear.columns}; GPTQ packs multiples "
                            "of 32 only")

    def nbytes(self, linear: LinearSpec, choice: Choice) -> int:
        """Bytes of the codes, a 16-bit scale and a packed zero for each group of each row, and a 32-bit group index for
        each column."""
        groups = linear.columns // choice.group_size
        bits = int(choice.bits)
        codes = linear.columns * linear.rows * bits // 8
        return codes + groups * linear.rows * 2 + groups * linear.rows * bits // 8 + linear.columns * 4

    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        """GPTQ with the Hessian 2/N sum x xT of the given statistics.

        If no calibration token reached the linear, the Hessian is the identity, so that GPTQ is plain rounding, and the
        record has ``unreached``. The record also has the damping used and ``loss``, the sum of squared errors over
        their diagonal elements of the inverse Hessian, per token.

        Raises:
            ImpqError: there are no statistics, they are not finite, or the Hessian cannot be factored.
        """
        return next(self._variants([(weight, choice)], statistics))

    def quantize_together(self, weights: Mapping[LinearSpec, torch.Tensor],
                          wanted: Sequence[tuple[LinearSpec, Choice]],
                          statistics: Statistics | None) -> Iterator[tuple[LinearSpec, Variant]]:
        """One sweep over the columns for all linears and widths; the bits of a variant are those of ``quantize``."""
        if not wanted:
            return
        try:
            variants = self._variants([(weights[linear], choice) for linear, choice in wanted], statistics)
            for (linear, _), variant in zip(wanted, variants, strict=True):
                yield linear, variant
        except ImpqError as error:
            raise ImpqError(f"{wanted[0][0].name}: {error}") from error

    def _variants(self, jobs: Sequence[tuple[torch.Tensor, Choice]],
                  statistics: Statistics | None) -> Iterator[Variant]:
        import torch

        from impq_gptq.solver import Job, NotPositiveDefinite, guided_sweep, sweep

        if statistics is None:
            raise ImpqError("backend gptq needs activation statistics")
        if not torch.isfinite(statistics.gram).all():
            raise ImpqError("the inputs hold NaN or infinity, which GPTQ cannot use; try --dtype float32")
        reached = statistics.tokens > 0
        settings = settings_of(self.options)
        solutions: dict[int, Solution] = {}
        try:
            for size in dict.fromkeys(choice.group_size for _, choice in jobs):
                numbers = [number for number, (_, choice) in enumerate(jobs) if choice.group_size == size]
                some = [Job(jobs[number][0], int(jobs[number][1].bits)) for number in numbers]
                sized = replace(settings, group_size=size)
                if reached and statistics.guided is not None:
                    solved = guided_sweep(some, statistics.guided, statistics.tokens, sized)
                else:
                    solved = sweep(some, statistics.gram if reached else None, max(1, statistics.tokens), sized,
                                   statistics.drift)
                solutions |= zip(numbers, solved, strict=True)
        except NotPositiveDefinite:
            raise ImpqError("GPTQ failed: the Hessian of the inputs is not positive definite, with any damping; more "
                            "calibration text may help") from None
        for number, (_, choice) in enumerate(jobs):
            solution = solutions[number]
            record = {"damping": solution.damping, "loss": solution.loss}
            yield _packed(choice, solution, record if reached else {**record, "unreached": 1.0})

    def pack(self, codes: torch.Tensor, scales: torch.Tensor, choice: Choice) -> Variant:
        """A variant from signed symmetric codes (rows, columns) and 16-bit scales (rows, groups)."""
        import torch

        from impq_gptq.solver import Solution

        middle = 2 ** (int(choice.bits) - 1)
        zeros = torch.full_like(scales.T, middle, dtype=torch.float32)
        return _packed(choice, Solution((codes.T + middle).to(torch.uint8), scales.T, zeros, 0.0, 0.0), {})

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        """(code - zero) * scale, rounded to 16 bits, as gptqmodel computes it from the 16-bit scales that are stored.

        Raises:
            ImpqError: the columns of the groups are not neighbours, which no variant of this backend has.
        """
        import torch

        from impq_gptq.packing import unpack

        tensors, bits, size = variant.tensors, int(variant.choice.bits), variant.choice.group_size
        if not torch.equal(tensors["g_idx"], _group_index(linear.columns, size).to(tensors["g_idx"].device)):
            raise ImpqError(f"backend gptq: the columns of {linear.name} are not in groups of {size} neighbours")
        words, scales = tensors["qweight"].T.contiguous(), tensors["scales"].T.float()[:, :, None]
        zeros = unpack(tensors["qzeros"], bits).T.float()[:, :, None]
        weight = torch.empty(linear.rows, linear.columns, device=words.device)
        most = max(1, CHUNK // linear.columns) if words.device.type == "cpu" else linear.rows
        for start in range(0, linear.rows, most):
            rows = slice(start, start + most)
            codes = unpack(words[rows], bits)
            values = codes.float().view(len(codes), -1, size).sub_(zeros[rows]).mul_(scales[rows])
            weight[rows] = values.half().view_as(codes)
        return weight


def settings_of(options: Options) -> Settings:
    """The solver's settings for the backend's options."""
    from impq_gptq.solver import Settings

    return Settings(options.group_size, options.symmetric, options.group_aware, options.grid, options.damping,
                    options.drift, options.drift_strength)


def _packed(choice: Choice, solution: Solution, record: Mapping[str, float]) -> Variant:
    """A variant in host memory."""
    import torch

    from impq_gptq.packing import pack

    codes, bits = solution.codes.cpu(), int(choice.bits)
    return Variant(choice, {"qweight": pack(codes.T, bits).T.contiguous(),
                            "qzeros": pack(solution.zeros.to(torch.uint8).cpu(), bits),
                            "scales": solution.scales.half().cpu().contiguous(),
                            "g_idx": _group_index(len(codes), choice.group_size)}, record)


def _group_index(columns: int, group_size: int) -> torch.Tensor:
    """int32 (columns,): the group of each column."""
    import torch

    return torch.arange(columns, dtype=torch.int32) // group_size
