"""SPQE and the surrogates from its marginals, on games with known answers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from impq_spqe.sampler import Options, Spqe
from impq_surrogates.shapley import Additive, Covariance, CovarianceOptions, covariance, paper_form

from impq_core.errors import ImpqError, UsageError
from impq_core.space import FloatArray
from impq_core.testing import PlantedGame, planted_estimate, planted_space
from impq_core.types import Measurements

N = 6


def _quadratic(seed: int = 0, n: int = N) -> tuple[PlantedGame, FloatArray, FloatArray]:
    rng = np.random.default_rng(seed)
    a, j = rng.random(n), np.triu(rng.normal(size=(n, n)) * 0.3, 1)
    j = j + j.T
    return PlantedGame(planted_space(n), lambda q: 3.0 + a @ q + 0.5 * q @ j @ q), a, j


def _sample(game: PlantedGame, permutations: int, antithetic: bool = False, seed: int = 0, fresh: bool = False,
            **more: float) -> Measurements:
    return Spqe(Options(permutations, antithetic, fresh=fresh, **more)).sample(game, np.random.default_rng(seed))


def test_each_path_demotes_one_layer_at_a_time_from_all_high_to_all_low() -> None:
    game, *_ = _quadratic()
    m = _sample(game, 3)
    assert len(m) == 3 * (N + 1) and game.evaluations == len(m)
    for path in range(3):
        picks = m.picks[m.path == path]
        assert picks.sum(axis=1).tolist() == list(range(N + 1))
        assert (np.diff(picks, axis=0) >= 0).all()


def test_additive_games_are_recovered_from_one_permutation() -> None:
    costs = np.arange(1.0, N + 1)
    game = PlantedGame(planted_space(N), lambda q: float(costs @ q))
    np.testing.assert_allclose(Additive().fit(_sample(game, 1)).linear[:, 1], costs)


def test_the_plan_settles_before_the_permutations_end() -> None:
    draws = []

    def drift(measurements: Measurements) -> float:
        draws.append(len(np.unique(measurements.replicate)))
        return (np.inf, 0.3, 0.001, 0.2, 0.004, 0.003)[len(draws) - 1]

    game = PlantedGame(planted_space(5), lambda pick: float(pick.sum()))
    m = Spqe(Options(40, settle=0.005)).sample(game, np.random.default_rng(0), drift)
    assert draws == [1, 2, 3, 4, 5, 6] == [*np.unique(m.replicate + 1)]
    assert len(np.unique(Spqe(Options(6, settle=0.005)).sample(game, np.random.default_rng(0)).replicate)) == 3


def test_every_pair_of_orders_has_windows_of_its_own() -> None:
    """Noise that belongs to the windows: with one set it stays in the estimate however many orders are played."""
    space, truth = planted_space(6), np.arange(6) / 6

    def error(fresh: bool) -> float:
        game = PlantedGame(space, lambda pick: float(truth @ pick), noise=1.0)
        m = Spqe(Options(60, antithetic=False, fresh=fresh)).sample(game, np.random.default_rng(0))
        assert game.set == 0
        return float(np.abs(Additive().fit(m).linear[:, 1] - truth).mean())

    assert error(True) < 0.6 * error(False)
    game = PlantedGame(space, lambda pick: 0.0, noise=1.0, sets=3)
    m = Spqe(Options(8)).sample(game, np.random.default_rng(0))
    assert m.windows[m.step == 0].tolist() == [0, 0, 1, 1, 2, 2, 0, 0]  # the fourth pair reads the first set again
    for path in range(8):
        game.redraw(path // 2)
        np.testing.assert_array_equal(game.losses(m.picks[m.path == path]), m.losses[m.path == path])
    plain = Spqe(Options(4, fresh=False)).sample(PlantedGame(space, lambda pick: 0.0), np.random.default_rng(0))
    assert not plain.windows.any()


@pytest.mark.parametrize("bits", [(4, 2), (4, 3, 2)])
def test_sets_of_windows_do_not_pass_for_covariance(bits: tuple[float, ...]) -> None:
    """Costs that differ between texts: pairs of orders on windows of their own have the C of common windows."""
    truth = planted_estimate(3, 8, bits, strength=0.2)
    interacting = lambda pick: float(truth.predict(pick)[0])  # noqa: E731
    found = {}
    for text_noise, fresh in ((0.0, False), (0.0, True), (0.5, True)):
        game = PlantedGame(truth.space, interacting, text_noise=text_noise)
        m = Spqe(Options(8, fresh=fresh)).sample(game, np.random.default_rng(0))
        marginals, replicates = m.marginals()
        values = marginals.reshape(8, -1)
        c = covariance(values, m.windows[m.step == 0])
        np.testing.assert_allclose(c.sum(axis=1), 0, atol=1e-12)
        for replicate in np.unique(replicates):
            totals = values[replicates == replicate].sum(axis=1)
            assert totals[0] == pytest.approx(totals[1])  # an order and its reverse add up to their own set's total
        phi = values.mean(axis=0)
        a, k = paper_form(phi, c, 0.5)
        picks = np.random.default_rng(1).integers(0, 2, (20, values.shape[1]))
        np.testing.assert_allclose(picks @ a + np.einsum("ni,ij,nj->n", picks, k, picks),
                                   picks @ (phi + np.diag(c)) + 0.5 * np.einsum("ni,ij,nj->n", picks, c, picks))
        found[text_noise, fresh] = c
    np.testing.assert_allclose(found[0.5, True], found[0.0, True], atol=1e-12)
    if len(bits) == 2:  # the mean of a pair is the Shapley value, whatever the pair
        np.testing.assert_allclose(found[0.0, True], found[0.0, False], atol=1e-12)
    additive = PlantedGame(truth.space, lambda pick: float(pick.sum()), text_noise=0.5)
    fitted = Covariance().fit(Spqe(Options(8)).sample(additive, np.random.default_rng(0)))
    assert fitted.pairwise is not None and np.abs(fitted.pairwise).max() < 1e-12


def test_orders_alone_on_their_windows_say_nothing_about_covariance() -> None:
    game, *_ = _quadratic()
    with pytest.raises(ImpqError, match="at least 2 permutations on the same calibration windows"):
        Covariance().fit(_sample(game, 6, fresh=True))
    values = np.random.default_rng(0).normal(size=(3, 4))
    np.testing.assert_allclose(covariance(values, np.array([0, 1, 0])), covariance(values[[0, 2]], np.zeros(2, int)))


def test_shapley_values_of_a_saturating_game_by_brute_force() -> None:
    costs = np.array([0.2, 0.5, 1.0, 2.0])
    def value(q: FloatArray) -> float:
        return float(np.log1p(costs @ q))
    exact = np.zeros(4)
    for order in itertools.permutations(range(4)):
        q = np.zeros(4)
        for i in order:
            before = value(q)
            q[i] = 1
            exact[i] += (value(q) - before) / math.factorial(4)
    estimate = Additive().fit(_sample(PlantedGame(planted_space(4), value), 4000))
    assert estimate.stderr is not None
    assert (np.abs(estimate.linear[:, 1] - exact) < 4 * estimate.stderr[:, 1] + 1e-12).all()
    assert estimate.stderr[:, 1].max() < 0.01


def test_one_antithetic_pair_is_exact_for_pair_interactions() -> None:
    game, a, j = _quadratic()
    fitted = Additive().fit(_sample(game, 2, antithetic=True))
    np.testing.assert_allclose(fitted.linear[:, 1], a + 0.5 * j.sum(axis=1))


def test_around_measures_only_picks_of_the_sizes_wanted() -> None:
    game, a, _ = _quadratic()
    spqe = Spqe(Options(40, around=3.0, span=0.4))
    m = spqe.sample(game, np.random.default_rng(0))
    bits = np.array([game.space.nominal_bits(game.space.bytes_of(pick)) for pick in m.picks])
    inside = np.abs(bits - 3.0) <= 0.4
    assert inside.mean() > 0.8 and len(m) < 40 * (N + 1) * 0.6  # two picks of a path at least, also off the mark
    for path in range(40):
        assert (np.diff(m.picks[m.path == path].sum(axis=1)) == 1).all()
    # An additive game is recovered from any part of its orders.
    plain = PlantedGame(game.space, lambda q: float(a @ q))
    np.testing.assert_allclose(Additive().fit(spqe.sample(plain, np.random.default_rng(0))).linear[:, 1], a)
    with pytest.raises(UsageError, match="outside the menu, 2 to 4 bits"):
        Spqe(Options(2, around=4.5)).check_space(game.space)


def test_wider_menus_play_width_steps() -> None:
    space = planted_space(3, bits=(8, 4, 2))
    costs = np.array([[0, 1.0, 5.0], [0, 0.5, 0.6], [0, 2.0, 9.0]])
    game = PlantedGame(space, lambda q: float(costs[np.arange(3), q].sum()))
    m = _sample(game, 2)
    assert len(m) == 2 * 7
    np.testing.assert_allclose(Additive().fit(m).linear, costs)
    np.testing.assert_allclose(Covariance().fit(m).linear, costs, atol=1e-12)


def test_early_stop_when_standard_errors_are_small() -> None:
    game, *_ = _quadratic()
    assert _sample(game, 1000, tolerance=0.2).path.max() < 999
    assert _sample(game, 20, tolerance=1e-9).path.max() == 19


def test_same_seed_same_measurements() -> None:
    game, *_ = _quadratic()
    np.testing.assert_array_equal(_sample(game, 3, seed=5).picks, _sample(game, 3, seed=5).picks)
    assert (_sample(game, 3, seed=5).picks != _sample(game, 3, seed=6).picks).any()


@pytest.mark.parametrize("options", [{"permutations": 0}, {"permutations": 3, "antithetic": True}, {"tolerance": -1.0}])
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Options(**options)  # type: ignore[arg-type]


@given(st.integers(0, 1000), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_identities_of_the_papers_program(seed: int, alpha: float) -> None:
    game, *_ = _quadratic(seed)
    m = _sample(game, 5, seed=seed)
    marginals = m.marginals()[0][:, :, 0]
    total = game.loss(game.space.uniform(1))
    np.testing.assert_allclose(marginals.sum(axis=1), total)  # efficiency
    c = covariance(marginals, np.zeros(len(marginals), dtype=int))
    np.testing.assert_allclose(c.sum(axis=1), 0, atol=1e-9)  # so the rows of C sum to zero
    assert np.linalg.eigvalsh(c).min() > -1e-9
    phi = marginals.mean(axis=0)
    a, k = paper_form(phi, c, alpha)
    estimate = Covariance(CovarianceOptions(alpha)).fit(m)
    picks = np.array(list(itertools.product((0, 1), repeat=N)))
    printed = picks @ a + np.einsum("ni,ij,nj->n", picks, k, picks)
    mean_variance = picks @ (phi + np.diag(c)) + (1 - alpha) * np.einsum("ni,ij,nj->n", picks, c, picks)
    np.testing.assert_allclose(printed, mean_variance, atol=1e-9)
    np.testing.assert_allclose(estimate.predict(picks), printed, atol=1e-9)


def test_alpha_one_is_a_knapsack_of_mean_plus_variance() -> None:
    m = _sample(_quadratic()[0], 5)
    estimate = Covariance(CovarianceOptions(1.0)).fit(m)
    marginals = m.marginals()[0][:, :, 0]
    assert estimate.pairwise is not None and not estimate.pairwise.any()
    np.testing.assert_allclose(estimate.linear[:, 1], marginals.mean(axis=0) + marginals.var(axis=0))


@pytest.mark.parametrize("joint", [0.8, -0.8])
def test_covariance_is_not_interaction(joint: float) -> None:
    game = PlantedGame(planted_space(2), lambda q: float(q.sum() + joint * q[0] * q[1]))
    both = _sample(game, 2, antithetic=True).marginals()[0][:, :, 0]
    assert covariance(both, np.zeros(2, dtype=int))[0, 1] == pytest.approx(-joint**2 / 4)


def test_what_cannot_be_fitted_is_refused() -> None:
    game, *_ = _quadratic()
    with pytest.raises(ImpqError, match="at least 2 permutations"):
        Covariance().fit(_sample(game, 1))
    m = _sample(game, 2)
    cut = m.step < 4
    short = Measurements(m.space, m.picks[cut], m.losses[cut], m.path[cut], m.step[cut], m.replicate[cut], m.tokens,
                         m.reference_loss, m.forwards)
    with pytest.raises(ImpqError, match="cut short"):
        Covariance().fit(short)
    with pytest.raises(ImpqError, match="no permutation reached every step of blocks"):
        Additive().fit(short)


def test_truncated_permutations_measure_before_the_collapse() -> None:
    costs = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    game = PlantedGame(planted_space(N), lambda q: float(min(costs @ q, 1.0)))  # collapses at 1
    m = _sample(game, 60, truncate=0.95)
    assert len(m) < 60 * (N + 1) and (m.losses[m.step == 0] == 0).all()
    ends = [m.losses[m.path == path] for path in range(60)]
    assert all((path[:-1] <= 0.95).all() for path in ends)
    fitted = Additive().fit(m).linear[:, 1]
    whole = Additive().fit(_sample(game, 60)).linear[:, 1]
    overflow = PlantedGame(planted_space(N), lambda q: float(costs @ q) if costs @ q <= 0.95 else np.inf)
    assert np.isfinite(_sample(overflow, 60, truncate=0.95).losses).all()  # infinite is past the collapse too
    # Shapley values of whole permutations are diluted by demotions behind the collapse; these are nearer the costs.
    assert np.abs(fitted - costs).max() < np.abs(whole - costs).max() and fitted[0] > whole[0]
