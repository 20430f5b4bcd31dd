"""What a source holds, before it is read: examples by number, so that only those that are used are decoded."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from mpq.data.dataset import new_dataset
from mpq.inputs import Dataset
from mpq.types import MpqError


class Rows(NamedTuple):
    """Rows of a `Dataset`: inputs `[R, ...]`, mask `bool[R]` or `bool[R, time]`, labels `[R, ...]` or None."""

    inputs: np.ndarray
    mask: np.ndarray
    labels: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Part:
    """Examples of one source.

    Attributes:
      count: how many there are.
      read: `int[n]`, numbers of examples, to their `n * rows` rows, those of one example next to each other.
      rows: rows of one example: 2 for a pair of sentences.
    """

    count: int
    read: Callable[[np.ndarray], Rows]
    rows: int = 1


Parts = Mapping[str, Part]
"""The parts that a source states, `train` and `test`, or all of it under the name `all`."""

SHARES = {"calibration": 0.5, "selection": 0.2, "test": 0.3}
"""Of a source without parts. Where it has them, calibration and selection share `train` in this ratio."""


def permutation(count: int) -> np.ndarray:
    """A fixed pseudo-random order of `count` examples, `int[count]`, which depends on nothing but the count.

    Sources are often sorted (by class, by genre), so that neither their first rows nor a contiguous share stand for
    the whole. The raw stream of a bit generator is the same in every version of NumPy (NEP 19), its shuffle is not.
    """
    return np.argsort(np.random.PCG64(0).random_raw(count), kind="stable")


def one_set(parts: Parts, source: str, which: str, limit: int) -> Dataset:
    """The first `limit` rows, in the fixed order, of a source, or of the part of it that suits the set `which`.

    Raises:
      MpqError: there is no example, or the limit takes none.
    """
    part = parts["all" if "all" in parts else "test" if which == "test" else "train"]
    return _new(part.read(_first(permutation(part.count), part, source, which, limit)), part.rows, source)


def three_sets(parts: Parts, source: str, limits: Mapping[str, int]) -> dict[str, Dataset]:
    """The sets of `limits`, no row of which is in two of them.

    A row of the test set is left out of the others where it occurs again, and one of the selection set out of the
    calibration set: real data have duplicates, and sentences occur in several pairs. With a row goes its example.

    Args:
      parts: of the source.
      source: for a person.
      limits: by set, the most rows.

    Raises:
      MpqError: a set has no example, or none that is not in another set.
    """
    chosen = _shares(parts, source, limits)
    seen: set[bytes] = set()
    sets: dict[str, Dataset] = {}
    for which in ("test", "selection", "calibration"):
        part, numbers = chosen[which]
        rows = part.read(numbers)
        digests = [hashlib.sha256(np.ascontiguousarray(row).tobytes()).digest() for row in rows.inputs]
        new = np.asarray([digest not in seen for digest in digests]).reshape(-1, part.rows).all(axis=1)
        if not new.any():
            raise MpqError(f"every example of the {which} set of {source} is in another set too: give other data")
        repeated = int((~new).sum())
        keep = np.repeat(new, part.rows)
        seen |= {digest for digest, kept in zip(digests, keep, strict=True) if kept}
        name = f"{source} ({which}{f'; {repeated} repeated examples left out' if repeated else ''})"
        labels = None if rows.labels is None else rows.labels[keep]
        sets[which] = _new(Rows(rows.inputs[keep], rows.mask[keep], labels), part.rows, name)
    return {which: sets[which] for which in SHARES}


def _shares(parts: Parts, source: str, limits: Mapping[str, int]) -> dict[str, tuple[Part, np.ndarray]]:
    """By set, a part and the numbers of the examples to read of it."""
    sharing = {"all": tuple(SHARES), "train": ("calibration", "selection"), "test": ("test",)}
    chosen: dict[str, tuple[Part, np.ndarray]] = {}
    for key, part in parts.items():
        ends = np.cumsum([SHARES[which] for which in sharing[key]])
        cuts = np.rint(part.count * ends / ends[-1]).astype(int)[:-1]
        for which, numbers in zip(sharing[key], np.split(permutation(part.count), cuts), strict=True):
            chosen[which] = part, _first(numbers, part, source, which, limits[which])
    return chosen


def _first(numbers: np.ndarray, part: Part, source: str, which: str, limit: int) -> np.ndarray:
    if limit < part.rows:
        raise MpqError(f"a limit of {limit} rows leaves nothing of the {which} set: one example takes {part.rows}")
    if not len(numbers):
        raise MpqError(f"{source} has {part.count} examples: too few for the {which} set")
    return numbers[: limit // part.rows]


def _new(rows: Rows, per_example: int, source: str) -> Dataset:
    document = np.arange(len(rows.inputs)) // per_example
    return new_dataset(rows.inputs, rows.mask, document, source, rows.labels, whole=per_example > 1)
