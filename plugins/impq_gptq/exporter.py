"""GPTQ checkpoints with a width for every linear, for GPTQModel, vLLM and SGLang."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from impq_core.exports.checkpoint import SafetensorsExporter, module_names, write_model
from impq_core.files import write_text
from impq_core.interfaces import Checkpoint
from impq_core.space import FUSED, Choice
from impq_gptq.backend import TENSORS


def module_pattern(name: str) -> str:
    """A ``dynamic`` key that matches exactly one module. GPTQModel takes keys for regular expressions that match a
    prefix, so the name is escaped and its end anchored (``layers.1`` must not match ``layers.10``)."""
    return rf"+:^{re.escape(name)}$"


def with_fused(widths: Mapping[str, Choice | None]) -> dict[str, Choice | None]:
    """Widths by module name, with entries for fused modules if their linears share a width. vLLM and SGLang look up the
    name ``qkv_proj``, and take the commonest width if there is no entry."""
    extended = dict(widths)
    for name in widths:
        parent, _, leaf = name.rpartition(".")
        for fused, parts in FUSED.items():
            siblings = [f"{parent}.{part}" for part in parts]
            if leaf == parts[0] and all(linear in widths and widths[linear] == widths[name] for linear in siblings):
                extended[f"{parent}.{fused}"] = widths[name]
    return extended


def quantization_config(widths: Mapping[str, Choice | None], options: Mapping[str, Any]) -> dict[str, Any]:
    """GPTQModel's configuration: the commonest width, and ``dynamic`` entries for modules of other widths; the entry of
    an unquantized linear begins with ``-:``."""
    common = Counter(choice for choice in widths.values() if choice).most_common(1)[0][0]
    dynamic: dict[str, dict[str, Any]] = {}
    for name, choice in with_fused(widths).items():
        if choice is None:
            dynamic[f"-:^{re.escape(name)}$"] = {}
        elif choice != common:
            dynamic[module_pattern(name)] = {"bits": int(choice.bits), "group_size": choice.group_size}
    return {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": int(common.bits),
            "group_size": common.group_size, "sym": bool(options["symmetric"]), "desc_act": False, "lm_head": False,
            "pack_dtype": "int32", "dynamic": dynamic, "meta": {"quantizer": ["impq"]}}


class GptqExporter(SafetensorsExporter):
    """safetensors in the gptq_v2 format (zeros stored as they are), with per-module ``dynamic`` widths."""

    backends = frozenset({"gptq", "auto-gptq"})

    def parts(self, choice: Choice) -> Mapping[str, str]:
        """The variant's tensors under their own names."""
        return {part: part for part in TENSORS}

    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write model.safetensors, config.json and quantize_config.json."""
        tensors = dict(checkpoint.dense)
        for name, variant in checkpoint.variants.items():
            tensors |= {f"{name}.{part}": variant.tensors[part] for part in TENSORS}
        # GPTQModel looks up the names of transformers' modules. vLLM has its own, which are most often the files'.
        modules = module_names(checkpoint)
        widths = {modules[name]: choice for name, choice in checkpoint.widths.items()} | checkpoint.widths
        config = quantization_config(widths, checkpoint.options)
        write_model(folder, tensors, {**checkpoint.config, "quantization_config": config})
        write_text(folder / "quantize_config.json", json.dumps(config, indent=2) + "\n")
