"""Uniform widths of rotated models, quantized in sequence, against those of the model itself.

Models are rotated with `impq rotate`; a row differs from the first in its rotation alone. Differences of losses are
paired over the evaluation windows.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import Printer, add_model, command, heading, model_name, page_of, plus_minus, table, write

from impq_core.config import RunConfig, TextConfig
from impq_core.exports.rotated import rotate_model
from impq_core.plugins import Plugins
from impq_core.results import Score
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session
from impq_core.types import Plan

ROTATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "hidden states and values": {},
    "hidden states": {"values": False},
    "values": {"residual": False},
    "hidden states and values, Sylvester's order": {"order": "sylvester"},
    "hidden states and values, in bfloat16": {"dtype": "bfloat16"},
}
"""Arguments of ``rotate_model`` by the name of a row; None for the model itself."""


@dataclass(frozen=True)
class Row:
    """Scores of one model.

    Args:
        plain: of the unquantized model.
        scores: by width.
        untied: bytes that the rotation adds to the model at 16 bits.
    """

    plain: Score
    scores: dict[str, Score]
    untied: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    parser.add_argument("--bits", default="3,2", help="Widths.")
    parser.add_argument("--block", type=int, default=64, help="Size of the Hadamard blocks.")
    parser.add_argument("--calibration-windows", type=int, default=24)
    parser.add_argument("--evaluation-windows", type=int, default=32)
    parser.add_argument("--rotations", default=",".join(map(str, range(len(ROTATIONS)))), help="Numbers of rows.")
    given = parser.parse_args()
    widths = tuple(given.bits.split(","))
    config = RunConfig(tracking_uri="none", cache=False, backend="gptq", bits=widths, granularity="linear",
                       dtype="float32", calibration=TextConfig(windows=given.calibration_windows),
                       evaluation=TextConfig(windows=given.evaluation_windows))
    rows: dict[str, Row] = {}
    for number in map(int, given.rotations.split(",")):
        name, options = list(ROTATIONS.items())[number]
        with tempfile.TemporaryDirectory() as folder:
            model, untied = given.model, 0
            if options is not None:
                written = rotate_model(given.model, Path(folder) / "rotated", given.block, **options)
                model, untied = str(written.folder), 2 * written.rotated.untied
            rows[name] = measure(replace(config, model=model), untied)
        print(name, rows[name], flush=True)
        report(rows, config, given, widths)


def measure(config: RunConfig, untied: int) -> Row:
    """Quantize a model in sequence at each width."""
    plugins = Plugins()
    plugins.watch(Printer())
    prepared = prepare(config, plugins)
    session = Session(prepared, plugins)
    space = prepared.space
    [plain] = session.evaluator_of_exports().scores([[None] * len(space.everyone)], lambda done, total: None)
    scores = {}
    for index, choice in enumerate(space.choices):
        pick = space.uniform(index)
        session.bank.apply([None] * len(session.bank.layers))
        session = Session(prepared, plugins, session.runner)
        evaluator = session.evaluator_of_exports()
        session.quantize_plan(Plan(space, pick, space.bytes_of(pick)))
        scores[choice.name] = evaluator.score(space.assignment(pick))
    return Row(plain, scores, untied)


def report(rows: dict[str, Row], config: RunConfig, given: argparse.Namespace, widths: tuple[str, ...]) -> None:
    first, cells = next(iter(rows.values())), []
    for name, row in rows.items():
        cells.append([name, f"{row.plain.nll:.4f}", f"{row.untied / 1e6:.1f}"])
        for width in widths:
            score = row.scores[width]
            cells[-1] += [plus_minus(score.nll, score.stderr),
                          "" if row is first else plus_minus(*score.minus(first.scores[width]), sign=True)]
    header = ["rotated", "unquantized", "MB of an untied head", *(cell for width in widths for cell in (
        f"{width} bits", "minus the first row"))]
    text = config.evaluation
    write(page_of("rotation.md", given.model), [
        *heading("Rotated models", command()),
        f"Model {model_name(given.model)}, Hadamard blocks of {given.block}, backend gptq, groups of 64, quantized in "
        f"sequence on {config.calibration.windows} windows of {config.calibration.length} tokens. Held-out NLL in "
        f"nats per token on {text.windows} windows of {text.length} tokens of the {text.source} text; differences are "
        "paired over windows. The linears of all rows have the same bytes at a width.", "", *table(header, cells)])


if __name__ == "__main__":
    main()
