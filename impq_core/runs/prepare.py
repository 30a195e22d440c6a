"""Preparation of a run: resolves and checks its configuration, model, texts and budget before weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np

from impq_core.config import METER, RunConfig
from impq_core.costs import Metering
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
from impq_core.model.device import hardware
from impq_core.model.source import ModelSource
from impq_core.model.text import Windows, draw_each, draw_windows, refuse_overlap
from impq_core.parts import name_in, slots_of
from impq_core.plugins import Plugins
from impq_core.runs.layout import Layout, lay_out
from impq_core.runs.work import in_sequence
from impq_core.space import Choice, IntArray, SearchSpace
from impq_core.trust import NO_TRUST, Trust

ORDER_STREAM = (1,)
"""Follows the seed of the calibration text in the seed of the order of its windows."""


@dataclass(frozen=True, eq=False)
class Prepared(Layout):
    """A run with checked configuration, model, weights, texts and budget.

    Args:
        calibration: None if no part reads calibration text.
        held_out: the windows of each held-out text.
        search: first window of the search among ``shuffled``, and the one behind its last; None for all. Statistics for
            quantizing are of the whole calibration text either way, so searches on several of its parts share variants.
    """

    calibration: Windows | None
    held_out: tuple[Windows, ...]
    search: tuple[int, int] | None = None

    @property
    def evaluation(self) -> Windows:
        """The windows of the first held-out text."""
        return self.held_out[0]

    def variants_key(self, backend: Backend, menus: Sequence[Sequence[Choice]]) -> VariantsKey:
        """The identity of a backend's variants. A backend that reads activations gets those behind layers at the widest
        of their ``menus``, or behind unquantized ones."""
        calibration, prefix = None, ""
        if backend.needs:
            calibration = TextKey(self.calibration.token_digest, str(self.calibration)) if self.calibration else None
            unquantized = self.config.prefix == "unquantized"
            widest = {linear: backend.stand_in(linear, menu[0]) if menu and not unquantized else None
                      for layer, menu in zip(self.space.everyone, menus, strict=True) for linear in layer.linears}
            prefix = digest_of(sorted([linear.name, *([choice.name, choice.group_size] if choice else [])]
                                      for linear, choice in widest.items()))
        return VariantsKey(self.source.digest, self.config.dtype, hardware(self.device), type(backend).__module__,
                           backend.variant_options(), versions(self.libraries),
                           code_digest(backend, core=MAKES_VARIANTS), calibration, prefix, self.config.model)

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

    @cached_property
    def shuffled(self) -> Windows | None:
        """The calibration windows in the order in which game, referee, gradients and the test of the plan take theirs.

        ``calibration`` has the windows of a text as they follow each other in it. Its first ones would be of the
        beginning of a file and the last ones, which test the plan, of its end, which may be another subject or
        language. Here they are in random order; a window of a mixture changes places with those of its own text.
        """
        text = self.calibration
        if text is None:
            return None
        rng = np.random.default_rng([self.config.calibration.seed, *ORDER_STREAM])
        texts: IntArray = np.zeros(len(text.ids), np.int64) if text.texts is None else text.texts
        order = np.arange(len(texts))
        for number in np.unique(texts):
            places = np.flatnonzero(texts == number)
            order[places] = rng.permutation(places)
        return text.take(order)

    @property
    def searched(self) -> Windows | None:
        """The windows of the search: of games, gradients and the test of a plan; those of ``shuffled``, or a part."""
        return self.shuffled.part(*self.search) if self.shuffled and self.search else self.shuffled

    @property
    def game_windows(self) -> Windows | None:
        """The first windows of the search, on which the game is played."""
        return self.searched.first(self.config.game_windows) if self.searched else None

    @property
    def refiner_windows(self) -> dict[str, Windows]:
        """The windows of a refinement and those of its referee, by the name of the game."""
        count = self.config.game_windows
        assert self.searched is not None
        return {"refinement": self.searched.first(count), "referee": self.searched.part(count, 2 * count)}

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
        return ScoresKey(self.deployed_key, self._held_out_key,
                         tuple(layer.name for layer in self.space.everyone), self.sequence)

    @property
    def _held_out_key(self) -> TextKey:
        return TextKey(" ".join(text.digest for text in self.held_out), "; ".join(map(str, self.held_out)))

    @cached_property
    def sequence(self) -> str:
        """Identity of how plans are quantized in sequence; empty if the table is of the variants of the bank."""
        backend = self.parts.backend
        return digest_of(asdict(backend.options)) if in_sequence(self) else ""

    @cached_property
    def key(self) -> RunKey:
        """The identity of the run.

        Raises:
            ImpqError: a file that an option names cannot be read.
        """
        parts = self.parts
        slots = {slot: parts.meters[slot.removeprefix(METER)] if slot.startswith(METER) else getattr(parts, slot)
                 for slot in slots_of(self.config)}
        return RunKey(self.losses_key(self.game_space, self.game_windows), self.deployed_key,
                      self._held_out_key, self.space.fingerprint, self.budget_bytes,
                      {slot: part_facts(name_in(self.config, slot), part) for slot, part in slots.items()},
                      code_digest(*slots.values()), self.config.seed, self.config.refine, self.config.held_back,
                      digest_of(self.plan.pick.tolist()) if self.plan else "", dict(self.config.limits),
                      digest_of([metering.to_dict() for metering in self.meterings]) if self.meterings else "")

    @property
    def spare(self) -> Windows | None:
        """Calibration windows outside those of the game, of a refinement's referee, and those held back."""
        used = self.config.game_windows + self.config.referee_windows
        if self.searched is None:
            return None
        return self.searched.part(used, len(self.searched.ids) - self.config.held_back)

    @property
    def held_back(self) -> Windows | None:
        """Calibration windows that the search does not read, on which its plan is tested; None if there are none."""
        if self.searched is None or not self.config.held_back:
            return None
        count = len(self.searched.ids)
        return self.searched.part(count - self.config.held_back, count)

    @property
    def held_back_key(self) -> ScoresKey:
        """The identity of scores on the held-back windows."""
        text = _text_key(self.held_back)
        assert text is not None
        return replace(self.scores_key, evaluation=text)

    @property
    def probed(self) -> Windows | None:
        """Calibration windows of gradients and activations: all but those of a refinement's referee and those held
        back, or the first ``probe_windows`` of them."""
        if self.searched is None:
            return None
        config, windows = self.config, np.arange(len(self.searched.ids) - self.config.held_back)
        games = config.game_windows + config.referee_windows
        kept = np.concatenate([windows[:config.game_windows], windows[games:]])
        return self.searched.take(kept[:config.probe_windows or len(kept)])


def _text_key(windows: Windows | None) -> TextKey | None:
    return TextKey(windows.digest, str(windows)) if windows else None


def prepare(config: RunConfig, plugins: Plugins, trust: Trust = NO_TRUST, calibrate: bool = True,
            source: ModelSource | None = None, meterings: Sequence[Metering] | None = None) -> Prepared:
    """Resolve and check a configuration: names, options, files, sizes, budget, texts, weights. Writes nothing.

    Args:
        config: the configuration.
        plugins: the source of the parts.
        trust: the permissions of the command line.
        calibrate: whether to read the calibration text; not needed if nothing is measured or quantized.
        source: the model, if it was located and its weights were checked before.
        meterings: what the meters of the same model and backend found before; by default they are read now.

    Raises:
        ImpqError: a value is wrong, or a file is missing or damaged.
    """
    layout = lay_out(config, plugins, trust, calibrate, source, meterings)
    tokenizer = layout.source.tokenizer()
    held_out = draw_each(config.evaluation, "evaluation", tokenizer, layout.shapes.vocabulary)
    calibration = None
    if calibrate and layout.parts.needs_calibration:
        calibration = draw_windows(config.calibration, "calibration", tokenizer, layout.shapes.vocabulary)
        for text in held_out:
            refuse_overlap(calibration, text)
    layout.source.check_weights()
    return Prepared(**vars(layout), calibration=calibration, held_out=held_out)
