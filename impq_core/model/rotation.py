"""An equivalent model with rotated hidden states and values, at no cost in the forward.

For an orthogonal matrix Q and hidden states h as rows, a model whose embeddings are E Q, whose writers are Q' W (bias
b Q) and whose readers are W Q computes with h Q what the other computes with h: a norm without gain gives (h Q) / rms(h
Q) = (h / rms(h)) Q. So gains of norms are multiplied into their readers first. Values of an attention are rotated in
front of it, in each head, and back in the linear behind it (QuaRot, arXiv 2404.00456; SpinQuant's R1 and R2, arXiv
2405.16406). Q is block-diagonal with Hadamard blocks of the size of a quantization group (GSR, arXiv 2505.03810), so
that an outlier is spread over its own group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from impq_core.errors import ImpqError, UsageError
from impq_core.model.hadamard import hadamard, rotate_columns, rotate_rows
from impq_core.model.layers import blocks_of
from impq_core.model.residual import Heads, Residual, observe

SAME = 1e-3
"""Largest difference of a logit, relative to the largest logit of its window, that passes as rounding of float32. Real
models are two orders of magnitude below, wrong rotations two above."""

WINDOWS, LENGTH = 8, 16
"""Windows of random tokens on which logits are compared, and the tokens in each."""


@dataclass(frozen=True)
class Rotated:
    """What was rotated.

    Args:
        block: size of the Hadamard blocks of the hidden states; 0 if they were not rotated.
        attentions: blocks of the model whose values and outputs were rotated.
        blocks: all blocks of the model.
        untied: number of weights that the head now has of its own; 0 if it was not tied.
    """

    block: int
    attentions: int
    blocks: int
    untied: int


def rotate(model: PreTrainedModel, block: int = 64, order: str = "sequency", residual: bool = True,
           values: bool = True) -> Rotated:
    """Rotate a model in place.

    Args:
        model: with float32 weights on the CPU, after ``to_linears``; no parameter requires a gradient.
        block: size of the Hadamard blocks of the hidden states; those of a head are at most as large.
        order: of the rows of a block: ``sequency`` or ``sylvester``.
        residual: rotate the hidden states.
        values: rotate values and outputs of attentions, wherever a linear reads what another writes.

    Raises:
        UsageError: the block is no power of two, or does not divide the hidden states.
        ImpqError: the model cannot be rotated, or nothing in it.
    """
    matrix = hadamard(block, order)
    found, heads = observe(model)
    if not residual and not (values and heads):
        raise ImpqError(f"{type(model).__name__} has no values and outputs of attentions that can be rotated")
    untied = 0
    if residual:
        check_block(block, found.width)
        _require(model, found)
        untied = _untie(model)
        _fold(model, found, matrix)
    if values:
        _rotate_heads(model, heads, block, order)
    blocks = [f"{name}." for name, _ in blocks_of(model)]
    turned = [name for name in blocks if values and any(pair.outputs.startswith(name) for pair in heads)]
    return Rotated(block if residual else 0, len(turned), len(blocks), untied)


def check_block(block: int, width: int) -> None:
    """Raises UsageError if a block does not divide the components of the hidden states."""
    if width % block:
        raise UsageError(f"blocks of {block} do not divide the {width} components of the hidden states: give --block "
                         f"{width & -width} or a smaller power of two")


def _require(model: PreTrainedModel, found: Residual) -> None:
    """Raises ImpqError if hidden states cannot be rotated."""
    name = type(model).__name__
    if found.after:
        raise _refused(name, f"the gain of {found.after[0]} acts on what is added to them")
    if found.unseen:
        raise _refused(name, f"{found.unseen} may read or write them, and did nothing in a forward of text")
    for norm in found.norms:
        _require_equivariant(name, norm, model.get_submodule(norm))


def _refused(name: str, reason: str) -> ImpqError:
    return ImpqError(f"the hidden states of {name} cannot be rotated: {reason}; --no-residual rotates values and "
                     "outputs of attentions alone")


def _require_equivariant(model: str, name: str, norm: nn.Module) -> None:
    """Raises ImpqError if a norm, but for its gain, does not give reflected outputs for reflected inputs."""
    if any(value is not None for key, value in norm._parameters.items() if key != "weight"):
        raise _refused(model, f"{name} adds a bias")
    weight = norm._parameters.get("weight")
    generator = torch.Generator().manual_seed(0)
    width = len(weight) if weight is not None else 64
    rows = torch.randn(4, width, generator=generator) + 1.0  # with a mean, which some norms subtract
    across = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)

    def reflected(values: torch.Tensor) -> torch.Tensor:
        return values - 2 * (values @ across)[:, None] * across

    with_gain, (gain, unit) = norm(rows), _gain(norm)
    if weight is not None:
        kept = weight.data.clone()
        weight.data.fill_(unit)
    plain, other = norm(rows), norm(reflected(rows))
    if weight is not None:
        weight.data.copy_(kept)
    if not _alike(plain * gain, with_gain) or not _alike(other, reflected(plain)):
        raise _refused(model, f"{name} is no root-mean-square norm with a gain")


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0.0, atol=1e-4 * float(other.abs().max()))


def _gain(norm: nn.Module) -> tuple[torch.Tensor, float]:
    """What a norm multiplies its components by (width,), 1 if it has no weight, and the weight at which it is 1. The
    gain of some norms is one plus the weight: their output for a weight of zeros is not zero."""
    weight = norm._parameters.get("weight")
    if weight is None:
        return torch.ones(()), 1.0
    kept = weight.data.clone()
    weight.data.zero_()
    added = bool(norm(torch.ones(1, len(weight))).any())
    weight.data.copy_(kept)
    return (kept + 1.0, 0.0) if added else (kept, 1.0)


def _untie(model: PreTrainedModel) -> int:
    """Give a tied head a weight of its own, because the gain of the last norm goes into it; returns its numbers."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is not embedding.weight:
        return 0
    head.weight = nn.Parameter(head.weight.data.clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False
    return int(head.weight.numel())


def _fold(model: PreTrainedModel, found: Residual, block: torch.Tensor) -> None:
    """Rotate the hidden states: fold gains into readers, and the rotation into tables, writers and readers."""
    for name in found.tables:
        rotate_rows(_weight(model, name), block)
    for name in found.writers:
        rotate_columns(_weight(model, name), block)
        bias = model.get_submodule(name)._parameters.get("bias")
        if bias is not None:
            rotate_rows(bias.data[None], block)
    for norm, readers in found.norms.items():
        module = model.get_submodule(norm)
        gain, unit = _gain(module)
        for name in readers:
            rotate_rows(_weight(model, name), block, gain)
        if module._parameters.get("weight") is not None:
            _weight(model, norm).fill_(unit)


def _rotate_heads(model: PreTrainedModel, heads: Sequence[Heads], size: int, order: str) -> None:
    """Rotate values in front of attentions, and back behind them."""
    blocks = {(pair.values, first, pair.size) for pair in heads for first in pair.rows}  # several heads read the same
    for name, first, length in blocks:
        block, bias = hadamard(math.gcd(size, length), order), model.get_submodule(name)._parameters.get("bias")
        rotate_columns(_weight(model, name)[first:first + length], block)
        if bias is not None:
            rotate_rows(bias.data[None, first:first + length], block)
    for pair in heads:
        rotate_rows(_weight(model, pair.outputs), hadamard(math.gcd(size, pair.size), order))


def _weight(model: PreTrainedModel, name: str) -> torch.Tensor:
    weight = model.get_submodule(name)._parameters["weight"]
    assert weight is not None
    values: torch.Tensor = weight.data
    return values


def random_tokens(model: PreTrainedModel) -> torch.Tensor:
    """Token ids (``WINDOWS``, ``LENGTH``) drawn from the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.get_input_embeddings().num_embeddings, (WINDOWS, LENGTH), generator=generator)


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Logits (windows, length, vocabulary) on ``random_tokens``; each window is a forward of its own."""
    with torch.inference_mode():
        return torch.cat([model(input_ids=window[None]).logits.float() for window in random_tokens(model)])


def difference(logits: torch.Tensor, others: torch.Tensor) -> float:
    """The largest difference of a logit in a window, relative to the largest logit there: the second largest of all
    windows, because one may have a token for which a router is undecided between two experts."""
    largest = logits.flatten(1).abs().amax(dim=1)
    apart = (logits - others).flatten(1).abs().amax(dim=1) / largest
    return float(apart.sort().values[-2])


def divergence(logits: torch.Tensor, others: torch.Tensor) -> float:
    """The mean Kullback-Leibler divergence over positions, in nats."""
    ours, theirs = logits.log_softmax(dim=-1), others.log_softmax(dim=-1)
    return float((ours.exp() * (ours - theirs)).sum(dim=-1).mean())
