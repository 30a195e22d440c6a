"""impq: mixed precision with a plan that knows how layers interact.

From Python: ``impq_core.run(impq_core.RunConfig(model=..., budget="3.0bits"))`` returns a ``RunResult``, and
``play`` of the same the game that estimators play. What is named here is all that a script needs (``examples/`` has
some); ``console()`` makes it talk as the command line does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError

if TYPE_CHECKING:
    from impq_core.answers.ask import ask
    from impq_core.compare.comparison import Comparison
    from impq_core.compare.html import write_page
    from impq_core.compare.read import gather
    from impq_core.display.progress import console
    from impq_core.exports.export import evaluate_folder, export_run
    from impq_core.exports.packed import load_quantized
    from impq_core.exports.rotated import rotate_model
    from impq_core.plugins import Plugins
    from impq_core.results import RunResult
    from impq_core.runs.allocate import allocate_run
    from impq_core.runs.curves import read_curves
    from impq_core.runs.grid import Sweep
    from impq_core.runs.pipeline import play, resume, run
    from impq_core.runs.points import extend_curve
    from impq_core.runs.reading import read_run
    from impq_core.runs.sweep import run_sweep
    from impq_core.tasks.measure import evaluate_tasks

__all__ = ["Comparison", "ImpqError", "Plugins", "RunConfig", "RunResult", "Sweep", "TextConfig", "allocate_run", "ask",
           "console", "evaluate_folder", "evaluate_tasks", "export_run", "extend_curve", "gather", "load_quantized",
           "play", "read_curves", "read_run", "resume", "rotate_model", "run", "run_sweep", "write_page"]

_HOMES = {"allocate_run": "runs.allocate", "ask": "answers.ask", "evaluate_tasks": "tasks.measure",
          "write_page": "compare.html", "gather": "compare.read",
          "evaluate_folder": "exports.export", "export_run": "exports.export",
          "load_quantized": "exports.packed", "rotate_model": "exports.rotated", "Sweep": "runs.grid",
          "RunResult": "results", "play": "runs.pipeline", "resume": "runs.pipeline", "run": "runs.pipeline",
          "Comparison": "compare.comparison", "read_run": "runs.reading", "Plugins": "plugins",
          "console": "display.progress", "run_sweep": "runs.sweep",
          "extend_curve": "runs.points", "read_curves": "runs.curves"}
"""Modules of the names that are imported when they are asked for: the command line's help must not import torch."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"impq_core.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'impq_core' has no attribute '{name}'")
