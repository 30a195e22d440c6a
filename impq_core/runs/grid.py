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

VARIED = ("backend", "estimator", "surrogate", "allocator", "budget")
"""Settings that a sweep takes lists of."""


@dataclass(frozen=True)
class Sweep:
    """The settings of a sweep.

    Args:
        base: the configuration of all runs.
        varied: lists of values, by setting (``VARIED``).
        pairs: options of parts as on the command line; each applies to the runs with a part that has it.
    """

    base: RunConfig
    varied: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pairs: Mapping[str, str] = field(default_factory=dict)

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
        return cls(folder.read_config(), varied, pairs)

    def configs(self, plugins: Plugins) -> list[RunConfig]:
        """The configuration of each run; runs of one backend are neighbours, and among them runs of one estimator.

        Raises:
            UsageError: a name is unknown, no run has a part with an option of ``pairs``, or the base has a plan or a
                refiner.
        """
        if self.base.plan or self.base.refine:
            raise UsageError("a sweep makes its own plans and refines none: leave out --plan and --refine")
        values = [list(dict.fromkeys(self.varied.get(name) or (getattr(self.base, name),))) for name in VARIED]
        if not all(value for name, many in zip(VARIED, values, strict=True) if name != "budget" for value in many):
            raise UsageError("a list of names has nothing between two commas")
        estimators = {name: plugins.load("estimator", name, Estimator) for name in values[VARIED.index("estimator")]}
        base = self.base
        if base.sequential == "auto":  # so that all tables of a sweep are of one kind
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
