"""Everything about a run that can be settled before the weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from impq_core.config import RunConfig
from impq_core.interfaces import Backend
from impq_core.model.layers import layers_of, resolve_dtype, rest_parameters, search_space
from impq_core.model.source import ModelSource, locate_model
from impq_core.model.text import Windows, check_source, draw_windows, refuse_overlap
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.runs.provenance import code_digest, digest_of, versions
from impq_core.space import Choice, SearchSpace
from impq_core.types import Plan


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run of which everything that can be checked without the weights has been checked.

    ``played`` is the space the estimator sees: the layers and widths of ``space`` at the sizes of the backend whose
    variants are measured. ``between`` are the backend's widths between the menu's that uniform references are made
    of, each with its bytes.
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
    calibration: Windows | None
    evaluation: Windows
    libraries: tuple[str, ...]

    @cached_property
    def measured_on(self) -> dict[str, Any]:
        """What decides a loss under a given pick, as plain data: model, variants, text, code."""
        config, played = self.config, self.parts.estimate_with or self.parts.backend
        return {"model": self.config.model, "model_digest": self.source.digest, "dtype": config.dtype,
                "backend": config.backend, "measured_with": config.estimate_with or config.backend,
                "backend_options": asdict(self.parts.backend.options), "measured_options": asdict(played.options),
                "versions": versions(self.libraries),
                "code": code_digest(self.parts.backend, self.parts.estimate_with),
                **({"calibration": str(self.calibration), "calibration_digest": self.calibration.digest}
                   if self.calibration else {})}

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What decides everything that comes out of the run, as plain data."""
        parts = self.parts
        return {**self.measured_on, "seed": self.config.seed, "value": self.config.value,
                "evaluation": str(self.evaluation), "evaluation_digest": self.evaluation.digest,
                "code_of_parts": code_digest(parts.estimator, parts.surrogate, parts.allocator, parts.refiner),
                "space": self.space.fingerprint, "plan_given": digest_of(self.plan.pick.tolist()) if self.plan else ""}

    def planned(self, config: RunConfig, plugins: Plugins) -> Prepared:
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

    def made_of(self, backend: Backend, menus: Sequence[Sequence[Choice]]) -> dict[str, Any]:
        """What decides the variants of a backend, as plain data. ``menus`` are the choices of every layer, widest
        first: where activations matter, those in front of a layer stand at the widest."""
        about = {"model": self.config.model, "model_digest": self.source.digest, "dtype": self.config.dtype,
                 "backend": type(backend).__module__, "options": asdict(backend.options),
                 "versions": versions(self.libraries), "code": code_digest(backend)}
        if backend.needs:
            assert self.calibration is not None
            prefix = [[linear.name, *([menu[0].bits, menu[0].group_size] if menu else [])]
                      for layer, menu in zip(self.space.everyone, menus, strict=True) for linear in layer.linears]
            about |= {"calibration": str(self.calibration), "calibration_digest": self.calibration.digest,
                      "prefix": digest_of(sorted(prefix))}
        return about

    @property
    def played_budget(self) -> int:
        """The budget in the space the estimator sees: the same place between all-low and all-high."""
        if self.played is self.space:
            return self.budget_bytes
        place = (self.budget_bytes - self.space.low_bytes) / max(1, self.space.high_bytes - self.space.low_bytes)
        return round(self.played.low_bytes + place * (self.played.high_bytes - self.played.low_bytes))

    @property
    def spare(self) -> Windows | None:
        """Calibration windows that neither the game nor a refinement's referee takes."""
        taken = self.config.game_windows * (2 if self.config.refine else 1)
        return self.calibration.part(taken, len(self.calibration.ids)) if self.calibration else None

    @property
    def probed(self) -> Windows | None:
        """Calibration windows that are looked at from inside: all but a refinement's referee's, or as many of them as
        asked for."""
        if self.calibration is None:
            return None
        played, config = self.config.game_windows, self.config
        ids = self.calibration.ids
        kept = np.concatenate([ids[:played], ids[played * (2 if config.refine else 1):]])
        return replace(self.calibration, ids=kept[:config.probe_windows or len(kept)])


def prepare(config: RunConfig, plugins: Plugins, calibrate: bool = True) -> Prepared:
    """Resolve and check a configuration: names, options, files, sizes, budget, texts, weights. Writes nothing.

    Args:
        config: what to do.
        plugins: who can do it.
        calibrate: false where nothing is to be measured or quantized: the calibration text is left alone.

    Raises:
        ImpqError: whatever is wrong, in one line.
    """
    parts = Parts.build(config, plugins)
    calibrate = calibrate and parts.needs_calibration
    if calibrate:
        check_source(config.calibration.source, "calibration")
    check_source(config.evaluation.source, "evaluation")
    source = locate_model(config.model, config.trust_remote_code)
    skeleton = source.skeleton()
    layers = layers_of(skeleton, parts.granularity)
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
    budget_bytes = parts.wanted.resolve(space)
    plan = Plan.load(Path(config.plan), space) if config.plan else None
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
        bits=tuple(choice.bits for choice in parts.menu), budget=str(parts.wanted), dtype=dtype,
        options=parts.options(), granularity=parts.granularity)
    return Prepared(resolved, parts, source, space, played, tuple(between), budget_bytes,
                    2 * rest_parameters(skeleton, layers), plan, calibration, evaluation,
                    tuple(sorted({library for name in {config.backend, config.estimate_with} - {""}
                                  for library in plugins.find("backend", name).needs})))


def _absolute(name: str) -> str:
    """A file's path made absolute, so that the resolved configuration runs from anywhere; other names as they are."""
    path = os.path.expanduser(name)
    return str(Path(path).absolute()) if name not in ("", "demo") and os.path.exists(path) else name
