"""Randomly damaged files of a run: a command succeeds or reports the reason in one line."""

from __future__ import annotations

import json
import os
import random
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from scenes import World

ROUNDS = int(os.environ.get("IMPQ_ROUNDS", "6"))
"""Number of damages of each kind for each file."""

FILES = {
    "impq.toml": "run --tracking-uri none",
    "finished/impq.toml": "run --resume finished",
    "estimated/impq.toml": "allocate estimated --budget 3bits --allocator greedy",
    "finished/provenance.json": "run --resume finished",
    "finished/measurements.jsonl": "run --resume finished",
    "finished/scores.jsonl": "run --resume finished",
    "finished/gradients.jsonl": "run --resume finished",
    "finished/plan.json": "run --plan finished/plan.json --tracking-uri none",
    "finished/space.json": "allocate finished --budget 3bits --allocator greedy",
    "finished/estimate.npz": "allocate finished --budget 3bits --allocator greedy",
    "finished/measurements.npz": "fit finished --surrogate additive",
    "swept/sweep.json": "sweep --resume swept",
    "swept/finished.jsonl": "sweep --resume swept",
    "exported/impq.json": "evaluate exported",
    "exported/plan.json": "evaluate exported",
    "exported/model.safetensors": "evaluate exported",
    "packed/impq.safetensors": "evaluate packed",
}


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


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_told_of_in_one_line(name: str, world: World) -> None:
    world.reset()
    whole, codes = (world.kept / name).read_bytes(), list[int]()
    for way in WAYS[Path(name).suffix]:
        rng = random.Random(f"{name} {way.__name__}")
        for _ in range(ROUNDS):
            data = way(whole, rng)
            (world.here / name).write_bytes(data)
            answer = world.ask(f"IMPQ_CACHE=/dev/null/x {FILES[name]}")
            codes.append(answer.code)
            lines = [line for line in answer.err.splitlines() if not line.startswith(("warning: ", "note: "))]
            assert answer.code in (0, 1, 2) and len(lines) == bool(answer.code), (data, answer)
            assert all(line.startswith("impq: ") and "bug of" not in line for line in lines), (data, answer)
            assert not [file for file in answer.touched if Path(file).name.startswith(".") and "lock" not in file], data
            world.reset()
    assert any(codes), "no damage was seen"
