"""Codes as a stream of bits in 32-bit words, as GPTQ's file format stores them.

Eight codes of 2, 3, 4 or 8 bits fill 2, 3, 4 or 8 bytes, the first code in the lowest bits. The format's 3-bit words,
in which a code may straddle two words, are the same little-endian stream. Eight codes are therefore moved between a
64-bit integer and eight bytes by three shifts, whatever the width.
"""

from __future__ import annotations

import torch

_LANES = (32, 16, 8)
"""Bits of a lane while eight codes are spread: two lanes with four codes each, four with two, eight with one."""


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of packed rows.

    Args:
        words: int32 (rows, words).
        bits: 2, 3, 4 or 8 bits of a code; 32 codes fill ``bits`` words.

    Returns:
        uint8 (rows, codes).
    """
    stream = words.flatten().view(torch.uint8).view(len(words), -1)
    if bits == 8:
        return stream
    eights = torch.zeros(len(words), stream.shape[1] // bits, 8, dtype=torch.uint8, device=words.device)
    eights[..., :bits] = stream.view(len(words), -1, bits)
    spread = eights.view(torch.int64)
    shifted = torch.empty_like(spread)
    for lane in _LANES:
        held = bits * lane // 8
        torch.bitwise_left_shift(spread, lane - held, out=shifted)
        spread.bitwise_or_(shifted).bitwise_and_(_mask(held, lane))
    return eights.view(len(words), -1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of ``unpack``.

    Args:
        codes: uint8 (rows, codes), each below 2^bits; a multiple of 32 codes.
        bits: 2, 3, 4 or 8 bits of a code.

    Returns:
        int32 (rows, words).
    """
    if bits == 8:
        return codes.flatten().view(torch.int32).view(len(codes), -1)
    joined = codes.flatten().clone().view(torch.int64)
    for lane in reversed(_LANES):
        held = bits * lane // 8
        joined.bitwise_or_(joined >> (lane - held)).bitwise_and_(_mask(2 * held, 2 * lane))
    stream = joined.view(torch.uint8).view(len(codes), -1, 8)[..., :bits]
    return stream.reshape(len(codes), -1).view(torch.int32)


def _mask(held: int, lane: int) -> int:
    """A 64-bit integer, in two's complement, with the lowest ``held`` bits of every lane set."""
    mask = sum(((1 << held) - 1) << start for start in range(0, 64, lane))
    return mask - (mask >> 63 << 64)
