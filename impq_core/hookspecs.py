"""The hooks of a plugin: what it offers, and the moments of a run that it observes.

Offers return descriptions and import nothing heavy. Observers return None and cannot change a run; an exception of an
observer becomes a warning, and the run continues. Only ``impq_run_started`` may stop a run, by raising ImpqError before
it begins.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    import click

    from impq_core.config import RunConfig
    from impq_core.curve import Curve, Outcome
    from impq_core.paired_answers import AnswerTable
    from impq_core.results import Exported, RunResult
    from impq_core.space import FloatArray, IntArray, SearchSpace
    from impq_core.task_scores import TaskTable
    from impq_core.types import Measurements, Plan, SensitivityEstimate

hookspec = pluggy.HookspecMarker("impq")
hookimpl = pluggy.HookimplMarker("impq")


@dataclass(frozen=True)
class Component:
    """A part that a plugin offers.

    Args:
        name: the name that the user types.
        target: ``package.module:Class``; the module is imported when the part is chosen.
        summary: one line for ``impq plugins``.
        needs: import names of the libraries that the part needs.
        extra: the extra of the impq distribution that installs those libraries, if there is one.
        notice: a line that is printed when the part is chosen.
    """

    name: str
    target: str
    summary: str = ""
    needs: tuple[str, ...] = ()
    extra: str = ""
    notice: str = ""

    def missing(self) -> list[str]:
        """Import names of the needed libraries that are not installed; nothing is imported."""
        return [name for name in self.needs if not _installed(name)]

    def remedy(self) -> str:
        """``needs hqq (pip install 'impq[hqq]')`` if a library is missing, else an empty text."""
        missing = self.missing()
        if not missing:
            return ""
        requirement = f"impq[{self.extra}]" if self.extra else " ".join(missing)
        return f"needs {', '.join(missing)} (pip install '{requirement}')"


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


# Offers ---------------------------------------------------------------------------------------------------------


@hookspec
def impq_estimators() -> Iterable[Component]:
    """Estimators and samplers, chosen by ``--estimator``."""


@hookspec
def impq_surrogates() -> Iterable[Component]:
    """Surrogates, chosen by ``--surrogate``."""


@hookspec
def impq_allocators() -> Iterable[Component]:
    """Allocators, chosen by ``--allocator``."""


@hookspec
def impq_backends() -> Iterable[Component]:
    """Backends, chosen by ``--backend``."""


@hookspec
def impq_refiners() -> Iterable[Component]:
    """Refiners, chosen by ``--refiner``."""


@hookspec
def impq_exporters() -> Iterable[Component]:
    """Exporters, chosen by ``--export``."""


@hookspec
def impq_meters() -> Iterable[Component]:
    """Meters of costs beside bytes, chosen by ``--meter``."""


@hookspec
def impq_crews() -> Iterable[Component]:
    """Crews of workers, chosen by ``--workers``."""


@hookspec
def impq_commands() -> Iterable[click.Command]:
    """Further commands of the ``impq`` command line."""


# Moments --------------------------------------------------------------------------------------------------------


@hookspec
def impq_run_started(config: RunConfig, space: SearchSpace, folder: Path, coverage: float) -> None:
    """Every check has passed and the run folder exists; the weights are not loaded. ``coverage`` is the share of the
    weights in the model's blocks that the layers of the space hold."""


@hookspec
def impq_sweep_started(config: RunConfig, folder: Path, varied: Mapping[str, Sequence[str]]) -> None:
    """A sweep begins, or the measurement of further budgets of a run. ``varied`` holds the values of each setting in
    which the runs differ, or the ``target`` that their budgets are chosen for. The moments of the runs follow, one run
    after the other, each between ``impq_run_started`` and ``impq_run_finished``."""


@hookspec
def impq_curve_ready(folder: Path, curves: tuple[Curve, ...], answer: Outcome | None) -> None:
    """The runs of a sweep over budgets have ended, and ``curve.json`` is in its folder. ``answer`` is that to the
    target, if there is one."""


@hookspec
def impq_sweep_finished(folder: Path) -> None:
    """Every run of the sweep has ended; ``impq_run_failed`` reported those that failed."""


@hookspec
def impq_progress(stage: str, done: int, total: int) -> None:
    """``done`` of ``total`` units of a stage are finished; a stage starts with ``done`` = 0."""


@hookspec
def impq_variants_ready(nbytes: int, seconds: float) -> None:
    """Every layer is stored at every width, in ``nbytes`` bytes."""


@hookspec
def impq_measured(picks: IntArray, losses: FloatArray, forwards: float) -> None:
    """New losses are on disk; ``forwards`` is the cost so far, in full-model forwards."""


@hookspec
def impq_estimate_ready(estimate: SensitivityEstimate, measurements: Measurements | None) -> None:
    """The estimate is on disk."""


@hookspec
def impq_plan_ready(plan: Plan) -> None:
    """The plan is on disk."""


@hookspec
def impq_run_finished(result: RunResult) -> None:
    """The run has ended, and every file is in ``result.folder``. If only an estimate was asked for, there is no
    plan."""


@hookspec
def impq_run_failed(error: BaseException) -> None:
    """The run ended early; KeyboardInterrupt means that the user or a signal stopped it."""


@hookspec
def impq_exported(exported: Exported, run: Path) -> None:
    """The plan of the run in folder ``run`` was exported, and every file is in ``exported.folder``."""


@hookspec
def impq_tasks_measured(tasks: TaskTable, folder: Path) -> None:
    """Models of the run or the exported folder ``folder`` were measured on tasks, and all scores are in its
    ``tasks.json``."""


@hookspec
def impq_answered(answers: AnswerTable, folder: Path) -> None:
    """Models of the run or the exported folder ``folder`` answered prompts, and all answers are in its
    ``answers.json``."""
