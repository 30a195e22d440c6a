"""Names of a model's tensors in its files: transformers renames tensors when it loads some architectures."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_converters, apply_renamings


def file_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Names in the files by names in the model, for the tensors that are stored one to one.

    Tensors that the model merges or splits on loading (fused experts) are left out.

    Args:
        model: as ``from_pretrained`` returned it.
        names: of tensors in the model, such as ``model.layers.0.mlp.up_proj.weight``.
    """
    conversions = getattr(model, "_weight_conversions", None) or []
    reverse = [conversion.reverse_transform() for conversion in reversed(conversions)]
    renamings = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    return {name: apply_renamings(name, renamings) for name in names if apply_converters(name, converters)[1] is None}
