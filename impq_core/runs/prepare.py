"""A run that is ready to load its model: the layout of its layers, the texts, and its identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np

from impq_core.config import RunConfig
from impq_core.errors import ImpqError
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
from impq_core.model.source import ModelSource
from impq_core.model.text import Windows, draw_windows, refuse_overlap
from impq_core.parts import slots_of
from impq_core.plugins import Plugins
from impq_core.runs.layout import Layout, lay_out
from impq_core.space import Choice, SearchSpace
from impq_core.trust import NO_TRUST, Trust


@dataclass(frozen=True, eq=False)
class Prepared(Layout):
    """A run whose configuration, model, weights, texts and budget have been checked.

    Args:
        calibration: None if no part reads calibration text.
        evaluation: the held-out windows.
    """

    calibration: Windows | None
    evaluation: Windows

    def variants_key(self, backend: Backend, menus: Sequence[Sequence[Choice]]) -> VariantsKey:
        """The identity of a backend's variants; if it reads activations, they were collected behind layers at the
        widest of their ``menus``."""
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
        """The identity of the variants that plans are made of."""
        return self.variants_key(self.parts.backend, self.deployed_menus)

    def losses_key(self, space: SearchSpace, game: Windows | None) -> LossesKey:
        """The identity of losses of picks of a space on calibration windows."""
        variants = self.variants_key(self.played_backend, self.played_menus) if space is self.played else (
            self.deployed_key)
        return LossesKey(variants, space.fingerprint, self.config.value, code_digest(), _text_key(self.calibration),
                         _text_key(game))

    @property
    def game_windows(self) -> Windows | None:
        """The first calibration windows, which the game is played on."""
        return self.calibration.first(self.config.game_windows) if self.calibration else None

    def require_text(self) -> None:
        """Raises ImpqError if the run reads no calibration text, so that there is no game."""
        if self.calibration is None:
            raise ImpqError(f"estimator '{self.config.estimator}' reads no text to play on: choose one that does, such "
                            "as spqe")

    @property
    def slopes_key(self) -> SlopesKey:
        """The identity of gradients."""
        return SlopesKey(self.losses_key(self.played, self.game_windows), _text_key(self.probed))

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
        return RunKey(self.losses_key(self.played, self.game_windows), self.deployed_key,
                      TextKey(self.evaluation.digest, str(self.evaluation)), self.space.fingerprint, self.budget_bytes,
                      {slot: part_facts(getattr(self.config, slot), part) for slot, part in slots.items()},
                      code_digest(*slots.values()), self.config.seed, self.config.refine,
                      digest_of(self.plan.pick.tolist()) if self.plan else "")

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


def _text_key(windows: Windows | None) -> TextKey | None:
    return TextKey(windows.digest, str(windows)) if windows else None


def prepare(config: RunConfig, plugins: Plugins, trust: Trust = NO_TRUST, calibrate: bool = True,
            source: ModelSource | None = None) -> Prepared:
    """Resolve and check a configuration: names, options, files, sizes, budget, texts, weights. Writes nothing.

    Args:
        config: the configuration.
        plugins: the source of the parts.
        trust: what the command line permits.
        calibrate: whether the calibration text is read; not needed if nothing is measured or quantized.
        source: the model, if it was located before; its weights are then not read again.

    Raises:
        ImpqError: a value is wrong, or a file is missing or damaged.
    """
    layout = lay_out(config, plugins, trust, calibrate, source)
    tokenizer = layout.source.tokenizer()
    evaluation = draw_windows(config.evaluation, "evaluation", tokenizer, layout.shapes.vocabulary)
    calibration = None
    if calibrate and layout.parts.needs_calibration:
        calibration = draw_windows(config.calibration, "calibration", tokenizer, layout.shapes.vocabulary)
        refuse_overlap(calibration, evaluation)
    layout.source.check_weights()
    return Prepared(**vars(layout), calibration=calibration, evaluation=evaluation)
