"""The knapsack with interactions: against enumeration, and the laws of its bound."""

import dataclasses
import itertools

import numpy as np
import pytest

from mpq.allocate import Problem, solve_frontier, solve_quadratic
from mpq.allocate.minorant import branch, maximise
from mpq.allocate.pairs import Pairs
from mpq.allocate.relaxed import semidefinite_bound
from mpq.allocate.semidefinite import Dual, Relaxation
from mpq.types import MpqError, Status
from tests.allocate_cases import SCHEMES, all_choices, make_problem, table, transformer, weight


def energies(problem, interactions, choices):
    """Sum over all ordered pairs of weights, one group a weight, written as the definition says."""
    rows = np.arange(len(problem.names))
    off = interactions * (1 - np.eye(len(rows)))[:, None, :, None]
    return np.array([problem.loss[rows, c].sum() + off[rows, c][:, rows, c].sum() for c in choices])


def small(seed):
    """A random problem with forbidden options, and interactions of any sign that are no Gram."""
    rng = np.random.default_rng(seed)
    shape = groups, schemes = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    allowed = rng.random(shape) < 0.85
    allowed[np.arange(groups), rng.integers(0, schemes, groups)] = True
    size = np.cumsum(rng.integers(1, 50, shape), axis=1)
    problem = make_problem(size, rng.normal(size=shape) * rng.choice([0.3, 1.0]), allowed=allowed)
    half = rng.normal(size=(groups * schemes, groups * schemes)) * rng.choice([0.02, 0.3])
    budget = int(rng.integers(problem.min_bits, problem.max_bits + 1))
    return problem, ((half + half.T) / 2).reshape(shape * 2), budget


def gram(groups, schemes, seed, correlation=0.03):
    """A transformer with one weight a group, losses falling by 4 a bit, and a Gram of that spread of correlations."""
    rng = np.random.default_rng(seed)
    problem = transformer(groups, seed, schemes=SCHEMES[:schemes])
    problem = dataclasses.replace(problem, members=tuple(members[:1] for members in problem.members))
    moves = rng.normal(size=(groups * schemes, round(correlation**-2)))
    moves *= np.sqrt(problem.loss.reshape(-1, 1)) / np.linalg.norm(moves, axis=1, keepdims=True)
    return problem, (moves @ moves.T).reshape(problem.loss.shape * 2)


CASES = [(8, 6, 0.1), (16, 4, 0.03), (24, 5, 0.03), (40, 5, 0.01)]


@pytest.mark.parametrize("seeds", [range(i, 100, 4) for i in range(4)])
def test_equals_enumeration_on_small_problems(seeds):
    for seed in seeds:
        problem, interactions, budget = small(seed)
        choices, size, _ = all_choices(problem)
        optimum = energies(problem, interactions, choices)[size <= budget].min()
        found = solve_quadratic(problem, interactions, budget, iterations=10)
        assert found.status is Status.OPTIMAL
        # sums of at most 25 terms of order 1 in float64
        assert found.loss == pytest.approx(optimum, rel=1e-9, abs=1e-12)
        assert found.lower_bound == found.loss
        assert found.size_bits <= found.budget_bits == budget
        assert energies(problem, interactions, [problem.by_group(found.choice)]) == pytest.approx(found.loss, rel=1e-9)


def test_every_bound_is_below_the_optimum_and_every_plan_above():
    """Also where almost nothing is iterated and kept."""
    for seed in range(40):
        problem, interactions, budget = small(seed)
        choices, size, _ = all_choices(problem)
        optimum = energies(problem, interactions, choices)[size <= budget].min()
        found = solve_quadratic(problem, interactions, budget, iterations=seed % 3, width=1 + seed % 2)
        slack = 1e-9 * abs(optimum) + 1e-12
        assert found.lower_bound - slack <= optimum <= found.loss + slack


def test_the_minorant_is_the_loss_itself_in_other_terms():
    problem, interactions, budget = small(4)
    pairs = Pairs.of(problem, interactions, budget)
    assert len(problem.names) > 2
    choices, _, _ = all_choices(problem)
    worst = energies(problem, interactions, choices).max()  # so that no option is left out
    minorant = maximise(pairs, 0.01, worst, 5)
    rows = np.arange(len(problem.names))
    for choice in choices:
        moved = minorant.theta[rows, choice].sum() + minorant.rest[rows, choice][:, rows, choice].sum() / 2
        assert moved == pytest.approx(pairs.energy(choice), rel=1e-9, abs=1e-9)
        over = minorant.price * (pairs.bits(choice) - budget)
        assert minorant.bound(pairs) <= pairs.energy(choice) + over + 1e-9


def test_the_semidefinite_bound_is_below_the_optimum_wherever_its_search_stands():
    """Of interactions of any sign, which are no Gram; as tight as the price of bits leaves it where they are one."""
    for seed in range(24):
        problem, interactions, budget = small(seed)
        pairs = Pairs.of(problem, interactions, budget)
        choices, size, _ = all_choices(problem)
        optimum = energies(problem, interactions, choices)[size <= budget].min()
        known = optimum + abs(optimum) * (seed % 2)
        minorant = maximise(pairs, 0.01, known, 5)
        for iterations in (0, 3, 20):
            bound = semidefinite_bound(pairs, minorant, known, enough=np.inf, iterations=iterations)
            assert bound <= optimum + 1e-9 * abs(optimum) + 1e-12


def test_the_semidefinite_bound_has_the_derivative_it_says():
    problem, interactions, budget = small(4)
    pairs = Pairs.of(problem, interactions, budget)
    relaxation = Relaxation.of(pairs, problem.allowed, 1.0)
    options = len(relaxation.group)
    rng = np.random.default_rng(0)
    at = rng.normal(size=len(Dual.zero(options, 0.0).flat))
    smoothed = lambda flat: relaxation.smoothed(Dual.split(flat, options), 0.3)
    _, slope = smoothed(at)
    for _ in range(5):
        along = rng.normal(size=at.shape)
        ends = [smoothed(at + step * along)[0] for step in (1e-5, -1e-5)]
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(slope @ along), rel=1e-5)
    # without smoothing the bound is higher: a smoothed minimum is below the minimum
    assert relaxation.bound(Dual.split(at, options)).nats >= -smoothed(at)[0] * relaxation.unit


def test_the_semidefinite_bound_of_an_option_is_below_all_plans_that_take_it():
    """Wherever its variables stand, those of a sign at 0 or above."""
    rng = np.random.default_rng(1)
    for seed in range(12):
        problem, interactions, budget = small(seed)
        pairs = Pairs.of(problem, interactions, budget)
        relaxation = Relaxation.of(pairs, problem.allowed, 1.0)
        zero = Dual.zero(len(relaxation.group), 0.0)
        at = zero._replace(price=0.2, b=rng.normal(size=zero.b.shape), nu=0.1 * rng.random(zero.nu.shape))
        at = at._replace(x=0.1 * rng.random(zero.x.shape))
        bound = relaxation.bound(at, 0.01)
        choices, size, _ = all_choices(problem)
        for choice in choices[size <= budget]:
            floors = bound.floor[np.arange(len(choice)), choice]
            assert bound.nats <= floors.max() <= pairs.energy(choice) + 1e-9
        kept = np.zeros(problem.allowed.shape, np.bool_)
        kept[np.arange(len(kept)), problem.allowed.argmax(axis=1)] = True
        part = Relaxation.of(pairs, kept, 1.0)  # fewer options from the same place: no lower
        assert part.bound(at.of(kept[problem.allowed])).nats >= bound.nats - 1e-9


@pytest.mark.slow
def test_errors_that_partly_cancel_need_the_bound_of_all_pairs_at_once():
    problem, interactions = gram(16, 5, 1, 0.1)
    budget = (problem.min_bits + problem.max_bits) // 2
    pairs = Pairs.of(problem, interactions, budget)
    known = pairs.energy(pairs.descend(problem.by_group(solve_frontier(problem).at(bits=budget).choice)))
    minorant = maximise(pairs, 0.0, known, 40)
    pairwise = known - minorant.bound(pairs)
    assert pairwise > 0.25 * known
    assert known - semidefinite_bound(pairs, minorant, known, enough=known, iterations=120) < 0.6 * pairwise


def test_more_options_than_an_eigendecomposition_serves_have_no_semidefinite_bound(monkeypatch):
    problem, interactions, budget = small(4)
    pairs = Pairs.of(problem, interactions, budget)
    monkeypatch.setattr("mpq.allocate.relaxed.MOST_OPTIONS", 2)
    minorant = maximise(pairs, 0.0, 1.0, 2)
    assert semidefinite_bound(pairs, minorant, 1.0, enough=1.0, iterations=1) == -np.inf


@pytest.mark.parametrize(("groups", "schemes", "correlation"), CASES)
def test_the_gap_is_at_most_five_percent_on_problems_like_those_of_models(groups, schemes, correlation):
    problem, interactions = gram(groups, schemes, 0, correlation)
    budget = int(0.7 * problem.min_bits + 0.3 * problem.max_bits)
    found = solve_quadratic(problem, interactions, budget, iterations=40)
    assert 0 <= found.gap <= 0.05 * found.loss
    start = solve_frontier(problem).at(bits=budget)
    separable = energies(problem, interactions, [problem.by_group(start.choice)])[0]
    assert found.loss <= separable
    again = solve_quadratic(problem, interactions, budget, iterations=40)
    assert dataclasses.asdict(again) == dataclasses.asdict(found)


def test_interactions_change_the_plan():
    """Two weights whose errors cancel at int2 both take it, though each alone would rather not."""
    problem = make_problem([[1, 2]] * 2, [[1.0, 0.5]] * 2)
    interactions = np.zeros((2, 2, 2, 2))
    interactions[0, 0, 1, 0] = interactions[1, 0, 0, 0] = -0.9
    found = solve_quadratic(problem, interactions, 4)
    assert [str(scheme) for scheme in found.choice.values()] == ["int2_g64", "int2_g64"]
    assert found.loss == pytest.approx(2 * (1 - 0.9))
    assert found.status is Status.OPTIMAL


def test_without_interactions_it_is_the_exact_solution():
    problem = transformer(9, schemes=SCHEMES[:4])
    budget = (problem.min_bits + problem.max_bits) // 2
    count = sum(map(len, problem.members))
    found = solve_quadratic(problem, np.zeros((count, 4, count, 4)), budget)
    exact = solve_frontier(problem).at(bits=budget)
    assert found.choice == exact.choice
    assert found.loss == pytest.approx(exact.loss, rel=1e-12)
    assert found.stderr == exact.stderr
    assert (found.status, found.solver) == (Status.OPTIMAL, "quadratic")


def test_fused_groups_add_the_pairs_of_their_members():
    """q and k share a scheme: their interaction is in the group's loss, those with o are in the pair's."""
    weights = [weight("q", group="qk"), weight("o"), weight("k", group="qk")]
    rng = np.random.default_rng(0)
    problem = Problem.from_table(table(weights, rng.random((3, 3))))
    half = rng.normal(size=(9, 9))
    interactions = (half + half.T).reshape(3, 3, 3, 3)
    pairs = Pairs.of(problem, interactions, problem.max_bits)
    for a, b in itertools.product(range(3), range(3)):
        plan = [a, b, a]
        want = problem.loss[0, a] + problem.loss[1, b]
        want += sum(interactions[i, plan[i], j, plan[j]] for i in range(3) for j in range(3) if i != j)
        assert pairs.energy(np.array([a, b])) == pytest.approx(want, rel=1e-12)


def test_a_looser_budget_is_never_worse_when_it_starts_from_the_tighter_plan():
    problem, interactions = gram(8, 4, 3, correlation=0.2)
    plan, before = None, np.inf
    for share in np.linspace(0, 1, 6):
        budget = int(problem.min_bits + share * (problem.max_bits - problem.min_bits))
        plan = solve_quadratic(problem, interactions, budget, start=plan, iterations=2, width=1)
        assert plan.loss <= before
        before = plan.loss


def test_the_local_search_ends_where_no_two_changes_help():
    for seed in range(20):
        problem, interactions, budget = small(seed)
        pairs = Pairs.of(problem, interactions, budget)
        found = pairs.descend(solve_frontier(problem).choice_within(budget))
        choices, size, _ = all_choices(problem)
        near = ((choices != found).sum(axis=1) <= 2) & (size <= budget)
        assert energies(problem, interactions, choices[near]).min() >= pairs.energy(found) - 1e-9
        assert pairs.bits(found) <= budget


def test_branching_of_full_width_needs_no_good_bound():
    problem, interactions, budget = small(5)
    pairs = Pairs.of(problem, interactions, budget)
    start = solve_frontier(problem).choice_within(budget)
    best, bound = branch(maximise(pairs, 0.0, pairs.energy(start), 0), pairs, start, 10**6)
    choices, size, _ = all_choices(problem)
    optimum = energies(problem, interactions, choices)[size <= budget].min()
    assert pairs.energy(best) == pytest.approx(optimum, rel=1e-9)
    assert bound == pairs.energy(best)


def test_what_is_no_problem_is_refused():
    problem, interactions = gram(3, 3, 0)
    budget = problem.max_bits
    with pytest.raises(MpqError, match=r"interactions have shape \[2, 3, 3, 3\]: they must be \[3, 3, 3, 3\]"):
        solve_quadratic(problem, interactions[:2], budget)
    for wrong in (np.nan, 1.0):
        broken = interactions.copy()
        broken[0, 0, 1, 1] = wrong
        with pytest.raises(MpqError, match="interactions are not finite and symmetric: compute them again"):
            solve_quadratic(problem, broken, budget)
    with pytest.raises(MpqError, match="below the smallest reachable size"):
        solve_quadratic(problem, interactions, problem.min_bits - 1)
    largest = solve_frontier(problem).at(bits=budget)
    with pytest.raises(MpqError, match=r"the given start: the choice takes .* more than"):
        solve_quadratic(problem, interactions, problem.min_bits, start=largest)
    with pytest.raises(MpqError, match="which is none of the problem's schemes"):
        solve_quadratic(problem, interactions, budget, start=dataclasses.replace(largest, choice={}))
