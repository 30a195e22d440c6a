"""The widths of a plan by kind of layer and block, for the terminal and for notebooks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_letters

from impq_core.space import Choice, LayerSpec
from impq_core.types import Plan

MOST_ROWS = 24
"""Kinds of layers that a map has a row for; with more, as for experts, kinds that differ by a number share one."""

UNQUANTIZED = "."


@dataclass(frozen=True)
class WidthMap:
    """Widths by kind of layer and block.

    Args:
        choices: those of the plan's menu and of its pins, widest first.
        blocks: number of blocks.
        rows: by kind of layer (its name inside its block), the choices of its layers in each block; None for a layer
            that stays unquantized. Kinds of experts share a row, so that a block can have several.
        ends: embedding and head, by name.
    """

    choices: tuple[Choice, ...]
    blocks: int
    rows: Mapping[str, Mapping[int, tuple[Choice | None, ...]]]
    ends: Mapping[str, Choice | None]

    @classmethod
    def of(cls, plan: Plan) -> WidthMap:
        """The map of a plan."""
        placed = list(zip(plan.space.everyone, plan.space.assignment(plan.pick), strict=True))
        inside = {layer.name: _kind(layer) for layer, _ in placed}
        ends = {layer.name: choice for layer, choice in placed if inside[layer.name] is None}
        kinds = {kind for kind in inside.values() if kind is not None}
        shared = len(kinds) > MOST_ROWS
        rows: dict[str, dict[int, tuple[Choice | None, ...]]] = {}
        for layer, choice in sorted(placed, key=lambda pair: pair[0].block):
            if (kind := inside[layer.name]) is not None:
                row = rows.setdefault(re.sub(r"\d+", "*", kind) if shared else kind, {})
                row[layer.block] = (*row.get(layer.block, ()), choice)
        used = {choice for _, choice in placed if choice}
        choices = (*plan.space.choices, *sorted(used - {*plan.space.choices}, key=lambda choice: -choice.bits))
        return cls(choices, 1 + max((block for row in rows.values() for block in row), default=-1), rows, ends)

    @property
    def symbols(self) -> dict[Choice, str]:
        """A character for each choice: its name if that is one character, else a letter."""
        if all(len(choice.name) == 1 for choice in self.choices):
            return {choice: choice.name for choice in self.choices}
        return {choice: ascii_letters[number % len(ascii_letters)] for number, choice in enumerate(self.choices)}

    def lines(self) -> list[str]:
        """The map as text: a row for each kind of layer, a character for each block."""
        symbols = self.symbols
        width = max((len(kind) for kind in (*self.rows, *self.ends)), default=0)
        legend = ", ".join(f"{symbol} {choice}" for choice, symbol in symbols.items() if symbol != choice.name)
        legend += (", " if legend else "") + f"{UNQUANTIZED} unquantized" if self._has_unquantized else ""
        lines = ["widths, a character for each block" + (f" ({legend})" if legend else "")]
        ruler = "".join(f"{block:<10}" for block in range(0, self.blocks, 10)).rstrip()
        lines.append(f"{'':<{width}}  {ruler}")
        for kind, row in self.rows.items():
            if any(len(cell) > 1 for cell in row.values()):
                counts = Counter(choice for cell in row.values() for choice in cell)
                text = ", ".join(f"{counts[choice]} at {choice}" for choice in (*self.choices, None) if counts[choice]
                                 ).replace("at None", "unquantized")
            else:
                text = "".join(self._symbol(row[block][0], symbols) if block in row else " "
                               for block in range(self.blocks))
            lines.append(f"{kind:<{width}}  {text}".rstrip())
        return [*lines, *(f"{name:<{width}}  {self._symbol(choice, symbols)}" for name, choice in self.ends.items())]

    @staticmethod
    def _symbol(choice: Choice | None, symbols: Mapping[Choice, str]) -> str:
        return UNQUANTIZED if choice is None else symbols[choice]

    @property
    def _has_unquantized(self) -> bool:
        return None in self.ends.values() or any(None in cell for row in self.rows.values() for cell in row.values())


def _kind(layer: LayerSpec) -> str | None:
    """The name of a layer inside its block; None for embedding and head, which have no number of a block."""
    found = re.match(rf".*?(?:^|\.){layer.block}(?:\.(.*))?$", layer.name)
    return (found[1] or "block") if found else None
