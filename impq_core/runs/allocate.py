"""Plans for other budgets from the estimate of a run, without the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from impq_core.costs import limited, with_limits
from impq_core.errors import UsageError
from impq_core.feasible import require_fitting
from impq_core.parts import Parts, assign_options
from impq_core.plugins import Plugins
from impq_core.runs.folder import RunFolder
from impq_core.types import Plan


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan for a budget, and its file."""

    budget: str
    plan: Plan
    file: Path


def allocate_run(run: str | Path, budgets: Sequence[str], surrogate: str | None = None, allocator: str | None = None,
                 pairs: Mapping[str, str] | None = None, plugins: Plugins | None = None,
                 limits: Mapping[str, str] | None = None) -> list[Planned]:
    """Make a plan for each budget; each is written to RUN/plans.

    Args:
        run: a run folder with an estimate.
        budgets: as on the command line.
        surrogate: fitted to the run's losses; None takes the run's estimate.
        allocator: the run's by default.
        pairs: options as on the command line.
        plugins: the source of the parts; the installed plugins by default.
        limits: of the costs of the run's meters, by name; None takes the run's.

    Raises:
        ImpqError: the run has no estimate (or no losses to fit), or a name, option or budget is wrong.
    """
    plugins = plugins or Plugins()
    folder = RunFolder.open(run, "space.json", *(() if surrogate else ("estimate.npz",)))
    measurements = folder.read_measurements() if surrogate else None
    if not all(budgets):
        raise UsageError("--budget takes budgets such as 2.5bits,60MB, with nothing left out between the commas")
    before = folder.read_config()
    config = replace(before, plan="", refine=0, limits=before.limits if limits is None else limits)
    space = folder.read_space()
    costs = with_limits((metering.on(space) for metering in folder.read_meterings()), config.limits)
    config = replace(config, surrogate=surrogate or before.surrogate,
                     allocator=allocator or before.allocator)
    kept = {slot: options for slot, options in before.options.items() if slot != "refiner"
            and getattr(config, slot, None) == getattr(before, slot, None)}
    config = replace(config, options=kept)
    config = replace(config, options=assign_options(config, plugins, pairs or {}))
    every = [replace(config, budget=budget) for budget in budgets]
    parts = [Parts.build(one, plugins) for one in every]
    account = folder.read_file_account()
    sizes = [part.wanted(space).resolve(space, account) for part in parts]
    for one, size in zip(every, sizes, strict=True):
        require_fitting(space, size, limited(costs), one.budget)
    made = []
    for one, part, size in zip(every, parts, sizes, strict=True):
        if measurements:
            wanted = space.carry_over(size, measurements.space)
            estimate = part.fit(replace(measurements, budget_bytes=wanted))
        else:
            estimate = folder.read_estimate()
        plan = part.plan(estimate.on(space), size, costs)
        plan = replace(plan, is_loss=estimate.is_loss,
                       provenance={"run": str(folder.path), "estimate": estimate.method},
                       file_bytes=plan.nbytes + account.fixed if account else None)
        size_name = one.budget.replace("%", "percent")
        bounds = "".join(f"-{cost}-{amount}" for cost, amount in config.limits.items())
        name = re.sub(r"[^\w.]+", "-", f"{config.allocator}-{surrogate or 'estimate'}-{size_name}{bounds}")
        file = folder.path / "plans" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        plan.save(file)
        made.append(Planned(one.budget, plan, file))
    return made
