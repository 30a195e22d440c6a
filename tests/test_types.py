from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from impq_core.errors import ImpqError
from impq_core.files import write_npz
from impq_core.testing import planted_space
from impq_core.types import Measurements, Plan, SearchSpace, SensitivityEstimate


def _measurements(space: SearchSpace, losses: list[float]) -> Measurements:
    picks = np.array([[0, 0], [1, 0], [1, 1]])
    return Measurements(space, picks, np.array(losses), path=np.zeros(3), step=np.arange(3), replicate=np.zeros(3),
                        tokens=10, reference_loss=2.0, forwards=1.5)


def test_a_space_knows_its_sizes_and_refuses_nonsense() -> None:
    space = planted_space(4, bits=(4, 3, 2))
    assert space.bytes_of(space.uniform(0)) == space.high_bytes
    assert space.nominal_bits(space.high_bytes) == 4 and space.nominal_bits(space.low_bytes) == 2
    assert space.bits_per_weight(space.high_bytes) == pytest.approx(4)
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))).fingerprint == space.fingerprint
    assert planted_space(5).fingerprint != planted_space(4).fingerprint
    with pytest.raises(ImpqError, match="leave one of the two out"):
        SearchSpace(space.layers, space.choices, space.nbytes[:, ::-1])
    with pytest.raises(ImpqError, match="shape"):
        SearchSpace(space.layers, space.choices, space.nbytes[:2])
    with pytest.raises(ImpqError, match="share a name"):
        SearchSpace(space.layers, (space.choices[0], *space.choices[:2]), space.nbytes)
    with pytest.raises(ImpqError, match=r"0\.\.2"):
        space.check_pick(np.array([0, 1, 2, 3]))


def test_measurements_and_estimates_round_trip(tmp_path: Path) -> None:
    space = planted_space(2)
    measurements = _measurements(space, [0.0, 0.5, 0.7])
    measurements.save(tmp_path / "m.npz")
    again = Measurements.load(tmp_path / "m.npz")
    np.testing.assert_array_equal(again.picks, measurements.picks)
    np.testing.assert_array_equal(again.losses, measurements.losses)
    assert (again.tokens, again.reference_loss, again.forwards) == (10, 2.0, 1.5)
    assert again.space.fingerprint == space.fingerprint and not again.windows.any()
    with np.load(tmp_path / "m.npz") as data:  # a file of before the sets of windows were recorded
        write_npz(tmp_path / "old.npz", {name: data[name] for name in data if name != "windows"})
    assert not Measurements.load(tmp_path / "old.npz").windows.any()
    other = replace(measurements, windows=np.full(3, 2))
    other.save(tmp_path / "m.npz")
    assert Measurements.load(tmp_path / "m.npz").windows.tolist() == [2, 2, 2]
    assert other.part(np.array([0, 2])).windows.tolist() == [2, 2]
    with pytest.raises(ImpqError, match="one set of windows"):
        replace(measurements, windows=np.array([0, 0, 1]))
    with pytest.raises(ImpqError, match="windows must have the shape"):
        replace(measurements, windows=np.zeros(2))
    for pairwise in (None, np.zeros((2, 2, 2, 2))):
        estimate = SensitivityEstimate(space, np.array([[0, 1.0], [0, 2.0]]), pairwise, method="x", forwards=3.0)
        estimate.save(tmp_path / "e.npz")
        back = SensitivityEstimate.load(tmp_path / "e.npz")
        np.testing.assert_array_equal(back.linear, estimate.linear)
        assert (back.pairwise is None) == (pairwise is None)
        assert (back.method, back.forwards) == ("x", 3.0)


def test_an_estimate_says_whether_it_predicts_losses_and_files_that_call_it_nats_still_load(tmp_path: Path) -> None:
    ranking = SensitivityEstimate(planted_space(2), np.array([[0, 1.0], [0, 2.0]]), is_loss=False)
    ranking.save(tmp_path / "e.npz")
    with np.load(tmp_path / "e.npz") as data:
        arrays = {name: data[name] for name in data if name != "is_loss"}
    assert not SensitivityEstimate.load(tmp_path / "e.npz").is_loss
    write_npz(tmp_path / "older.npz", {**arrays, "nats": np.array(False)})
    assert not SensitivityEstimate.load(tmp_path / "older.npz").is_loss
    write_npz(tmp_path / "oldest.npz", arrays)
    assert SensitivityEstimate.load(tmp_path / "oldest.npz").is_loss
    plan = Plan(ranking.space, np.array([0, 1]), ranking.space.high_bytes, is_loss=False)
    plan.save(tmp_path / "plan.json")
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert stored["is_loss"] is False
    del stored["is_loss"]
    (tmp_path / "plan.json").write_text(json.dumps({**stored, "nats": False}))
    assert Plan.load(tmp_path / "plan.json", ranking.space).pick.tolist() == [0, 1]


def test_marginals_and_non_finite_losses() -> None:
    space = planted_space(2)
    values, replicates = _measurements(space, [0.0, 0.5, 0.7]).marginals()
    np.testing.assert_allclose(values[0, :, 0], [0.5, 0.2])
    assert replicates.tolist() == [0]
    with pytest.raises(ImpqError, match="permutation 0, step 1"):
        _measurements(space, [0.0, float("nan"), 0.7]).marginals()


def test_predict_counts_each_pair_once() -> None:
    space = planted_space(3)
    pairwise = np.zeros((3, 2, 3, 2))
    pairwise[0, 1, 2, 1] = pairwise[2, 1, 0, 1] = 0.25
    estimate = SensitivityEstimate(space, np.array([[0, 1.0], [0, 2.0], [0, 4.0]]), pairwise)
    np.testing.assert_allclose(estimate.predict(np.array([[1, 0, 1], [1, 1, 0], [0, 0, 0]])), [5.25, 3.0, 0.0])
    with pytest.raises(ImpqError, match="symmetric"):
        SensitivityEstimate(space, estimate.linear, np.triu(pairwise.reshape(6, 6)).reshape(3, 2, 3, 2))
    with pytest.raises(ImpqError, match="reference"):
        SensitivityEstimate(space, estimate.linear + 1)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_rounding_of_zeros_and_symmetry_is_relative_to_the_scale(scale: float) -> None:
    space, rng = planted_space(3), np.random.default_rng(0)
    linear, pairs = np.zeros((3, 2)), np.zeros((3, 2, 3, 2))
    linear[:, 1] = scale * rng.normal(size=3)
    pairs[:, 1, :, 1] = scale * (np.ones((3, 3)) - np.eye(3))
    off = 1e-9 * scale * rng.normal(size=pairs.shape)
    estimate = SensitivityEstimate(space, linear + off[:, :, 0, 0], pairs + off)
    assert estimate.pairwise is not None
    assert not estimate.linear[:, 0].any() and not estimate.pairwise[:, 0].any()
    np.testing.assert_array_equal(estimate.pairwise, estimate.pairwise.transpose(2, 3, 0, 1))
    assert estimate.predict(np.zeros((1, 3), dtype=int))[0] == 0
    wrong = pairs.copy()
    wrong[0, 1, 2, 1] *= 1.1
    with pytest.raises(ImpqError, match="symmetric"):
        SensitivityEstimate(space, linear, wrong)
    with pytest.raises(ImpqError, match="reference"):
        SensitivityEstimate(space, linear + 0.1 * scale, pairs)


def test_terms_that_are_not_finite_are_refused_with_their_layer() -> None:
    linear = np.array([[0.0, 1.0], [0.0, np.nan]])
    with pytest.raises(ImpqError, match=r"linear term of blocks\.1 is not finite"):
        SensitivityEstimate(planted_space(2), linear)
    with pytest.raises(ImpqError, match="link"):
        SensitivityEstimate(planted_space(2), np.zeros((2, 2)), link=np.array([[0.0, 1.0], [0.0, np.nan]]))


def test_a_size_is_carried_over_to_the_same_place_in_another_space() -> None:
    space, other = planted_space(4, (4, 2)), planted_space(4, (8, 3))
    for share in (0.0, 0.3, 1.0):
        size = round(space.low_bytes + share * (space.high_bytes - space.low_bytes))
        assert space.carry_over(size, space) == size
        place = (space.carry_over(size, other) - other.low_bytes) / (other.high_bytes - other.low_bytes)
        assert place == pytest.approx(share, abs=1e-3)


def test_a_plan_file_can_be_edited_and_applied_again(tmp_path: Path) -> None:
    space = planted_space(3)
    plan = Plan(space, np.array([0, 1, 0]), space.high_bytes, 0.5, 0.4)
    assert plan.gap == pytest.approx(0.1)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path, space).pick.tolist() == [0, 1, 0]
    data = json.loads(path.read_text())
    data["layers"]["blocks.1"]["bits"] = 4
    path.write_text(json.dumps(data))
    assert Plan.load(path, space).pick.tolist() == [0, 0, 0]
    data["layers"]["blocks.1"]["bits"] = 5
    path.write_text(json.dumps(data))
    with pytest.raises(ImpqError, match=r"'blocks\.1' 5 bits"):
        Plan.load(path, space)
    data["layers"] = {"block.1": {"bits": 4, "group_size": 64}}
    path.write_text(json.dumps(data))
    with pytest.raises(ImpqError, match=r"did you mean 'blocks\.1'"):
        Plan.load(path, space)
    path.write_text("[]")
    with pytest.raises(ImpqError, match="cannot read a plan"):
        Plan.load(path, space)
    with pytest.raises(ImpqError, match="more than its budget"):
        Plan(space, np.zeros(3), space.low_bytes)


def test_files_are_whole_or_absent_and_never_pickled(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="pickle"):
        write_npz(tmp_path / "x.npz", {"a": np.array([object()])})
    assert list(tmp_path.iterdir()) == []
