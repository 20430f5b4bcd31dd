"""`mpq.allocate.refit`: corrections that were put in come back, plans that say nothing correct nothing."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from mpq.allocate import PowerLaw, Problem, refit
from mpq.allocate.refit import EXPONENTS
from mpq.types import MpqError
from tests.allocate_cases import graded_problem

GROUPS, SCHEMES = 30, 4


@pytest.fixture
def problem() -> Problem:
    return graded_problem(GROUPS, SCHEMES)


def draw(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(SCHEMES, size=(count, GROUPS))


def total(loss: np.ndarray, plans: np.ndarray) -> np.ndarray:
    return loss[np.arange(GROUPS), plans].sum(axis=1)


def wrong_by(problem: Problem, spread: float) -> np.ndarray:
    """True losses of the candidates, off from the table's by random factors."""
    return problem.loss * np.exp(spread * np.random.default_rng(2).normal(size=problem.loss.shape))


def tau(a: np.ndarray, b: np.ndarray) -> float:
    return float(kendalltau(a, b)[0])


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.3])
def test_forty_plans_mend_the_ranking(problem: Problem, exponent: float) -> None:
    true = wrong_by(problem, 0.5)
    plans, others = draw(40), draw(400, seed=3)
    found = refit(problem, plans, 2 * total(true, plans) ** exponent)
    expected = 2 * total(true, others) ** exponent
    before, after = tau(total(problem.loss, others), expected), tau(found.predict(others), expected)
    assert after > before + (1 - before) / 3
    assert np.log(found.predict(others) / expected).std() < 0.7 * np.log(total(problem.loss, others) / expected).std()


def test_with_many_plans_the_true_losses_come_back(problem: Problem) -> None:
    true = wrong_by(problem, 0.2)
    plans, others = draw(1000), draw(400, seed=3)
    found = refit(problem, plans, total(true, plans))
    assert np.log(found.predict(others) / total(true, others)).std() < 0.005
    large = problem.loss > 0.02
    ratio = (found.problem.loss / true)[large]
    assert ratio.std() / ratio.mean() < 0.05


def test_a_true_table_stays_as_it_is(problem: Problem) -> None:
    plans = draw(40)
    noise = np.exp(0.05 * np.random.default_rng(5).normal(size=40))
    found = refit(problem, plans, total(problem.loss, plans) * noise)
    relative = found.problem.loss / problem.loss
    assert relative.std() < 0.05
    law = PowerLaw.fit(total(problem.loss, plans), total(problem.loss, plans) * noise)
    assert found.law.spread == pytest.approx(law.spread, rel=0.15)


def test_an_exact_law_leaves_nothing_to_correct(problem: Problem) -> None:
    plans, others, exponent = draw(40), draw(20, seed=3), float(EXPONENTS[37])
    found = refit(problem, plans, 3 * total(problem.loss, plans) ** exponent)
    np.testing.assert_allclose(found.predict(others), 3 * total(problem.loss, others) ** exponent, rtol=1e-6)
    assert found.law.exponent == exponent


def test_the_spread_is_that_of_plans_that_were_left_out(problem: Problem) -> None:
    plans = draw(30)
    measured = total(wrong_by(problem, 0.4), plans)
    found = refit(problem, plans, measured)
    errors = []
    for left_out in range(len(plans)):
        kept = np.arange(len(plans)) != left_out
        alone = refit(problem, plans[kept], measured[kept])
        errors.append(np.log(alone.predict(plans[left_out : left_out + 1])[0] / measured[left_out]))
    assert found.law.spread == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.15)


def test_the_order_and_the_unit_of_measured_plans_do_not_matter(problem: Problem) -> None:
    plans = draw(40)
    measured = total(wrong_by(problem, 0.4), plans)
    found = refit(problem, plans, measured)
    order = np.random.default_rng(7).permutation(40)
    np.testing.assert_allclose(refit(problem, plans[order], measured[order]).problem.loss, found.problem.loss)
    np.testing.assert_allclose(refit(problem, plans, 1e3 * measured).predict(plans), 1e3 * found.predict(plans))


def test_candidates_that_no_plan_took_keep_the_word_of_the_table(problem: Problem) -> None:
    plans = draw(40) % 3
    found = refit(problem, plans, total(wrong_by(problem, 0.4), plans))
    relative = found.problem.loss / problem.loss
    assert np.ptp(relative[:, 3]) < 1e-12  # all by the common factor alone
    assert relative[:, :3].std() > 0.05


def test_no_candidate_becomes_a_gain_and_errors_scale(problem: Problem) -> None:
    plans = draw(200)
    true = problem.loss.copy()
    true[:5] = 0.0
    found = refit(problem, plans, total(true, plans))
    assert (found.problem.loss >= 0).all()
    expected = problem.variance * np.square(found.problem.loss / problem.loss)
    np.testing.assert_allclose(found.problem.variance, expected)


def test_few_plans_are_refused(problem: Problem) -> None:
    with pytest.raises(MpqError, match="7 measured plans: correcting a table takes at least 8"):
        refit(problem, draw(7), np.ones(7))
    with pytest.raises(MpqError, match="losses above zero"):
        refit(problem, draw(8), np.zeros(8))
