"""The part of a run that is decided without weights and texts: layers, widths, bytes and the budget."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from impq_core.config import RunConfig
from impq_core.errors import UsageError
from impq_core.interfaces import Backend
from impq_core.model.layers import coverage, layers_of, resolve_dtype, rest_parameters, search_space
from impq_core.model.shapes import Shapes
from impq_core.model.source import ModelSource, locate_model
from impq_core.model.text import check_source
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.space import Choice, SearchSpace
from impq_core.trust import NO_TRUST, Trust
from impq_core.types import Plan


@dataclass(frozen=True, eq=False)
class Layout:
    """A run whose configuration, model architecture and budget have been checked. No weight has been read.

    Args:
        config: resolved: paths are absolute, and no value is left to a default.
        parts: of the run.
        source: of the model.
        space: layers and choices with the deployed backend's sizes.
        played: the same layers and choices with the sizes of the backend whose variants are measured.
        between: choices of the deployed backend between those of the menu, for uniform references, each with the bytes
            of a model that is uniformly so.
        budget_bytes: of the plan.
        rest_bytes: of embeddings, head and all else that is never quantized, at 16 bits a weight.
        plan: the plan of ``--plan``.
        libraries: import names of the backends' libraries.
        coverage: share of the weights in the model's blocks that the layers hold.
        shapes: of the model.
    """

    config: RunConfig
    parts: Parts
    source: ModelSource
    space: SearchSpace
    played: SearchSpace
    between: tuple[tuple[Choice, int], ...]
    budget_bytes: int
    rest_bytes: int
    plan: Plan | None
    libraries: tuple[str, ...]
    coverage: float
    shapes: Shapes

    @property
    def measures_another_backend(self) -> bool:
        """Whether the measured variants are not the deployed ones (``--estimate-with``)."""
        return self.parts.estimate_with is not None and self.plan is None

    @property
    def deployed_menus(self) -> list[list[Choice]]:
        """The choices of each layer that the deployed backend makes, widest first: the menu and those between."""
        return _menus(self.space, [choice for choice, _ in self.between])

    @property
    def played_menus(self) -> list[list[Choice]]:
        """The choices of each layer that are measured, widest first."""
        return _menus(self.played) if self.measures_another_backend else self.deployed_menus

    @property
    def played_backend(self) -> Backend:
        """The backend whose variants are measured."""
        return self.parts.estimate_with if self.measures_another_backend and self.parts.estimate_with else (
            self.parts.backend)

    @property
    def played_budget(self) -> int:
        """The budget in the space the estimator sees: the same place between all-narrowest and all-widest."""
        return self.space.carry_over(self.budget_bytes, self.played)

    def planned(self, config: RunConfig, plugins: Plugins) -> Self:
        """The same model, layers, estimator and texts with a configuration's surrogate, allocator and budget.

        Raises:
            ImpqError: the budget is out of reach, or a name or option is wrong.
        """
        parts = Parts.build(config, plugins)
        for part in (parts.surrogate, parts.allocator):
            part.check_space(self.played)
        budget = parts.wanted
        resolved = replace(self.config, surrogate=config.surrogate, allocator=config.allocator, budget=str(budget),
                           options=parts.options())
        return replace(self, config=resolved, parts=parts, budget_bytes=budget.resolve(self.space))


def _menus(space: SearchSpace, between: Sequence[Choice] = ()) -> list[list[Choice]]:
    menu = sorted([*space.choices, *between], reverse=True)
    return [menu] * len(space) + [[pin.choice] if pin.choice else [] for pin in space.pinned]


def lay_out(config: RunConfig, plugins: Plugins, trust: Trust = NO_TRUST, calibrate: bool = True,
            source: ModelSource | None = None) -> Layout:
    """Resolve and check a configuration as far as that goes without weights and tokenizer: names, options, files,
    sizes, budget. Writes nothing.

    Args:
        config: the configuration.
        plugins: the source of the parts.
        trust: what the command line permits.
        calibrate: whether the file of the calibration text is checked, if a part reads it.
        source: the model, if it was located before.

    Raises:
        ImpqError: a value is wrong, or a file is missing or damaged.
    """
    parts = Parts.build(config, plugins)
    if calibrate and parts.needs_calibration:
        check_source(config.calibration.source, "calibration")
    check_source(config.evaluation.source, "evaluation")
    source = source or locate_model(config.model, trust.remote_code)
    skeleton = source.skeleton()
    layers = layers_of(skeleton, parts.granularity)
    covered = coverage(skeleton, layers)
    if not config.partial:
        covered.require(config.model)
    space = search_space(layers, parts.backend, parts.menu, config.pins, config.exclude)
    played = space
    if parts.estimate_with and not config.plan:  # a plan that is given is measured as it will be deployed
        played = search_space(layers, parts.estimate_with, parts.played, config.pins, config.exclude)
    for part in (parts.estimator, parts.surrogate, parts.allocator):
        part.check_space(played)
    inside = [choice for choice in parts.backend.choices()
              if parts.menu[-1] < choice < parts.menu[0] and choice not in parts.menu]
    between = []
    for choice in inside:
        alone = search_space(layers, parts.backend, (choice,), config.pins, config.exclude)
        between.append((choice, alone.high_bytes))
    budget, budget_bytes = str(parts.wanted), parts.wanted.resolve(space)
    plan = Plan.load(Path(config.plan), space) if config.plan else None
    if plan and parts.budget and plan.nbytes > budget_bytes:
        raise UsageError(f"plan {config.plan} takes {plan.nbytes} bytes, more than the {budget_bytes} of --budget "
                         f"{config.budget}: leave out --budget, or give a smaller plan")
    if plan and not parts.budget:  # the plan is its own budget
        budget, budget_bytes = f"{plan.nbytes}B", plan.nbytes
    dtype = str(resolve_dtype(config.dtype)).removeprefix("torch.")
    resolved = replace(
        config, model=_absolute(config.model), plan=_absolute(config.plan),
        calibration=replace(config.calibration, source=_absolute(config.calibration.source)),
        evaluation=replace(config.evaluation, source=_absolute(config.evaluation.source)),
        bits=tuple(choice.bits for choice in parts.menu), budget=budget, dtype=dtype,
        options=parts.options(), granularity=parts.granularity)
    return Layout(resolved, parts, source, space, played, tuple(between), budget_bytes,
                  2 * rest_parameters(skeleton, layers), plan,
                  tuple(sorted({library for name in {config.backend, config.estimate_with} - {""}
                                for library in plugins.find("backend", name).needs})), covered.share,
                  Shapes.of(skeleton, layers))


def _absolute(name: str) -> str:
    """A file's path made absolute, so that the resolved configuration runs from anywhere; other names as they are."""
    path = os.path.expanduser(name)
    return str(Path(path).absolute()) if name not in ("", "demo") and os.path.exists(path) else name
