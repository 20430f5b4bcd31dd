"""Data: calibration, selection and test sets that never overlap. Windows, padding and masks are made here only."""

from mpq.data.dataset import new_dataset, require_disjoint, take
from mpq.data.text import make_dataset, read_documents, split_documents

__all__ = ["make_dataset", "new_dataset", "read_documents", "require_disjoint", "split_documents", "take"]
