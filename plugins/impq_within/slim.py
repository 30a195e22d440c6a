"""The SliM-LLM backend: group-wise widths inside a linear (arXiv 2405.14917)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from impq_core.errors import ImpqError
from impq_core.interfaces import Statistics, Variant
from impq_core.space import Choice, LinearSpec
from impq_within.base import GroupedOptions, Mixture

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Options(GroupedOptions):
    """Options of the SliM-LLM backend.

    Args:
        group_size: columns that share a width, and weights of a row that share a scale and a zero.
        lowest: bits of the narrowest groups, 1 or 2. With 2, no group of a linear at 2 bits is narrower, so that none
            is wider, and it is quantized as GPTQ does.
        trial: what the count of groups loses least by: ``feedback``, the error that is left if GPTQ spreads errors
            over later columns, or ``outputs``, the error of the outputs if nothing is spread.
    """

    lowest: int = 2
    trial: str = "feedback"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lowest not in (1, 2):
            raise ValueError(f"lowest must be 1 or 2 bits, not {self.lowest}")
        if self.trial not in ("feedback", "outputs"):
            raise ValueError(f"trial must be feedback or outputs, not {self.trial}")


class Slim(Mixture):
    """SliM-LLM (arXiv 2405.14917): groups of columns at b - 1, b and b + 1 bits, b on average, rounded by GPTQ.

    1. The salience of a group of columns is ``sum_rc w_rc^2 / U_cc^2``, with U the upper Cholesky factor of the inverse
       of the damped Hessian H, as in the authors' code; their paper has the diagonal of the inverse itself.
    2. For every count i, the i groups of least salience get b - 1 bits and the i of most b + 1. Each is tried with
       the errors dW of plain rounding, and the count that loses least is taken: by ``sum_rc dW_rc^2 / U_cc^2``, what
       GPTQ loses by such errors, or, with option ``trial=outputs``, by ``tr(dW H dW')``, the squared error of the
       outputs without GPTQ. The authors take the KL divergence of softmaxes over the outputs, which need activations
       and mean nothing inside a block; and they exclude i = 0, which is all groups at b bits and competes here.
    3. GPTQ rounds the widest groups, then those of b bits, then the narrowest, with one Hessian
       (``impq_within.parts``).

    A group of one bit has the values ``m + s`` and ``m - s``, where m is the mean of its weights in a row and s the
    mean of |w - m|. Only with option ``lowest=1`` and at 2 bits are there such groups. m is stored as a multiple of
    s / 32 in a byte, which the zeros of all groups of the linear then take, because bytes may not depend on the count.

    Stored are codes, 16-bit scales and packed zeros for each width, as GPTQ stores them, and two bits for each group of
    columns: the bytes do not depend on the count.
    """

    Options = Options
    default_bits = ("2", "3", "4")

    def choices(self) -> tuple[Choice, ...]:
        """4, 3, 2 bits."""
        return tuple(Choice(float(bits), self.options.group_size) for bits in (4, 3, 2))

    def check(self, linear: LinearSpec, choice: Choice) -> None:
        """Raises ImpqError if groups do not divide the inputs, or the outputs are no multiple of 8."""
        if linear.columns % choice.group_size:
            raise ImpqError(f"backend slim: group size {choice.group_size} does not divide the {linear.columns} inputs "
                            f"of {linear.name}")
        if linear.rows % 8:
            raise ImpqError(f"backend slim: the {linear.rows} outputs of {linear.name} are no multiple of 8")

    def nbytes(self, linear: LinearSpec, choice: Choice) -> int:
        """Bytes of the codes, a 16-bit scale and a packed zero for each group of each row, and two bits for each group
        of columns."""
        from impq_within.codes import bytes_of

        groups, bits = linear.columns // choice.group_size, int(choice.bits)
        zero = 8 if self._has_one_bit(bits) else bits
        return linear.parameters * bits // 8 + groups * linear.rows * 2 + groups * linear.rows * zero // 8 + bytes_of(
            groups, 2)

    def _has_one_bit(self, bits: int) -> bool:
        """Whether groups of a linear at this width may have one bit."""
        return bits == 2 and self.options.lowest == 1

    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        """Find the widths of groups, then GPTQ.

        If no calibration token reached the linear, the Hessian is the identity, so that GPTQ is plain rounding, and the
        record has ``unreached``. The record also has ``wider``, the share of groups that are wider than b bits.

        Raises:
            ImpqError: there are no statistics, or they are not finite.
        """
        import torch

        from impq_within.codes import pack
        from impq_within.feedback import corrected, reached, required
        from impq_within.parts import Part, round_parts, settings_of, stored

        statistics, bits = required(statistics, "slim"), int(choice.bits)
        weight = corrected(weight, statistics, self.options.drift_strength)
        steps = self._steps(weight, bits, choice.group_size, statistics)
        columns = torch.arange(weight.shape[1], device=weight.device).view(len(steps), -1)
        parts = [Part(columns[steps == step].flatten(), bits + step) for step in (1, 0, -1) if (steps == step).any()]
        solutions = round_parts(weight, statistics, parts, settings_of(choice.group_size, self.options.damping))
        tensors = {"widths": pack((steps + 1).to(torch.uint8), 2).cpu()}
        for part, solution in zip(parts, solutions, strict=True):
            tensors |= stored(solution, part.bits, 8 if self._has_one_bit(bits) else part.bits)
        record = {"wider": float((steps == 1).float().mean())}
        return Variant(choice, tensors, record if reached(statistics) else {**record, "unreached": 1.0})

    def _steps(self, weight: torch.Tensor, bits: int, group_size: int, statistics: Statistics) -> torch.Tensor:
        """-1, 0 or 1 for each group of columns, int64 (groups,): the bits that its width differs by."""
        import torch

        from impq_within.feedback import hessian, inverse_factor
        from impq_within.parts import plainly_rounded, settings_of

        groups = weight.shape[1] // group_size
        steps = torch.zeros(groups, dtype=torch.long, device=weight.device)
        if bits - 1 < self.options.lowest:
            return steps
        damped, weight = hessian(statistics, self.options.damping), weight.float()
        stiffness = inverse_factor(damped).diagonal() ** -2
        ranked = (weight.double().square().sum(0) * stiffness).view(groups, -1).sum(1).argsort(stable=True)
        losses = stiffness.diag() if self.options.trial == "feedback" else damped
        settings = settings_of(group_size, self.options.damping)
        narrow, plain, wide = (plainly_rounded(weight, bits + step, settings) - weight for step in (-1, 0, 1))
        count = best_count(plain, narrow, wide, losses.float(), ranked)
        steps[ranked[:count]], steps[ranked[groups - count:]] = -1, 1
        return steps

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        """(code - zero) * scale of each group, with the 16-bit scales that are stored."""
        import torch

        from impq_within.codes import unpack
        from impq_within.parts import restored

        size, bits = variant.choice.group_size, int(variant.choice.bits)
        groups = linear.columns // size
        steps = unpack(variant.tensors["widths"], 2, (groups,)).long() - 1
        weight = torch.empty(linear.rows, groups, size, device=steps.device)
        for step in (-1, 0, 1):
            if count := int((steps == step).sum()):
                part = restored(variant.tensors, bits + step, linear.rows, count * size,
                                8 if self._has_one_bit(bits) else bits + step)
                weight[:, steps == step] = part.view(linear.rows, count, size)
        return weight.view(linear.rows, linear.columns)


def best_count(plain: torch.Tensor, narrow: torch.Tensor, wide: torch.Tensor, hessian: torch.Tensor,
               ranked: torch.Tensor) -> int:
    """The count i of the least ``tr(E H E')``, where E has the errors ``narrow`` in the first i groups, ``wide`` in the
    last i, and ``plain`` in the others; 0 if none is better than it.

    Args:
        plain: (rows, columns), errors at b bits.
        narrow: the same at b - 1 bits.
        wide: the same at b + 1 bits.
        hessian: (columns, columns).
        ranked: (groups,), the groups in ascending order of salience.
    """
    import torch

    errors, groups = plain.clone(), len(ranked)
    columns = torch.arange(plain.shape[1], device=plain.device).view(groups, -1)
    total, least, best = 0.0, 0.0, 0
    for count in range(1, groups // 2 + 1):
        for group, other in ((ranked[count - 1], narrow), (ranked[groups - count], wide)):
            own = columns[group]
            change = other[:, own] - errors[:, own]
            total += float((change * (2 * errors @ hessian[:, own] + change @ hessian[own][:, own])).double().sum())
            errors[:, own] = other[:, own]
        if total < least:
            least, best = total, count
    return best
