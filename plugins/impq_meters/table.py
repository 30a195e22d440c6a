"""Costs from a CSV of one's own."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from impq_core.costs import UNQUANTIZED
from impq_core.errors import ImpqError, UsageError
from impq_core.interfaces import NO_FILE, Form, InputFile, Meter, Readings
from impq_core.space import Choice, LayerSpec, LinearSpec

REST = "rest"
"""The layer of the line with the cost of all that is no layer."""

_COLUMNS = ("layer", "choice", "cost", "error")


@dataclass(frozen=True)
class Options:
    """Options of the table of costs.

    Args:
        file: a CSV with the header ``layer,choice,cost`` or ``layer,choice,cost,error``. A layer is a pattern of names
            of layers or linears, or a shape such as ``1536x576`` (rows x columns of a linear); ``*`` is any choice, and
            ``unquantized`` none. The first line that fits a layer counts; if none does, the sum over its linears, in
            which a routed expert counts by the share of tokens that choose it. The cost of layer ``rest`` is that of
            all that is no layer.
        cost: name of the cost, as in ``--limit latency=9ms``.
        unit: of the numbers, such as ``ms``, ``bytes`` or ``mJ``.
    """

    file: InputFile = NO_FILE
    cost: str = "latency"
    unit: str = "ms"

    def __post_init__(self) -> None:
        for name in ("cost", "unit"):
            if not re.fullmatch(r"[A-Za-z][\w-]*", getattr(self, name), re.ASCII):
                raise ValueError(f"{name} is a word such as {'latency' if name == 'cost' else 'ms'}, not "
                                 f"'{getattr(self, name)}'")


@dataclass(frozen=True)
class _Line:
    """A line of the table: a pattern or shape, a choice or ``*``, a cost and its standard error."""

    layer: str
    choice: str
    cost: float
    error: float

    def fits(self, layer: LayerSpec | LinearSpec, choice: Choice | None) -> bool:
        """Whether the line is of a layer or a linear at a choice, as the menu names it."""
        name = choice.name if choice else UNQUANTIZED
        if self.choice.lower() not in ("*", name.lower()):
            return False
        shape = f"{layer.rows}x{layer.columns}" if isinstance(layer, LinearSpec) else ""
        return self.layer == shape or fnmatchcase(layer.name, self.layer)


class Table(Meter):
    """Costs of layers at choices from a CSV, such as times measured on the chip that the model is for, or joules.

    Lines of layers are of a whole layer of the run's granularity, so that kernels which run as one may have one line;
    lines of linears are added up.
    """

    Options = Options

    @property
    def cost(self) -> str:  # type: ignore[override]
        """Name of the cost: option ``cost``."""
        return str(self.options.cost)

    @property
    def unit(self) -> str:  # type: ignore[override]
        """Unit of the cost: option ``unit``."""
        return str(self.options.unit)

    def check(self, choices: Sequence[Choice]) -> None:
        """Raises ImpqError if the file is missing or has a wrong line, or a choice has no line."""
        lines = self._lines()
        for choice in choices:
            if not any(line.choice.lower() in ("*", choice.name.lower()) for line in lines):
                raise ImpqError(f"meter table: {self.options.file} has no line for {choice}")

    def read(self, forms: Sequence[Form], dtype: str, progress: Callable[[int, int], None]) -> Readings:
        """The costs of the lines that fit; NaN for a form without one, unless it is a layer's at a choice.

        Raises:
            ImpqError: the file is missing or has a wrong line.
        """
        lines = [line for line in self._lines() if line.layer != REST]
        rest = [line for line in self._lines() if line.layer == REST]
        found = np.array([self._of(form, lines) for form in forms]).reshape(-1, 2)
        return Readings(found[:, 0], found[:, 1], sum(line.cost for line in rest), sum(line.error for line in rest),
                        () if rest else ("without what is no layer: the table has no line 'rest'",))

    def _of(self, form: Form, lines: Sequence[_Line]) -> tuple[float, float]:
        whole = next((line for line in lines if line.fits(form.layer, form.choice)), None)
        if whole:
            return whole.cost, whole.error
        parts = [next((line for line in lines if line.fits(stored.linear, form.choice)), None)
                 for stored in form.linears]
        times = [stored.reads for stored in form.linears]
        if None in parts:
            return math.nan, math.nan
        return (sum(line.cost * reads for line, reads in zip(parts, times, strict=True) if line),
                sum(line.error * reads for line, reads in zip(parts, times, strict=True) if line))

    def _lines(self) -> list[_Line]:
        file = self.options.file
        if not file:
            raise UsageError("meter table takes a file: give -o meter.table.file=costs.csv")
        try:
            with Path(file).open(newline="", encoding="utf-8-sig") as opened:
                rows = list(csv.reader(opened))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise ImpqError(f"meter table: {file} cannot be read: {reason}") from error
        header = [name.strip().lower() for name in rows[0]] if rows else []
        if tuple(header) not in (_COLUMNS[:3], _COLUMNS):
            raise ImpqError(f"meter table: {file} needs the header layer,choice,cost or layer,choice,cost,error in its "
                            "first line")
        lines = [self._line(number, [cell.strip() for cell in row], len(header))
                 for number, row in enumerate(rows[1:], 2) if any(cell.strip() for cell in row)]
        if not lines:
            raise ImpqError(f"meter table: {file} has no lines behind its header")
        return lines

    def _line(self, number: int, row: Sequence[str], columns: int) -> _Line:
        where = f"meter table: {self.options.file}, line {number}"
        if len(row) != columns or not row[0] or not row[1]:
            raise ImpqError(f"{where}: {columns} values are needed, a layer and a choice among them, not "
                            f"'{','.join(row)}'")
        try:
            numbers = [float(cell) for cell in row[2:]]
        except ValueError:
            numbers = [math.nan]
        if not all(math.isfinite(value) and value >= 0 for value in numbers):
            raise ImpqError(f"{where}: costs and errors are numbers from 0, not '{','.join(row[2:])}'")
        return _Line(row[0], row[1], numbers[0], numbers[1] if len(numbers) > 1 else 0.0)
