"""The unit that searches are compared by: one forward of the model over the windows of the game."""

from __future__ import annotations

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


def flop_counter() -> FlopCounterMode:
    """torch's counter of FLOPs as a context manager. It also counts the attention kernel of the CPU, which torch's own
    table lacks."""
    aten = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward})


def _attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None,
                        **more: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]
