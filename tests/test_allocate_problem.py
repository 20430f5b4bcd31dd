import dataclasses

import numpy as np
import pytest

from mpq.allocate import Problem
from mpq.formats import parse_scheme
from mpq.types import MpqError, Status
from tests.allocate_cases import SCHEMES, make_problem, table, weight

WEIGHTS = (
    weight("0.q", 64, 32, "0.qkv"),
    weight("head", 100, 7),
    weight("0.k", 64, 16, "0.qkv"),
    weight("0.experts", 96, 8, batch=3),
)
LOSS = [[3.0, 2.0, 1.0], [30.0, 20.0, 10.0], [0.5, 0.25, 0.125], [7.0, 6.0, 5.0]]
STDERR = [[3.0, 1.0, 0.0], [1.0, 1.0, 1.0], [4.0, 2.0, 0.0], [0.0, 0.0, 0.0]]


def test_groups_add_up():
    problem = Problem.from_table(table(WEIGHTS, LOSS, STDERR))
    assert problem.names == ("0.qkv", "head", "0.experts")
    assert [[spec.path for spec in group] for group in problem.members] == [["0.q", "0.k"], ["head"], ["0.experts"]]
    np.testing.assert_array_equal(problem.loss[0], [3.5, 2.25, 1.125])
    np.testing.assert_array_equal(problem.variance[0], [25.0, 5.0, 0.0])
    for column, scheme in enumerate(SCHEMES[:3]):
        assert problem.size_bits[0, column] == scheme.size_bits(64, 32) + scheme.size_bits(64, 16)
        assert problem.size_bits[2, column] == 3 * scheme.size_bits(96, 8)
    assert problem.num_weights == 64 * 48 + 700 + 3 * 96 * 8
    assert problem.min_bits == sum(problem.size_bits.min(axis=1))
    assert problem.max_bits == sum(problem.size_bits.max(axis=1))
    assert problem.allowed.all()


def test_choice_is_in_the_order_of_the_table():
    problem = Problem.from_table(table(WEIGHTS, LOSS, STDERR))
    allocation = problem.allocation([0, 1, 2], budget_bits=problem.max_bits, lower_bound=0, solver="by hand")
    assert list(allocation.choice) == [spec.path for spec in WEIGHTS]
    assert [str(scheme) for scheme in allocation.choice.values()] == ["int2_g64", "int2_g32", "int2_g64", "int3_g64"]
    assert allocation.loss == 3.5 + 20 + 5
    assert allocation.stderr == np.sqrt(25 + 1 + 0)
    assert allocation.size_bits == problem.size_bits[0, 0] + problem.size_bits[1, 1] + problem.size_bits[2, 2]
    assert allocation.status is Status.FEASIBLE
    assert (
        problem.allocation([0, 1, 2], budget_bits=problem.max_bits, lower_bound=2**62, solver="").status
        is Status.OPTIMAL
    )


def test_fixed_point_is_exact_on_dyadic_losses_and_rounds_the_others_by_half_a_step():
    fixed, exponent = make_problem([[1, 2]], [[0.75, -3.0]]).fixed_point
    assert (np.ldexp(fixed.astype(np.float64), exponent) == [[0.75, -3.0]]).all()
    rng = np.random.default_rng(0)
    loss = rng.lognormal(-10, 8, (50, 4)) * rng.choice([-1, 1], (50, 4))
    problem = make_problem(np.ones((50, 4)), loss)
    fixed, exponent = problem.fixed_point
    # as float64 the integers may round once more, by 2^-53 of themselves
    assert (
        np.abs(np.ldexp(fixed.astype(np.float64), exponent) - loss) <= 0.5 * 2.0**exponent + 2.0**-53 * np.abs(loss)
    ).all()
    assert 2.0**exponent <= 2.0**-59 * np.abs(loss).max(axis=1).sum()
    assert np.abs(fixed).max(axis=1).astype(object).sum() < 2**61


def test_fixed_point_of_zeros_and_of_extremes():
    assert (make_problem([[1, 2]], [[0.0, 0.0]]).fixed_point[0] == 0).all()
    tiny = make_problem([[1, 2]], [[5e-324, 0.0]])
    assert tiny.to_loss(int(tiny.fixed_point[0][0, 0])) == 5e-324
    with pytest.raises(MpqError, match="too large to be added"):
        _ = make_problem([[1, 2], [1, 2]], [[1.5e308, 0.0], [1.5e308, 0.0]]).fixed_point


def test_pins():
    problem = Problem.from_table(table(WEIGHTS, LOSS), pins={r"0\.k": "int3_g64", "he.*": parse_scheme("int2_g64")})
    np.testing.assert_array_equal(problem.allowed, [[False, False, True], [True, False, False], [True, True, True]])


def test_equal_pins_on_one_group_agree():
    problem = Problem.from_table(table(WEIGHTS, LOSS), pins={r"0\.k": "int3_g64", r"0\.q": "int3_g64"})
    np.testing.assert_array_equal(problem.allowed[0], [False, False, True])


def test_only_leaves_the_schemes_it_names_and_several_intersect():
    only = {"0.*": ["int2_g64", "int3_g64"], r"0\.q": [parse_scheme("int3_g64"), "int2_g32"]}
    problem = Problem.from_table(table(WEIGHTS, LOSS), only=only)
    expected = [[False, False, True], [True, True, True], [True, False, True]]
    np.testing.assert_array_equal(problem.allowed, expected)


def test_a_pin_and_only_hold_together():
    problem = Problem.from_table(
        table(WEIGHTS, LOSS), pins={"head": "int2_g32"}, only={".*": ["int2_g64", "int2_g32"], r"0\.k": ["int2_g64"]}
    )
    np.testing.assert_array_equal(problem.allowed, [[True, False, False], [False, True, False], [True, True, False]])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"only": {"1.*": ["int2_g64"]}}, r"only '1\.\*' matches no weight; .* there are 0\.q, head"),
        (
            {"only": {"head": ["int2_g64", "int9"]}},
            "only 'head': scheme 'int9' is not in the table, which has int2_g64",
        ),
        ({"only": {"head": []}}, "only 'head' names no scheme: give at least one of int2_g64, int2_g32, int3_g64"),
        ({"only": {"he(": ["int2_g64"]}}, r"only 'he\(' is not a regular expression"),
        (
            {"only": {r"0\.k": ["int3_g64"], "0.*": ["int2_g64", "int2_g32"]}},
            r"only '0\\\\.k' \(int3_g64\) and only '0\.\*' \(int2_g64, int2_g32\) contradict each other on 0\.q",
        ),
        ({"pins": {"head": "int3_g64"}, "only": {"h.*": ["int2_g64"]}}, "pin 'head' .* and only .* leave no scheme"),
    ],
)
def test_wrong_only(rules, message):
    with pytest.raises(MpqError, match=message):
        Problem.from_table(table(WEIGHTS, LOSS), **rules)


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"1.*": "int2_g64"}, r"pin '1\.\*' matches no weight; .* there are 0\.q, head, 0\.k, 0\.experts"),
        ({"ead": "int2_g64"}, "matches no weight"),
        ({"head": "int9"}, "scheme 'int9' is not in the table, which has int2_g64, int2_g32, int3_g64"),
        ({"head(": "int2_g64"}, "not a regular expression"),
        ({r"0\.k": "int3_g64", r"0\.q": "int2_g64"}, "contradict each other on 0.q"),
    ],
)
def test_wrong_pins(pins, message):
    with pytest.raises(MpqError, match=message):
        Problem.from_table(table(WEIGHTS, LOSS), pins=pins)


def test_long_lists_are_cut():
    weights = [weight(f"w{i}") for i in range(100)]
    with pytest.raises(MpqError, match="w39 and 60 more"):
        Problem.from_table(table(weights, np.zeros((100, 3))), pins={"x": "int2_g64"})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_no_number_names_the_weight(bad):
    loss = np.array(LOSS)
    loss[2, 1] = bad
    with pytest.raises(MpqError, match=r"loss_increase of 0\.k at int2_g32"):
        Problem.from_table(table(WEIGHTS, loss))
    if np.isinf(bad):
        with pytest.raises(MpqError, match=r"stderr of 0\.k at int2_g32"):
            Problem.from_table(table(WEIGHTS, LOSS, loss))
    with pytest.raises(MpqError, match="predicted loss of w0000 at int2_g32"):
        make_problem([[1, 2]], [[0.0, bad]])


def test_an_unknown_error_stays_unknown():
    """A single document has a mean and no spread."""
    stderr = np.full(np.shape(LOSS), 0.5)
    stderr[:, 1] = np.nan
    problem = Problem.from_table(table(WEIGHTS, LOSS, stderr))
    assert not problem.errors_known
    assert dataclasses.replace(problem, allowed=np.arange(3) != np.full((len(problem.names), 1), 1)).errors_known
    known, unknown = (problem.evaluate([column] * len(problem.names))[2] for column in (0, 1))
    assert known == pytest.approx(0.5 * len(WEIGHTS) ** 0.5, rel=1e-12)
    assert np.isnan(unknown)


def test_a_table_of_the_wrong_shape():
    with pytest.raises(MpqError, match=r"loss_increase has shape \(4, 2\) for 4 weights and 3 schemes"):
        Problem.from_table(table(WEIGHTS, np.zeros((4, 2))))
    with pytest.raises(MpqError, match="for 0 weights"):
        Problem.from_table(table((), np.zeros((0, 3))))


def test_no_meaning_where_not_allowed():
    problem = make_problem([[1, -5]], [[0.0, np.nan]], allowed=[[True, False]])
    assert (problem.min_bits, problem.max_bits) == (1, 1)


def test_wrong_fields():
    problem = make_problem([[1, 2]], [[1.0, 0.0]])
    with pytest.raises(MpqError, match=r"problem\.loss is float32\[1, 2\]: it must be float64\[1, 2\]"):
        dataclasses.replace(problem, loss=problem.loss.astype(np.float32))
    with pytest.raises(MpqError, match=r"problem\.size_bits is int64\[2, 2\]"):
        dataclasses.replace(problem, size_bits=np.ones((2, 2), np.int64))
    with pytest.raises(MpqError, match="one name of its own"):
        make_problem([[1, 2], [1, 2]], np.zeros((2, 2)), names=("a", "a"))
    with pytest.raises(MpqError, match="no scheme is allowed for w0001: allow at least one of int2_g64, int2_g32"):
        make_problem([[1, 2], [1, 2]], np.zeros((2, 2)), allowed=[[True, True], [False, False]])
    with pytest.raises(MpqError, match="size is negative"):
        make_problem([[-1, 2]], [[1.0, 0.0]])
    with pytest.raises(MpqError, match="the variance finite or NaN, which is unknown, and not negative"):
        make_problem([[1, 2]], [[1.0, 0.0]], variance=[[-1.0, 0.0]])


def test_a_choice_that_is_not_allowed_or_does_not_fit():
    problem = make_problem([[10, 20]], [[1.0, 0.0]], allowed=[[True, False]])
    with pytest.raises(MpqError, match="int2_g32 is not allowed for w0000"):
        problem.evaluate([1])
    with pytest.raises(MpqError, match="by hand: the choice takes 2 bytes"):
        problem.allocation([0], budget_bits=8, lower_bound=0, solver="by hand")


@pytest.mark.parametrize("budget", [15.0, True, "15"])
def test_a_budget_is_whole_bits(budget):
    with pytest.raises(MpqError, match="not a whole number of bits"):
        make_problem([[10, 20]], [[1.0, 0.0]]).check_budget(budget)
