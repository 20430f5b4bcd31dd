import dataclasses
import time

import numpy as np
import pytest

from mpq.allocate import Exact, Lagrangian, best_uniform, lagrangian, lower_bound, solve_frontier, uniform
from mpq.types import MpqError, Status
from tests.allocate_cases import KINDS, all_choices, make_problem, random_problem, transformer


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_never_exceeds_the_optimum(kind):
    rng = np.random.default_rng(1)
    for _ in range(30):
        problem = random_problem(kind, rng)
        _, size, loss = all_choices(problem)
        for budget in {
            problem.min_bits,
            problem.max_bits,
            *rng.integers(problem.min_bits, problem.max_bits + 1, 5).tolist(),
        }:
            allocation = Lagrangian().solve(problem, budget)
            optimum = loss[size <= budget].min()
            assert problem.to_loss(lower_bound(problem, budget)) == allocation.lower_bound <= optimum <= allocation.loss
            assert allocation.size_bits <= budget
            if allocation.status is Status.OPTIMAL:
                assert allocation.loss == optimum


def test_the_bound_is_the_linear_relaxation():
    # two groups, the second option costs 10 bits: 4 nats saved, and 2; 15 bits take the first and half of the second
    problem = make_problem([[10, 20], [10, 20]], [[4.0, 0.0], [2.0, 0.0]])
    assert problem.to_loss(lower_bound(problem, 35)) == 1.0
    assert problem.to_loss(lower_bound(problem, 30)) == 2.0
    assert Lagrangian().solve(problem, 30).status is Status.OPTIMAL
    cut = Lagrangian().solve(problem, 35)
    assert (cut.loss, cut.gap, cut.status) == (2.0, 1.0, Status.FEASIBLE)
    assert Lagrangian().solve(problem, 40).loss == Lagrangian().solve(problem, 40).lower_bound == 0.0


def test_a_hull_vertex_is_solved_to_optimality():
    problem = transformer(33)
    frontier = solve_frontier(problem)
    root = frontier.points.roots[0]
    vertices = frontier.size_bits[0] + root.x * frontier.points.unit
    for budget in vertices[:: len(vertices) // 10]:
        allocation = Lagrangian().solve(problem, int(budget))
        assert allocation.status is Status.OPTIMAL
        assert allocation.loss == frontier.at(bits=int(budget)).loss


def test_room_behind_a_segment_that_does_not_fit_is_used():
    # the best segment is too wide; behind it one segment of the same group (useless alone) and one of another group
    problem = make_problem([[0, 100, 101], [0, 5, 999]], [[100.0, 1.0, 0.9], [2.0, 0.0, 3.0]])
    allocation = Lagrangian().solve(problem, 50)
    assert (allocation.loss, allocation.size_bits) == (100.0, 5)


def test_options_inside_the_hull_are_used_too():
    # the middle option lies above the hull, yet is all that fits
    problem = make_problem([[0, 10, 20]], [[10.0, 8.0, 0.0]])
    assert Lagrangian().solve(problem, 15).loss == 8.0


def test_many_groups_are_near_the_bound():
    rng = np.random.default_rng(0)
    size = np.sort(rng.integers(1, 10**9, (5000, 6)), axis=1)
    loss = -np.sort(-rng.random((5000, 6)), axis=1)
    problem = make_problem(size, loss)
    allocation = Lagrangian().solve(problem, (problem.min_bits + problem.max_bits) // 2)
    # Greedy stops at one hull segment, whose whole drop is at most the largest loss of a group: 1 nat of about 5000
    # / 3.
    assert 0 <= allocation.gap <= 1.0


def test_the_bound_is_exact_in_integers_beyond_64_bits():
    """Against the same minimum in Python's integers, where options tie to the last bit or differ by one."""
    rng = np.random.default_rng(4)
    for _ in range(200):
        size = rng.integers(1, 10**12, (6, 4))
        slope = int(rng.integers(1, 1000))
        allowed = (size % 4 > 0) | (np.arange(4) == 0)
        problem = make_problem(size, 1e15 - slope * size + rng.integers(-1, 2, size.shape), allowed=allowed)
        drop, width = int(rng.integers(1, 2**60)), int(rng.integers(1, 10**12))
        fixed = problem.fixed_point[0]
        for exchange in ((drop, width), (slope * 2 ** (-problem.fixed_point[1]), 1)):
            least = [
                min(int(f) * exchange[1] + int(s) * exchange[0] for f, s, a in zip(*row, strict=True) if a)
                for row in zip(fixed, size, problem.allowed, strict=True)
            ]
            assert lagrangian._least_priced(problem, *exchange) == sum(least)


def test_many_groups_take_a_second_and_are_proven_within_a_millionth():
    """20,000 groups x 6 schemes: measured 0.1 s of processor time and a relative gap of 1e-7."""
    rng = np.random.default_rng(20_000)
    size = np.sort(rng.integers(1, 10**9, (20_000, 6)), axis=1)
    problem = make_problem(size, -np.sort(-rng.random((20_000, 6)), axis=1))
    start = time.process_time()
    allocation = Lagrangian().solve(problem, (problem.min_bits + problem.max_bits) // 2)
    assert time.process_time() - start < 1.0
    assert 0 <= allocation.gap < 1e-6 * allocation.loss


def test_exact_needs_memory_for_its_points():
    problem = transformer(33)
    with pytest.raises(MpqError, match="more than 10 candidate points"):
        Exact(max_pairs=10).solve(problem, problem.max_bits)


SIZE, LOSS = [[10, 20, 30], [10, 20, 30]], [[4.0, 2.0, 3.0], [4.0, 2.0, 3.0]]


def test_uniform():
    problem = make_problem(SIZE, LOSS)
    allocation = uniform(problem, "int2_g32")
    assert {str(scheme) for scheme in allocation.choice.values()} == {"int2_g32"}
    assert (allocation.loss, allocation.size_bits, allocation.budget_bits) == (4.0, 40, 40)
    assert allocation.solver == "uniform int2_g32"
    assert allocation.lower_bound <= allocation.loss
    assert uniform(problem, problem.schemes[0], 35).budget_bits == 35


def test_uniform_errors():
    problem = make_problem(SIZE, LOSS, allowed=[[True, True, True], [True, False, True]])
    with pytest.raises(MpqError, match="uniform int2_g32 is not allowed: w0001 must take another scheme"):
        uniform(problem, "int2_g32")
    with pytest.raises(MpqError, match="'int5_g64' is not among the candidates: int2_g64, int2_g32, int3_g64"):
        uniform(problem, "int5_g64")
    with pytest.raises(MpqError, match="uniform int3_g64 needs 8 bytes"):
        uniform(problem, "int3_g64", 50)


def test_best_uniform_takes_the_least_loss_that_fits_not_the_largest():
    problem = make_problem(SIZE, LOSS)
    assert best_uniform(problem, 60).solver == "uniform int2_g32"
    assert best_uniform(problem, 39).solver == "uniform int2_g64"
    assert best_uniform(problem, 39).budget_bits == 39
    tied = make_problem([[20, 10]], [[1.0, 1.0]])
    assert best_uniform(tied, 20).size_bits == 10


def test_best_uniform_errors():
    problem = make_problem([[10, 20], [20, 10]], [[4.0, 2.0], [4.0, 2.0]])
    with pytest.raises(MpqError, match=r"no uniform scheme fits 3 bytes.*: the smallest is int2_g64 with 4 bytes"):
        best_uniform(problem, 20)
    pinned = dataclasses.replace(problem, allowed=np.array([[True, False], [False, True]]))
    with pytest.raises(MpqError, match="no scheme is allowed for every weight"):
        best_uniform(pinned, 20)
