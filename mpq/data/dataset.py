"""Datasets of any kind: made, thinned out, and held apart."""

import hashlib

import numpy as np

from mpq.inputs import Dataset
from mpq.types import MpqError


def new_dataset(
    inputs: np.ndarray,
    mask: np.ndarray,
    document: np.ndarray,
    source: str,
    labels: np.ndarray | None = None,
    *,
    whole: bool = False,
) -> Dataset:
    """A `Dataset` with the digest of its arrays."""
    document = np.asarray(document).astype(np.int32)
    digest = hashlib.sha256()
    for array in (inputs, mask, document, *(() if labels is None else (labels,))):
        digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return Dataset(inputs, mask, document, source, digest.hexdigest(), labels, whole)


def require_disjoint(**datasets: Dataset) -> None:
    """No window may be in two of the sets.

    Raises:
      MpqError: names the two sets and how many windows they share.
    """
    rows = {name: set(row_digests(data)) for name, data in datasets.items()}
    names = list(rows)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if shared := len(rows[a] & rows[b]):
                raise MpqError(f"the {a} and {b} sets share {shared} windows: give data that do not overlap")


def row_digests(data: Dataset) -> list[str]:
    """Of every window's input, 128 bits of sha256 in hexadecimal."""
    return [hashlib.sha256(np.ascontiguousarray(row).tobytes()).hexdigest()[:32] for row in data.inputs]


def unseen(data: Dataset, seen: frozenset[str], by: str) -> Dataset:
    """The windows whose `row_digests` are not among `seen`.

    Raises:
      MpqError: there is none; `by` says what saw them all.
    """
    keep = np.asarray([digest not in seen for digest in row_digests(data)])
    if not keep.any():
        raise MpqError(
            f"all {len(keep)} windows of {data.source} are among those that {by} was made of, on which rounding errors "
            "are smaller than elsewhere: give other text, or use fewer windows there (mpq calibrate --max-windows)"
        )
    return data if keep.all() else _rows(data, np.flatnonzero(keep))


def take(data: Dataset, windows: int) -> Dataset:
    """`windows` of the windows, from as many documents as there are: a first one of each, then a second, and so on."""
    if windows >= len(data.inputs):
        return data
    return _rows(data, np.sort(_by_document(data)[:windows]))


def divide(data: Dataset, windows: int) -> tuple[Dataset, Dataset]:
    """What `take` takes, and all other windows: for two purposes that must not see the same data.

    The first part has at most half of the windows, and at least one; a single window is both parts. Data with `whole`
    are divided by document, since rounding that saw one sentence of a pair has seen much of the other: the first part
    is the first documents, at least one, and a single document is both parts.
    """
    if (data.num_documents if data.whole else len(data.inputs)) == 1:
        return data, data
    order = np.argsort(data.document, kind="stable") if data.whole else _by_document(data)
    first = min(windows, len(order) // 2)
    if data.whole:
        ends = np.flatnonzero(np.diff(data.document[order])) + 1
        first = max(ends[ends <= first], default=ends[0])
    return _rows(data, np.sort(order[:first])), _rows(data, np.sort(order[first:]))


def by_document(data: Dataset) -> Dataset:
    """All windows in another order: a first one of each document, then a second, and so on."""
    return _rows(data, _by_document(data))


def _by_document(data: Dataset) -> np.ndarray:
    order = np.argsort(data.document, kind="stable")
    _, start, count = np.unique(data.document[order], return_index=True, return_counts=True)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(start, count)
    return np.argsort(rank, kind="stable")


def _rows(data: Dataset, keep: np.ndarray) -> Dataset:
    labels = None if data.labels is None else data.labels[keep]
    return new_dataset(data.inputs[keep], data.mask[keep], data.document[keep], data.source, labels, whole=data.whole)
