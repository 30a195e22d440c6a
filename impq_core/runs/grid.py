"""The settings of a sweep and the configurations of its runs. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from impq_core.config import RunConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.interfaces import Estimator
from impq_core.parts import assign_options
from impq_core.plugins import Plugins
from impq_core.runs.folder import SWEEP, RunFolder
from impq_core.target import STEPS, Target, check_steps

VARIED = ("backend", "estimator", "surrogate", "allocator", "budget")
"""Settings that a sweep takes lists of."""


@dataclass(frozen=True)
class Sweep:
    """The settings of a sweep.

    Args:
        base: the configuration of all runs.
        varied: lists of values, by setting (``VARIED``).
        pairs: options of parts as on the command line; each applies to the runs with a part that has it.
        target: if it is given, one search is made, and its budgets are chosen in search of the smallest plan within
            this loss: ``nll+0.1``, ``kl=0.2``.
        steps: number of bisections of that search.
    """

    base: RunConfig
    varied: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pairs: Mapping[str, str] = field(default_factory=dict)
    target: str = ""
    steps: int = STEPS

    @property
    def is_curve(self) -> bool:
        """Whether its runs differ in their budgets alone."""
        several = {name for name, values in self.varied.items() if len(set(values)) > 1}
        return bool(self.target) or ("budget" in self.varied and several <= {"budget"})

    @classmethod
    def open(cls, path: str) -> Sweep:
        """Read the settings from a sweep's folder; raises ImpqError if they are missing or damaged."""
        folder = RunFolder.open(path, SWEEP)
        data = folder.read_json(folder.path / SWEEP)
        varied, pairs = (data.get(name) for name in ("varied", "pairs"))
        if not (isinstance(varied, dict) and varied.keys() <= set(VARIED) and isinstance(pairs, dict)
                and all(isinstance(values, list) and all(map(_is_text, values)) for values in varied.values())
                and all(map(_is_text, pairs.values()))):
            raise ImpqError(f"{folder.path / SWEEP} is damaged: it has to hold 'varied', lists of names for "
                            f"some of {', '.join(VARIED)}, and 'pairs', a text for each option")
        target, steps = data.get("target", ""), data.get("steps", STEPS)
        if not (_is_text(target) and type(steps) is int):
            raise ImpqError(f"{folder.path / SWEEP} is damaged: 'target' is a text, and 'steps' a whole number")
        return cls(folder.read_config(), varied, pairs, target, steps)

    def configs(self, plugins: Plugins) -> list[RunConfig]:
        """The configuration of each run; runs of one backend are neighbours, and among them runs of one estimator.

        Raises:
            UsageError: a name is unknown, no run has a part with an option of ``pairs``, the base has a plan or a
                refiner, or a target is wrong or given with budgets.
        """
        if self.base.plan or self.base.refine:
            raise UsageError("sweeps, several budgets and --target make their own plans and refine none: leave out "
                             "--plan and --refine")
        if self.target:
            Target.parse(self.target)
            check_steps(self.steps)
            if self.base.whole:
                raise UsageError("--target bounds a loss, and --whole the size of a file: leave out one of them")
            if any(len(set(values)) > 1 for values in self.varied.values()) or self.varied.get("budget"):
                raise UsageError("--target chooses the budgets of one search: leave out --budget and lists of names")
        values = [list(dict.fromkeys(self.varied.get(name) or (getattr(self.base, name),))) for name in VARIED]
        if "budget" in self.varied and not all(self.varied["budget"]):
            raise UsageError("--budget takes budgets such as 2.5bits,60MB, with nothing left out between the commas")
        if not all(value for name, many in zip(VARIED, values, strict=True) if name != "budget" for value in many):
            raise UsageError("a list of names has nothing between two commas")
        estimators = {name: plugins.load("estimator", name, Estimator) for name in values[VARIED.index("estimator")]}
        base = self.base
        if base.fallback == "auto" and not self.is_curve:  # plans of several parts are compared as they are
            base = replace(base, fallback="no")
        several = len(values[VARIED.index("backend")]) * len(estimators) > 1
        if base.sequential == "auto" and several:  # so that all tables of a sweep are of one kind
            base = replace(base, sequential="no")
        if base.granularity == "auto":  # all runs of a sweep have the same layers
            wanted = {kind.default_granularity for kind in estimators.values()}
            base = replace(base, granularity=wanted.pop() if len(wanted) == 1 else "block")
        configs: list[RunConfig] = []
        refused: dict[str, UsageError] = {}
        taken: set[str] = set()
        for combination in product(*values):
            config = replace(base, **dict(zip(VARIED, combination, strict=True)))
            if not estimators[config.estimator].needs_surrogate and config.surrogate != values[2][0]:
                continue  # the estimator needs no surrogate: one run is enough
            for key, value in self.pairs.items():
                try:
                    config = replace(config, options=assign_options(config, plugins, {key: value}))
                    taken.add(key)
                except UsageError as error:
                    refused.setdefault(key, error)
            configs.append(config)
        for key in self.pairs:
            if key not in taken:
                raise refused[key]
        return configs


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
