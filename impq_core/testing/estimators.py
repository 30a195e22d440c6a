"""Tests of the contract of ``Estimator``: players, samplers and inspectors."""

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
"""Menus of the tests: with two widths, and with more."""

NOT_FINITE = (float("nan"), float("inf"))
"""Losses, slopes, traces and hidden states of a model that overflows."""


class EstimatorSuite(PartSuite):
    """Tests a ``GameEstimator``, ``Sampler`` or ``Inspector`` on a tiny model, and the first two on a planted game."""

    part: ClassVar[type[Estimator]]

    def estimate(self, game: Game, probe: Probe, seed: int = 0) -> SensitivityEstimate:
        """The part's estimate; measurements of a sampler are fitted by least squares."""
        part: Estimator = self.make()
        part.check_space(game.space)
        result = part.measure(game, probe, np.random.default_rng(seed))
        if isinstance(result, SensitivityEstimate):
            return result
        result.require_finite()
        return least_squares(result)

    def on_tiny_model(self, bits: Sequence[float], exclude: tuple[str, ...] = ()) -> tuple[TinyTable,
                                                                                           SensitivityEstimate]:
        """A tiny model and the part's estimate of it."""
        table = TinyTable(bits, self.part.default_granularity, exclude)
        return table, self.estimate(table.game, table.game.probe)

    def test_a_model_is_estimated(self) -> None:
        """With two and three widths, the estimate is of the game's space and has a method."""
        for bits in MENUS:
            table, estimate = self.on_tiny_model(bits)
            assert estimate.space.fingerprint == table.space.fingerprint, "the estimate is of another space"
            assert estimate.method, "the estimate has no method"

    def test_a_single_layer_among_pinned_ones_is_estimated(self) -> None:
        """A space with one free layer, all others in ``space.pinned``, is estimated."""
        _, estimate = self.on_tiny_model(MENUS[1], exclude=("*.0.*", "*.1.*", "*.2.self_attn*", "*.2.mlp.down*")
                                         if issubclass(self.part, Inspector) else ("*.0.*", "*.1.*"))
        assert estimate.linear.shape == (1, 3)

    def test_the_cost_is_what_the_model_did(self) -> None:
        """``forwards`` of an estimate equals the charge of the game or the probe, which is within 3 % of the model's
        floating point operations divided by those of one ordinary forward."""
        from impq_core.model.cost import flop_counter

        for bits in MENUS:
            table, estimate = self.on_tiny_model(bits)
            charged = table.game.forwards
            assert np.isclose(estimate.forwards, charged), (
                f"the estimate has {estimate.forwards} forwards, but {charged} were charged")
            game = table.new_game(table.game.probe)  # this probe has already counted its forward and backward
            before = game.forwards
            with flop_counter() as counter:
                self.estimate(game, game.probe)
            charged, counted = game.forwards - before, counter.get_total_flops() / table.forward_flops()
            assert abs(charged - counted) <= 0.03 * counted, (
                f"{charged:.2f} forwards were charged, {counted:.2f} computed")

    def test_the_work_is_forecast(self) -> None:
        """If the estimator has a ``workload``, the forwards of that work are within a fifth of the forwards that it is
        charged, on a model of eight blocks."""
        from impq_core.runs.work import work_forwards

        for bits in MENUS:
            table = TinyTable(bits, self.part.default_granularity, blocks=8)
            part: Estimator = self.make()
            work = part.workload(table.space, 1)
            if work is None:
                return
            config = RunConfig(calibration=TextConfig("random bytes", 4, 24), game_windows=4)
            forecast = work_forwards(work, table.shapes(), config, table.space)
            self.estimate(table.game, table.game.probe)
            charged = table.game.forwards
            assert abs(forecast - charged) <= 0.2 * charged, f"{forecast:.2f} forwards forecast, {charged:.2f} charged"

    def test_every_draw_comes_from_the_generator_given(self) -> None:
        """The same seed gives the same estimate, bit for bit, for any state of the global generators."""
        import torch

        estimates = []
        for seed in (1, 2):
            np.random.seed(seed)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                estimates.append(self.on_tiny_model(MENUS[1])[1])
        assert np.array_equal(estimates[0].linear, estimates[1].linear), "two runs with one seed differ"
        pairs = [np.asarray(estimate.pairwise, dtype=float) for estimate in estimates]
        assert np.array_equal(pairs[0], pairs[1], equal_nan=True), "two runs with one seed differ in their pair terms"

    def test_weights_are_left_alone(self) -> None:
        """The estimator changes no tensor of the model: a probe returns weights without a copy."""
        table = TinyTable(MENUS[1])
        before = table.digest()
        self.estimate(table.game, table.game.probe)
        assert table.digest() == before, "weights or variants were changed in place"

    def test_what_matters_is_found(self) -> None:
        """On a planted additive game without noise, the best plan for the estimate has at most a quarter of the regret
        of a random plan. Inspectors are not tested."""
        if issubclass(self.part, Inspector):
            return
        for bits in MENUS:
            truth = planted_estimate(1, 6, bits, rising=True)
            space, budget = truth.space, (truth.space.low_bytes + truth.space.high_bytes) // 2
            game = PlantedGame(space, planted_loss(truth), probe=PlantedProbe(truth), budget_bytes=budget)
            pick, best = (best_pick(e, budget) for e in (self.estimate(game, game.probe), truth))
            regret = float(np.diff(truth.predict(np.stack([best, pick])))[0])
            rng = np.random.default_rng(0)
            random_picks = [random_plan(space, budget, rng) for _ in range(50)]
            random_regret = float(truth.predict(np.stack(random_picks)).mean() - truth.predict(best)[0])
            assert regret <= 0.25 * random_regret, (
                f"{bits}: regret {regret:.3f}, of a random plan {random_regret:.3f}")

    def test_losses_that_are_not_finite_make_no_estimate(self) -> None:
        """With NaN or infinite losses, a player or sampler raises an ImpqError of one line or returns finite terms."""
        if issubclass(self.part, Inspector):
            return
        truth = planted_estimate(1, 6, MENUS[1], rising=True)
        loss = planted_loss(truth)
        for bad, layer in itertools.product(NOT_FINITE, range(0, 6, 2)):
            def overflowing(pick: IntArray, bad: float = bad, layer: int = layer) -> float:
                return bad if pick[layer] == 2 else loss(pick)

            game = PlantedGame(truth.space, overflowing, probe=PlantedProbe(truth), budget_bytes=truth.space.low_bytes)
            self._refuses(game, game.probe)

    def test_readings_that_are_not_finite_are_refused(self) -> None:
        """An inspector that reads a NaN or infinite slope, trace or hidden state raises an ImpqError of one line."""
        if not issubclass(self.part, Inspector):
            return
        for bad in NOT_FINITE:
            table = TinyTable(MENUS[1], "group")
            probe = _Overflowing(table.game.probe, bad)
            refused = self._refuses(table.game, cast(Probe, probe))
            assert refused or not probe.was_read, f"a reading of {bad} gave a score"

    def _refuses(self, game: Game, probe: Probe) -> bool:
        """Whether the estimator raises an ImpqError; fails if its message is not one line, or an estimate is not
        finite."""
        try:
            estimate = self.estimate(game, probe)
        except ImpqError as error:
            assert str(error) and "\n" not in str(error), f"the refusal is not one line: {error!r}"
            return True
        assert np.isfinite(estimate.linear).all(), "the estimate is not finite"
        return False

    def test_it_looks_only_at_what_it_says_it_needs(self) -> None:
        """An inspector calls only those methods of the probe that its ``needs`` names."""
        if issubclass(self.part, Inspector):
            table = TinyTable(MENUS[1], "group")
            self.estimate(table.game, _Guarded(table.game.probe, self.part.needs))


class _Overflowing:
    """A probe with a value that is not finite in every reading."""

    def __init__(self, probe: Probe, bad: float) -> None:
        self._probe, self._bad, self.was_read = probe, bad, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._probe, name)

    def slopes(self, at: FloatArray | None = None) -> FloatArray:
        """Slopes with a value that is not finite for the last choice of layer 1 in the first window."""
        self.was_read = True
        slopes = self._probe.slopes(at).copy()
        slopes[0, 1, -1] = self._bad
        return slopes

    def token_squares(self, at: FloatArray | None = None) -> FloatArray:
        """Squares with a value that is not finite for the last choice of layer 1 in the first window."""
        self.was_read = True
        squares = self._probe.token_squares(at).copy()
        squares[0, 1, -1] = self._bad
        return squares

    def absolute_slopes(self, at: FloatArray | None = None) -> FloatArray:
        """Sums with a value that is not finite for layer 1 in the first window."""
        self.was_read = True
        sums = self._probe.absolute_slopes(at).copy()
        sums[0, 1] = self._bad
        return sums

    def hessian_traces(self, rng: np.random.Generator) -> Mapping[LinearSpec, float]:
        """Traces with a value that is not finite for the first linear."""
        self.was_read = True
        traces = dict(self._probe.hessian_traces(rng))
        return {**traces, next(iter(traces)): self._bad}

    def output_curvature(self, groups: int = 1) -> Iterator[tuple[LinearSpec, Any]]:
        """Curvatures with a value that is not finite for every linear."""
        self.was_read = True
        for linear, gram in self._probe.output_curvature(groups):
            gram = gram.clone()
            gram.view(-1)[0] = self._bad
            yield linear, gram

    def first_outputs(self, weights: Any = None) -> Iterator[tuple[int, dict[LinearSpec, list[Any]]]]:
        """Outputs with a value that is not finite in block 1."""
        self.was_read = True
        for index, outputs in self._probe.first_outputs(weights):
            outputs = {linear: [part.clone() for part in parts] for linear, parts in outputs.items()}
            if index == 1:
                next(iter(outputs.values()))[0].view(-1)[0] = self._bad
            yield index, outputs

    def block_states(self) -> Iterator[tuple[int, list[Any], list[Any]]]:
        """States with a value that is not finite in the output of block 1."""
        self.was_read = True
        for index, inputs, outputs in self._probe.block_states():
            outputs = [output.clone() for output in outputs]
            if index == 1:
                outputs[0].view(-1)[0] = self._bad
            yield index, inputs, outputs


class _Guarded:
    """A probe that fails if a method is called that ``needs`` does not name."""

    def __init__(self, probe: Any, needs: frozenset[str]) -> None:
        self._probe, self._needs = probe, needs

    def __getattr__(self, name: str) -> Any:
        need = {"block_states": "activations", "first_outputs": "activations", **dict.fromkeys((
            "slopes", "token_squares", "absolute_slopes", "hessian_traces", "output_curvature"), "gradients")}.get(name)
        assert need is None or need in self._needs, f"{name} was called, but needs does not name '{need}'"
        assert name != "window_tokens" or self._needs, "window_tokens was read, but needs is empty"
        return getattr(self._probe, name)


def least_squares(measurements: Measurements) -> SensitivityEstimate:
    """Additive costs of the width steps by least squares, with a negligible ridge penalty."""
    space = measurements.space
    taken = space.steps_taken(measurements.picks).reshape(len(measurements), -1)
    ridge = 1e-9 * np.eye(taken.shape[1])
    steps = np.linalg.solve(taken.T @ taken + ridge, taken.T @ measurements.losses).reshape(len(space), -1)
    linear = np.concatenate([np.zeros((len(space), 1)), steps.cumsum(axis=1)], axis=1)
    return SensitivityEstimate(space, linear, method="least squares", forwards=measurements.forwards)
