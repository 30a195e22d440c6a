"""Sizes of a model and the floating point operations of its forwards, from the shapes of its parameters alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from impq_core.model.cost import ForwardCost
from impq_core.model.layers import layers_of
from impq_core.space import LayerSpec

EXPERTS_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Names of a configuration's fields for the experts that a token is routed to, and for all experts of a block."""

BACKWARD, FUSED_BACKWARD = 2.0, 2.5
"""FLOPs of the backward of attention over those of its forward: a fused implementation makes the scores once more."""


@dataclass(frozen=True)
class BlockShape:
    """Weights of a block: parameters of two or more dimensions.

    Args:
        weights: number of weights.
        held: those that the layers hold.
        active: those that a token is multiplied with; of routed experts, the chosen share.
    """

    weights: int
    held: int
    active: float


@dataclass(frozen=True)
class Shapes:
    """The sizes that decide the cost of a forward and the memory of a run.

    Args:
        architecture: class of the model.
        parameters: number of parameters; a tied head counts once.
        embeddings: those of the embeddings and of a head that is not tied to them.
        tied: whether the head has the weight of the embeddings.
        encoders: those of a multimodal model beside its language model: encoders of images and audio, projectors.
        blocks: of each block.
        hidden: width of the hidden states.
        attention: width of all attention heads together.
        attention_backward: FLOPs of the backward of attention over those of its forward.
        intermediate: width inside a feed-forward, as far as a token sees it.
        vocabulary: rows of the embeddings.
        loose: name of the largest weight in a block that no layer holds; empty if there is none.
    """

    architecture: str
    parameters: int
    embeddings: int
    tied: bool
    encoders: int
    blocks: tuple[BlockShape, ...]
    hidden: int
    attention: int
    attention_backward: float
    intermediate: int
    vocabulary: int
    loose: str

    @classmethod
    def of(cls, model: PreTrainedModel, layers: Sequence[LayerSpec]) -> Shapes:
        """The shapes of a model, which may be on the meta device.

        Args:
            model: the model.
            layers: all layers of the model, at any granularity.
        """
        config = model.config.get_text_config(decoder=True)
        held = {f"{linear.name}.weight" for layer in layers for linear in layer.linears}
        prefixes = {f"{layer.name}.": layer.block for layer in layers_of(model, "block")}
        share = share_of_experts(config)
        sizes: list[dict[str, int]] = [{} for _ in prefixes]
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            block = next((block for prefix, block in prefixes.items() if name.startswith(prefix)), None)
            if block is not None and parameter.dim() >= 2:
                sizes[block][name] = parameter.numel()
        blocks = [BlockShape(sum(weights.values()), sum(size for name, size in weights.items() if name in held),
                             sum(size * (share if ".experts." in name else 1.0) for name, size in weights.items()))
                  for weights in sizes]
        loose = {name: size for weights in sizes for name, size in weights.items() if name not in held}
        embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
        ends = {id(module.weight): module.weight.numel() for module in (embeddings, output) if module is not None}
        width = _setting(config, "hidden_size") or embeddings.weight.shape[1]
        heads = _setting(config, "num_attention_heads")
        head = _setting(config, "head_dim") or width // max(1, heads)
        inner = _setting(config, "intermediate_size")
        if expert := _setting(config, "moe_intermediate_size"):
            inner = expert * max(1, _setting(config, *EXPERTS_CHOSEN))
        return cls(type(model).__name__, sum(p.numel() for p in parameters.values()), sum(ends.values()),
                   output is not None and len(ends) == 1, _encoders(model, ends), tuple(blocks), width, heads * head,
                   BACKWARD if getattr(config, "_attn_implementation", None) == "eager" else FUSED_BACKWARD,
                   inner or 4 * width, embeddings.weight.shape[0], max(loose, key=loose.__getitem__, default=""))

    def cost(self, length: int) -> ForwardCost:
        """The cost of a forward over a window of ``length`` tokens: two FLOPs for each active weight and token, the
        products of attention over all pairs of tokens, and the head for all tokens but one."""
        return ForwardCost(tuple(round(2 * length * block.active) + self._pairs(length) for block in self.blocks),
                           2 * (length - 1) * self.hidden * self.vocabulary)

    def slopes_flops(self, length: int, weights_on_play: int, value: str, head_products: int = 0) -> int:
        """FLOPs of the slopes of the loss of a window: a forward, each block once more and backwards, the gradient of
        each weight on play, and, for ``kl``, the logits of the unquantized model.

        Args:
            length: tokens in the window.
            weights_on_play: number of weights in blocks whose gradient is read.
            value: the loss, ``nll`` or ``kl``.
            head_products: products of the size of a forward through the head that its weight takes beside: 1 for a
                gradient.
        """
        products = 2 * length * sum(block.active for block in self.blocks)
        gradients = products * weights_on_play / sum(block.weights for block in self.blocks)
        attention = len(self.blocks) * self._pairs(length) * (2 + self.attention_backward)
        head = 2 * self.hidden * self.vocabulary * (length - 1) * (2 + (value == "kl") + head_products)
        return round(3 * products + gradients + attention + head)

    def _pairs(self, length: int) -> int:
        """FLOPs of the two products of attention in a block."""
        return 4 * length**2 * self.attention


def _encoders(model: PreTrainedModel, ends: Collection[int]) -> int:
    """Number of parameters outside the text decoder of a multimodal model; 0 for other models.

    Args:
        model: the model.
        ends: ids of the parameters of embeddings and head.
    """
    if model.config.get_text_config(decoder=True) is model.config:
        return 0
    inside = {id(parameter) for parameter in model.get_decoder().parameters()}.union(ends)
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)


def share_of_experts(config: Any) -> float:
    """Share of a block's routed experts that a token goes to; 1 if the configuration names no experts."""
    experts = _setting(config, *EXPERTS)
    return min(1.0, (_setting(config, *EXPERTS_CHOSEN) or experts) / experts) if experts else 1.0


def _setting(config: Any, *names: str) -> int:
    """The first of the fields that is a positive number; 0 if there is none, or if its value differs between layers."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # transformers raises a class of its own for a field that differs between layers
            continue
        if isinstance(value, int) and value > 0:
            return value
    return 0
