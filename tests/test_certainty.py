"""How sure the choices of a plan are: shares of resamples where there can be some, and else one sentence."""

import numpy as np
import pytest

from mpq.allocate import Problem, solve_frontier, stability
from mpq.certainty import certainty
from tests.allocate_cases import make_problem, table, weight

# Two groups, room for one upgrade: the first saves more, by `ahead` nats.
SIZE, BUDGET = [[10, 20], [10, 20]], 30


def pair(ahead, stderr):
    return make_problem(SIZE, [[3.0 + ahead, 0.0], [3.0, 0.0]], variance=np.full((2, 2), stderr**2))


def solved(problem, seed=0):
    return certainty(problem, solve_frontier(problem).at(bits=BUDGET).choice, BUDGET, seed)


def test_a_clear_choice_is_sure_and_a_close_one_is_not():
    clear, close = solved(pair(5.0, 0.1)), solved(pair(0.2, 0.5))
    assert (clear["share"], clear["unsure"]) == ({"w0000": 1.0, "w0001": 1.0}, [])
    assert clear["statement"].startswith(
        "0 of 2 choices are not distinguishable from others: in more than 1 of 20 of 200"
    )
    # the upgrade goes to the first in Phi(0.2 / (2 * 0.5)) = 0.579 of the resamples, +- 0.035
    assert abs(close["share"]["w0000"] - 0.579) < 4 * 0.035
    assert close["unsure"] == ["w0000", "w0001"]
    assert close["statement"].startswith("2 of 2 choices")


def test_the_seed_decides_and_nothing_else_does():
    problem = pair(0.2, 0.5)
    assert solved(problem, 3) == solved(problem, 3)
    assert solved(problem, 3)["share"] != solved(problem, 4)["share"]


def test_fused_weights_share_what_is_known_of_their_group():
    weights = [weight("q", group="qkv"), weight("o"), weight("k", group="qkv")]
    loss = np.array([[3.0, 1.0, 0.2], [3.1, 0.9, 0.3], [2.0, 1.0, 0.4]])
    problem = Problem.from_table(table(weights, loss, 0.2 * loss))
    plan = solve_frontier(problem).at(bits=(problem.min_bits + problem.max_bits) // 2)
    found = certainty(problem, plan.choice, plan.budget_bits, 0)
    direct = stability(problem, plan.budget_bits, np.random.default_rng(0), exact=False)
    taken = direct.share[[0, 1], problem.by_group(plan.choice)]
    assert found["share"] == {"q": taken[0], "o": taken[1], "k": taken[0]}
    sorted_as_in_a_file = dict(sorted(plan.choice.items()))
    again = certainty(problem, sorted_as_in_a_file, plan.budget_bits, 0)
    assert list(again["share"]) == list(found["share"]) == ["q", "o", "k"]


@pytest.mark.parametrize(
    ("stderr", "statement"), [(np.nan, "no standard errors (one document or probe)"), (0.0, "no sampling error")]
)
def test_without_errors_there_is_one_sentence(stderr, statement):
    found = solved(pair(1.0, stderr))
    assert (found["share"], found["unsure"]) == (None, [])
    assert statement in found["statement"]
