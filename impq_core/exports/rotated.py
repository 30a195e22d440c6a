"""A rotated model as a folder that transformers, and impq itself, load as any other model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from impq_core.errors import ImpqError
from impq_core.exports.manifest import check_target
from impq_core.files import scratch_folder, write_text
from impq_core.machine import free_memory
from impq_core.model import rotation
from impq_core.model.device import resolve_dtype
from impq_core.model.linears import to_linears
from impq_core.model.rotation import Rotated
from impq_core.model.source import ModelSource, locate_model
from impq_core.trust import NO_TRUST, Trust

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD = "5GB"
"""Largest file of weights."""


@dataclass(frozen=True)
class RotatedModel:
    """A rotated model in a folder.

    Args:
        folder: the folder.
        rotated: what was rotated.
        dtype: in which matrices are stored.
        difference: largest difference of a logit in float32, relative to the largest logit.
        rounding: mean Kullback-Leibler divergence from the original model, in nats, that storing the rotated weights
            in their dtype costs, on windows of random tokens.
        untied_bytes: bytes of the head, if it was tied; else 0.
        file_bytes: bytes of the files with the weights.
    """

    folder: Path
    rotated: Rotated
    dtype: str
    difference: float
    rounding: float
    untied_bytes: int
    file_bytes: int


def rotate_model(model: str, target: str | Path, block: int = 64, order: str = "sequency", residual: bool = True,
                 values: bool = True, dtype: str = "auto", trust: Trust = NO_TRUST) -> RotatedModel:
    """Write a model that computes the same logits with rotated hidden states and values.

    The model is in memory once, in float32; products are made in float64. The rotated model must give the logits of the
    original in float32, and the folder those of the rotated model, or nothing is written.

    Args:
        model: demo, a folder or a hub name.
        target: a folder that is missing or empty. It appears when all is written.
        block: size of the Hadamard blocks; that of a quantization group is best.
        order: of the rows in a block, ``sequency`` or ``sylvester``.
        residual: rotate the hidden states.
        values: rotate values and outputs of attentions, wherever they are found.
        dtype: of the stored weights: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for that of each tensor.
        trust: what the caller permits.

    Raises:
        ImpqError: the model cannot be rotated, or the folder is not empty.
    """
    target = Path(target)
    check_target(target)
    source = locate_model(model, trust.remote_code)
    skeleton = source.skeleton()
    if residual:
        rotation.check_block(block, getattr(skeleton.get_input_embeddings(), "embedding_dim", 0))
    _warn_of_memory(source.name, skeleton)
    own = source.load_own(None)
    dtypes = {name: tensor.dtype if dtype == "auto" else resolve_dtype(dtype, tensor.device)
              for name, tensor in own.state_dict().items() if tensor.is_floating_point()}
    for parameter in own.parameters():
        parameter.data = parameter.data.float()
    state = own.state_dict()
    running = to_linears(own)  # whose weights are views of those in the state
    before = rotation.logits_of(running)
    rotated = rotation.rotate(running, block, order, residual, values)
    difference = rotation.difference(before, rotation.logits_of(running))
    if not difference < rotation.SAME:
        hint = "; --no-values or --no-residual rotates less" if residual and values else ""
        raise ImpqError(f"model {source.name} gives other logits after its rotation (by {difference:.2g} of the "
                        "largest), so nothing is written: something in it reads what was rotated and was not seen"
                        f"{hint}")
    ends = running.get_input_embeddings(), running.get_output_embeddings()
    embedding, head = (next(f"{name}.weight" for name, module in running.named_modules() if module is end)
                       for end in ends)
    state[head] = ends[1].weight.data
    if ends[0].weight is ends[1].weight:
        del state[head]  # it is saved once
    for name in dtypes.keys() & state.keys():
        state[name].copy_(state[name].to(dtypes[name]))
    rounded = rotation.logits_of(running)
    empty = _without_weights(running)
    del own, running, ends
    for name in dtypes.keys() & state.keys():
        state[name] = state[name].to(dtypes[name])
    stored = state[embedding].dtype
    config = source.config()
    if rotated.untied:
        _set(config, "tie_word_embeddings", False)
    if dtype != "auto":
        _set(config, "dtype", dtype)
    _write(target, source, empty, state, config, rounded)
    return RotatedModel(
        target, rotated, str(stored).removeprefix("torch."), difference, rotation.divergence(before, rounded),
        stored.itemsize * rotated.untied, sum(file.stat().st_size for file in target.glob("*.safetensors")))


def _warn_of_memory(name: str, skeleton: PreTrainedModel) -> None:
    needed, free = 4 * skeleton.num_parameters(), free_memory()
    if free is not None and needed > free:
        warnings.warn(f"the rotation of model {name} takes about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} "
                      "GB are free", RuntimeWarning, stacklevel=3)


def _without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and configuration on the meta device, which saves the weights of another."""
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty._weight_conversions = getattr(model, "_weight_conversions", None)
    return empty


def _set(config: dict[str, Any], name: str, value: Any) -> None:
    """Set an entry of a config.json, and that of the language model in it if it has one of its own."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            if name == "dtype":
                part.pop("torch_dtype", None)  # its older name
            part[name] = value


def _write(target: Path, source: ModelSource, empty: PreTrainedModel, state: dict[str, torch.Tensor],
           config: Mapping[str, Any], logits: torch.Tensor) -> None:
    """Write a model to a folder, whole or not at all.

    Args:
        target: the folder, missing or empty.
        source: the original, whose other files are copied.
        empty: the model without weights.
        state: its weights, which this empties.
        config: content of its config.json.
        logits: what the model in the folder must give in float32.

    Raises:
        ImpqError: it gives other logits.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target.parent, target.name) as scratch:
        work = scratch / "model"
        empty.save_pretrained(work, state_dict=state, max_shard_size=SHARD)
        source.folder_with_tokenizer()
        source.copy_files(work)
        write_text(work / "config.json", json.dumps(config, indent=2) + "\n")
        loaded = locate_model(str(work), source.trust_remote_code).load(torch.float32)
        difference = rotation.difference(logits, rotation.logits_of(loaded))
        if not difference < rotation.SAME:
            raise ImpqError("the rotated model gives other logits after it is loaded from its files (by "
                            f"{difference:.2g} of the largest), so nothing is written: transformers saves this "
                            "architecture in another form")
        for file in work.iterdir():
            file.chmod(0o644)  # safetensors are readable by their owner alone
        if target.exists():
            target.rmdir()
        work.rename(target)
