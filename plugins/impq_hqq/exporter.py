"""Checkpoints for hqq: the state dict of a model with HQQLinear modules, as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from impq_core.exports.checkpoint import SafetensorsExporter, require_module_names, write_model
from impq_core.interfaces import Checkpoint
from impq_core.space import Choice
from impq_hqq.backend import Hqq, Options

_NAMES = {"codes": "W_q", "scale": "scale", "zero": "zero"}


class HqqExporter(SafetensorsExporter):
    """safetensors for ``HQQLinear.load_state_dict``, with a width for every linear.

    transformers cannot load this format. The configuration makes it fail: transformers 5.23 would load an HQQ
    checkpoint in the form of its earlier releases with random weights.
    """

    backends = frozenset({"hqq"})
    more_parts = ("nbits", "group_size", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
                  "quant_zero", "shape", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
                  "optimize", "round_zero")

    def parts(self, choice: Choice) -> Mapping[str, str]:
        """hqq's names."""
        return _NAMES

    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write model.safetensors and config.json; raises ImpqError if the files have other names than the modules."""
        require_module_names(checkpoint, "hqq")
        tensors, backend = dict(checkpoint.dense), Hqq(Options(**checkpoint.options))
        for name, variant in checkpoint.variants.items():
            state = backend.stored_state(variant, checkpoint.specs[name])
            tensors |= {f"{name}.{part}": tensor for part, tensor in state.items()}
        # Without the key 'quant_config' transformers fails; with it, transformers would load random weights.
        widths = {name: int(choice.bits) for name, choice in checkpoint.widths.items() if choice}
        write_model(folder, tensors, {**checkpoint.config, "quantization_config": {
            "quant_method": "hqq", "bits": widths}})
