"""Recipes: configuration files of other quantizers with the plan's width for every linear."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from impq_core.errors import ImpqError
from impq_core.files import write_text
from impq_core.interfaces import Checkpoint, Exporter
from impq_core.space import Choice


class GptqModelRecipe(Exporter):
    """``dynamic`` of GPTQModel's QuantizeConfig: escaped, anchored patterns, ``-:`` for unquantized linears."""

    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write dynamic.json; raises ImpqError if a width is no whole number of bits."""
        dynamic = {f"{'+' if choice else '-'}:^{re.escape(name)}$": _width(name, choice) if choice else {}
                   for name, choice in checkpoint.widths.items()}
        write_text(folder / "dynamic.json", json.dumps(dynamic, indent=1) + "\n")


class AutoRoundRecipe(Exporter):
    """``layer_config`` of auto-round: full module names, 16 bits for unquantized linears."""

    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write layer_config.json; raises ImpqError if a width is no whole number of bits."""
        layers = {name: _width(name, choice) if choice else {"bits": 16} for name, choice in checkpoint.widths.items()}
        write_text(folder / "layer_config.json", json.dumps(layers, indent=1) + "\n")


def _width(name: str, choice: Choice) -> dict[str, Any]:
    if not choice.is_width or choice.bits % 1:
        raise ImpqError(f"the recipe has widths of whole bits, not {choice} (of {name}): choose others with --bits")
    return {"bits": int(choice.bits), "group_size": choice.group_size or -1}
