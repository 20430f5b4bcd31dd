import dataclasses
import types

import numpy as np
import pytest

from mpq.allocate import Constraint, Problem, bops, constrained, latency, peak_memory, solve_constrained, solve_frontier
from mpq.types import MpqError, Status, Use
from tests.allocate_cases import KINDS, all_choices, make_problem, random_problem, table, transformer, weight


def random_constraints(problem, rng, count):
    """Limits between the least and the largest value, so that some sets of them cannot be met."""
    constraints = []
    for index in range(count):
        cost = rng.integers(0, int(rng.choice([5, 1000, 10**9])), problem.loss.shape)
        constraint = Constraint(f"cost {index}", "units", cost, 0)
        top = sum(np.where(problem.allowed, cost, -1).max(axis=1).tolist())
        limit = int(rng.integers(constraint.least(problem), top + 1))
        constraints.append(dataclasses.replace(constraint, limit=limit))
    return constraints


def best(problem, budget, constraints):
    """The least loss by enumeration, or None."""
    choices, size, loss = all_choices(problem)
    rows = np.arange(len(problem.names))
    fits = size <= budget
    for constraint in constraints:
        fits &= constraint.cost[rows, choices].sum(axis=1) <= constraint.limit
    return loss[fits].min() if fits.any() else None


def check(problem, budget, constraints):
    optimum = best(problem, budget, constraints)
    if optimum is None:
        with pytest.raises(MpqError, match=r"cannot be met together, though each can alone \(smallest reachable: size"):
            solve_constrained(problem, budget, constraints)
        return
    allocation = solve_constrained(problem, budget, constraints)
    assert allocation.loss == allocation.lower_bound == optimum
    assert allocation.status is Status.OPTIMAL
    assert allocation.solver == "highs"
    assert allocation.size_bits <= allocation.budget_bits == budget
    for constraint in constraints:
        assert constraint.of(problem, allocation) <= constraint.limit


@pytest.mark.parametrize("kind", KINDS)
def test_equals_brute_force(kind):
    rng = np.random.default_rng(17)
    for _ in range(25):
        problem = random_problem(kind, rng)
        budget = int(rng.integers(problem.min_bits, problem.max_bits + 1))
        check(problem, budget, random_constraints(problem, rng, int(rng.integers(0, 4))))


def test_groups_pins_and_sets_equal_brute_force():
    rng = np.random.default_rng(5)
    for _ in range(15):
        weights = [
            weight(f"{i}.{name}", 64 * int(rng.integers(1, 5)), 8, f"{i}.{name[0]}")
            for i in (0, 1)
            for name in ("qa", "qb", "o", "d")
        ]
        losses = table(weights, rng.integers(0, 50, (8, 3)) / 64.0)
        problem = Problem.from_table(losses, pins={r"0\.qb": "int3_g64"}, only={r"1\..*": ["int2_g64", "int3_g64"]})
        budget = int(rng.integers(problem.min_bits, problem.max_bits + 1))
        limit = Constraint("BOPs", "bit operations", bops(problem, 1e12).cost, 0)
        middle = (
            limit.least(problem) + limit.total(problem.allowed.shape[1] - 1 - problem.allowed[:, ::-1].argmax(1))
        ) // 2
        check(problem, budget, [bops(problem, middle), *random_constraints(problem, rng, 1)])


@pytest.mark.slow
def test_equals_the_exact_frontier_where_size_is_all():
    rng = np.random.default_rng(0)
    for _ in range(200):
        groups, schemes = int(rng.integers(20, 60)), int(rng.integers(3, 7))
        size = np.cumsum(rng.integers(1, 400, (groups, schemes)), axis=1)
        problem = make_problem(size, -np.sort(-rng.integers(0, 10**6, (groups, schemes)), axis=1))
        budget = int(rng.integers(problem.min_bits, problem.max_bits + 1))
        assert solve_constrained(problem, budget, ()).loss == solve_frontier(problem).at(bits=budget).loss


def test_equals_the_exact_frontier_on_a_transformer():
    problem = transformer(33)
    budget = (problem.min_bits + problem.max_bits) // 3
    allocation, exact = solve_constrained(problem, budget, ()), solve_frontier(problem).at(bits=budget)
    # HiGHS ends within 2e-6 of 2^23 steps: 2.4e-13 of the largest difference of a group's losses
    assert exact.loss <= allocation.loss <= exact.loss + 3e-13 * np.ptp(problem.loss, axis=1).max()
    assert allocation.status is Status.OPTIMAL


def test_a_limit_that_binds_costs_loss_and_a_loose_one_nothing():
    problem = transformer(9)
    budget = (problem.min_bits + problem.max_bits) // 3
    free = solve_constrained(problem, budget, ())
    used = bops(problem, 1e15).of(problem, free)
    assert solve_constrained(problem, budget, [bops(problem, used)]).loss == free.loss
    tight = solve_constrained(problem, budget, [bops(problem, int(0.9 * used))])
    assert tight.loss > free.loss
    assert bops(problem, 1e15).of(problem, tight) <= 0.9 * used


def test_bops_are_macs_times_bits_times_bits():
    problem = Problem.from_table(table([weight("a", 64, 10, "g"), weight("b", 64, 3, "g")], np.zeros((2, 3))))
    np.testing.assert_array_equal(bops(problem, 1e9, activation_bits=8).cost, [[64 * 13 * b * 8 for b in (2, 2, 3)]])
    assert bops(problem, 1e9).limit == 10**9
    for limit in (0, -1.0, float("nan"), True):
        with pytest.raises(MpqError, match=r"limit of BOPs .* is not a positive number"):
            bops(problem, limit)
    with pytest.raises(MpqError, match="activation bits 0 is not a positive number"):
        bops(problem, 1e9, activation_bits=0)


def test_peak_memory_is_a_budget_less_what_lies_beside():
    problem = make_problem([[10, 20], [10, 20]], [[1.0, 0.0], [1.0, 0.0]], overhead_bits=7)
    constraint = peak_memory(problem, 100, 63)
    assert constraint.limit == 30
    assert solve_constrained(problem, 40, [constraint]).size_bits == 30


LOSS = np.zeros((2, 3))
TIMES = {"64x64": {"int2_g64": 1.5, "int2_g32": 2, "int3_g64": 0.0011}}


def test_latency_counts_multiplications_in_whole_nanoseconds():
    tied = dataclasses.replace(weight("head"), uses=(Use("embedding", "i", 0), Use("matmul", "h", 1)))
    looked_up = dataclasses.replace(weight("embedding", 5, 5), uses=(Use("embedding", "i", 0),))
    problem = Problem.from_table(table([weight("experts", batch=3), tied, looked_up], np.zeros((3, 3))))
    constraint = latency(problem, TIMES, 2.3456)
    np.testing.assert_array_equal(constraint.cost, [[4500, 6000, 6], [1500, 2000, 2], [0, 0, 0]])
    assert constraint.limit == 2345


def test_a_latency_table_says_what_it_lacks():
    problem = Problem.from_table(table([weight("a"), weight("b", 32, 8)], LOSS), only={"b": ["int2_g64"]})
    with pytest.raises(MpqError, match=r"the latency table lacks int2_g64 of 32x8 \(b\): measure them"):
        latency(problem, TIMES, 10)
    for wrong in (-1, float("inf"), "fast", True):
        with pytest.raises(MpqError, match="microseconds"):
            latency(problem, {"64x64": dict.fromkeys(TIMES["64x64"], wrong), "32x8": {"int2_g64": 1}}, 10)
    with pytest.raises(MpqError, match="has 5 for 64x64: it must be an object, scheme to microseconds"):
        latency(problem, {"64x64": 5}, 10)
    with pytest.raises(MpqError, match="limit of latency 0 is not a positive number"):
        latency(problem, {**TIMES, "32x8": {"int2_g64": 1}}, 0)


def test_a_limit_that_cannot_be_met_alone_is_named_with_the_smallest_value():
    problem = make_problem([[10, 20], [10, 20]], [[1.0, 0.0], [1.0, 0.0]])
    constraint = Constraint("latency", "ns", np.array([[4000, 5], [3000, 7]]), 11)
    with pytest.raises(MpqError, match="latency of at most 11 ns cannot be met: the smallest reachable is 12; raise"):
        solve_constrained(problem, 40, [constraint])
    with pytest.raises(MpqError, match=r"size 20 bits, latency 12 ns\): raise one"):
        solve_constrained(problem, 39, [dataclasses.replace(constraint, limit=12)])


def test_costs_of_the_wrong_kind():
    problem = make_problem([[10, 20]], [[1.0, 0.0]])
    with pytest.raises(MpqError, match=r"cost of latency is float64\[1, 2\]: it must be int64\[1, 2\]"):
        solve_constrained(problem, 20, [Constraint("latency", "ns", np.ones((1, 2)), 5)])
    with pytest.raises(MpqError, match="latency of w0000 at int2_g32 is -1 ns: a cost is not negative"):
        solve_constrained(problem, 20, [Constraint("latency", "ns", np.array([[1, -1]]), 5)])


def test_nothing_found_in_time(monkeypatch):
    nothing = types.SimpleNamespace(status=1, x=None, mip_dual_bound=None)
    monkeypatch.setattr(constrained, "milp", lambda *_, **__: nothing)
    with pytest.raises(MpqError, match="no allocation was found in 5 s: allow more time, or raise size"):
        solve_constrained(make_problem([[10, 20]], [[1.0, 0.0]]), 20, (), time_limit=5)


def test_an_answer_that_only_tolerances_let_through_is_solved_again(monkeypatch):
    """A stand-in takes every limit for one unit more than it is, as a tolerance can."""
    real = constrained.milp

    def generous(loss, *, constraints, **rest):
        one_each, rows = constraints
        more = type(rows)(rows.A, rows.lb, np.asarray(rows.ub) + 1)
        return real(loss, constraints=[one_each, more], **rest)

    monkeypatch.setattr(constrained, "milp", generous)
    problem = make_problem([[0, 2, 3], [0, 2, 3]], [[4.0, 1.0, 0.0], [4.0, 1.0, 0.0]])
    allocation = solve_constrained(problem, 4, ())
    assert (allocation.size_bits, allocation.loss) == (4, 2.0)
    assert allocation.lower_bound <= 2.0


def test_without_a_dual_bound_that_of_the_relaxation_holds(monkeypatch):
    real = constrained.milp
    monkeypatch.setattr(
        constrained, "milp", lambda *a, **k: types.SimpleNamespace(**{**real(*a, **k), "mip_dual_bound": None})
    )
    problem = make_problem([[10, 20], [10, 20]], [[4.0, 0.0], [2.0, 0.0]])
    allocation = solve_constrained(problem, 35, ())
    assert (allocation.loss, allocation.lower_bound, allocation.status) == (2.0, 1.0, Status.FEASIBLE)
