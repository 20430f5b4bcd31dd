import math

import numpy as np
import pytest

from mpq.allocate import Lagrangian, Stability, gaussian, resampled, solve_frontier, stability
from mpq.types import MpqError
from tests.allocate_cases import make_problem, transformer

# Two groups, room for one upgrade of 10 bits: which of them gets it is decided by what the upgrade saves.
SIZE = [[10, 20], [10, 20]]
BUDGET = 30


def pair(first, second, stderr):
    """Both groups save `first` and `second` nats, each loss with standard error `stderr`."""
    return make_problem(SIZE, [[first, 0.0], [second, 0.0]], variance=np.full((2, 2), stderr**2))


@pytest.mark.parametrize("exact", [True, False])
def test_a_clear_winner_is_always_chosen(exact):
    found = stability(pair(5.0, 1.0, 0.1), BUDGET, np.random.default_rng(0), exact=exact)
    np.testing.assert_array_equal(found.share, [[0.0, 1.0], [1.0, 0.0]])
    assert found.chosen.tolist() == [1, 0]
    assert found.confidence.tolist() == [1.0, 1.0]
    assert found.distinguishable.all()
    assert found.num_resamples == 200
    assert found.solver == ("exact" if exact else "lagrangian")


@pytest.mark.parametrize("exact", [True, False])
def test_two_equals_are_chosen_half_of_the_time_each(exact):
    found = stability(pair(3.0, 3.0, 0.5), BUDGET, np.random.default_rng(1), exact=exact)
    # a binomial share of 200 has a standard error of 0.035
    assert abs(found.share - 0.5).max() < 4 * 0.0354
    assert not found.distinguishable.any()
    np.testing.assert_allclose(found.share.sum(axis=1), 1.0, atol=1e-12)


@pytest.mark.parametrize("difference", [0.2, 1.0, 2.0])
def test_the_share_is_the_normal_tail(difference):
    """The first is chosen where four losses of standard error 0.5 leave it ahead: Phi(difference / (2 * 0.5))."""
    found = stability(pair(3.0 + difference, 3.0, 0.5), BUDGET, np.random.default_rng(2), 2000, exact=False)
    expected = 0.5 * (1 + math.erf(difference / math.sqrt(2)))
    assert abs(found.share[0, 1] - expected) < 4 * math.sqrt(expected * (1 - expected) / 2000)


def test_without_errors_every_resample_is_the_allocation_itself():
    problem = transformer(9)
    budget = (problem.min_bits + problem.max_bits) // 3
    certain = make_problem(problem.size_bits, problem.loss)
    found = stability(certain, budget, np.random.default_rng(0), 3)
    choice = list(solve_frontier(certain).at(bits=budget).choice.values())
    assert [found.schemes[i] for i in found.chosen] == choice
    assert (found.confidence == 1).all()


def test_the_same_generator_gives_the_same_shares():
    problem = transformer(9)
    budget = (problem.min_bits + problem.max_bits) // 3
    first, second = (stability(problem, budget, np.random.default_rng(7), 20) for _ in range(2))
    np.testing.assert_array_equal(first.share, second.share)


def test_a_forbidden_scheme_is_never_chosen():
    problem = make_problem(
        SIZE, [[9.0, np.nan], [3.0, 0.0]], allowed=[[True, False], [True, True]], variance=[[1.0, np.nan], [1.0, 1.0]]
    )
    found = stability(problem, BUDGET, np.random.default_rng(0), 50)
    assert found.share[0].tolist() == [1.0, 0.0]


def test_many_groups_are_solved_by_relaxation():
    problem = transformer(65)
    budget = (problem.min_bits + problem.max_bits) // 3
    found = stability(problem, budget, np.random.default_rng(0), 20)
    assert isinstance(found, Stability)
    assert found.solver == Lagrangian.name
    assert found.names == problem.names
    # losses known to 10 % leave some groups between neighbouring schemes, and most of the others where they are
    assert 0 < found.distinguishable.sum() < len(found.names)


def test_resamples_of_whole_tables_keep_what_goes_together():
    """Both groups rise and fall with the document: drawn together, the first is always ahead."""
    problem = pair(3.2, 3.0, 1.0)
    rng = np.random.default_rng(3)
    shared = (problem.loss * rng.uniform(0.5, 2.0) for _ in range(100))
    assert resampled(problem, BUDGET, shared).distinguishable.all()
    assert not stability(problem, BUDGET, rng).distinguishable.any()


def test_gaussian_resamples_have_the_mean_and_the_error():
    problem = make_problem([[1, 2]], [[4.0, 1.0]], variance=[[9.0, 0.25]])
    draws = np.array(list(gaussian(problem, np.random.default_rng(0), 4000)))
    assert draws.shape == (4000, 1, 2)
    # four standard errors of a mean, and of a standard deviation, of 4000
    np.testing.assert_allclose(draws.mean(axis=0), problem.loss, atol=4 * 3.0 / math.sqrt(4000))
    np.testing.assert_allclose(draws.std(axis=0), [[3.0, 0.5]], rtol=4 / math.sqrt(2 * 4000))


def test_wrong_input():
    problem = pair(3.0, 2.0, 0.1)
    with pytest.raises(MpqError, match="smallest reachable size"):
        stability(problem, 5, np.random.default_rng(0))
    with pytest.raises(MpqError, match="there are no resamples: draw at least one"):
        resampled(problem, BUDGET, [])
    with pytest.raises(MpqError, match="the sensitivities have no standard errors"):
        stability(make_problem(SIZE, problem.loss, variance=np.full((2, 2), np.nan)), BUDGET, np.random.default_rng(0))
    with pytest.raises(MpqError, match=r"problem\.loss is float64\[1, 2\]: it must be float64\[2, 2\]"):
        resampled(problem, BUDGET, [np.zeros((1, 2))])
