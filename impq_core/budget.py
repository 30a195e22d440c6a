"""Memory budgets of a plan: ``3.0bits``, ``3.25bpw``, ``60MB``, ``60%``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal

from impq_core.errors import UsageError
from impq_core.space import SearchSpace
from impq_core.units import BYTES

_FORM = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(bits|bpw|%|[kmg]i?b|b)\s*", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str, what: str) -> int:
    """The bytes that a text such as ``8GB`` or ``500MiB`` stands for; raises UsageError, which names ``what``, if it
    stands for none."""
    match = _FORM.fullmatch(text)
    if not match or match[2].upper() not in BYTES or float(match[1]) <= 0:
        raise UsageError(f"{what} '{text}' is not understood: write 8GB, 500MB or 4GiB")
    return round(float(match[1]) * BYTES[match[2].upper()])


@dataclass(frozen=True)
class FileAccount:
    """The file of an export, for a budget that bounds it.

    Args:
        fixed: the most bytes that it has beside those of the plan: dense tensors, header, metadata.
        unquantized: bytes of the unquantized model's tensors.
    """

    fixed: int
    unquantized: int


@dataclass(frozen=True)
class Budget:
    """An amount and its unit. Bytes are the stored bytes of the quantizable weights, scales and zeros included; those
    of the whole file if the budget is resolved for one.

    ``bits`` is the paper's nominal average, ``B(b) = B_low + (b - low)/(high - low) (B_high - B_low)`` (IMPQ, section
    on allocation); ``bpw`` the true stored bits per quantizable weight; ``%`` a share of the all-high footprint, or of
    the unquantized model's file.
    """

    amount: float
    unit: str
    text: str = field(default="", compare=False)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a budget; raises UsageError if the text is none."""
        match = _FORM.fullmatch(text)
        if not match or float(match[1]) <= 0:
            raise UsageError(f"budget '{text}' is not understood: write 3.0bits, 3.25bpw, 60MB, 4GiB or 60%")
        unit = match[2].lower() if match[2].lower() in ("bits", "bpw", "%") else match[2].upper()
        return cls(float(match[1]), unit, text.strip())

    @classmethod
    def nominal(cls, bits: float) -> Budget:
        """A budget in nominal bits."""
        return cls(bits, "bits")

    def __str__(self) -> str:
        """The text that the user wrote, digit by digit, or an equal one: ``parse`` of it gives this budget."""
        return self.text or f"{Decimal(repr(self.amount)).normalize():f}{self.unit}"

    def check_menu(self, bits: Iterable[float]) -> None:
        """Check the budget against the widths alone, before a model is read.

        Raises:
            UsageError: no model can meet the budget with these widths.
        """
        low, high = min(bits), max(bits)
        if self.unit == "bits" and not low <= self.amount <= high:
            raise UsageError(f"budget {self} is outside what --bits {low:g} to {high:g} can reach: "
                             f"{low:g}bits to {high:g}bits")
        if self.unit == "%" and self.amount > 100:
            raise UsageError(f"budget {self} is more than 100% of the all-high footprint")

    def check_whole(self) -> None:
        """Raises UsageError if the budget cannot bound a file."""
        if self.unit in ("bits", "bpw"):
            raise UsageError(f"--whole bounds a file, which has a size and no bits a weight: write --budget 60MB, 4GiB "
                             f"or 40% (of the unquantized file), not {self}")

    def resolve(self, space: SearchSpace, file: FileAccount | None = None) -> int:
        """The bytes of the budget that are the layers'.

        Args:
            space: the layers and choices.
            file: what the file has beside them, if the budget bounds the file.

        Raises:
            UsageError: below the smallest plan or above the largest; the reachable range is in the message.
        """
        low, high = space.low_bytes, space.high_bytes
        if self.unit == "bits":
            (narrow, wide), (least, most) = space.ends, space.line
            share = (self.amount - narrow) / (wide - narrow) if wide > narrow else 1.0
            nbytes = float(round(least + share * (most - least)))
        elif self.unit == "bpw":
            nbytes = self.amount * space.parameters / 8
        elif self.unit == "%":
            nbytes = self.amount * (file.unquantized if file else high) / 100
        else:
            nbytes = self.amount * BYTES[self.unit]
        if file:
            nbytes -= file.fixed
            if not low <= nbytes <= high * (1 + 1e-9):
                raise UsageError(f"budget {self} for the whole file is outside what these widths can reach: "
                                 f"{self._show_file(low, file)} to {self._show_file(high, file)}, of which "
                                 f"{file.fixed / 1e6:.6g}MB are no layer's; {self._cure(nbytes < low)}")
        if not low <= nbytes <= high * (1 + 1e-9):
            raise UsageError(
                f"budget {self} is outside what these widths can reach: {self._show(low, space)} to "
                f"{self._show(high, space)} ({space.nominal_bits(low):.4g}bits to {space.nominal_bits(high):.4g}bits, "
                f"{low / 1e6:.4g}MB to {high / 1e6:.4g}MB); {self._cure(nbytes < low)}")
        return min(int(round(nbytes, 3)), high)  # 60.7MB is 60,700,000 bytes, not one less

    @staticmethod
    def _cure(below: bool) -> str:
        if below:
            return "write a larger budget, or run with narrower --bits"
        return "write a smaller budget, or run with wider --bits"

    def _show_file(self, nbytes: int, file: FileAccount) -> str:
        if self.unit == "%":
            return f"{100 * (nbytes + file.fixed) / file.unquantized:.2f}%"
        return f"{(nbytes + file.fixed) / BYTES[self.unit]:.9g}{self.unit}"

    def _show(self, nbytes: int, space: SearchSpace) -> str:
        if self.unit == "bits":
            return f"{space.nominal_bits(nbytes):.4g}bits"
        if self.unit == "bpw":
            return f"{space.bits_per_weight(nbytes):.3f}bpw"
        if self.unit == "%":
            return f"{100 * nbytes / space.high_bytes:.1f}%"
        return f"{nbytes / BYTES[self.unit]:.6g}{self.unit}"
