"""Preparation of a run: resolves and checks its configuration, model, texts and budget before weights are loaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from impq_core.config import RunConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.interfaces import Backend
from impq_core.keys import (
    MAKES_VARIANTS,
    LossesKey,
    RunKey,
    ScoresKey,
    SlopesKey,
    TextKey,
    VariantsKey,
    code_digest,
    digest_of,
    part_facts,
    versions,
)
from impq_core.model.layers import coverage, layers_of, resolve_dtype, rest_parameters, search_space, unstorable
from impq_core.model.source import ModelSource, locate_model
from impq_core.model.text import Windows, check_source, draw_windows, refuse_overlap
from impq_core.parts import Parts, slots_of
from impq_core.plugins import Plugins
from impq_core.space import Choice, SearchSpace
from impq_core.trust import NO_TRUST, Trust
from impq_core.types import Plan


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run with checked configuration, model, texts and budget.

    Args:
        config: the resolved configuration: paths are absolute, and defaults are replaced by their values.
        parts: the parts of the run.
        source: the model's files.
        space: layers and choices with the deployed backend's sizes.
        game_space: the same layers and choices with the sizes of the backend of the measured variants.
        between: choices of the deployed backend between those of the menu, for uniform references, each with the bytes
            of the uniform model at that choice.
        budget_bytes: budget of the plan.
        rest_bytes: bytes of embeddings, head and everything else that is never quantized, at 16 bits a weight.
        plan: the plan of ``--plan``.
        calibration: None if no part reads calibration text.
        evaluation: the held-out windows.
        libraries: import names of the backends' libraries.
        coverage: share of the weights in the model's blocks that can be quantized.
    """

    config: RunConfig
    parts: Parts
    source: ModelSource
    space: SearchSpace
    game_space: SearchSpace
    between: tuple[tuple[Choice, int], ...]
    budget_bytes: int
    rest_bytes: int
    plan: Plan | None
    calibration: Windows | None
    evaluation: Windows
    libraries: tuple[str, ...]
    coverage: float

    @property
    def measures_another_backend(self) -> bool:
        """Whether the measured variants are not the deployed ones (``--estimate-with``)."""
        return self.parts.estimate_with is not None and self.plan is None

    @property
    def deployed_menus(self) -> list[list[Choice]]:
        """The choices of each layer that the deployed backend quantizes to, widest first: the menu and ``between``."""
        return _menus(self.space, [choice for choice, _ in self.between])

    @property
    def game_menus(self) -> list[list[Choice]]:
        """The choices of each layer that are measured, widest first."""
        return _menus(self.game_space) if self.measures_another_backend else self.deployed_menus

    @property
    def game_backend(self) -> Backend:
        """The backend of the measured variants."""
        return self.parts.estimate_with if self.measures_another_backend and self.parts.estimate_with else (
            self.parts.backend)

    def variants_key(self, backend: Backend, menus: Sequence[Sequence[Choice]]) -> VariantsKey:
        """The identity of a backend's variants. A backend that reads activations gets those behind layers at the widest
        of their ``menus``."""
        calibration, prefix = None, ""
        if backend.needs:
            calibration = _text_key(self.calibration)
            prefix = digest_of(sorted([linear.name, *([menu[0].bits, menu[0].group_size] if menu else [])]
                                      for layer, menu in zip(self.space.everyone, menus, strict=True)
                                      for linear in layer.linears))
        return VariantsKey(self.source.digest, self.config.dtype, type(backend).__module__, asdict(backend.options),
                           versions(self.libraries), code_digest(backend, core=MAKES_VARIANTS), calibration, prefix,
                           self.config.model)

    @cached_property
    def deployed_key(self) -> VariantsKey:
        """The identity of the deployed variants."""
        return self.variants_key(self.parts.backend, self.deployed_menus)

    def losses_key(self, space: SearchSpace, game: Windows | None) -> LossesKey:
        """The identity of losses of picks of a space on calibration windows."""
        variants = self.variants_key(self.game_backend, self.game_menus) if space is self.game_space else (
            self.deployed_key)
        return LossesKey(variants, space.fingerprint, self.config.value, code_digest(), _text_key(self.calibration),
                         _text_key(game))

    @property
    def game_windows(self) -> Windows | None:
        """The first calibration windows, on which the game is played."""
        return self.calibration.first(self.config.game_windows) if self.calibration else None

    def require_text(self) -> None:
        """Raises ImpqError if the run reads no calibration text, so that there is no game."""
        if self.calibration is None:
            raise ImpqError(f"estimator '{self.config.estimator}' reads no calibration text, so there is no game: "
                            "choose one that reads it, such as spqe")

    @property
    def slopes_key(self) -> SlopesKey:
        """The identity of gradients."""
        return SlopesKey(self.losses_key(self.game_space, self.game_windows), _text_key(self.probed))

    @property
    def scores_key(self) -> ScoresKey:
        """The identity of held-out scores."""
        return ScoresKey(self.deployed_key, TextKey(self.evaluation.digest, str(self.evaluation)),
                         tuple(layer.name for layer in self.space.everyone))

    @cached_property
    def key(self) -> RunKey:
        """The identity of the run.

        Raises:
            ImpqError: a file that an option names cannot be read.
        """
        parts = self.parts
        slots = {slot: getattr(parts, slot) for slot in slots_of(self.config)}
        return RunKey(self.losses_key(self.game_space, self.game_windows), self.deployed_key,
                      TextKey(self.evaluation.digest, str(self.evaluation)), self.space.fingerprint, self.budget_bytes,
                      {slot: part_facts(getattr(self.config, slot), part) for slot, part in slots.items()},
                      code_digest(*slots.values()), self.config.seed, self.config.refine,
                      digest_of(self.plan.pick.tolist()) if self.plan else "")

    def planned(self, config: RunConfig, plugins: Plugins) -> Prepared:
        """The same model, layers, estimator and texts with a configuration's surrogate, allocator and budget.

        Raises:
            ImpqError: the budget is out of reach, or a name or option is wrong.
        """
        parts = Parts.build(config, plugins)
        for part in (parts.surrogate, parts.allocator):
            part.check_space(self.game_space)
        budget = parts.wanted
        resolved = replace(self.config, surrogate=config.surrogate, allocator=config.allocator, budget=str(budget),
                           options=parts.options())
        return replace(self, config=resolved, parts=parts, budget_bytes=budget.resolve(self.space))

    @property
    def game_budget(self) -> int:
        """The budget in the game's space: at the same share of the way from all-narrowest to all-widest."""
        return self.space.carry_over(self.budget_bytes, self.game_space)

    @property
    def spare(self) -> Windows | None:
        """Calibration windows outside those of the game and of a refinement's referee."""
        used = self.config.game_windows * (2 if self.config.refine else 1)
        return self.calibration.part(used, len(self.calibration.ids)) if self.calibration else None

    @property
    def probed(self) -> Windows | None:
        """Calibration windows of gradients and activations: all but those of a refinement's referee, or the first
        ``probe_windows`` of them."""
        if self.calibration is None:
            return None
        config, ids = self.config, self.calibration.ids
        games = 2 if config.refine else 1
        kept = np.concatenate([ids[:config.game_windows], ids[config.game_windows * games:]])
        return replace(self.calibration, ids=kept[:config.probe_windows or len(kept)])


def _menus(space: SearchSpace, between: Sequence[Choice] = ()) -> list[list[Choice]]:
    menu = sorted([*space.choices, *between], reverse=True)
    return [menu] * len(space) + [[pin.choice] if pin.choice else [] for pin in space.pinned]


def _text_key(windows: Windows | None) -> TextKey | None:
    return TextKey(windows.digest, str(windows)) if windows else None


def prepare(config: RunConfig, plugins: Plugins, trust: Trust = NO_TRUST, calibrate: bool = True,
            source: ModelSource | None = None) -> Prepared:
    """Resolve and check a configuration: names, options, files, sizes, budget, texts, weights. Writes nothing.

    Args:
        config: the configuration.
        plugins: the source of the parts.
        trust: the permissions of the command line.
        calibrate: whether to read the calibration text; not needed if nothing is measured or quantized.
        source: the model, if it was located and its weights were checked before.

    Raises:
        ImpqError: a value is wrong, or a file is missing or damaged.
    """
    parts = Parts.build(config, plugins)
    calibrate = calibrate and parts.needs_calibration
    if calibrate:
        check_source(config.calibration.source, "calibration")
    check_source(config.evaluation.source, "evaluation")
    source = source or locate_model(config.model, trust.remote_code)
    skeleton = source.skeleton()
    layers = layers_of(skeleton, parts.granularity)
    measured = parts.estimate_with if not config.plan else None  # a given plan is measured as it will be deployed
    dense = unstorable(layers, parts.backend, parts.menu)
    if measured:
        dense = unstorable(layers, measured, parts.game_menu) | dense
    covered = coverage(skeleton, layers, dense)
    if not config.partial:
        covered.require(config.model, dense)
    space = search_space(layers, parts.backend, parts.menu, config.pins, config.exclude, dense)
    game_space = (search_space(layers, measured, parts.game_menu, config.pins, config.exclude, dense) if measured
                  else space)
    if dense:
        warnings.warn(f"{len(dense)} linears stay at 16 bits, {100 * (1 - covered.share):.1f}% of the weights in the "
                      f"blocks (first: {next(iter(dense.values()))})", RuntimeWarning, stacklevel=2)
    for part in (parts.estimator, parts.surrogate, parts.allocator):
        part.check_space(game_space)
    inside = [choice for choice in parts.backend.choices()
              if parts.menu[-1] < choice < parts.menu[0] and choice not in parts.menu]
    between = []
    for choice in inside:
        if unstorable(space.layers, parts.backend, (choice,)):
            continue
        alone = search_space(layers, parts.backend, (choice,), config.pins, config.exclude, dense)
        between.append((choice, alone.high_bytes))
    budget, budget_bytes = str(parts.wanted), parts.wanted.resolve(space)
    plan = Plan.load(Path(config.plan), space) if config.plan else None
    if plan and parts.budget and plan.nbytes > budget_bytes:
        raise UsageError(f"plan {config.plan} takes {plan.nbytes} bytes, more than the {budget_bytes} of --budget "
                         f"{config.budget}: leave out --budget, or give a smaller plan")
    if plan and not parts.budget:  # the plan's size is the budget
        budget, budget_bytes = f"{plan.nbytes}B", plan.nbytes
    tokenizer, vocabulary = source.tokenizer(), skeleton.get_input_embeddings().num_embeddings
    evaluation = draw_windows(config.evaluation, "evaluation", tokenizer, vocabulary)
    calibration = None
    if calibrate:
        calibration = draw_windows(config.calibration, "calibration", tokenizer, vocabulary)
        refuse_overlap(calibration, evaluation)
    source.check_weights()
    dtype = str(resolve_dtype(config.dtype)).removeprefix("torch.")
    resolved = replace(
        config, model=_absolute(config.model), plan=_absolute(config.plan),
        calibration=replace(config.calibration, source=_absolute(config.calibration.source)),
        evaluation=replace(config.evaluation, source=_absolute(config.evaluation.source)),
        bits=tuple(choice.bits for choice in parts.menu), budget=budget, dtype=dtype,
        options=parts.options(), granularity=parts.granularity)
    return Prepared(resolved, parts, source, space, game_space, tuple(between), budget_bytes,
                    2 * rest_parameters(skeleton, layers), plan, calibration, evaluation,
                    tuple(sorted({library for name in {config.backend, config.estimate_with} - {""}
                                  for library in plugins.find("backend", name).needs})), covered.share)


def _absolute(name: str) -> str:
    """An existing file's path made absolute, so that the resolved configuration runs from any folder; any other name
    unchanged."""
    path = os.path.expanduser(name)
    return str(Path(path).absolute()) if name not in ("", "demo") and os.path.exists(path) else name
