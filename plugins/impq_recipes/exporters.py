"""Recipes: configuration files of other quantizers with the plan's width for every linear."""

from __future__ import annotations

import json
import re
from pathlib import Path

from impq_core.files import write_text
from impq_core.interfaces import Checkpoint, Exporter


class GptqModelRecipe(Exporter):
    """``dynamic`` of GPTQModel's QuantizeConfig: escaped, anchored patterns, ``-:`` for unquantized linears."""

    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write dynamic.json."""
        dynamic = {f"{'+' if choice else '-'}:^{re.escape(name)}$":
                   {"bits": int(choice.bits), "group_size": choice.group_size or -1} if choice else {}
                   for name, choice in checkpoint.widths.items()}
        write_text(folder / "dynamic.json", json.dumps(dynamic, indent=1) + "\n")


class AutoRoundRecipe(Exporter):
    """``layer_config`` of auto-round: full module names, 16 bits for unquantized linears."""

    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write layer_config.json."""
        layers = {name: {"bits": int(choice.bits), "group_size": choice.group_size or -1} if choice else {"bits": 16}
                  for name, choice in checkpoint.widths.items()}
        write_text(folder / "layer_config.json", json.dumps(layers, indent=1) + "\n")
