import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.allocate import Problem, search, solve_frontier
from mpq.types import MpqError, Status
from tests.allocate_cases import (
    KINDS,
    all_choices,
    brute_force,
    dense_frontier,
    make_problem,
    random_problem,
    solve_milp,
    table,
    transformer,
    weight,
)


@pytest.fixture(params=["shipped", "narrow first band", "large groups on top"])
def search_options(request, monkeypatch):
    """The search's own settings must not matter: a first band too narrow to be right, a tree that is a chain."""
    if request.param == "narrow first band":
        monkeypatch.setattr(search, "FIRST_BAND", 1)
        monkeypatch.setattr(search, "WIDEN", 1.1)
    elif request.param == "large groups on top":
        monkeypatch.setattr(search, "FIRST_BAND", 3)
        monkeypatch.setattr(search, "LARGE", 0.5)


def points_of(frontier):
    choices = frontier.choices(np.arange(len(frontier))).tolist()
    return list(zip(frontier.size_bits.tolist(), frontier.loss.tolist(), choices, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("search_options")
def test_equals_brute_force(kind):
    rng = np.random.default_rng(7)
    for _ in range(40):
        problem = random_problem(kind, rng)
        frontier = solve_frontier(problem)
        assert points_of(frontier) == brute_force(problem)
        frontier.verify()


def test_groups_and_pins_equal_brute_force():
    rng = np.random.default_rng(3)
    for _ in range(25):
        weights = [
            weight(
                f"layers.{i}.{name}", 32 * int(rng.integers(1, 6)), int(rng.integers(1, 40)), f"layers.{i}.{name[0]}"
            )
            for i in range(2)
            for name in ("qa", "qb", "o", "d")
        ]
        loss = rng.integers(0, 50, (len(weights), 3)) / 64.0
        pins = {rf"layers\.{rng.integers(2)}\.qb": "int2_g32", ".*1.o": "int3_g64"}
        problem = Problem.from_table(table(weights, loss), pins=pins)
        frontier = solve_frontier(problem)
        assert points_of(frontier) == brute_force(problem)
        for allocation in frontier:
            assert allocation.choice["layers.0.qa"] == allocation.choice["layers.0.qb"]
            assert str(allocation.choice["layers.1.o"]) == "int3_g64"


@pytest.mark.parametrize(
    ("groups", "schemes", "top", "high"), [(40, 5, 60, 10**6), (30, 4, 300, 40), (60, 3, 25, 10**9)]
)
@pytest.mark.usefixtures("search_options")
def test_equals_dense_dynamic_programming(groups, schemes, top, high):
    rng = np.random.default_rng(groups)
    size = np.sort(rng.integers(0, top, (groups, schemes)), axis=1)
    size[0] *= 40  # one outstandingly large group, as an embedding
    problem = make_problem(size, -np.sort(-rng.integers(0, high, (groups, schemes)), axis=1))
    frontier = solve_frontier(problem)
    size, loss = dense_frontier(problem)
    np.testing.assert_array_equal(frontier.size_bits, size)
    np.testing.assert_array_equal(frontier.loss, loss)
    frontier.verify()


@pytest.mark.parametrize("num_layers", [12, 48])
def test_equals_dense_dynamic_programming_on_a_transformer(num_layers):
    problem = transformer(num_layers, schemes=transformer(2).schemes[:6], outlier=2.0)
    unit = int(np.gcd.reduce(problem.size_bits.ravel()))
    loss = np.rint(problem.loss / problem.loss.max() * 2**40)
    reduced = dataclasses.replace(problem, size_bits=problem.size_bits // unit, loss=loss)
    frontier = solve_frontier(dataclasses.replace(problem, loss=loss))
    size, least = dense_frontier(reduced)
    np.testing.assert_array_equal(frontier.size_bits, size * unit)
    np.testing.assert_array_equal(frontier.loss, least)


@pytest.mark.parametrize("seed", range(3))
def test_equals_milp_at_several_budgets(seed):
    rng = np.random.default_rng(seed)
    size = np.cumsum(rng.integers(1, 400, (40, 6)), axis=1)
    problem = make_problem(size, -np.sort(-rng.integers(0, 10**5, (40, 6)), axis=1))
    frontier = solve_frontier(problem)
    for fraction in (0.05, 0.2, 0.5, 0.8):
        budget = int(problem.min_bits + fraction * (problem.max_bits - problem.min_bits))
        _, loss = solve_milp(problem, budget)
        assert frontier.at(bits=budget).loss == loss


LOSS = st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_floats_are_optimal_up_to_the_stated_rounding(data):
    groups, schemes = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    loss = data.draw(st.lists(st.lists(LOSS, min_size=schemes, max_size=schemes), min_size=groups, max_size=groups))
    sizes = st.lists(st.integers(0, 9), min_size=schemes, max_size=schemes)
    problem = make_problem(data.draw(st.lists(sizes, min_size=groups, max_size=groups)), loss)
    frontier = solve_frontier(problem)
    frontier.verify()
    _, size, exact = all_choices(problem)
    magnitude = np.abs(problem.loss).max(axis=1).sum()
    # Each loss moves by at most half a step of 2^-59 of the magnitude; sums of at most 4 float64 by 4 * 2^-53 of it.
    tolerance = magnitude * (groups * 2.0**-59 + 4 * 2.0**-53)
    for budget in range(problem.min_bits, problem.max_bits + 1):
        assert abs(frontier.at(bits=budget).loss - exact[size <= budget].min()) <= tolerance


def test_one_bit_below_a_threshold_flips_the_answer():
    problem = make_problem([[1000, 1500, 2000], [800, 900, 1600]], [[9.0, 5.0, 1.0], [8.0, 4.0, 0.0]])
    frontier = solve_frontier(problem)
    assert frontier.size_bits.tolist() == [1800, 1900, 2400, 2900, 3600]
    assert frontier.at(bits=2900).loss == 5.0
    assert frontier.at(bits=2899).loss == 9.0
    assert frontier.at(bits=2899).size_bits == 2400
    for before, after in zip(frontier.size_bits[:-1], frontier.size_bits[1:], strict=True):
        assert frontier.at(bits=int(after)).choice != frontier.at(bits=int(after) - 1).choice
        assert frontier.at(bits=int(after) - 1).size_bits == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_looser_budget_or_another_scheme_is_never_worse(kind):
    rng = np.random.default_rng(11)
    for _ in range(10):
        problem = random_problem(kind, rng, groups=5, schemes=4, some_forbidden=False)
        fewer = dataclasses.replace(
            problem,
            schemes=problem.schemes[:3],
            **{f: getattr(problem, f)[:, :3] for f in ("loss", "variance", "size_bits", "allowed")},
        )
        frontier, smaller = solve_frontier(problem), solve_frontier(fewer)
        budgets = np.unique(np.concatenate([frontier.size_bits, smaller.size_bits]))
        losses = [frontier.lower_bound(int(bits)) for bits in budgets]
        assert losses == sorted(losses, reverse=True)
        for bits in budgets[budgets >= smaller.size_bits[0]]:
            assert frontier.lower_bound(int(bits)) <= smaller.lower_bound(int(bits))


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_groups_permutes_the_choice(kind):
    rng = np.random.default_rng(5)
    for _ in range(10):
        problem = random_problem(kind, rng)
        order = rng.permutation(len(problem.names))
        permuted = dataclasses.replace(
            problem,
            names=tuple(problem.names[i] for i in order),
            members=tuple(problem.members[i] for i in order),
            **{f: getattr(problem, f)[order] for f in ("loss", "variance", "size_bits", "allowed")},
        )
        frontier, other = solve_frontier(problem), solve_frontier(permuted)
        np.testing.assert_array_equal(frontier.size_bits, other.size_bits)
        np.testing.assert_array_equal(frontier.loss, other.loss)
        assert [a.choice for a in frontier] == [b.choice for b in other]


def test_a_dominated_scheme_is_never_chosen():
    rng = np.random.default_rng(2)
    size = np.cumsum(rng.integers(1, 50, (20, 5)), axis=1)
    loss = -np.sort(-rng.random((20, 5)), axis=1)
    size[:, 3], loss[:, 3] = size[:, 2] + 1, loss[:, 2]  # larger and no better
    frontier = solve_frontier(make_problem(size, loss))
    choices = frontier.choices(np.arange(len(frontier)))
    assert (choices != 3).all()
    assert (choices == 2).any()


def test_two_solves_give_the_same_bits():
    first, second = solve_frontier(transformer(24)), solve_frontier(transformer(24))
    np.testing.assert_array_equal(first.size_bits, second.size_bits)
    np.testing.assert_array_equal(first.loss, second.loss)
    every = np.arange(len(first))
    np.testing.assert_array_equal(first.choices(every), second.choices(every))


def test_a_transformer_verifies_and_uses_true_sizes():
    problem = transformer(33)
    frontier = solve_frontier(problem)
    frontier.verify()
    for index in (0, len(frontier) // 2, -1):
        allocation = frontier[index]
        specs = {spec.path: spec for group in problem.members for spec in group}
        assert list(allocation.choice) == list(specs)
        assert allocation.size_bits == sum(specs[path].size_bits(s) for path, s in allocation.choice.items())
        assert allocation.status is Status.OPTIMAL
        assert allocation.gap == 0
        assert allocation.solver == "exact"


def test_one_scheme_and_one_group():
    only = solve_frontier(make_problem([[640]], [[0.25]]))
    assert points_of(only) == [(640, 0.25, [0])]
    only.verify()
    pair = solve_frontier(make_problem([[10, 20]], [[0.0, 1.0]]))
    assert points_of(pair) == [(10, 0.0, [0])]


def test_iteration_and_indexing():
    frontier = solve_frontier(make_problem([[8, 16], [8, 16]], [[4.0, 1.0], [2.0, 0.0]]))
    assert [a.loss for a in frontier] == [6.0, 3.0, 1.0]
    assert [a.budget_bits for a in frontier] == frontier.size_bits.tolist() == [16, 24, 32]
    assert frontier[-1].loss == frontier[2].loss
    with pytest.raises(IndexError):
        frontier[3]


@pytest.fixture
def frontier():
    problem = make_problem([[8000, 16000], [8000, 16000]], [[4.0, 1.0], [2.0, 0.0]], overhead_bits=800)
    return solve_frontier(dataclasses.replace(problem, variance=np.array([[9.0, 4.0], [16.0, 1.0]])))


def test_targets(frontier):
    assert frontier.at(bits=24000).size_bits == frontier.at(bits=31999).size_bits == 24000
    # 24000 bits of weights and 800 of overhead are 3100 bytes
    assert frontier.at(size=3100).size_bits == frontier.at(size="3.1 kB").size_bits == 24000
    assert frontier.at(size=3099).size_bits == 16000
    assert frontier.at(size=3100).budget_bits == 24000
    # 8192 weights
    assert frontier.at(bpw=24000 / 8192).size_bits == 24000
    assert frontier.at(bpw=2.9).size_bits == 16000
    assert frontier.at(bits=24000).stderr == math.sqrt(4.0 + 16.0)


def test_target_loss_gives_the_smallest(frontier):
    assert frontier.at(loss=3.0).size_bits == 24000
    assert frontier.at(loss=2.999).size_bits == 32000
    assert frontier.at(loss=100).size_bits == 16000
    assert frontier.at(loss=3.5).budget_bits == 24000
    with pytest.raises(MpqError, match=r"loss of 0\.5: the best reachable is 1 nats per token, at 4100 bytes"):
        frontier.at(loss=0.5)
    with pytest.raises(MpqError, match="not a finite number"):
        frontier.at(loss=math.nan)


def test_budgets_out_of_range(frontier):
    with pytest.raises(MpqError, match=r"below the smallest reachable size, 2100 bytes .*1\.9531 bpw"):
        frontier.at(bits=15999)
    with pytest.raises(MpqError, match="smallest reachable size, 2100 bytes"):
        frontier.at(size="2kB")
    with pytest.raises(MpqError, match=r"above the largest useful size, 4100 bytes .*3\.9062 bpw"):
        frontier.at(bpw=4)
    with pytest.raises(MpqError, match="smallest reachable size"):
        frontier.lower_bound(15999)
    assert frontier.lower_bound(10**9) == 1.0


@pytest.mark.parametrize("targets", [{}, {"bits": 20000, "bpw": 3.0}])
def test_exactly_one_target(frontier, targets):
    with pytest.raises(MpqError, match="exactly one of bits, size, bpw and loss"):
        frontier.at(**targets)


def test_verify_finds_damage(frontier):
    frontier.verify()
    with pytest.raises(MpqError, match="point 1 of the frontier does not hold"):
        dataclasses.replace(frontier, size_bits=frontier.size_bits + np.array([0, 1, 0])).verify()
    with pytest.raises(MpqError, match="point 2 of the frontier does not hold"):
        dataclasses.replace(frontier, loss=frontier.loss + np.array([0, 0, 1e-12])).verify()
    forbidden = dataclasses.replace(frontier.problem, allowed=np.array([[True, False], [True, True]]))
    with pytest.raises(MpqError, match="does not hold"):
        dataclasses.replace(frontier, problem=forbidden).verify()
    reverse = dataclasses.replace(frontier.points, tree=frontier.points.tree[::-1], state=frontier.points.state[::-1])
    with pytest.raises(MpqError, match="must ascend"):
        dataclasses.replace(
            frontier, size_bits=frontier.size_bits[::-1], loss=frontier.loss[::-1], points=reverse
        ).verify()


def test_too_many_points_is_an_error():
    size = np.stack([np.zeros(30), 2.0 ** np.arange(30)], axis=1)
    problem = make_problem(size, -size)  # every subset of the groups is non-dominated: 2^30 points
    with pytest.raises(MpqError, match="more than 100000 candidate points"):
        solve_frontier(problem, max_pairs=100_000)


def test_the_choice_within_a_budget_is_that_of_the_point():
    problem = transformer(6)
    frontier = solve_frontier(problem)
    for budget in np.linspace(problem.min_bits, problem.max_bits, 5, dtype=int).tolist():
        np.testing.assert_array_equal(frontier.choice_within(budget), problem.by_group(frontier.at(bits=budget).choice))
    largest = frontier.choice_within(problem.max_bits + 8)  # as a part of a problem may be asked for
    np.testing.assert_array_equal(largest, frontier.choices(np.array([len(frontier) - 1]))[0])
    with pytest.raises(MpqError, match="below the smallest reachable size"):
        frontier.choice_within(problem.min_bits - 1)
