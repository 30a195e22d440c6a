"""Statistics that several components share."""

import math

import numpy as np
import pytest

from impq_core.statistics import standard_error


def test_the_standard_error_of_a_mean() -> None:
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)
    assert standard_error(np.array([2.0, 2.0, 2.0])) == 0.0


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf, 2.0]])
def test_no_standard_error_from_fewer_than_two_or_values_that_are_not_finite(values: list[float]) -> None:
    assert math.isnan(standard_error(np.array(values)))
