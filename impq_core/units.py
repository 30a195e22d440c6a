"""Units of sizes and costs, and texts such as ``9ms`` and ``1.2GB``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType

from impq_core.errors import UsageError

BYTES: Mapping[str, int] = MappingProxyType({"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10,
                                             "MIB": 2**20, "GIB": 2**30})
"""Bytes in each unit of a size, by its name in capitals."""

_SCALES: Mapping[str, Mapping[str, float]] = MappingProxyType({
    "bytes": {**BYTES, "BYTES": 1}, "ms": {"NS": 1e-6, "US": 1e-3, "MS": 1.0, "S": 1e3}})
"""For each unit that has others beside it, the amount in that unit of each, by its name in capitals."""


def parse_amount(text: str, unit: str, what: str) -> float:
    """The amount in ``unit`` that a text stands for, such as 9 for ``9ms``, ``0.009s`` or ``9`` if the unit is ms.

    Raises:
        UsageError: it stands for no positive amount of that unit; the message names ``what``.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*(\S*)\s*", text, re.IGNORECASE | re.ASCII)
    scales = _SCALES.get(unit, {})
    known = {unit.upper(): 1.0, **scales}
    if match and (match[2].upper() in known or not match[2]):
        amount = float(match[1]) * (known[match[2].upper()] if match[2] else 1.0)
        if 0 < amount < math.inf:
            return amount
    names = " or ".join(f"9{name if name == unit else name.lower() if unit == 'ms' else name}"
                        for name in (["MS", "S"] if unit == "ms" else ["MB", "GB"] if scales else [unit]))
    raise UsageError(f"{what} '{text}' is not understood: write an amount of {unit}, such as {names}")


def shown(amount: float, unit: str) -> str:
    """An amount for a reader: ``8.71 ms``, ``1.2 MB``."""
    return f"{amount / 1e6:.4g} MB" if unit == "bytes" else f"{amount:.4g} {unit}"


def at_least(amount: float, unit: str) -> str:
    """An amount of four digits that is not below the true one, as ``parse_amount`` reads it: ``8.72ms``, ``1.21MB``."""
    scaled, name = (amount / 1e6, "MB") if unit == "bytes" else (amount, unit)
    if scaled <= 0:
        return f"0{name}"
    step = 10.0 ** (math.floor(math.log10(scaled)) - 3)
    return f"{math.ceil(scaled / step * (1 - 1e-12)) * step:.9g}{name}"
