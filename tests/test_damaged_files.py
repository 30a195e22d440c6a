"""Randomly damaged files of a run: a command succeeds or reports the reason in one line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from damage import ROUNDS, WAYS
from scenes import World

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
