"""The layout of a run: layers, widths, bytes and the budget, decided without weights and texts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedModel

from impq_core.budget import parse_bytes
from impq_core.config import RunConfig
from impq_core.costs import Cost, Metering, limited
from impq_core.errors import ImpqError, UsageError
from impq_core.interfaces import Backend
from impq_core.model.device import resolve_device, resolve_dtype
from impq_core.model.ends import chosen_ends
from impq_core.model.layers import (
    by_size,
    coverage,
    further_choices,
    layers_of,
    rest_parameters,
    search_space,
    unstorable,
)
from impq_core.model.shapes import Shapes
from impq_core.model.source import ModelSource, locate_model
from impq_core.model.text import check_texts
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.references import Mix, mixes_of
from impq_core.runs.metering import costs_of, forms_of, read_meters
from impq_core.runs.whole import WholeFile, whole_file
from impq_core.space import Choice, LayerSpec, LinearSpec, SearchSpace
from impq_core.trust import NO_TRUST, Trust
from impq_core.types import Plan


@dataclass(frozen=True, eq=False)
class Layout:
    """A run with checked configuration, model architecture and budget. No weight has been read.

    Args:
        config: the resolved configuration: paths are absolute, and defaults are replaced by their values.
        parts: the parts of the run.
        source: the model's files.
        space: layers and choices with the deployed backend's sizes.
        game_space: the same layers and choices with the sizes of the backend of the measured variants.
        between: choices of the deployed backend between those of the menu, for uniform references, each with the bytes
            of the uniform model at that choice.
        mixes: plans of other software, for the table of references.
        budget_bytes: budget of the plan.
        item: bytes of a number that stays unquantized: in the dtype of the run, or in that of the files if it is
            narrower.
        rest_bytes: bytes of everything in no layer: norms, embeddings and head unless they are layers ...
        whole: the file of the plans, if the budget bounds it.
        plan: the plan of ``--plan``.
        libraries: import names of the backends' libraries.
        coverage: share of the weights in the model's blocks that the layers hold.
        shapes: shapes of the model.
        meterings: what the meters found.
        costs: of the plans, with their limits.
    """

    config: RunConfig
    parts: Parts
    source: ModelSource
    space: SearchSpace
    game_space: SearchSpace
    between: tuple[tuple[Choice, int], ...]
    mixes: tuple[Mix, ...]
    budget_bytes: int
    item: int
    rest_bytes: int
    whole: WholeFile | None
    plan: Plan | None
    libraries: tuple[str, ...]
    coverage: float
    shapes: Shapes
    meterings: tuple[Metering, ...]
    costs: tuple[Cost, ...]

    @property
    def device(self) -> torch.device:
        """Where blocks compute."""
        return torch.device(self.config.device)

    def promise(self, plan: Plan) -> int | None:
        """The most bytes of the file of a plan; None if the budget does not bound it."""
        return self.whole.promise(plan) if self.whole else None

    @property
    def ends(self) -> tuple[LayerSpec, ...]:
        """The input embedding and the head, if they are layers."""
        return tuple(layer for layer in self.space.everyone if not 0 <= layer.block < len(self.shapes.blocks))

    @property
    def head_is_layer(self) -> bool:
        """Whether the head, or an embedding that is tied to it, is a layer."""
        return any(end.block >= 0 or self.shapes.tied for end in self.ends)

    @property
    def measures_another_backend(self) -> bool:
        """Whether the measured variants are not the deployed ones (``--estimate-with``)."""
        return self.parts.estimate_with is not None and self.plan is None

    @property
    def deployed_menus(self) -> list[list[Choice]]:
        """The choices of each layer that the deployed backend quantizes to, widest first: the menu and ``between``."""
        return _menus(self.space, self.between)

    @property
    def game_menus(self) -> list[list[Choice]]:
        """The choices of each layer that are measured, widest first."""
        return _menus(self.game_space) if self.measures_another_backend else self.deployed_menus

    @property
    def game_backend(self) -> Backend:
        """The backend of the measured variants."""
        return self.parts.estimate_with if self.measures_another_backend and self.parts.estimate_with else (
            self.parts.backend)

    def further_choices(self, backend: Backend) -> dict[str, list[Choice]]:
        """The choices of each linear, by its name, that a backend quantizes to for the mixes alone."""
        mixes = self.mixes if backend is self.parts.backend else ()
        names = [linear.name for layer in self.space.everyone for linear in layer.linears]
        return {name: [choice for mix in mixes if (choice := mix.choices[name])] for name in names}

    def stored(self, backend: Backend, menus: Sequence[Sequence[Choice]]) -> dict[LinearSpec, list[Choice]]:
        """The choices at which a backend stores each linear, for the menus of the layers and for the mixes."""
        further = self.further_choices(backend)
        return {linear: list(dict.fromkeys(backend.stand_in(linear, choice)
                                           for choice in [*menu, *further[linear.name]]))
                for layer, menu in zip(self.space.everyone, menus, strict=True) for linear in layer.linears}

    @property
    def game_budget(self) -> int:
        """The budget in the game's space: at the same share of the way from all-narrowest to all-widest."""
        return self.space.carry_over(self.budget_bytes, self.game_space)

    def planned(self, config: RunConfig, plugins: Plugins) -> Self:
        """The same model, layers, estimator and texts with a configuration's surrogate, allocator and budget.

        Raises:
            ImpqError: the budget is out of reach, or a name or option is wrong.
        """
        parts = Parts.build(config, plugins)
        for part in (parts.surrogate, parts.allocator):
            part.check_space(self.game_space)
        budget = parts.wanted(self.space)
        resolved = replace(self.config, surrogate=config.surrogate, allocator=config.allocator, budget=str(budget),
                           options=parts.options())
        account = self.whole.account if self.whole else None
        budget_bytes = budget.resolve(self.space, account)
        return replace(self, config=resolved, parts=parts, budget_bytes=budget_bytes,
                       costs=costs_of(self.meterings, self.space, config.limits, budget_bytes, str(budget)))


def _menus(space: SearchSpace, between: Sequence[tuple[Choice, int]] = ()) -> list[list[Choice]]:
    sizes = [(choice, space.bytes_of(space.uniform(k))) for k, choice in enumerate(space.choices)]
    menu = [choice for choice, _ in sorted([*sizes, *between], key=lambda item: -item[1])]
    return [menu] * len(space) + [[pin.choice] if pin.choice else [] for pin in space.pinned]


def lay_out(config: RunConfig, plugins: Plugins, trust: Trust = NO_TRUST, calibrate: bool = True,
            source: ModelSource | None = None, meterings: Sequence[Metering] | None = None) -> Layout:
    """Resolve and check a configuration as far as that goes without weights and tokenizer: names, options, files,
    sizes, budget. Writes nothing.

    Args:
        config: the configuration.
        plugins: the source of the parts.
        trust: the permissions of the command line.
        calibrate: whether to check the file of the calibration text, if a part reads it.
        source: the model, if it was located before.
        meterings: what the meters of the same model and backend found before; by default they are read now.

    Raises:
        ImpqError: a value is wrong, or a file is missing or damaged.
    """
    parts = Parts.build(config, plugins)
    device = resolve_device(config.device)
    if config.memory:
        parse_bytes(config.memory, "memory")
    if calibrate and parts.needs_calibration:
        check_texts(config.calibration, "calibration")
    check_texts(config.evaluation, "evaluation")
    for name, backend in ((config.backend, parts.backend), (config.estimate_with, parts.estimate_with)):
        if backend and "gradients" in backend.needs and config.calibration.scored != "all":
            raise UsageError(f"backend '{name}' weighs the tokens of the calibration text by gradients of the loss of "
                             "all of them: leave out --calibration-scored, or that option of the backend")
    source = source or locate_model(config.model, trust.remote_code)
    skeleton = source.skeleton()
    if config.plan and config.granularity == "auto":
        parts = replace(parts, granularity=_granularity_of(Path(config.plan), skeleton, parts.granularity))
    layers = layers_of(skeleton, parts.granularity)
    named = [*config.pins, *(Plan.read_layers(Path(config.plan)) if config.plan else ())]
    ends = chosen_ends(skeleton, layers, config.quantize_embeddings, named)
    layers = tuple(sorted((*layers, *ends), key=lambda layer: layer.block))
    measured = parts.estimate_with if not config.plan else None  # a given plan is measured as it will be deployed
    dense = unstorable(layers, parts.backend, parts.menu)
    if measured:
        dense = unstorable(layers, measured, parts.game_menu) | dense
    for end in ends:
        if end.name in dense and not any(fnmatchcase(end.name, pattern) for pattern in (*config.pins, *config.exclude)):
            raise UsageError(f"{dense[end.name]}: leave it unquantized with --exclude {end.name}")
    covered = coverage(skeleton, layers, dense)
    if not config.partial:
        covered.require(config.model, dense)
    menu = by_size(layers, parts.backend, parts.menu, dense)
    if len(menu) < len(parts.menu):
        left = ", ".join(choice.name for choice in parts.menu if choice not in menu)
        if len(menu) < 2 and not config.plan:
            raise UsageError(f"all of --bits are stored alike in this model, as {menu[0]}: add other widths")
        warnings.warn(f"{left}: left out of the menu, because they are stored in the shapes of this model as one of "
                      f"{', '.join(choice.name for choice in menu)} is", RuntimeWarning, stacklevel=2)
    game_menu = tuple(parts.game_menu[parts.menu.index(choice)] for choice in menu)
    space = search_space(layers, parts.backend, menu, config.pins, config.exclude, dense)
    game_space = search_space(layers, measured, game_menu, config.pins, config.exclude, dense) if measured else space
    if dense:
        warnings.warn(f"{len(dense)} linears stay at 16 bits, {100 * (1 - covered.share):.1f}% of the weights in the "
                      f"blocks (first: {next(iter(dense.values()))})", RuntimeWarning, stacklevel=2)
    for part in (parts.estimator, parts.surrogate, parts.allocator):
        part.check_space(game_space)
    between = []
    defaults = [choice for name in parts.backend.default_bits if (choice := parts.backend.choice(name))]
    for choice in further_choices(layers, parts.backend, menu, defaults, dense):
        if unstorable(space.layers, parts.backend, (choice,)):
            continue
        alone = search_space(layers, parts.backend, (choice,), config.pins, config.exclude, dense)
        if space.low_bytes < alone.high_bytes < space.high_bytes:
            between.append((choice, alone.high_bytes))
    dtype = resolve_dtype(config.dtype, device)
    item = min(dtype.itemsize, skeleton.dtype.itemsize)
    whole = None
    if config.whole:
        whole = whole_file(config, parts, plugins, source, space, [end.name for end in ends], dtype, item)
    wanted = parts.wanted(space)
    budget, budget_bytes = str(wanted), wanted.resolve(space, whole.account if whole and parts.budget else None)
    plan = Plan.load(Path(config.plan), space) if config.plan else None
    if plan and whole:
        plan = replace(plan, file_bytes=whole.promise(plan))
    if plan and parts.budget and plan.nbytes > budget_bytes:
        raise UsageError(f"plan {config.plan} takes {plan.nbytes} bytes, more than the {budget_bytes} of --budget "
                         f"{config.budget}: leave out --budget, or give a smaller plan")
    if plan and not parts.budget:  # the plan's size is the budget
        budget, budget_bytes = f"{plan.nbytes + (whole.account.fixed if whole else 0)}B", plan.nbytes
    mixes = mixes_of(parts.backend, space)
    if meterings is None:
        forms = forms_of(skeleton, space, parts.backend, item, [choice for choice, _ in between],
                         mixes) if parts.meters else ()
        meterings = read_meters(parts.meters, skeleton, space, forms, str(dtype).removeprefix("torch."),
                                lambda done, total: plugins.notify("impq_progress", stage="meter", done=done,
                                                                   total=total))
    if [metering.meter for metering in meterings] != list(parts.meters):
        raise ImpqError("the readings of the run's meters are not those of its configuration: start a new run")
    costs = costs_of(meterings, space, config.limits, budget_bytes if parts.budget or not plan else space.high_bytes,
                     budget)
    if plan:
        for cost in limited(costs):
            if not cost.keeps(plan.pick[None])[0]:
                raise UsageError(f"plan {config.plan} exceeds a limit: {cost.describe(plan.pick)}")
        plan = replace(plan, costs=costs)
    resolved = replace(
        config, meters=tuple(parts.meters), model=_absolute(config.model), plan=_absolute(config.plan),
        calibration=config.calibration.with_sources(_absolute), evaluation=config.evaluation.with_sources(_absolute),
        bits=tuple(choice.name for choice in menu), budget=budget, device=str(device),
        threads=config.threads or int(config.shared and device.type == "cpu"),
        dtype=str(dtype).removeprefix("torch."),
        options=parts.options(), granularity=parts.granularity)
    return Layout(resolved, parts, source, space, game_space, tuple(between), mixes,
                  budget_bytes, item, item * rest_parameters(skeleton, layers), whole, plan,
                  tuple(sorted({library for name in {config.backend, config.estimate_with} - {""}
                                for library in plugins.find("backend", name).needs})), covered.share,
                  Shapes.of(skeleton, layers), tuple(meterings), costs)


def _granularity_of(plan: Path, skeleton: PreTrainedModel, default: str) -> str:
    """The granularity whose layers a plan names; the default if it is one of those, or if there is none."""
    named = Plan.read_layers(plan).keys()
    return max((default, "block", "group", "expert", "linear"),
               key=lambda size: len(named & {layer.name for layer in layers_of(skeleton, size)}))


def _absolute(name: str) -> str:
    """An existing file's path made absolute, so that the resolved configuration runs from any folder; any other name
    unchanged."""
    path = os.path.expanduser(name)
    return str(Path(path).absolute()) if name not in ("", "demo") and os.path.exists(path) else name
