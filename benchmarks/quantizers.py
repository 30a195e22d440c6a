"""Options of GPTQ at equal bytes: uniform models quantized in sequence, one option changed at a time, and all together.

The first row is GPTQ as gptqmodel has it. Differences of losses are paired over the evaluation windows. Rows are kept
in a file of JSON lines in kept/, so that a stopped benchmark continues. Seconds are those of one processor
core, with one thread.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import heading, plus_minus, table, write

from impq_core.config import RunConfig, TextConfig
from impq_core.evaluate import Evaluator
from impq_core.exports.rotated import rotate_model
from impq_core.model.bank import Bank
from impq_core.model.quantize import quantize_in_sequence
from impq_core.model.text import draw_windows
from impq_core.plugins import Plugins
from impq_core.results import Score
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session
from impq_core.statistics import standard_error

KEPT = Path(__file__).parent / "kept"

NEAREST = {"drift": "none", "true_sequential": False}
"""Options without a correction of the drift."""


@dataclass(frozen=True)
class Setting:
    """Options of the backend, by the name of a row; ``rotated`` models have blocks of the group's size."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rotated: bool = False


SETTINGS = (
    Setting("grid by weight error (gptqmodel's clip search)", {**NEAREST, "grid": "weight-error"}),
    Setting("whole range as grid", {**NEAREST, "grid": "min-max"}),
    Setting("**grid by the Hessian** (base of the rows below)", NEAREST),
    Setting("base, damping 0.01", {**NEAREST, "damping": 0.01}),
    Setting("base, damping 0.2", {**NEAREST, "damping": 0.2}),
    Setting("base, guided Hessian, 1 row group", {**NEAREST, "hessian": "guided"}),
    Setting("base, guided Hessian, 4 row groups", {**NEAREST, "hessian": "guided", "row_groups": 4}),
    Setting("base, QEP 0.5", {**NEAREST, "drift": "qep", "drift_strength": 0.5}),
    Setting("base, GPTAQ 0.25", {**NEAREST, "drift": "gptaq"}),
    Setting("base, true-sequential", {"drift": "none"}),
    Setting("base, rotated", NEAREST, rotated=True),
    Setting("**defaults**: base, GPTAQ 0.25, true-sequential"),
    Setting("defaults, rotated", rotated=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", help="a second held-out text")
    parser.add_argument("--widths", default="2,3,4")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--evaluation-windows", type=int, default=24)
    parser.add_argument("--settings", help="numbers of settings, such as 0,2,11")
    parser.add_argument("--name", default="quantizers", help="of the files in results/")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = RunConfig(model=given.model, calibration=TextConfig(windows=given.calibration_windows),
                       evaluation=TextConfig(windows=given.evaluation_windows), cache=False)
    texts = {"demo text": config.evaluation}
    if given.text:
        texts[Path(given.text).name] = replace(config.evaluation, source=given.text)
    numbers = range(len(SETTINGS)) if given.settings is None else map(int, given.settings.split(","))
    KEPT.mkdir(exist_ok=True)
    log = _Log(KEPT / f"{given.name}.jsonl", [given.model, given.calibration_windows, given.evaluation_windows])
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            setting = SETTINGS[number]
            missing = [width for width in given.widths.split(",") if not log.has(setting.name, width)]
            if missing:
                model = str(rotate_model(given.model, Path(folder) / str(number)).folder) if setting.rotated else (
                    given.model)
                _measure(replace(config, model=model, options={"backend": dict(setting.options)}), setting.name,
                         missing, texts, log)
            write(f"{given.name}.md", _report(log, given, list(texts)))


class _Log:
    """Measured rows, in a file of JSON lines."""

    def __init__(self, path: Path, key: Sequence[Any]) -> None:
        self._path, self._key = path, list(key)
        lines = path.read_text().splitlines() if path.is_file() else []
        self.rows = [row for row in map(json.loads, lines) if row["key"] == self._key]

    def has(self, setting: str, width: str) -> bool:
        return any(row["setting"] == setting and row["width"] == width for row in self.rows)

    def add(self, **row: Any) -> None:
        row = {"key": self._key, **row}
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _measure(config: RunConfig, name: str, widths: Sequence[str], texts: Mapping[str, TextConfig], log: _Log) -> None:
    prepared = prepare(config, Plugins())
    session = Session(prepared, Plugins())
    runner, layers, backend = session.runner, prepared.space.everyone, prepared.parts.backend
    assert prepared.calibration is not None
    tokenizer = prepared.source.tokenizer()
    windows = {text: draw_windows(source, "evaluation", tokenizer, prepared.shapes.vocabulary)
               for text, source in texts.items()}
    for width in widths:
        choice = backend.choice(width)
        bank = Bank(runner, layers, backend)
        bank.apply([None] * len(layers))
        evaluators = {text: Evaluator(runner, bank, part) for text, part in windows.items()}
        unquantized = {text: evaluator.score([None] * len(layers)) for text, evaluator in evaluators.items()}
        bank.apply([None] * len(layers))
        start = time.process_time()
        quantize_in_sequence(bank, runner, prepared.calibration.ids, [choice] * len(layers), lambda done, total: None)
        seconds = time.process_time() - start
        scores = {text: evaluator.score([choice] * len(layers)) for text, evaluator in evaluators.items()}
        log.add(setting=name, width=width, seconds=seconds, bytes=bank.nbytes,
                weights=sum(layer.parameters for layer in layers),
                scores={text: _numbers(score) for text, score in scores.items()},
                unquantized={text: _numbers(score) for text, score in unquantized.items()})
        bank.apply([None] * len(layers))


def _numbers(score: Score) -> dict[str, Any]:
    return {"windows": score.window_nll.tolist(), "kl": score.kl}


def _report(log: _Log, given: argparse.Namespace, texts: Sequence[str]) -> list[str]:
    lines = heading("Options of GPTQ", shlex.join(["python", "benchmarks/quantizers.py", *sys.argv[1:]]))
    lines += [f"Model {Path(given.model).name}; {given.calibration_windows} calibration windows and "
              f"{given.evaluation_windows} evaluation windows of 256 tokens on each text. In brackets: the loss above "
              "that of the unquantized model. A difference is paired with the first row of its width.", ""]
    for width in dict.fromkeys(row["width"] for row in log.rows):
        rows = [row for row in log.rows if row["width"] == width]
        order = [setting.name for setting in SETTINGS]
        rows.sort(key=lambda row: order.index(row["setting"]))
        first = rows[0]
        lines += [f"## {width} bits ({8 * first['bytes'] / first['weights']:.2f} stored, "
                  f"{first['bytes'] / 1e6:.2f} MB)", ""]
        header = ["options", *(part for text in texts for part in (f"NLL, {text}", "minus the first", "KL")),
                  "CPU s"]
        shown = []
        for row in rows:
            cells = [row["setting"]]
            for text in texts:
                nll, exact = np.array(row["scores"][text]["windows"]), np.array(row["unquantized"][text]["windows"])
                minus = nll - np.array(first["scores"][text]["windows"])
                cells += [f"{nll.mean():.3f} ({nll.mean() - exact.mean():+.3f})",
                          "" if row is first else plus_minus(minus.mean(), standard_error(minus), sign=True),
                          f"{row['scores'][text]['kl']:.3f}"]
            shown.append([*cells, f"{row['seconds']:.0f}"])
        lines += table(header, shown)
    return lines


if __name__ == "__main__":
    main()
