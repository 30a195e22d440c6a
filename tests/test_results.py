"""Evaluations written and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apart import HEAVY, loaded_after
from hypothesis import given
from hypothesis import strategies as st

from impq_core.errors import ImpqError
from impq_core.results import Evaluation, Row, Score

LOSSES = st.floats(0, 20, allow_nan=False) | st.just(float("nan")) | st.just(float("inf"))


def make(windows: dict[str, list[float]], sizes: dict[str, int], kl: float = 0.1) -> Evaluation:
    rows = []
    for name, losses in windows.items():
        nll = np.array(losses)
        bits = (sizes[name], 3.0, 3.25) if name in sizes else (None, None, None)
        rows.append(Row(name, nll, *bits, Score(nll, kl, 0.9)))
    return Evaluation(tuple(rows), "6 windows of a text", 288).with_lines()


@st.composite
def evaluations(draw: st.DrawFn) -> Evaluation:
    count = draw(st.integers(1, 4))
    names = ["plan", "unquantized", *draw(st.lists(st.sampled_from(["uniform 2", "uniform 3", "uniform 4", "random 1"]),
                                                   unique=True))]
    windows = {name: draw(st.lists(LOSSES, min_size=count, max_size=count)) for name in names}
    sizes = {name: draw(st.integers(1, 10**12)) for name in names if name != "unquantized"}
    return make(windows, sizes, draw(LOSSES))


@given(evaluations())
def test_an_evaluation_is_read_as_it_was_written(evaluation: Evaluation) -> None:
    again = Evaluation.from_dict(json.loads(json.dumps(evaluation.to_dict())))
    assert (again.text, again.tokens) == (evaluation.text, evaluation.tokens)
    for row, same in zip(evaluation.rows, again.rows, strict=True):
        assert (row.name, row.nbytes, row.bits_nominal, row.bits_stored, row.score is None) == (
            same.name, same.nbytes, same.bits_nominal, same.bits_stored, same.score is None)
        np.testing.assert_array_equal(row.window_nll, same.window_nll)
    assert json.dumps(again.to_dict()) == json.dumps(evaluation.to_dict())


def test_lines_are_straight_between_uniform_models() -> None:
    sizes = {"plan": 150, "uniform 2": 100, "uniform 3": 140, "uniform 4": 200}
    evaluation = make({"plan": [3.0, 3.0], "unquantized": [1.0, 1.0], "uniform 2": [5.0, 7.0], "uniform 3": [4.0, 4.0],
                       "uniform 4": [2.0, 3.0]}, sizes)
    np.testing.assert_allclose(evaluation.row("line low-high").window_nll, [3.5, 5.0])
    np.testing.assert_allclose(evaluation.row("line of uniforms").window_nll, [4 - 2 / 6, 4 - 1 / 6])
    difference = evaluation.against_plan(evaluation.row("line low-high"))
    assert difference is not None and difference.mean == pytest.approx(1.25)
    assert difference.stderr == pytest.approx(0.75)  # of 0.5 and 2
    assert evaluation.against_plan(evaluation.rows[0]) is None


@pytest.mark.parametrize("change, said", [
    ({"text": 3}, "'text' as text"), ({"tokens": "many"}, "'tokens' as a whole number"), ({"rows": {}}, "'rows'"),
    ({"rows": []}, "measured plan"), ({"rows": [3]}, "object with a name"),
    ({0: {"bytes": None}}, "measured plan"), ({0: {"bytes": 2.5}}, "row 'plan'.*'bytes'"),
    ({1: {"name": "other"}}, "unquantized"), ({0: {"window_nll": ["x"]}}, "row 'plan'.*'window_nll'"),
    ({0: {"window_nll": []}}, "'window_nll'"), ({0: {"window_nll": [1.0]}}, "different numbers of windows"),
    ({2: {"kl": "small"}}, "row 'uniform 2'.*'kl'"), ({2: {"bits_stored": [1]}}, "row 'uniform 2'.*'bits_stored'"),
    ({3: {"name": "uniform 9"}}, "row 'uniform 9'.*no 'window_nll'")])
def test_what_is_wrong_with_an_evaluation_is_named(change: dict[Any, Any], said: str) -> None:
    windows = {"plan": [3.0, 3.1], "unquantized": [1.0, 1.1], "uniform 2": [5.0, 5.1]}
    data = make(windows, {"plan": 150, "uniform 2": 100}).to_dict()
    for key, value in change.items():
        if isinstance(key, int):
            data["rows"][key] |= value
        else:
            data[key] = value
    with pytest.raises(ImpqError, match=said):
        Evaluation.from_dict(data)


def test_results_need_no_torch(tmp_path: Path) -> None:
    assert loaded_after("import impq_core.results", HEAVY, tmp_path) == []
