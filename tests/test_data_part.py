"""Splitting of examples: a fixed order, shares, parts that a source states, duplicates."""

import numpy as np
import pytest

from mpq.data.part import Part, Rows, one_set, permutation, three_sets
from mpq.types import MpqError

NAMES = ("calibration", "selection", "test")
ALL = dict.fromkeys(NAMES, 10**6)


def part(values):
    """One row an example, which holds its value; the label is the value's negative."""
    values = np.asarray(values, np.int32)
    return Part(len(values), lambda n: Rows(values[n, None], np.ones((len(n), 1), bool), -values[n]))


def test_the_order_is_fixed_for_good():
    assert permutation(8).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]  # PCG XSL-RR 128/64, seed 0
    np.testing.assert_array_equal(np.sort(permutation(1000)), np.arange(1000))
    assert not np.array_equal(permutation(1000), np.arange(1000))


def test_a_smaller_limit_gives_the_first_rows_of_the_same_order():
    parts = {"all": part(range(100))}
    long, short = one_set(parts, "toy", "test", 60), one_set(parts, "toy", "test", 10)
    np.testing.assert_array_equal(long.inputs[:10], short.inputs)
    np.testing.assert_array_equal(long.labels, -long.inputs[:, 0])


def test_a_sorted_source_gives_sets_of_every_kind():
    sets = three_sets({"all": part(np.arange(300) * 10)}, "toy", dict.fromkeys(NAMES, 40))
    for data in sets.values():  # 40 of 300 in three thirds; all in one has a chance below 1e-7 for a random order
        assert np.bincount(data.inputs[:, 0] // 1000, minlength=3).min() >= 5


@pytest.mark.parametrize("count", [10, 11, 99, 1000])
def test_a_source_without_parts_is_divided_in_its_shares(count):
    sets = three_sets({"all": part(range(count))}, "toy", ALL)
    assert tuple(sets) == NAMES
    np.testing.assert_allclose([len(d.inputs) for d in sets.values()], [0.5 * count, 0.2 * count, 0.3 * count], atol=1)
    assert sorted(np.concatenate([d.inputs[:, 0] for d in sets.values()])) == list(range(count))


def test_stated_parts_are_kept():
    parts = {"train": part(range(70)), "test": part(range(100, 110))}
    sets = three_sets(parts, "toy", ALL)
    assert sorted(sets["test"].inputs[:, 0]) == list(range(100, 110))
    assert [len(sets[name].inputs) for name in NAMES] == [50, 20, 10]
    assert sorted([*sets["calibration"].inputs[:, 0], *sets["selection"].inputs[:, 0]]) == list(range(70))
    assert one_set(parts, "toy", "test", 99).digest == sets["test"].digest
    assert len(one_set(parts, "toy", "calibration", 99).inputs) == 70
    assert len(one_set(parts, "toy", "selection", 99).inputs) == 70


def test_what_is_in_the_test_set_is_left_out_of_the_others():
    sets = three_sets({"train": part(range(70)), "test": part(range(30, 40))}, "toy", ALL)
    assert sorted(sets["test"].inputs[:, 0]) == list(range(30, 40))
    rest = np.concatenate([sets[name].inputs[:, 0] for name in NAMES[:2]])
    assert sorted(rest) == [*range(30), *range(40, 70)]
    left_out = sum(int(sets[name].source.split("; ")[1].split()[0]) for name in NAMES[:2])
    assert left_out == 10
    np.testing.assert_array_equal(sets["calibration"].labels, -sets["calibration"].inputs[:, 0])


def test_documents_are_examples():
    pairs = Part(5, lambda n: Rows(np.repeat(n, 2)[:, None], np.ones((2 * len(n), 1), bool), None), rows=2)
    assert one_set({"all": pairs}, "toy", "test", 7).document.tolist() == [0, 0, 1, 1, 2, 2]


def test_equal_sets_are_refused():
    with pytest.raises(MpqError, match="every example of the selection set of toy is in another set too"):
        three_sets({"train": part(range(10)), "test": part(range(10))}, "toy", ALL)


@pytest.mark.parametrize(
    ("parts", "which"),
    [
        ({"all": part([])}, "calibration"),
        ({"all": part([1, 2])}, "selection"),
        ({"train": part([1]), "test": part([2])}, "selection"),
        ({"train": part(range(9)), "test": part([])}, "test"),
    ],
)
def test_too_few_examples_are_refused(parts, which):
    with pytest.raises(MpqError, match=f"toy has . examples: too few for the {which} set"):
        three_sets(parts, "toy", ALL)
