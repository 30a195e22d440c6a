"""The input embedding and the head of a model, which may be layers of a plan beside those of the blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from impq_core.errors import ImpqError
from impq_core.model.layers import blocks_of
from impq_core.space import LayerSpec, LinearSpec


@dataclass(frozen=True, eq=False)
class Ends:
    """The input embedding and the head.

    Args:
        embedding: turns token ids into hidden states.
        head: turns hidden states into logits.
        tied: whether both have the same weight.
    """

    embedding: nn.Embedding
    head: nn.Linear
    tied: bool


def ends_of(model: PreTrainedModel) -> Ends:
    """The ends of a model, with weights or on the meta device.

    Raises:
        ImpqError: the model has no embedding or no head, or others than a plan can give a width: their weight has a
            third user, or tokens have a second embedding.
    """
    name, embedding, head = type(model).__name__, model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise _refused(name, f"its input embedding is of class {type(embedding).__name__}, no nn.Embedding")
    if not isinstance(head, nn.Linear):
        raise _refused(name, f"its head is of class {type(head).__name__}, no nn.Linear")
    users = [(user, module) for user, module in model.named_modules() if module not in (embedding, head)]
    for end in (embedding, head):
        for user, module in users:
            if any(parameter is end.weight for parameter in module._parameters.values()):
                raise _refused(name, f"{user} has the same weight as its embedding or its head")
    inside = {module for _, block in blocks_of(model) for module in block.modules()}
    widths = {embedding.embedding_dim, getattr(model.config.get_text_config(decoder=True), "hidden_size", None)}
    decoder = set(model.get_decoder().modules())
    for user, module in users:  # positions and types of tokens have the width of the hidden states
        if (isinstance(module, nn.Embedding) and module in decoder and module not in inside
                and module.embedding_dim not in widths):
            raise _refused(name, f"{user} is a second embedding of its tokens")
    return Ends(embedding, head, embedding.weight is head.weight)


def end_layers(model: PreTrainedModel) -> tuple[LayerSpec, ...]:
    """The layers at the ends: the embedding at block -1, and the head at the block behind the last. A tied pair is one
    layer, the embedding's. Each is one linear with a row for each token of the vocabulary.

    Args:
        model: with weights or on the meta device.

    Raises:
        ImpqError: as ``ends_of``.
    """
    ends = ends_of(model)
    names = {module: name for name, module in model.named_modules()}
    pairs: list[tuple[nn.Linear | nn.Embedding, int]] = [(ends.embedding, -1)]
    if not ends.tied:
        pairs.append((ends.head, len(blocks_of(model))))
    return tuple(LayerSpec(names[module], block, (LinearSpec(names[module], *tuple(module.weight.shape)),))
                 for module, block in pairs)


def chosen_ends(model: PreTrainedModel, layers: Sequence[LayerSpec], everyone: bool,
                names: Iterable[str]) -> tuple[LayerSpec, ...]:
    """The ends that are layers of a run.

    Args:
        model: with weights or on the meta device.
        layers: those of the blocks.
        everyone: whether both ends are.
        names: names and patterns in pins and in a plan; one that matches nothing in the blocks but an end makes that a
            layer.

    Raises:
        ImpqError: an end is asked for, and the model's can have no width.
    """
    inside = [*(layer.name for layer in layers), *(linear.name for layer in layers for linear in layer.linears)]
    outside = [name for name in names if not any(fnmatchcase(other, name) for other in inside)]
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    named = {name for name, module in model.named_modules()
             if module in modules and any(fnmatchcase(name, pattern) for pattern in outside)}
    return tuple(layer for layer in (end_layers(model) if everyone or named else ())
                 if everyone or layer.name in named)


def _refused(model: str, reason: str) -> ImpqError:
    return ImpqError(f"embedding and head of {model} cannot be quantized: {reason}; leave out --quantize-embeddings, "
                     "and pins and plans that name them")
