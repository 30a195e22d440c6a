"""What every estimator must do: estimators that play, samplers that only measure, and inspectors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np

from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError
from impq_core.interfaces import Estimator, Game, Inspector, Probe
from impq_core.references import random_plan
from impq_core.space import FloatArray, IntArray, LinearSpec
from impq_core.testing.part import PartSuite
from impq_core.testing.planted import PlantedGame, PlantedProbe, best_pick, planted_estimate, planted_loss
from impq_core.testing.tiny import TinyTable
from impq_core.types import Measurements, SensitivityEstimate

MENUS = ((8.0, 2.0), (8.0, 4.0, 2.0))
"""The menus that estimators are tried with: two widths, and more."""

NOT_FINITE = (float("nan"), float("inf"))
"""Losses and readings of a model that overflows."""


class EstimatorSuite(PartSuite):
    """An ``Estimator``, ``Sampler`` or ``Inspector`` on a tiny model, and, if it plays, on a planted game."""

    part: ClassVar[type[Estimator]]

    def estimate(self, game: Game, probe: Probe, seed: int = 0) -> SensitivityEstimate:
        """The part's estimate from a game or a probe; measurements of a sampler are fitted by least squares."""
        part: Estimator = self.make()
        part.check_space(game.space)
        result = part.measure(game, probe, np.random.default_rng(seed))
        if isinstance(result, SensitivityEstimate):
            return result
        result.require_finite()
        return least_squares(result)

    def on_tiny_model(self, bits: Sequence[float], exclude: tuple[str, ...] = ()) -> tuple[TinyTable,
                                                                                           SensitivityEstimate]:
        """A tiny model and its estimate."""
        table = TinyTable(bits, self.part.default_granularity, exclude)
        return table, self.estimate(table.game, table.game.probe)

    def test_a_model_is_estimated(self) -> None:
        """With two widths and with three: an estimate of the space that was on play, and who made it."""
        for bits in MENUS:
            table, estimate = self.on_tiny_model(bits)
            assert estimate.space.fingerprint == table.space.fingerprint, "the estimate is of another space"
            assert estimate.method, "the estimate does not say who made it (method)"

    def test_a_single_layer_among_pinned_ones_is_estimated(self) -> None:
        """Layers that do not play are in ``space.pinned``; one that plays is enough."""
        _, estimate = self.on_tiny_model(MENUS[1], exclude=("*.0.*", "*.1.*", "*.2.self_attn*", "*.2.mlp.down*")
                                         if issubclass(self.part, Inspector) else ("*.0.*", "*.1.*"))
        assert estimate.linear.shape == (1, 3)

    def test_the_cost_is_what_the_model_did(self) -> None:
        """``forwards`` of an estimate is what the game, or the probe, charged, and that is within 3 % of the floating
        point operations that the model did, over those of one ordinary forward."""
        from impq_core.model.cost import flop_counter

        for bits in MENUS:
            table, estimate = self.on_tiny_model(bits)
            charged = table.game.forwards
            assert np.isclose(estimate.forwards, charged), (
                f"the estimate says {estimate.forwards} forwards, the model was charged {charged}")
            game = table.new_game(table.game.probe)  # whose forward and backward have been counted by now
            before = game.forwards
            with flop_counter() as counter:
                self.estimate(game, game.probe)
            charged, done = game.forwards - before, counter.get_total_flops() / table.forward_flops()
            assert abs(charged - done) <= 0.03 * done, f"{charged:.2f} forwards charged, the model did {done:.2f}"

    def test_the_work_is_forecast(self) -> None:
        """If the estimator has a ``workload``, the forwards of that work are within a fifth of the forwards that it is
        charged, on a model of eight blocks."""
        from impq_core.runs.forecast import work_forwards

        for bits in MENUS:
            table = TinyTable(bits, self.part.default_granularity, blocks=8)
            part: Estimator = self.make()
            work = part.workload(table.space, 1)
            if work is None:
                return
            config = RunConfig(calibration=TextConfig("random bytes", 4, 24), game_windows=4)
            forecast = work_forwards(work, table.shapes(), config, table.space.parameters)
            self.estimate(table.game, table.game.probe)
            charged = table.game.forwards
            assert abs(forecast - charged) <= 0.2 * charged, f"{forecast:.2f} forwards forecast, {charged:.2f} charged"

    def test_every_draw_comes_from_the_generator_given(self) -> None:
        """The same seed makes the same estimate, bit for bit, whatever the global generators say."""
        import torch

        found = []
        for seed in (1, 2):
            np.random.seed(seed)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                found.append(self.on_tiny_model(MENUS[1])[1])
        assert np.array_equal(found[0].linear, found[1].linear), "two runs with one seed differ"
        pairs = [np.asarray(estimate.pairwise, dtype=float) for estimate in found]
        assert np.array_equal(pairs[0], pairs[1], equal_nan=True), "two runs with one seed differ in their pair terms"

    def test_weights_are_left_alone(self) -> None:
        """What a probe hands out is the model's own."""
        table = TinyTable(MENUS[1])
        before = table.digest()
        self.estimate(table.game, table.game.probe)
        assert table.digest() == before, "weights or variants were changed in place"

    def test_what_matters_is_found(self) -> None:
        """If it plays: on a planted additive game without noise, the best plan for the estimate gives away less than a
        quarter of what a random plan does. An inspector is not held to it."""
        if issubclass(self.part, Inspector):
            return
        for bits in MENUS:
            truth = planted_estimate(1, 6, bits, rising=True)
            space, budget = truth.space, (truth.space.low_bytes + truth.space.high_bytes) // 2
            game = PlantedGame(space, planted_loss(truth), probe=PlantedProbe(truth), budget_bytes=budget)
            found, best = (best_pick(e, budget) for e in (self.estimate(game, game.probe), truth))
            regret = float(np.diff(truth.predict(np.stack([best, found])))[0])
            rng = np.random.default_rng(0)
            chance = [random_plan(space, budget, rng) for _ in range(50)]
            usual = float(truth.predict(np.stack(chance)).mean() - truth.predict(best)[0])
            assert regret <= 0.25 * usual, f"{bits}: {regret:.3f} worse than the best plan; a random one, {usual:.3f}"

    def test_losses_that_are_not_finite_make_no_estimate(self) -> None:
        """If it plays: with NaN or infinite losses an ImpqError of one line, or an estimate of finite terms."""
        if issubclass(self.part, Inspector):
            return
        truth = planted_estimate(1, 6, MENUS[1], rising=True)
        loss = planted_loss(truth)
        for bad, layer in itertools.product(NOT_FINITE, range(0, 6, 2)):
            def overflowing(pick: IntArray, bad: float = bad, layer: int = layer) -> float:
                return bad if pick[layer] == 2 else loss(pick)

            game = PlantedGame(truth.space, overflowing, probe=PlantedProbe(truth), budget_bytes=truth.space.low_bytes)
            self._refuses_or_copes(game, game.probe)

    def test_readings_that_are_not_finite_are_refused(self) -> None:
        """If it inspects: a NaN or infinite slope, trace or hidden state is an ImpqError of one line, never a score."""
        if not issubclass(self.part, Inspector):
            return
        for bad in NOT_FINITE:
            table = TinyTable(MENUS[1], "group")
            probe = _Overflowing(table.game.probe, bad)
            refused = self._refuses_or_copes(table.game, cast(Probe, probe))
            assert refused or not probe.was_read, f"a reading of {bad} passed for a score"

    def _refuses_or_copes(self, game: Game, probe: Probe) -> bool:
        """Whether it refuses; fails unless that is done in one line, or the estimate is finite."""
        try:
            estimate = self.estimate(game, probe)
        except ImpqError as error:
            assert str(error) and "\n" not in str(error), f"the refusal is not one line: {error!r}"
            return True
        assert np.isfinite(estimate.linear).all(), "the estimate is not finite"
        return False

    def test_it_looks_only_at_what_it_says_it_needs(self) -> None:
        """Of an inspector: ``needs`` decides what impq prepares."""
        if issubclass(self.part, Inspector):
            table = TinyTable(MENUS[1], "group")
            self.estimate(table.game, _Guarded(table.game.probe, self.part.needs))


class _Overflowing:
    """A probe whose readings of one layer are not finite."""

    def __init__(self, probe: Probe, bad: float) -> None:
        self._probe, self._bad, self.was_read = probe, bad, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._probe, name)

    def slopes(self, at: FloatArray | None = None) -> FloatArray:
        """With the last choice of layer 1 spoiled in one window."""
        self.was_read = True
        slopes = self._probe.slopes(at).copy()
        slopes[0, 1, -1] = self._bad
        return slopes

    def hessian_traces(self, rng: np.random.Generator) -> Mapping[LinearSpec, float]:
        """With one linear's spoiled."""
        self.was_read = True
        traces = dict(self._probe.hessian_traces(rng))
        return {**traces, next(iter(traces)): self._bad}

    def block_states(self) -> Iterator[tuple[int, list[Any], list[Any]]]:
        """With one value of block 1's output spoiled."""
        self.was_read = True
        for index, inputs, outputs in self._probe.block_states():
            outputs = [output.clone() for output in outputs]
            if index == 1:
                outputs[0].view(-1)[0] = self._bad
            yield index, inputs, outputs


class _Guarded:
    """A probe that shows only what was asked for."""

    def __init__(self, probe: Any, needs: frozenset[str]) -> None:
        self._probe, self._needs = probe, needs

    def __getattr__(self, name: str) -> Any:
        wanted = {"block_states": "activations", "slopes": "gradients", "hessian_traces": "gradients"}.get(name)
        assert wanted is None or wanted in self._needs, f"{name} was called, but needs does not say '{wanted}'"
        assert name != "window_tokens" or self._needs, "the text was asked for, but needs is empty"
        return getattr(self._probe, name)


def least_squares(measurements: Measurements) -> SensitivityEstimate:
    """Additive costs of every step (ridge, next to none): enough for a planted additive game."""
    space = measurements.space
    taken = space.steps_taken(measurements.picks).reshape(len(measurements), -1)
    ridge = 1e-9 * np.eye(taken.shape[1])
    steps = np.linalg.solve(taken.T @ taken + ridge, taken.T @ measurements.losses).reshape(len(space), -1)
    linear = np.concatenate([np.zeros((len(space), 1)), steps.cumsum(axis=1)], axis=1)
    return SensitivityEstimate(space, linear, method="least squares", forwards=measurements.forwards)
