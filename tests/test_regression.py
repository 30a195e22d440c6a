"""Surrogates fitted by least squares, and their validation, on games with known answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from impq_spqe.sampler import Options, Spqe
from impq_surrogates.auto import Auto
from impq_surrogates.regression import Coverage, Regression, RegressionOptions
from impq_surrogates.shapley import Additive, Covariance

from impq_core.errors import ImpqError
from impq_core.interfaces import Surrogate
from impq_core.space import IntArray, Pinned
from impq_core.testing import PlantedGame, planted_estimate, planted_space
from impq_core.types import Measurements, SensitivityEstimate
from impq_core.validation import Ordering, higher_order_share, near_budget, validate

N, BITS = 8, (4, 3, 2)
SPACE = planted_space(N, BITS)
RNG = np.random.default_rng(5)
COSTS = np.concatenate([np.zeros((N, 1)), RNG.random((N, 2)).cumsum(axis=1)], axis=1) / N
PICKS = np.random.default_rng(9).integers(0, 3, (60, N))


def _additive(pick: IntArray) -> float:
    return float(COSTS[np.arange(N), pick].sum())


def _saturating(pick: IntArray) -> float:
    return float(2.0 * -np.expm1(-2 * COSTS[np.arange(N), pick].sum()))


def _growing(pick: IntArray) -> float:
    return float(np.expm1(1.5 * COSTS[np.arange(N), pick].sum()))


def _interacting(strength: float = 0.3) -> Callable[[IntArray], float]:
    estimate = planted_estimate(3, N, BITS, strength)
    return lambda pick: float(estimate.predict(pick)[0])


def _measured(function: Callable[[IntArray], float], permutations: int = 10, noise: float = 0.0) -> Measurements:
    wobble = np.random.default_rng(1)
    game = PlantedGame(SPACE, lambda pick: function(pick) + noise * wobble.normal())
    return Spqe(Options(permutations, fresh=False)).sample(game, np.random.default_rng(0))


def _error(estimate: SensitivityEstimate, function: Callable[[IntArray], float]) -> float:
    """Root mean square error over random picks, relative to their spread."""
    truth = np.array([function(pick) for pick in PICKS])
    return float(np.sqrt(((estimate.predict(PICKS) - truth) ** 2).mean()) / truth.std())


def test_regression_recovers_additive_and_interacting_games() -> None:
    assert _error(Regression().fit(_measured(_additive)), _additive) < 0.02
    interacting = _interacting()
    measured = _measured(interacting, 60)
    assert _error(Regression().fit(measured), interacting) < 0.05
    assert _error(Additive().fit(measured), interacting) > 0.2


def test_regression_sees_the_sign_of_an_interaction_where_a_covariance_does_not() -> None:
    def game(sign: float) -> Callable[[IntArray], float]:
        return lambda pick: float(0.1 * pick.sum() + sign * 0.5 * (pick[0] == 2) * (pick[1] == 2))
    for sign in (1.0, -1.0):
        measured = _measured(game(sign), 60)
        pairs = Regression(RegressionOptions("identity")).fit(measured).pairwise
        assert pairs is not None and sign * pairs[0, 2, 1, 2] > 0.2
        covariance = Covariance().fit(measured).pairwise
        assert covariance is not None and covariance[0, 2, 1, 2] < 0


def test_links_and_coverage_follow_saturation() -> None:
    measured = _measured(_saturating, 20)
    coverage = Coverage().fit(measured)
    assert _error(coverage, _saturating) < 0.01 < _error(Additive().fit(measured), _saturating)
    growing = _measured(_growing, 20)
    assert _error(Regression().fit(growing), _growing) < 0.05 < _error(Coverage().fit(growing), _growing)
    # A link changes no order: the least score is the least loss.
    assert (np.argsort(coverage.score(PICKS)) == np.argsort(coverage.predict(PICKS))).all()


def test_noise_is_not_fitted() -> None:
    measured = _measured(_additive, 10, noise=0.02)
    assert _error(Regression().fit(measured), _additive) < 0.15


@pytest.mark.parametrize("surrogate", [Additive(), Regression(), Coverage()])
def test_validation_separates_games(surrogate: Surrogate) -> None:
    found = {game.__name__: validate(surrogate.fit, _measured(game, 20)) for game in (_additive, _saturating)}
    assert found["_additive"].explained > 0.98 and found["_additive"].misordered < 0.02
    assert found["_additive"].error < 0.02
    if isinstance(surrogate, Coverage):
        assert found["_saturating"].explained > 0.98
    interactions = validate(surrogate.fit, _measured(_interacting(), 20))
    additive = validate(Additive().fit, _measured(_interacting(), 20))
    assert additive.explained < 0.97
    if isinstance(surrogate, Regression):
        assert interactions.error < additive.error and interactions.explained > additive.explained


def test_a_prior_leaves_only_the_rest_to_be_measured(tmp_path: Path) -> None:
    """Few losses of an interacting game, and the single costs known but for their scale."""
    truth = planted_estimate(3, N, BITS, 0.1)
    known = SensitivityEstimate(SPACE, truth.linear / 3, truth.pairwise / 3, method="a third")
    known.save(tmp_path / "known.npz")
    game = _interacting(0.1)
    measured = _measured(game, 2)
    plain = Regression(RegressionOptions(link="identity"))
    beyond = Regression(RegressionOptions(link="identity", prior=str(tmp_path / "known.npz")))
    assert _error(beyond.fit(measured), game) < 0.05 < _error(plain.fit(measured), game)
    assert "beyond a third" in beyond.fit(measured).method
    beyond.check_space(SPACE)
    with pytest.raises(ImpqError, match=r"known\.npz is no estimate of this model's layers"):
        beyond.check_space(planted_space(N - 1, BITS))
    with pytest.raises(ImpqError, match=r"nowhere\.npz"):
        Regression(RegressionOptions(prior="nowhere.npz")).check_space(SPACE)


def test_validation_cares_for_sizes_near_the_budget() -> None:
    """A game that is additive while few steps are taken, and noise beyond."""
    wobble = np.random.default_rng(2)
    measured = _measured(lambda pick: _additive(pick) + (0.5 * wobble.normal() if pick.sum() > N + 2 else 0.0))
    low, high = SPACE.low_bytes, SPACE.high_bytes
    near = replace(measured, budget_bytes=round(low + 0.85 * (high - low)))
    truth = SensitivityEstimate(SPACE, COSTS)
    assert validate(lambda m: truth, near).misordered == 0 < validate(lambda m: truth, measured).misordered


def test_auto_takes_what_tells_unseen_losses_best() -> None:
    assert "auto: regression" in Auto().fit(_measured(_interacting(), 60)).method
    assert "auto: coverage" in Auto().fit(_measured(_saturating, 10, noise=0.003)).method
    assert "misordered: additive 0%" in Auto().fit(_measured(_additive)).method
    few = _measured(_interacting(), 4)
    assert validate(Regression().fit, few).misordered < validate(Additive().fit, few).misordered
    assert "auto: additive" in Auto().fit(few).method


def test_what_orderings_differ_by_has_a_standard_error_over_draws() -> None:
    rng = np.random.default_rng(0)
    wrong = rng.integers(0, 2, (2, 12, 30)).astype(float)
    draws = np.repeat(np.arange(12), 30)[:, None].repeat(2, axis=1)
    one, other = (Ordering(part.ravel(), draws) for part in wrong)
    difference = (wrong[0] - wrong[1]).mean(axis=1)  # of each draw, as its pairs are with itself
    assert one.minus(other) == pytest.approx((difference.mean(), difference.std(ddof=1) / np.sqrt(12)))
    assert one.minus(one) == (0.0, 0.0)
    few = [Ordering(part[:4].ravel(), draws[:120]) for part in wrong]
    assert few[0].minus(few[1])[1] == np.inf


def test_one_permutation_cannot_be_validated() -> None:
    measured = Spqe(Options(1, antithetic=False)).sample(PlantedGame(SPACE, _additive), np.random.default_rng(0))
    for surrogate in (Regression(), Additive(), Auto()):
        with pytest.raises(ImpqError, match="at least 2 permutations"):
            validate(surrogate.fit, measured)
    with pytest.raises(ImpqError, match="at least 2 permutations"):
        Regression().fit(measured)


@pytest.mark.parametrize("bits", [(4, 2), (4, 3, 2)])
def test_the_share_of_higher_order_separates_games(bits: tuple[float, ...]) -> None:
    layers = 16
    rng = np.random.default_rng(2)
    costs = np.concatenate([np.zeros((layers, 1)), rng.random((layers, len(bits) - 1)).cumsum(axis=1)], axis=1) / layers
    coupled = planted_estimate(3, layers, bits, strength=0.5)

    def additive(pick: IntArray) -> float:
        return float(costs[np.arange(layers), pick].sum())

    games = {"additive": additive, "saturating": lambda pick: float(-np.expm1(-4 * additive(pick))),
             "growing": lambda pick: float(np.expm1(3 * additive(pick))),
             "coupled": lambda pick: float(coupled.predict(pick)[0])}
    for options in (Options(4, fresh=False), Options(12)):
        found = {name: higher_order_share(Spqe(options).sample(
            PlantedGame(coupled.space, game), np.random.default_rng(0))) for name, game in games.items()}
        assert found["additive"].loss < 1e-6 and found["additive"].linked <= found["additive"].loss
        for name in ("saturating", "growing"):
            assert found[name].loss > 0.05 and found[name].linked < 0.01
        assert found["coupled"].loss >= found["coupled"].linked > 0.05


@pytest.mark.parametrize("bits", [(4, 2), (4, 3, 2)])
def test_costs_that_differ_between_texts_are_no_interactions(bits: tuple[float, ...]) -> None:
    """An additive game on every set of windows, with other costs on each."""
    space = planted_space(16, bits)
    costs = np.random.default_rng(0).random(16)
    game = PlantedGame(space, lambda pick: float(costs @ pick), text_noise=0.5)
    measured = Spqe(Options(12)).sample(game, np.random.default_rng(0))
    share = higher_order_share(measured)
    assert share.loss < 1e-6 and share.linked <= share.loss
    mixed = replace(measured, windows=np.zeros(len(measured)))  # as if all losses were of one set
    assert higher_order_share(mixed).loss > 0.02
    truth = SensitivityEstimate(space, np.arange(len(bits)) * costs[:, None])
    quiet = Spqe(Options(12)).sample(PlantedGame(space, lambda pick: float(costs @ pick)), np.random.default_rng(0))
    assert validate(lambda m: truth, quiet).misordered == 0
    assert validate(lambda m: truth, quiet).explained == pytest.approx(1.0)


def test_pairs_are_compared_on_the_same_windows_only() -> None:
    """A surrogate is not wrong about losses that differ by their texts alone."""
    shift = {number: 0.3 * number for number in range(6)}
    game = PlantedGame(SPACE, lambda pick: _additive(pick) + shift[game.set] * float(pick.sum()))
    measured = Spqe(Options(12)).sample(game, np.random.default_rng(0))
    truth = SensitivityEstimate(SPACE, COSTS)
    assert validate(lambda m: truth, measured).misordered == 0
    assert validate(lambda m: truth, replace(measured, windows=np.zeros(len(measured)))).misordered > 0.1


def test_what_too_few_windows_in_common_say_is_unknown() -> None:
    measured = Spqe(Options(12, antithetic=False)).sample(PlantedGame(SPACE, _saturating), np.random.default_rng(0))
    assert np.isnan(higher_order_share(measured).loss) and np.isnan(validate(Additive().fit, measured).misordered)
    level = Spqe(Options(4, fresh=False)).sample(PlantedGame(SPACE, lambda q: 0.1 * float(q.sum())),
                                                 np.random.default_rng(0))
    assert np.isnan(higher_order_share(level).loss)  # picks of one size cost the same, but for rounding


def test_sizes_near_the_budget_count_pinned_layers() -> None:
    measured = _measured(_additive)
    low, high = SPACE.low_bytes, SPACE.high_bytes
    free = replace(measured, budget_bytes=(low + high) // 2)
    pin = Pinned(planted_space(N + 1, BITS).layers[-1], None, 10 * high, 5 * high, 10 * high)
    pinned = replace(measured, space=replace(SPACE, pinned=(pin,)), budget_bytes=(low + high) // 2 + 10 * high)
    assert 0 < near_budget(free).sum() < len(measured)
    np.testing.assert_array_equal(near_budget(pinned), near_budget(free))


@pytest.mark.parametrize("bits", [(4, 2), (4, 3, 2)])
@pytest.mark.parametrize("options", [Options(8, fresh=False), Options(20)])
def test_the_share_of_higher_order_is_that_of_independent_picks(bits: tuple[float, ...], options: Options) -> None:
    layers, draws = 16, 6
    game = planted_estimate(3, layers, bits, strength=0.2)
    rng = np.random.default_rng(0)
    tickets = np.repeat(np.arange(layers), len(bits) - 1)
    size = np.tile(np.arange(1, len(tickets)), 200)
    picks = np.array([np.bincount(rng.permutation(tickets)[:k], minlength=layers) for k in size])
    columns = np.concatenate([size[:, None] == np.unique(size), *(picks == k for k in range(1, len(bits)))], axis=1)
    losses = game.predict(picks)
    within = losses - (np.bincount(size, losses) / np.maximum(np.bincount(size), 1))[size]
    left = losses - columns @ np.linalg.lstsq(columns.astype(float), losses, rcond=1e-9)[0]
    truth = (left**2).sum() / (within**2).sum()
    found = [higher_order_share(Spqe(options).sample(PlantedGame(game.space, lambda q: float(game.predict(q)[0])),
                                                        np.random.default_rng(seed))).loss for seed in range(draws)]
    assert np.mean(found) == pytest.approx(truth, rel=0.35)


def test_the_share_of_higher_order_is_unknown_of_one_draw() -> None:
    measured = _measured(_saturating, permutations=2)
    assert np.isnan(higher_order_share(measured).loss)
    assert np.isnan(higher_order_share(measured.part(np.array([0]))).linked)
    flat = Spqe(Options(4)).sample(PlantedGame(SPACE, lambda pick: 1.0), np.random.default_rng(0))
    assert np.isnan(higher_order_share(flat).loss)


def test_estimates_with_a_link_come_back_from_disk(tmp_path) -> None:  # type: ignore[no-untyped-def]
    estimate = Coverage().fit(_measured(_saturating))
    estimate.save(tmp_path / "e.npz")
    again = SensitivityEstimate.load(tmp_path / "e.npz")
    np.testing.assert_array_equal(again.predict(PICKS), estimate.predict(PICKS))
    with pytest.raises(ImpqError, match="two increasing rows"):
        SensitivityEstimate(SPACE, np.zeros((N, 3)), link=np.array([[0.0, 1.0], [0.0, -1.0]]))
