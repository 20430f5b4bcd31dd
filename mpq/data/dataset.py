"""Datasets of any kind: made, thinned out, and held apart."""

import hashlib

import numpy as np

from mpq.inputs import Dataset
from mpq.types import MpqError


def new_dataset(
    inputs: np.ndarray, mask: np.ndarray, document: np.ndarray, source: str, labels: np.ndarray | None = None
) -> Dataset:
    """A `Dataset` with the digest of its arrays."""
    document = np.asarray(document).astype(np.int32)
    digest = hashlib.sha256()
    for array in (inputs, mask, document, *(() if labels is None else (labels,))):
        digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return Dataset(inputs, mask, document, source, digest.hexdigest(), labels)


def require_disjoint(**datasets: Dataset) -> None:
    """No window may be in two of the sets.

    Raises:
      MpqError: names the two sets and how many windows they share.
    """
    rows = {name: {hashlib.sha256(row.tobytes()).digest() for row in d.inputs} for name, d in datasets.items()}
    names = list(rows)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if shared := len(rows[a] & rows[b]):
                raise MpqError(f"the {a} and {b} sets share {shared} windows: give data that do not overlap")


def take(data: Dataset, windows: int) -> Dataset:
    """`windows` of the windows, from as many documents as there are: a first one of each, then a second, and so on."""
    if windows >= len(data.inputs):
        return data
    return _rows(data, np.sort(_by_document(data)[:windows]))


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
    return new_dataset(data.inputs[keep], data.mask[keep], data.document[keep], data.source, labels)
