"""One run on the real small model and real text: the promise of the README, at a size for tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError
from impq_core.model.demo import Packaged, _fetch
from impq_core.runs.pipeline import run


@pytest.fixture(autouse=True)
def cache() -> None:
    """The user's own cache, to which model and texts are fetched once."""


def test_the_real_model_end_to_end(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        result = run(RunConfig(
            estimator="spqe", granularity="block", bits=(3, 4), budget="3.5bits",
            calibration=TextConfig(windows=8, length=128), game_windows=2,
            evaluation=TextConfig(windows=6, length=128), output=str(tmp_path), tracking_uri="none",
            options={"estimator": {"permutations": 2}, "backend": {"clip_search": False}}))
    finally:
        torch.set_num_threads(1)
    assert len(result.plan.space) == 30 and result.plan.space.parameters == 106_168_320
    nll = {row.name: row.nll for row in result.evaluation.rows}
    assert 2.5 < nll["unquantized"] < 4.0  # a language model on prose, not noise (log of the vocabulary is 10.8)
    assert nll["unquantized"] < nll["uniform 4"] < nll["plan"] < nll["uniform 3"]
    assert result.forwards / len(result.measurements or ()) < 0.6


def test_a_file_with_another_digest_is_refused(tmp_path: Path) -> None:
    wrong = Packaged("exllamav3==1.6.5", "exllamav3/conversion/standard_cal_data/c4.utf8", "0" * 64)
    with pytest.raises(ImpqError, match=r"another c4\.utf8 than expected"):
        _fetch(wrong, tmp_path / "c4.utf8")
    with pytest.raises(ImpqError, match="cannot fetch impq-no-such-package"):
        _fetch(Packaged("impq-no-such-package==9", "x", ""), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
