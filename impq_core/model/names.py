"""Names of a model's tensors in its files: transformers renames tensors when it loads some architectures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming


def file_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Names in the files by names in the model, for the tensors that are stored one to one.

    Files of most mixtures hold experts one by one; an expert's linear is then a tensor of its own there. Other tensors
    that the model merges or splits on loading are left out.

    Args:
        model: as ``ModelSource.load`` returned it.
        names: of tensors in the model, such as ``model.layers.0.mlp.up_proj.weight``.
    """
    conversions = getattr(model, "_weight_conversions", None) or []
    reverse = [conversion.reverse_transform() for conversion in reversed(conversions)]
    renamings = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    merged = [entry for entry in conversions if isinstance(entry, WeightConverter)
              and [type(operation) for operation in entry.operations] in ([MergeModulelist],
                                                                          [MergeModulelist, Concatenate])]
    found = {}
    for name in names:
        if expert := _expert_name(name, merged):
            found[name] = _renamed(expert, renamings)
        elif all(converter.rename_source_key(name)[1] is None for converter in converters):
            found[name] = _renamed(name, renamings)
    return found


def _renamed(name: str, renamings: Sequence[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<number>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight")
_PLACES = {"gate_proj": (2, 0), "up_proj": (2, 1), "down_proj": (1, 0)}
"""How many tensors of the files a fused parameter is merged of, and which of them a linear is."""


def _expert_name(name: str, merged: Sequence[WeightConverter]) -> str:
    """The name, before renamings, of an expert's linear in files that hold experts one by one; empty if it is none."""
    if match := _EXPERT.fullmatch(name):
        number, place = _PLACES[match["part"]]
        fused = f"{match['experts']}.{'down_proj' if number == 1 else 'gate_up_proj'}"
        for converter in merged:
            [target], sources = converter.target_patterns, converter.source_patterns
            if len(sources) == number and fused.endswith(target):
                return f"{fused.removesuffix(target)}{sources[place].replace('*', match['number'])}"
    return ""
