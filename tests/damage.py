"""Ways to damage a file at random."""

from __future__ import annotations

import json
import os
import random
import tomllib
from collections.abc import Callable
from typing import Any

import tomli_w

ROUNDS = int(os.environ.get("IMPQ_ROUNDS", "6"))
"""Number of damages of each kind for each file."""


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The data with a byte flipped, or a few bytes deleted, repeated or inserted; mostly near the start, in headers."""
    place = min(rng.randrange(len(data)), rng.randrange(len(data)))
    few = data[place:place + rng.randint(1, 8)]
    before, after = data[:place], data[place:]
    flipped = bytes([after[0] ^ 1 << rng.randrange(8)]) + after[1:]
    return before + rng.choice([flipped, after[len(few):], few + after, b'"' + after, b""])


def distorted(data: Any, rng: random.Random) -> Any:
    """Plain data with one value, at any depth, changed or removed."""
    if isinstance(data, dict | list) and data and rng.random() < 0.8:
        places = list(data) if isinstance(data, dict) else list(range(len(data)))
        place, copy = rng.choice(places), data.copy()
        if rng.random() < 0.2:
            del copy[place]
        else:
            copy[place] = distorted(data[place], rng)
        return copy
    return rng.choice([None, True, -1, 3, 1e308, float("nan"), "", "x", "a\0b", [], [[]], {}, {"x": 1}])


def distorted_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.decode().splitlines()
    number = rng.randrange(len(lines))
    lines[number] = json.dumps(distorted(json.loads(lines[number]), rng))
    return ("\n".join(lines) + "\n").encode()


def distorted_object(data: bytes, rng: random.Random) -> bytes:
    return json.dumps(distorted(json.loads(data), rng)).encode()


def distorted_toml(data: bytes, rng: random.Random) -> bytes:
    plain = json.dumps(distorted(tomllib.loads(data.decode()), rng)).replace("null", "0")
    found = json.loads(plain)
    return tomli_w.dumps(found if isinstance(found, dict) else {"x": found}).encode()


WAYS: dict[str, list[Callable[[bytes, random.Random], bytes]]] = {
    ".toml": [damaged, distorted_toml], ".json": [damaged, distorted_object], ".jsonl": [damaged, distorted_lines],
    ".npz": [damaged], ".safetensors": [damaged]}
