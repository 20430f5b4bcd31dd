"""`mpq.allocate.surrogate`: it sees what sums cannot, says how sure it is, and equals a dense computation."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from mpq.allocate import PowerLaw, Problem, Refine, Surrogate, refit, solve_frontier
from mpq.allocate.surrogate import RESIDUAL, WORTH
from mpq.types import MpqError
from tests.allocate_cases import graded_problem, make_problem

GROUPS, SCHEMES = 12, 4


@pytest.fixture
def problem() -> Problem:
    return graded_problem(GROUPS, SCHEMES)


def draw(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(SCHEMES, size=(count, GROUPS))


def true_loss(problem: Problem, plans: np.ndarray) -> np.ndarray:
    """Errors of neighbours go together, and outputs saturate."""
    error = np.sqrt(problem.parts(plans))
    squared = np.square(error).sum(axis=1) + 1.2 * (error[:, 1:] * error[:, :-1]).sum(axis=1)
    return 3 * (1 - np.exp(-squared))


def tau(a: np.ndarray, b: np.ndarray) -> float:
    return float(kendalltau(a, b)[0])


def off(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(np.log(predicted / true).std())


def test_pairs_and_saturation_are_seen_that_no_table_holds(problem: Problem) -> None:
    plans, others = draw(160), draw(300, seed=3)
    measured, expected = true_loss(problem, plans), true_loss(problem, others)
    found = Surrogate(problem, plans, measured).predict(others)[0]
    corrected = refit(problem, plans, measured).predict(others)
    assert off(found, expected) < off(corrected, expected) / 2
    assert 1 - tau(found, expected) < (1 - tau(corrected, expected)) / 2
    few = Surrogate(problem, plans[:20], measured[:20]).predict(others)[0]
    assert off(found, expected) < off(few, expected) / 2


def test_an_exact_law_comes_back(problem: Problem) -> None:
    plans, others = draw(40), draw(50, seed=3)
    law = lambda which: 3 * problem.parts(which).sum(axis=1) ** 1.3
    found, spread = Surrogate(problem, plans, law(plans)).predict(others)
    np.testing.assert_allclose(found, law(others), rtol=0.02)
    assert spread.max() < RESIDUAL


def test_the_spread_holds_what_it_promises(problem: Problem) -> None:
    within = []
    for seed in range(10):
        plans, others = draw(60, seed=10 + seed), draw(200, seed=50 + seed)
        noise = np.exp(0.1 * np.random.default_rng(seed).normal(size=260))
        measured = true_loss(problem, np.concatenate([plans, others])) * noise
        found, spread = Surrogate(problem, plans, measured[:60]).predict(others)
        within.append((np.abs(np.log(found / measured[60:])) < 1.96 * spread).mean())
    assert 0.9 < np.mean(within) < 0.99


def test_far_from_all_plans_it_is_less_sure(problem: Problem) -> None:
    plans = draw(60) % 2
    found = Surrogate(problem, plans, true_loss(problem, plans))
    near, far = (found.predict(which)[1] for which in (draw(50, seed=3) % 2, 2 + draw(50, seed=3) % 2))
    assert np.median(far) > 2 * np.median(near)


def test_one_point_of_the_grid_is_the_textbook_regression(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the posterior of one joint Gaussian whose line has a wide prior instead of a flat one."""
    for name, value in (("CANDIDATES", [2.0]), ("SMOOTH", [30.0]), ("LENGTHS", [1.5])):
        monkeypatch.setattr(f"mpq.allocate.surrogate.{name}", value)
    plans, others = draw(25), draw(9, seed=3)
    y = np.log(true_loss(problem, plans))
    found, spread = Surrogate(problem, plans, np.exp(y)).predict(others)

    both = np.concatenate([plans, others])
    parts = problem.parts(both)
    total = parts.sum(axis=1)
    shares = np.zeros((len(both), GROUPS, SCHEMES))
    for plan, group in np.ndindex(both.shape):
        shares[plan, group, both[plan, group]] = parts[plan, group] / total[plan]
    shares = shares.reshape(len(both), -1) - shares[:25].reshape(25, -1).mean(axis=0)
    shares /= np.sqrt((shares[:25] ** 2).sum(axis=1).mean())
    squared = ((np.sqrt(parts)[:, None] - np.sqrt(parts)[None]) ** 2).sum(axis=-1)
    squared /= squared[:25, :25].mean()
    line = np.stack([np.ones(len(both)), np.log(total) - np.log(total[:25]).mean()], axis=1)
    covariance = 2.0 * shares @ shares.T + 30.0 * np.exp(-squared / (2 * 1.5**2)) + 1e7 * line @ line.T
    noisy = covariance + np.eye(len(both))
    gain = np.linalg.solve(noisy[:25, :25], covariance[:25, 25:]).T
    mean = gain @ y
    rest = np.linalg.inv(noisy[:25, :25])
    squares = y @ rest @ y + WORTH * RESIDUAL**2
    variance = squares / (25 - 2 + WORTH) * (np.diag(noisy)[25:] - (gain * covariance[25:, :25]).sum(axis=1))
    np.testing.assert_allclose(np.log(found), mean, atol=1e-4)
    np.testing.assert_allclose(spread, np.sqrt(variance), rtol=1e-3)


def test_neither_order_nor_unit_matters(problem: Problem) -> None:
    plans, others = draw(30), draw(20, seed=3)
    measured = true_loss(problem, plans)
    found, spread = Surrogate(problem, plans, measured).predict(others)
    order = np.random.default_rng(7).permutation(30)
    scaled, same = Surrogate(problem, plans[order], 1e3 * measured[order]).predict(others)
    np.testing.assert_allclose(scaled, 1e3 * found, rtol=1e-6)
    np.testing.assert_allclose(same, spread, rtol=1e-6)


def test_a_search_takes_it_for_a_measurement(problem: Problem) -> None:
    plans = draw(160)
    found = Surrogate(problem, plans, true_loss(problem, plans))
    start = solve_frontier(problem).at(bits=4000 * GROUPS)
    refined = Refine()(problem, start, found.measure).allocation
    chosen = [problem.by_group(plan.choice) for plan in (start, refined)]
    assert refined.size_bits <= 4000 * GROUPS
    assert refined.loss == pytest.approx(found.predict(chosen[1][None])[0][0])
    before, after = true_loss(problem, np.stack(chosen))
    assert after <= before


def test_plans_without_loss_are_predicted_without(problem: Problem) -> None:
    loss = problem.loss.copy()
    loss[:, -1] = 0.0
    free = make_problem(problem.size_bits, loss)
    plans = draw(20) % 3
    found, spread = Surrogate(free, plans, true_loss(free, plans)).predict(np.full((1, GROUPS), SCHEMES - 1))
    assert (found[0], spread[0]) == (0.0, np.inf)


def test_few_plans_and_losses_of_nothing_are_refused(problem: Problem) -> None:
    with pytest.raises(MpqError, match="7 measured plans: predicting others takes at least 8"):
        Surrogate(problem, draw(7), np.ones(7))
    with pytest.raises(MpqError, match="losses above zero"):
        Surrogate(problem, draw(9), np.zeros(9))
    with pytest.raises(MpqError, match="the same predicted loss"):
        Surrogate(problem, np.repeat(draw(1), 9, axis=0), np.ones(9))


def test_the_law_alone_is_not_better(problem: Problem) -> None:
    plans, others = draw(40), draw(300, seed=3)
    measured, expected = true_loss(problem, plans), true_loss(problem, others)
    law = PowerLaw.fit(problem.parts(plans).sum(axis=1), measured)(problem.parts(others).sum(axis=1))
    assert off(Surrogate(problem, plans, measured).predict(others)[0], expected) < off(law, expected)
