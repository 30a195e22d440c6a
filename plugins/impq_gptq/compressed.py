"""compressed-tensors checkpoints with a width for every linear, for stock transformers and vLLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from impq_core.errors import ImpqError
from impq_core.exports.checkpoint import SafetensorsExporter, module_names, read_model, write_model
from impq_core.interfaces import Checkpoint, Variant
from impq_core.space import Choice
from impq_gptq.backend import Gptq, Options


class CompressedTensorsExporter(SafetensorsExporter):
    """The ``pack-quantized`` format: symmetric integer codes, with a config group of full module names for each width.

    Symmetric GPTQ codes (``-o symmetric=true``) convert exactly. The format stores neither zeros nor a group index, so
    its 2-, 4- and 8-bit linears are slightly smaller than in the plan; 3-bit linears are larger, because a 32-bit word
    holds ten codes. Files with 3-bit layers need compressed-tensors before 0.18, which changed the packing of odd
    widths.
    """

    backends = frozenset({"gptq", "auto-gptq"})

    def parts(self, choice: Choice) -> Mapping[str, str]:
        """The names of the format, whose tensors are not the variant's."""
        return {"qweight": "weight_packed", "scales": "weight_scale"}

    more_parts = ("weight_shape",)

    def variant_bytes(self, checkpoint: Checkpoint) -> int:
        """Whole words of codes in each row, and 16-bit scales."""
        total = 0
        for name, choice in checkpoint.widths.items():
            if choice is not None:
                spec = checkpoint.specs[name]
                words = math.ceil(spec.columns / (32 // int(choice.bits)))
                total += spec.rows * (4 * words + 2 * math.ceil(spec.columns / (choice.group_size or spec.columns)))
        return total

    def check(self, options: Mapping[str, Any]) -> None:
        """Raises ImpqError if the codes are asymmetric."""
        if not options["symmetric"]:
            raise ImpqError("format 'compressed-tensors' stores symmetric codes: run with -o symmetric=true")

    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write model.safetensors and config.json."""
        import torch
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        backend = Gptq(Options(**checkpoint.options))
        tensors = dict(checkpoint.dense)
        for name, variant in checkpoint.variants.items():
            spec, bits = checkpoint.specs[name], int(variant.choice.bits)
            scales = variant.tensors["scales"].T.contiguous()
            weight = backend.dequantize(variant, spec).reshape(spec.rows, -1, variant.choice.group_size)
            codes = torch.round(weight / scales.float().clamp_min(1e-12)[:, :, None]).reshape(spec.rows, spec.columns)
            tensors |= {f"{name}.weight_packed": pack_to_int32(codes.to(torch.int8), bits),
                        f"{name}.weight_scale": scales, f"{name}.weight_shape": torch.tensor([spec.rows, spec.columns])}
        modules = module_names(checkpoint)
        quantized = quantization_config({modules[name]: choice for name, choice in checkpoint.widths.items()})
        write_model(folder, tensors, {**checkpoint.config, "quantization_config": quantized})

    def restore(self, folder: Path, checkpoint: Checkpoint) -> Mapping[str, Variant]:
        """Read the linears as GPTQ variants; raises ImpqError if the file lacks one."""
        import torch
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        variants = {}
        with read_model(folder) as tensor:
            for name, choice in checkpoint.widths.items():
                if choice is not None:
                    spec = checkpoint.specs[name]
                    shape = torch.Size((spec.rows, spec.columns))
                    codes = unpack_from_int32(tensor(f"{name}.weight_packed"), int(choice.bits), shape)
                    backend = Gptq(Options(group_size=choice.group_size, symmetric=True))
                    variants[name] = backend.pack(codes, tensor(f"{name}.weight_scale"), choice)
        return variants


def quantization_config(widths: Mapping[str, Choice | None]) -> dict[str, Any]:
    """The ``quantization_config`` of the format for widths by module name."""
    groups: dict[Choice, dict[str, Any]] = {}
    ignored = ["lm_head"]
    for name, choice in widths.items():
        if choice is None:
            ignored.append(name)
            continue
        group = groups.setdefault(choice, {
            "targets": [], "input_activations": None, "output_activations": None, "format": "pack-quantized",
            "weights": {"num_bits": int(choice.bits), "type": "int", "symmetric": True, "strategy": "group",
                        "group_size": choice.group_size, "dynamic": False}})
        group["targets"].append(name)
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups.values())},
            "ignore": ignored}

