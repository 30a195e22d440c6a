"""Checkpoints for ``QuantizedModelForCausalLM`` of optimum-quanto."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from impq_core.errors import ImpqError
from impq_core.exports.checkpoint import SafetensorsExporter, require_module_names, write_model
from impq_core.files import write_text
from impq_core.interfaces import Checkpoint
from impq_core.space import Choice

STOCK_GROUP = 128
"""Group size that quanto assumes for its files, which do not store it."""

_QBITS = {"codes": "weight._data._data", "scale": "weight._scale", "shift": "weight._shift"}
_QBYTES = {"codes": "weight._data", "scale": "weight._scale"}


class QuantoExporter(SafetensorsExporter):
    """safetensors and a map from module to qtype, for ``QuantizedModelForCausalLM.from_pretrained``.

    Scales are float16, and quanto multiplies in the type of the scales, so all other tensors are float16 too.
    """

    backends = frozenset({"quanto"})
    more_parts = ("input_scale", "output_scale")

    def parts(self, choice: Choice) -> Mapping[str, str]:
        """quanto's names."""
        return _QBITS if choice.group_size else _QBYTES

    def check(self, options: Mapping[str, Any]) -> None:
        """Raises ImpqError if the group size is not the one that quanto assumes."""
        if options["group_size"] != STOCK_GROUP:
            raise ImpqError(f"format 'quanto' holds groups of {STOCK_GROUP} weights only: run with "
                            f"-o group_size={STOCK_GROUP}")

    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write model.safetensors, config.json and quanto_qmap.json."""
        import torch

        require_module_names(checkpoint, "quanto")
        tensors = {}
        for name, tensor in checkpoint.dense.items():
            tensors[name] = tensor.half() if tensor.is_floating_point() else tensor
            if not torch.isfinite(tensors[name]).all():
                raise ImpqError(f"format 'quanto' stores 16-bit floats, which {name} overflows")
        for name, variant in checkpoint.variants.items():
            parts = self.parts(variant.choice)
            tensors |= {f"{name}.{stored}": variant.tensors[part] for part, stored in parts.items()}
            tensors |= {f"{name}.{side}_scale": torch.ones((), dtype=torch.float16) for side in ("input", "output")}
        write_model(folder, tensors, {**checkpoint.config, "dtype": "float16"})
        types = {name: {"weights": f"qint{variant.choice}", "activations": "none"}
                 for name, variant in checkpoint.variants.items()}
        write_text(folder / "quanto_qmap.json", json.dumps(types, indent=4) + "\n")
