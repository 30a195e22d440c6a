"""What the benchmarks share: the real model ready to play, a heading that says what was measured on what, tables."""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from impq_core.budget import Budget
from impq_core.config import RunConfig
from impq_core.evaluate import Evaluator
from impq_core.game.model_game import ModelGame
from impq_core.game.probe import ModelProbe
from impq_core.model.bank import Bank
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.text import Windows
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.results import Score
from impq_core.runs.pipeline import load_runner, quantize_all
from impq_core.runs.prepare import Prepared, prepare
from impq_core.types import Measurements, Plan, SensitivityEstimate

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("impq", "torch", "transformers", "gptqmodel", "hqq", "optimum-quanto", "pyomo", "highspy", "numpy")


@dataclass(frozen=True, eq=False)
class Bench:
    """The model of a configuration with its variants made, for many estimates, plans and scores."""

    prepared: Prepared
    plugins: Plugins
    runner: BlockwiseModel
    bank: Bank
    windows: Windows
    evaluator: Evaluator

    @classmethod
    def build(cls, config: RunConfig) -> Bench:
        plugins = Plugins()
        prepared = prepare(config, plugins)
        runner = load_runner(prepared)
        bank = quantize_all(prepared, runner, say("quantize"))
        assert prepared.calibration is not None
        return cls(prepared, plugins, runner, bank, prepared.calibration.first(config.game_windows),
                   Evaluator(runner, bank, prepared.evaluation))

    def at(self, config: RunConfig) -> Bench:
        """The same model and variants as another configuration sees them: other layers or another menu."""
        prepared = prepare(config, self.plugins)
        self.bank.apply([None] * len(self.bank.layers))
        bank = Bank(self.runner.model, prepared.space.everyone, self.bank.backend, self.runner.model.dtype)
        for layer in bank.layers:
            for linear in layer.linears:
                for choice in {*prepared.space.choices, *(choice for choice, _ in prepared.between)}:
                    bank.add(linear, self.bank.stored(linear, choice))
        return Bench(prepared, self.plugins, self.runner, bank, self.windows,
                     Evaluator(self.runner, bank, prepared.evaluation))

    def game(self, config: RunConfig, budget_bytes: int | None = None, text: Windows | None = None) -> ModelGame:
        """The game of a configuration, and its probe, on this model; on other text than calibration's where given."""
        calibration = text or self.prepared.calibration
        assert calibration is not None
        probe = ModelProbe(self.prepared.space, self.bank, self.runner,
                           calibration.first(config.probe_windows or config.game_windows), config.value,
                           config.game_windows)
        return ModelGame(self.prepared.space, self.bank, self.runner, calibration.first(config.game_windows),
                         progress=say("estimate"), value=config.value, budget_bytes=budget_bytes,
                         spare=calibration.part(config.game_windows, len(calibration.ids)), probe=probe)

    def estimate(self, config: RunConfig,
                 budget_bytes: int | None = None) -> tuple[SensitivityEstimate, Measurements | None]:
        """What a configuration's estimator makes of this model, and what it measured for a surrogate to fit."""
        game = self.game(config, budget_bytes)
        return Parts.build(config, self.plugins).estimate(game, game.probe, np.random.default_rng(config.seed))

    def plan(self, config: RunConfig, estimate: SensitivityEstimate, budget: float) -> Plan:
        """The plan of a configuration's allocator at a budget in nominal bits."""
        allocator = Parts.build(config, self.plugins).allocator
        return allocator.allocate(estimate, Budget(budget, "bits").resolve(self.prepared.space))

    def score(self, plan: Plan) -> Score:
        return self.evaluator.score(self.prepared.space.assignment(plan.pick))

    def uniforms(self) -> list[tuple[str, int, Score]]:
        """Every width of the menu and between: name, bytes, score; from small to large."""
        space = self.prepared.space
        sizes = [(choice, space.bytes_of(space.uniform(k))) for k, choice in enumerate(space.choices)]
        return [(f"uniform {choice}", nbytes, self.evaluator.score([choice] * len(space)))
                for choice, nbytes in sorted([*sizes, *self.prepared.between])]


def heading(title: str, command: str) -> list[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return [f"# {title}", "",
            f"Written by `{command}` on {date.today()}, {os.cpu_count()} cores, no GPU; {versions}.", ""]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header),
            *("| " + " | ".join(row) + " |" for row in rows), ""]


def plus_minus(value: float, stderr: float, sign: bool = False) -> str:
    return (f"{value:+.3f}" if sign else f"{value:.3f}") + ("" if math.isnan(stderr) else f" ± {stderr:.3f}")


def write(name: str, lines: Sequence[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines), flush=True)


def say(stage: str) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done % max(1, total // 10) == 0:
            print(f"{stage}: {done} of {total}", flush=True)
    return progress
