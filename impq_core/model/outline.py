"""A checkpoint without weights: what an exporter needs to know the size of its files, or to read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

import torch
from transformers import PreTrainedModel

from impq_core.interfaces import Backend, Checkpoint
from impq_core.model.names import file_names
from impq_core.model.source import ModelSource
from impq_core.space import Choice
from impq_core.types import Plan


def outline(source: ModelSource, model: PreTrainedModel, plan: Plan, name: str, backend: Backend,
            dtype: torch.dtype, packed: bool = True) -> Checkpoint:
    """The checkpoint of a plan, without variants and with its other tensors on the meta device.

    Args:
        source: the model's files.
        model: as ``source.load`` or ``source.without_weights`` returned it.
        plan: the plan.
        name: of the backend of the variants.
        backend: the backend.
        dtype: of the run. Wider floats are stored in it.
        packed: as of the exporter.
    """
    names = file_names(model, model.state_dict())
    specs = {spec.name: spec for layer in plan.space.everyone for spec in layer.linears}
    in_files = {name: names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight") for name in specs}
    widths = {in_files[name]: choice for name, choice in stored_widths(plan, backend).items()}
    tensors = source.tensors() if source.unquantized_files else _by_names(model, names)
    if (given := source.dequantized_dtype) is not None:
        tensors = ((name, torch.empty_like(tensor, dtype=stored_dtype(tensor, given), device="meta"))
                   for name, tensor in tensors)
    dense = {}
    for tensor_name, tensor in tensors:
        planned = widths.get(tensor_name.removesuffix(".weight")) is not None
        if not (planned and packed):
            kept_in = unpacked_dtype(tensor, dtype) if planned else stored_dtype(tensor, dtype)
            dense[tensor_name] = torch.empty_like(tensor, dtype=kept_in, device="meta")
    config = source.config()
    stored = {tensor.dtype for tensor in dense.values() if tensor.is_floating_point()}
    if len(stored) == 1:
        config.pop("torch_dtype", None)
        config["dtype"] = str(stored.pop()).removeprefix("torch.")
    return Checkpoint(plan, widths, {in_files[name]: spec for name, spec in specs.items()}, {}, dense, config, name,
                      asdict(backend.options), source.folder_with_tokenizer())


def stored_widths(plan: Plan, backend: Backend) -> dict[str, Choice | None]:
    """The choice of every linear by its name in the model, as the backend stores it; None if it stays unquantized."""
    specs = {spec.name: spec for layer in plan.space.everyone for spec in layer.linears}
    return {name: choice and backend.stand_in(specs[name], choice) for name, choice in plan.widths().items()}


def stored_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an export stores an unquantized tensor: that of the run, in which it was measured, if the
    tensor's is a wider float."""
    wider = tensor.is_floating_point() and tensor.dtype.itemsize > dtype.itemsize
    return dtype if wider else tensor.dtype


def unpacked_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The 16-bit dtype in which an export stores the quantized values of a weight unpacked: ``stored_dtype``, or
    float16 if that is wider."""
    found = stored_dtype(tensor, dtype)
    return found if found.itemsize == 2 else torch.float16


def _by_names(model: PreTrainedModel, names: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the model by its name in the files, or in the model if the files hold it in another form; a tied
    head is not repeated."""
    tied = set(model.all_tied_weights_keys)
    yield from ((names.get(name, name), tensor) for name, tensor in model.state_dict().items() if name not in tied)
