"""Options of GPTQ at equal bytes: uniform models quantized in sequence, one option changed at a time, and all together.

The first row is GPTQ as gptqmodel has it. Differences of losses are paired over the evaluation windows. Rows are kept
in a file of JSON lines in kept/, so that a stopped benchmark continues. Seconds are those of one processor
core, with one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import add_model, command, heading, model_name, page_of, plus_minus, table, write
from keyed import Keyed, facts_of
from lines import KEPT

from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError
from impq_core.evaluate import Evaluator
from impq_core.exports.rotated import rotate_model
from impq_core.model.bank import Bank
from impq_core.model.quantize import quantize_in_sequence
from impq_core.model.text import Windows, draw_windows
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session
from impq_core.space import Choice
from impq_core.statistics import standard_error

NEAREST = {"drift": "none", "true_sequential": False}
"""Options without a correction of the drift."""


@dataclass(frozen=True)
class Setting:
    """Options of the backend, by the name of a row; ``rotated`` models have blocks of the group's size."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rotated: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        """The key of the setting's rows: all options, defaults included. Its name is a label."""
        backend = Parts.build(RunConfig(options={"backend": dict(self.options)}), Plugins()).backend
        return {"options": asdict(backend.options), "rotated": self.rotated}


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
    add_model(parser)
    parser.add_argument("--text", help="a second held-out text")
    parser.add_argument("--widths", default="2,3,4")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--evaluation-windows", type=int, default=24)
    parser.add_argument("--settings", help="numbers of settings, such as 0,2,11")
    parser.add_argument("--name", help="of the page in results/ [quantizers, and the model's name]")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = RunConfig(model=given.model, calibration=TextConfig(windows=given.calibration_windows),
                       evaluation=TextConfig(windows=given.evaluation_windows), cache=False)
    prepared = prepare(config, Plugins())
    texts = {"demo text": prepared.evaluation}
    if given.text:
        text = replace(config.evaluation, source=given.text)
        texts[Path(given.text).name] = draw_windows(text, "evaluation", prepared.source.tokenizer(),
                                                    prepared.shapes.vocabulary)
    numbers = range(len(SETTINGS)) if given.settings is None else map(int, given.settings.split(","))
    facts = facts_of(prepared)
    log = Keyed(KEPT / "quantizers.jsonl", {
        **{name: facts[name] for name in ("model", "calibration", "backend", "dtype")},
        "texts": {name: text.digest for name, text in texts.items()}})
    page = given.name or Path(page_of("quantizers.md", given.model)).stem
    workshops: dict[bool, _Workshop] = {}
    left_out: dict[str, str] = {}  # by setting, the reason
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            setting = SETTINGS[number]
            for width in given.widths.split(","):
                if log.rows(**setting.facts, width=width):
                    continue
                if setting.rotated not in workshops:
                    try:
                        model = str(rotate_model(given.model, Path(folder)).folder) if setting.rotated else given.model
                    except ImpqError as error:
                        left_out[setting.name] = str(error)
                        break
                    workshops[setting.rotated] = _Workshop(replace(config, model=model), texts)
                workshop = workshops[setting.rotated]
                # A rotated model computes what the model does, so one measurement serves every setting.
                if not log.rows(unquantized=True):
                    log.add(unquantized=True, scores=workshop.unquantized())
                log.add(**setting.facts, width=width, **workshop.measure(setting, width))
            write(f"{page}.md", _report(log, given, list(texts), left_out))


class _Workshop:
    """A model and the outputs of the unquantized model on the texts, for all settings of a model.

    Args:
        config: the configuration, of any backend options.
        texts: the windows of the held-out texts by name.
    """

    def __init__(self, config: RunConfig, texts: Mapping[str, Windows]) -> None:
        self._config, self._prepared = config, prepare(config, Plugins())
        self._runner, self._layers = Session(self._prepared, Plugins()).runner, self._prepared.space.everyone
        bank = Bank(self._runner, self._layers, self._prepared.parts.backend)
        self._evaluators = {name: Evaluator(self._runner, bank, text) for name, text in texts.items()}

    def unquantized(self) -> dict[str, Any]:
        return self._scores(None)

    def measure(self, setting: Setting, width: str) -> dict[str, Any]:
        """A uniform model: seconds, bytes, number of weights and scores."""
        assert self._prepared.calibration is not None
        options = {"backend": dict(setting.options)}
        backend = Parts.build(replace(self._config, options=options), Plugins()).backend
        bank, choice = Bank(self._runner, self._layers, backend), backend.choice(width)
        bank.apply([None] * len(self._layers))
        start = time.process_time()
        quantize_in_sequence(bank, self._runner, self._prepared.calibration.ids, [choice] * len(self._layers),
                             lambda done, total: None)
        seconds = time.process_time() - start
        scores = self._scores(choice, bank)
        bank.apply([None] * len(self._layers))
        return {"seconds": seconds, "bytes": bank.nbytes, "scores": scores,
                "weights": sum(layer.parameters for layer in self._layers)}

    def _scores(self, choice: Choice | None, bank: Bank | None = None) -> dict[str, Any]:
        found = {}
        for name, evaluator in self._evaluators.items():
            score = (evaluator if bank is None else evaluator.of_bank(bank)).score([choice] * len(self._layers))
            found[name] = {"windows": score.window_nll.tolist(), "kl": score.kl}
        return found


def _report(log: Keyed, given: argparse.Namespace, texts: Sequence[str], left_out: Mapping[str, str]) -> list[str]:
    lines = heading("Options of GPTQ", command())
    lines += [f"Model {model_name(given.model)}; {given.calibration_windows} calibration windows and "
              f"{given.evaluation_windows} evaluation windows of 256 tokens on each text. In brackets: the loss above "
              "that of the unquantized model. A difference is paired with the first row of its width.", ""]
    named = [{**row, "setting": setting.name} for setting in SETTINGS for row in log.rows(**setting.facts)]
    unquantized = {text: np.mean(score["windows"]) for row in log.rows(unquantized=True)
                   for text, score in row["scores"].items()}
    for width in sorted({row["width"] for row in named}):
        rows = [row for row in named if row["width"] == width]
        first = rows[0]
        lines += [f"## {width} bits ({8 * first['bytes'] / first['weights']:.2f} stored, "
                  f"{first['bytes'] / 1e6:.2f} MB)", ""]
        header = ["options", *(part for text in texts for part in (f"NLL, {text}", "minus the first", "KL")),
                  "CPU s"]
        shown = []
        for row in rows:
            cells = [row["setting"]]
            for text in texts:
                nll = np.array(row["scores"][text]["windows"])
                minus = nll - np.array(first["scores"][text]["windows"])
                cells += [f"{nll.mean():.3f} ({nll.mean() - unquantized[text]:+.3f})",
                          "" if row is first else plus_minus(minus.mean(), standard_error(minus), sign=True),
                          f"{row['scores'][text]['kl']:.3f}"]
            shown.append([*cells, f"{row['seconds']:.0f}"])
        lines += table(header, shown)
    return [*lines, *(line for name, reason in left_out.items() for line in (f"Left out: {name}: {reason}.", ""))]


if __name__ == "__main__":
    main()
