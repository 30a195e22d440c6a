"""The real small model and real text: one run whose plan of two blocks is between the uniform models, and files that
are not those that were packaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError
from impq_core.model.demo import Packaged, _fetch
from impq_core.runs.pipeline import run

UNPLANNED = ("model.layers.?", "model.layers.1?", "model.layers.2[0-7]")
"""All blocks of the demo model except the last two."""


@pytest.fixture(autouse=True)
def cache() -> None:
    """The user's cache, with the demo model and texts."""


def test_the_real_model_end_to_end(tmp_path: Path) -> None:
    result = run(RunConfig(
        estimator="spqe", granularity="block", bits=(2, 4), budget="3bits", exclude=UNPLANNED,
        calibration=TextConfig(windows=4, length=128), game_windows=2, evaluation=TextConfig(windows=4, length=64),
        dtype="float32", cache=False, output=str(tmp_path), tracking_uri="none",
        options={"estimator": {"permutations": 2}, "backend": {"grid": "min-max"}}))
    assert len(result.plan.space) == 2 and result.plan.space.parameters == 106_168_320
    scores = {row.name: row.score for row in result.evaluation.rows if row.score is not None}
    assert 2.0 < scores["unquantized"].nll < 5.0  # a language model on prose; the log of the vocabulary is 10.8
    # Divergences from the unquantized model differ by factors here; differences of losses this small would be noise.
    assert 0 < 2 * scores["uniform 4"].kl < scores["plan"].kl < scores["uniform 2"].kl
    assert result.forwards < len(result.measurements or ())


def test_a_file_with_another_digest_is_refused(tmp_path: Path) -> None:
    wrong = Packaged("exllamav3==1.6.5", "exllamav3/conversion/standard_cal_data/c4.utf8", "0" * 64)
    with pytest.raises(ImpqError, match=r"another c4\.utf8 than expected"):
        _fetch(wrong, tmp_path / "c4.utf8")
    with pytest.raises(ImpqError, match="cannot fetch impq-no-such-package"):
        _fetch(Packaged("impq-no-such-package==9", "x", ""), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
