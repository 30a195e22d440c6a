"""Codes of 1 to 8 bits as a stream of bits, whatever their number."""

from __future__ import annotations

import torch


def bytes_of(count: int, bits: int) -> int:
    """Bytes that a number of codes takes: eight codes fill ``bits`` bytes, and the last eight are filled up."""
    return -(-count // 8) * bits


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes of any shape, each below 2^bits, as uint8 (bytes,), the first code in the lowest bits."""
    flat = codes.flatten()
    eights = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8).long()
    return (eights << _shifts(bits, codes)).sum(1).view(torch.uint8).view(-1, 8)[:, :bits].flatten()


def unpack(stream: torch.Tensor, bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    """uint8 codes of a shape, the inverse of ``pack``."""
    eights = torch.nn.functional.pad(stream.view(-1, bits), (0, 8 - bits)).flatten().view(torch.int64)
    codes = (eights[:, None] >> _shifts(bits, stream)).bitwise_and_(2**bits - 1).to(torch.uint8)
    return codes.flatten()[:torch.Size(shape).numel()].view(shape)


def _shifts(bits: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(8, device=like.device) * bits
