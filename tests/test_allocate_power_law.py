"""`mpq.allocate.power_law`: known laws come back, the spread is that of the noise, bad plans are refused."""

import numpy as np
import pytest

from mpq.allocate import PowerLaw
from mpq.types import MpqError

SUMS = np.geomspace(0.01, 1.0, 40)


@pytest.mark.parametrize(("factor", "exponent"), [(1.0, 1.0), (3.0, 1.4), (0.5, 0.7)])
def test_an_exact_law_comes_back(factor: float, exponent: float) -> None:
    law = PowerLaw.fit(SUMS, factor * SUMS**exponent)
    assert law.factor == pytest.approx(factor)
    assert law.exponent == pytest.approx(exponent)
    assert law.spread == pytest.approx(0, abs=1e-12)
    assert law.num_plans == 40
    np.testing.assert_allclose(law(SUMS), factor * SUMS**exponent, rtol=1e-9)


def test_the_spread_estimates_the_noise() -> None:
    rng = np.random.default_rng(0)
    spreads = [PowerLaw.fit(SUMS, SUMS * np.exp(0.1 * rng.normal(size=40))).spread for _ in range(200)]
    assert np.sqrt(np.mean(np.square(spreads))) == pytest.approx(0.1, rel=0.03)  # unbiased in the square


def test_units_of_the_sum_do_not_matter() -> None:
    measured = 2 * SUMS**1.2 * np.exp(0.1 * np.sin(np.arange(40)))
    np.testing.assert_allclose(
        PowerLaw.fit(1e-6 * SUMS, measured)(1e-6 * SUMS), PowerLaw.fit(SUMS, measured)(SUMS), rtol=1e-9
    )


def test_a_sum_that_is_not_positive_predicts_no_loss() -> None:
    law = PowerLaw.fit(SUMS, SUMS)
    assert law(np.array([-1.0, 0.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("predicted", "measured", "message"),
    [
        (SUMS[:3], SUMS[:3], "3 measured for 3 predicted losses: a power law takes at least 4 plans"),
        (SUMS, SUMS[:39], "39 measured for 40 predicted losses"),
        (SUMS - 0.02, SUMS, "losses above zero"),
        (SUMS, np.where(SUMS > 0.5, np.nan, SUMS), "losses above zero"),
        (np.ones(40), SUMS, "all plans have the same predicted loss"),
    ],
)
def test_bad_plans_are_refused(predicted: np.ndarray, measured: np.ndarray, message: str) -> None:
    with pytest.raises(MpqError, match=message):
        PowerLaw.fit(predicted, measured)
