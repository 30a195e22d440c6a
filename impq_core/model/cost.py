"""The unit that searches are compared by: one forward of the model over the windows of the game."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


@dataclass(frozen=True)
class ForwardCost:
    """Floating point operations (FLOPs) of one forward over one window of token ids.

    A *forward* is what scores a pick from nothing: every block over all tokens of a window, and the head (final norm
    included) over the tokens that predict another. Everything that impq counts in forwards is FLOPs over ``total``
    times the number of windows: a pick that shares its first blocks with the pick before costs the other blocks and
    the head; losses against a reference make the reference's logits once a batch; a backward pass costs what it
    computes.

    Args:
        blocks: FLOPs of each block.
        head: FLOPs of the head.
    """

    blocks: tuple[int, ...]
    head: int

    @property
    def total(self) -> int:
        """FLOPs of the whole forward."""
        return sum(self.blocks) + self.head

    def behind(self, first: int) -> int:
        """FLOPs of block ``first`` and all blocks behind it, without the head."""
        return sum(self.blocks[first:])


_KERNELS = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable")
"""Attention kernels of torch, of all devices; the backward pass of each has a name of its own."""


def flop_counter() -> FlopCounterMode:
    """torch's counter of FLOPs as a context manager. It also counts attention kernels that torch's own table lacks, and
    those with fewer heads for keys than for queries, which torch counts only from 2.13 on."""
    aten = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={
        **{getattr(aten, name): _attention for name in _KERNELS},
        **{getattr(aten, f"{name}_backward"): _attention_backward for name in _KERNELS}})


def _attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    return int(sdpa_flop_count(query, *_of_all_heads(query, key, value)))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None,
                        **more: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, *_of_all_heads(query, key, value)))  # type: ignore[no-untyped-call]


def _of_all_heads(query: Any, *others: Any) -> Iterator[Any]:
    """Shapes (windows, heads, length, width) of keys and values as the kernel reads them, once for each query head."""
    return (shape if len(shape) != 4 else (shape[0], query[1], *shape[2:]) for shape in others)
