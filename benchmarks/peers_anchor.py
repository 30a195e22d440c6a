"""auto-round's learned rounding beside impq's backend: uniform models quantized in sequence, at equal bytes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Bench
from peers_environment import AUTO_ROUND, ask
from safetensors.torch import load_file

from impq_core.errors import ImpqError
from impq_core.interfaces import Backend, Statistics, Variant
from impq_core.model.bank import Bank
from impq_core.model.quantize import quantize_in_sequence
from impq_core.results import Score
from impq_core.space import Choice, LinearSpec


class Given(Backend):
    """A backend of weights that other software has quantized and dequantized."""

    default_bits = ()

    def choices(self) -> tuple[Choice, ...]:
        return ()

    def check(self, linear: LinearSpec, choice: Choice) -> None:
        return None

    def nbytes(self, linear: LinearSpec, choice: Choice) -> int:
        return 4 * linear.parameters  # as held here, not as the other software stores it

    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        return Variant(choice, {"weight": weight.float()})

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        return variant.tensors["weight"]


def anchor_rows(bench: Bench, given: argparse.Namespace, folder: Path, pythons: Mapping[str, Path],
                done: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each width and quantizer that is not among those that are done; linears behind the first
    ``anchor_blocks`` blocks stay unquantized."""
    prepared, session = bench.prepared, bench.session
    space, calibration = prepared.space, prepared.calibration
    assert calibration is not None
    blocks = given.anchor_blocks or len(session.runner)
    quantized = [layer for layer in space.layers if layer.block < blocks]
    names = [linear.name for layer in quantized for linear in layer.linears]
    folder.mkdir(parents=True, exist_ok=True)
    tokens = folder / f"tokens-{calibration.digest}.npy"
    np.save(tokens, calibration.ids)
    granularity = f"anchor, {blocks} of {len(session.runner)} blocks"
    finished = {(row["method"], row["budget"]) for row in done if row["granularity"] == granularity}
    for bits in map(int, given.anchor.split(",")):
        choice = next((choice for choice in space.choices if choice.bits == bits), None)
        if choice is None:
            raise ImpqError(f"--anchor {bits}: the menu is {given.bits}")
        assignment = [choice if layer.block < blocks else None for layer in space.layers]
        stored = sum(prepared.parts.backend.nbytes(linear, choice) for layer in quantized for linear in layer.linears)

        def row(method: str, score: Score, seconds: float, choice: Choice = choice,
                stored: int = stored) -> dict[str, Any]:
            assert score.window_kl is not None
            return {"method": method, "granularity": granularity, "budget": choice.bits, "bytes": stored,
                    "nll": score.window_nll.tolist(), "kl": score.window_kl.tolist(), "seconds": seconds,
                    "text": str(prepared.evaluation), "calibration": str(calibration)}

        session.bank.apply([None] * len(space))
        if (f"impq {given.backend}", bits) not in finished:
            bank, start = Bank(session.runner, space.everyone, prepared.parts.backend), time.process_time()
            quantize_in_sequence(bank, session.runner, calibration.ids, assignment, lambda done, total: None)
            seconds = time.process_time() - start
            yield row(f"impq {given.backend}", bench.evaluator.of_bank(bank).score(assignment), seconds)
        job = {"model": str(prepared.source.folder), "tokens": str(tokens), "linears": names,
               "group_size": choice.group_size,
               "options": {"bits": bits, "steps": given.anchor_steps, "batch": 4, "blocks": given.anchor_blocks}}
        answer = ask(AUTO_ROUND, "rounding.py", job, folder, pythons.get("autoscheme"))
        method = f"auto-round {answer['version']}, {given.anchor_steps} steps"
        if (method, bits) in finished:
            continue
        weights = load_file(answer["weights"])
        session.bank.apply([None] * len(space))
        other = Bank(session.runner, space.everyone, Given())
        for layer in quantized:
            for linear in layer.linears:
                other.add(linear, Variant(choice, {"weight": weights[linear.name]}))
        score = bench.evaluator.of_bank(other).score(assignment)
        session.bank.apply([None] * len(space))
        yield row(method, score, answer["processor_seconds"])
