"""Loading of a model whose blocks stay on disk: ``accelerate`` finds their tensors in the model's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import PreTrainedModel

from impq_core.model.layers import blocks_of
from impq_core.model.linears import to_linears
from impq_core.model.placement import Stored


def device_map(skeleton: PreTrainedModel, device: torch.device) -> dict[str, str]:
    """The places of a model's modules, for ``from_pretrained``: blocks on disk, all else on a device.

    Args:
        skeleton: the model on the meta device.
        device: of the embeddings, the head and all else outside the blocks.
    """
    blocks = blocks_of(skeleton)[0][0].rpartition(".")[0]
    places, parents = {blocks: "disk"}, blocks.split(".")
    for depth, inner in enumerate(parents):
        parent = skeleton.get_submodule(".".join(parents[:depth]))
        beside = [*parent.named_children(), *parent.named_parameters(recurse=False),
                  *parent.named_buffers(recurse=False)]
        places |= {".".join([*parents[:depth], name]): str(device) for name, _ in beside if name != inner}
    return places


def stored_parameters(model: PreTrainedModel) -> Mapping[nn.Parameter, Stored]:
    """Free a model that was loaded by ``device_map`` from accelerate, and replace what is no linear in it
    (``to_linears``).

    Args:
        model: with the parameters of its blocks on the meta device.

    Returns:
        Where the files hold each of those parameters.
    """
    index = next(hook.weights_map.dataset.index for module in model.modules()
                 if (hook := getattr(module, "_hf_hook", None)) is not None and hook.weights_map is not None)
    for module in model.modules():
        if (hook := getattr(module, "_hf_hook", None)) is not None:
            hook.original_devices = {}  # or its removal would read buffers once more
    remove_hook_from_submodules(model)
    # Linears of experts are views: of the meta tensor here, and of the file's tensor when they are read.
    whole = {_storage(parameter): name for name, parameter in model.named_parameters() if parameter.is_meta}
    to_linears(model.eval().requires_grad_(False))
    return {parameter: _stored(parameter, index[whole[_storage(parameter)]])
            for parameter in model.parameters() if parameter.is_meta}


def _storage(parameter: nn.Parameter) -> int:
    return int(parameter.untyped_storage()._cdata)


def _stored(parameter: nn.Parameter, entry: Mapping[str, Any]) -> Stored:
    return Stored(Path(entry["safetensors_file"]), str(entry["weight_name"]), tuple(parameter.shape),
                  tuple(parameter.stride()), int(parameter.storage_offset()), parameter.dtype)
