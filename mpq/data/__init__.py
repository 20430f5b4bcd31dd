"""Data: calibration, selection and test sets that never overlap. Windows, padding and masks are made here only."""

from mpq.data.dataset import divide, new_dataset, require_disjoint, row_digests, take, unseen
from mpq.data.text import make_dataset, read_documents, split_documents

__all__ = [
    "divide",
    "make_dataset",
    "new_dataset",
    "read_documents",
    "require_disjoint",
    "row_digests",
    "split_documents",
    "take",
    "unseen",
]
