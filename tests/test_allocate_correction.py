"""What sums over weights miss: local lines through measured plans, against weighted least squares written otherwise."""

import numpy as np
import pytest

from mpq.allocate.correction import RIDGE, WIDTH, Correction
from mpq.types import MpqError

SUMS = np.array([0.02, 0.05, 0.11, 0.3, 0.9])
LOSSES = np.array([0.024, 0.07, 0.17, 0.61, 1.5])


def line_at(x, y, at):
    """Weighted least squares with a penalty on the slope, as one linear system, for a single query."""
    inside = np.clip(at, x.min(), x.max())
    weight = np.diag(np.exp(-0.5 * ((x - at) / WIDTH) ** 2))
    center = np.trace(weight @ np.diag(x)) / np.trace(weight)
    design = np.stack([np.ones_like(x), x - center], axis=1)
    penalty = np.diag([0.0, RIDGE * WIDTH**2 * np.trace(weight)])
    intercept, slope = np.linalg.solve(design.T @ weight @ design + penalty, design.T @ weight @ y)
    return intercept + slope * (inside - center)


@pytest.mark.parametrize("summed", [0.005, 0.02, 0.08, 0.5, 4.0])
def test_it_is_a_local_line_in_logarithms_within_the_plans(summed):
    x, y = np.log(SUMS), np.log(LOSSES / SUMS)
    found, spread = Correction.fit(SUMS, LOSSES)(np.array([summed]))
    assert found[0] == pytest.approx(summed * np.exp(line_at(x, y, np.log(summed))), rel=1e-9)
    left_out = [y[i] - line_at(np.delete(x, i), np.delete(y, i), x[i]) for i in range(len(x))]
    weight = np.exp(-0.5 * ((x - np.log(summed)) / WIDTH) ** 2)
    assert spread[0] == pytest.approx(np.sqrt(np.sum(weight * np.square(left_out)) / weight.sum()), rel=1e-9)


def test_a_constant_ratio_is_found_at_every_sum_without_spread():
    found, spread = Correction.fit(SUMS, 1.7 * SUMS)(np.array([1e-6, 0.02, 0.4, 50.0]))
    np.testing.assert_allclose(found, 1.7 * np.array([1e-6, 0.02, 0.4, 50.0]), rtol=1e-12)
    np.testing.assert_allclose(spread, 0, atol=1e-12)


def test_far_from_all_plans_the_ratio_is_that_of_the_end():
    correct = Correction.fit(SUMS, LOSSES)
    (nearer, farther), _ = correct(np.array([1e-4, 1e-8]))
    assert farther == pytest.approx(nearer * 1e-4, rel=0.05)  # the weights of the last plans still change


def test_plans_near_a_budget_are_predicted_better_than_by_their_sum():
    """Losses that grow faster than the sum, with 5 % noise: each plan by the others."""
    rng = np.random.default_rng(0)
    summed = np.geomspace(0.01, 1, 12)
    measured = 1.3 * summed * (1 + summed) * np.exp(0.05 * rng.normal(size=12))
    correct = Correction.fit(summed, measured)
    error = lambda log: np.sqrt(np.square(log).mean())
    assert error(correct.left_out) < 0.1 < 0.2 < error(np.log(measured / summed))


def test_what_costs_nothing_is_predicted_to_cost_nothing():
    found, spread = Correction.fit(SUMS, LOSSES)(np.array([0.0, -1e-9]))
    assert found.tolist() == [0.0, 0.0]
    assert np.isfinite(spread).all()


def test_too_few_plans_are_refused():
    with pytest.raises(MpqError, match="3 measured for 3 predicted losses: a power law takes at least 4 plans"):
        Correction.fit(SUMS[:3], LOSSES[:3])
