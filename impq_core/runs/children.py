"""Runs below another folder: those of a sweep, and those of further budgets of a run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from impq_core.errors import ImpqError
from impq_core.evaluate import Evaluator
from impq_core.files import write_text
from impq_core.plugins import Plugins
from impq_core.runs.folder import CHILDREN, RunFolder
from impq_core.runs.pipeline import Search, keep_estimate, make_folder, result_of, tested
from impq_core.runs.prepare import Prepared
from impq_core.runs.session import Session
from impq_core.types import Measurements, SensitivityEstimate


@dataclass(frozen=True, eq=False)
class Child:
    """A run below another folder, and its name."""

    name: str
    prepared: Prepared

    @classmethod
    def of(cls, prepared: Prepared, taken: Collection[str] = ()) -> Child:
        """The child of a prepared run, named after its parts and its budget.

        Args:
            prepared: the run.
            taken: names of other children; two names never become one.
        """
        config = prepared.config
        parts = [config.backend, config.estimator]
        if prepared.parts.estimator.needs_surrogate:
            parts.append(config.surrogate)
        name = "-".join([*parts, config.allocator, config.budget])
        short = re.sub(r"[^\w.]+", "-", name.replace("%", "percent"))
        unique = f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:6]}" if short in taken else short
        return cls(unique, prepared)

    def folder_path(self, parent: RunFolder) -> Path:
        """Where its folder is or will be."""
        return parent.path / CHILDREN / self.name

    def folder(self, parent: RunFolder) -> RunFolder:
        """Its folder, which is made if it is missing."""
        path = self.folder_path(parent)
        return RunFolder(path) if path.exists() else make_folder(self.prepared, path.parent, path.name)

    def estimate(self, measured: Measurements | SensitivityEstimate) -> SensitivityEstimate:
        """The estimate for its budget: measured losses are fitted near it."""
        if isinstance(measured, SensitivityEstimate):
            return measured
        return self.prepared.parts.fit(replace(measured, budget_bytes=self.prepared.game_budget))


def start(child: Child, plugins: Plugins, folder: RunFolder) -> None:
    """Notify observers that a child begins."""
    prepared = child.prepared
    plugins.notify("impq_run_started", config=prepared.config, space=prepared.space, folder=folder.path,
                   coverage=prepared.coverage)


def fail(child: Child, error: ImpqError, plugins: Plugins, parent: RunFolder) -> None:
    """Leave a run that failed because no plan can be made for it; the others continue."""
    folder = child.folder(parent)
    with folder.locked():
        start(child, plugins, folder)
        write_text(folder.error, f"{error}\n")
        plugins.notify("impq_run_failed", error=ImpqError(f"{child.name}: {error}"))


def finish(child: Child, search: Search, session: Session, evaluator: Evaluator, parent: RunFolder,
           same_size: bool = True) -> None:
    """Score a plan, and leave a run folder like any other.

    Args:
        child: the run.
        search: its plan and estimate.
        session: the model with the deployed variants.
        evaluator: scores plans of the session.
        parent: the folder above.
        same_size: whether to score the references of the plan's own size too.
    """
    prepared, plugins = child.prepared, session.plugins
    assert search.plan is not None and search.estimate is not None
    folder = child.folder(parent)
    with folder.locked():
        start(child, plugins, folder)
        with plugins.observing():
            session.bank.save_record(folder.variants)
            keep_estimate(plugins, folder, search.estimate, search.measurements)
            search.plan.save(folder.searched_plan)
            plugins.notify("impq_plan_ready", plan=search.plan)
            search = tested(session, folder, search)
            assert search.plan is not None
            evaluation = session.evaluate(evaluator, search.plan, same_size, search.estimated)
            evaluation.save(folder.evaluation)
            result = result_of(prepared, folder, search, evaluation, {})
            folder.write_cost(result)
            plugins.notify("impq_run_finished", result=result)
        folder.error.unlink(missing_ok=True)
