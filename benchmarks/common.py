"""Shared code of the benchmarks: the real model with all its variants, and the heading and tables of a report."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np

from impq_core.budget import Budget
from impq_core.config import RunConfig
from impq_core.evaluate import Evaluator
from impq_core.game.model_game import ModelGame
from impq_core.hookspecs import hookimpl
from impq_core.model.text import Windows
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.results import Score
from impq_core.runs.prepare import Prepared, prepare
from impq_core.runs.session import Session
from impq_core.types import Measurements, Plan, SensitivityEstimate

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("impq", "torch", "transformers", "gptqmodel", "hqq", "optimum-quanto", "pyomo", "highspy", "numpy")


@dataclass(frozen=True, eq=False)
class Bench:
    """A session with all variants, for many estimates, plans and scores."""

    session: Session
    evaluator: Evaluator

    @classmethod
    def build(cls, config: RunConfig) -> Bench:
        """Load and quantize the model of a configuration."""
        plugins = Plugins()
        plugins.watch(Printer())
        prepared = prepare(config, plugins)
        prepared.require_text()
        session = Session(prepared, plugins)
        session.quantize_deployed()
        return cls(session, session.evaluator_of_exports())

    @property
    def prepared(self) -> Prepared:
        return self.session.prepared

    @property
    def windows(self) -> Windows:
        """The calibration windows of the game."""
        windows = self.prepared.game_windows
        assert windows is not None
        return windows

    def at(self, config: RunConfig) -> Bench:
        """The same model and variants with other layers or another menu."""
        session = self.session.for_space(prepare(config, self.session.plugins))
        return Bench(session, session.evaluator_of_exports())

    def game(self, config: RunConfig, budget_bytes: int | None = None, text: Windows | None = None) -> ModelGame:
        """The game and the probe of a configuration on this model, on the calibration text unless ``text`` is
        given."""
        session = self.session.with_prepared(replace(self.prepared, config=replace(
            self.prepared.config, game_windows=config.game_windows, probe_windows=config.probe_windows,
            value=config.value, refine=0)))
        calibration = text or self.prepared.calibration
        assert calibration is not None
        probe = session.probe(text=calibration.first(config.probe_windows or config.game_windows))
        game = session.game(None, probe, calibration)
        game.budget_bytes = budget_bytes
        return game

    def estimate(self, config: RunConfig,
                 budget_bytes: int | None = None) -> tuple[SensitivityEstimate, Measurements | None]:
        """The estimate of a configuration's estimator, and the measurements if a surrogate was fitted to them."""
        game = self.game(config, budget_bytes)
        parts = Parts.build(config, self.session.plugins)
        return parts.estimate(game, game.probe, np.random.default_rng(config.seed))

    def plan(self, config: RunConfig, estimate: SensitivityEstimate, budget: float) -> Plan:
        """The plan of a configuration's allocator at a budget in nominal bits."""
        allocator = Parts.build(config, self.session.plugins).allocator
        return allocator.allocate(estimate, Budget.nominal(budget).resolve(self.prepared.space))

    def score(self, plan: Plan) -> Score:
        return self.evaluator.score(self.prepared.space.assignment(plan.pick))

    def uniforms(self) -> list[tuple[str, int, Score]]:
        """Name, bytes and score of the uniform model at every width of the menu and between, from small to large."""
        space = self.prepared.space
        sizes = [(choice, space.bytes_of(space.uniform(k))) for k, choice in enumerate(space.choices)]
        return [(f"uniform {choice}", nbytes, self.evaluator.score([choice] * len(space)))
                for choice, nbytes in sorted([*sizes, *self.prepared.between], key=lambda item: item[1])]


class Printer:
    """Prints the progress of a session, at each tenth of a stage."""

    def __init__(self) -> None:
        self._last = ("", 0)

    @hookimpl
    def impq_progress(self, stage: str, done: int, total: int) -> None:
        now = (stage, 10 * done // max(1, total))
        if now != self._last:
            self._last = now
            print(f"{stage}: {done} of {total}", flush=True)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``. ``page_of`` returns the name of the benchmark's page for it."""
    parser.add_argument("--model", default="demo",
                        help="demo, or the folder of a model; its name is added to that of the page [demo]")


def model_name(model: str) -> str:
    """The name of a model in tables: that of its folder, or of the demo model."""
    return "SmolLM2-135M" if model == "demo" else Path(model).name


def page_of(page: str, model: str) -> str:
    """The name of a file of results: ``shape.md`` for the demo model, ``shape-NAME.md`` for another."""
    path = Path(page)
    return page if model == "demo" else f"{path.stem}-{model_name(model)}{path.suffix}"


def command() -> str:
    """The command line of the benchmark that runs, without the folders of the models and files that it names."""
    script, *words = sys.argv
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *(
        re.sub("[^,=]+", lambda part: Path(part[0]).name if Path(part[0]).exists() else part[0], word)
        for word in words)])


def version_of(package: str) -> str:
    """The version of an installed package, or ``not installed``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def heading(title: str, command: str, accelerator: str = "no GPU") -> list[str]:
    versions = ", ".join(f"{name} {version_of(name)}" for name in PACKAGES)
    return [f"# {title}", "",
            f"Written by `{command}` on {date.today()}, {os.cpu_count()} cores, {accelerator}; {versions}.", ""]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header),
            *("| " + " | ".join(row) + " |" for row in rows), ""]


def plus_minus(value: float, stderr: float, sign: bool = False) -> str:
    return (f"{value:+.3f}" if sign else f"{value:.3f}") + ("" if math.isnan(stderr) else f" ± {stderr:.3f}")


def write(name: str, lines: Sequence[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines), flush=True)
