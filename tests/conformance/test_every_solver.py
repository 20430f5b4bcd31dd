"""The laws of an allocation solver; whatever is in `SOLVERS` is tested here."""

import dataclasses

import numpy as np
import pytest

from mpq.allocate import SOLVERS
from mpq.types import MpqError, Status
from tests.allocate_cases import all_choices, make_problem, random_problem, transformer

pytestmark = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def problems(count=12):
    """Small problems that every solver can solve: sizes ascend with the scheme, so the smallest is uniform."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        groups, schemes = int(rng.integers(1, 6)), int(rng.integers(2, 5))
        size = np.cumsum(rng.integers(1, 100, (groups, schemes)), axis=1)
        yield make_problem(size, rng.integers(-50, 1000, (groups, schemes)) / 64.0)
    yield random_problem("identical", rng, groups=1, schemes=4, some_forbidden=False)
    yield transformer(6, schemes=transformer(2).schemes[:4])


def budgets(problem):
    return sorted(
        {problem.min_bits, problem.max_bits, *np.linspace(problem.min_bits, problem.max_bits, 5, dtype=int).tolist()}
    )


def test_budget_is_kept_and_the_bound_holds(solver):
    for problem in problems():
        _, size, loss = all_choices(problem)
        magnitude = np.abs(problem.loss).max(axis=1).sum()
        # the transformer's losses are not dyadic: sums of 6 float64 round by 6 * 2^-53, the fixed point by 6 * 2^-60
        tolerance = 7 * 2.0**-53 * magnitude
        for budget in budgets(problem):
            allocation = solver.solve(problem, budget)
            optimum = loss[size <= budget].min()
            assert allocation.size_bits <= allocation.budget_bits == budget
            assert allocation.lower_bound <= optimum + tolerance
            assert allocation.loss >= optimum - tolerance
            assert allocation.gap >= 0
            if allocation.status is Status.OPTIMAL:
                assert abs(allocation.loss - optimum) <= tolerance


def test_the_allocation_is_what_it_says(solver):
    problem = transformer(9)
    budget = (problem.min_bits + problem.max_bits) // 3
    allocation = solver.solve(problem, budget)
    index = [problem.schemes.index(allocation.choice[group[0].path]) for group in problem.members]
    rows = np.arange(len(index))
    assert allocation.size_bits == problem.size_bits[rows, index].sum()
    # sums of 9 float64 in another order, and the fixed point
    assert allocation.loss == pytest.approx(problem.loss[rows, index].sum(), rel=20 * 2.0**-53)
    assert allocation.stderr == pytest.approx(np.sqrt(problem.variance[rows, index].sum()), rel=20 * 2.0**-53)
    for group in problem.members:
        assert len({allocation.choice[spec.path] for spec in group}) == 1


def test_it_is_a_frozen_object_that_knows_its_name(solver):
    assert dataclasses.is_dataclass(solver)
    assert SOLVERS[solver.name] is solver
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.name = "other"


def test_it_is_deterministic(solver):
    for problem in problems(3):
        for budget in budgets(problem):
            first, second = solver.solve(problem, budget), solver.solve(problem, budget)
            assert dataclasses.asdict(first) == dataclasses.asdict(second)


def test_the_order_of_groups_does_not_matter(solver):
    problem = transformer(9)
    reverse = dataclasses.replace(
        problem,
        names=problem.names[::-1],
        members=problem.members[::-1],
        **{f: getattr(problem, f)[::-1].copy() for f in ("loss", "variance", "size_bits", "allowed")},
    )
    for budget in budgets(problem):
        first, second = solver.solve(problem, budget), solver.solve(reverse, budget)
        assert first.choice == second.choice
        assert (first.loss, first.lower_bound, first.size_bits) == (second.loss, second.lower_bound, second.size_bits)


def test_losses_scale(solver):
    problem = transformer(9)
    scaled = dataclasses.replace(problem, loss=problem.loss * 2.0**-20)
    for budget in budgets(problem):
        first, second = solver.solve(problem, budget), solver.solve(scaled, budget)
        assert first.choice == second.choice
        assert second.loss == first.loss * 2.0**-20
        assert second.lower_bound == first.lower_bound * 2.0**-20


def test_a_budget_out_of_range_raises_with_the_size(solver):
    problem = make_problem([[800, 1600], [800, 1600]], [[2.0, 1.0], [2.0, 1.0]])
    with pytest.raises(MpqError, match="smallest reachable size, 200 bytes"):
        solver.solve(problem, 1599)
    with pytest.raises(MpqError, match="largest useful size, 400 bytes"):
        solver.solve(problem, 3201)
    with pytest.raises(MpqError, match="not a whole number"):
        solver.solve(problem, 2000.0)
