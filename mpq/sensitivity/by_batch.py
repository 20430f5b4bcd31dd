"""The loop of the metrics that score all candidates in one pass over the data, and the table of what windows sum up.

One pass scores all candidates, and the last bits of a matmul depend on its width: adding a scheme moves the columns of
the others by rounding. An item is therefore a batch with all its candidates, and none is made of two passes: a table
has the same bits whatever was scored before. A further scheme costs one pass over the data, as it would alone.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mpq.estimate import mean_over_documents, sums_over_documents
from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.progress import track
from mpq.sensitivity.base import CandidateSource, Store, candidates_digest, make_table, measured_on
from mpq.sensitivity.taps import dense, require_finite_windows
from mpq.store import kept
from mpq.trace import Trace
from mpq.types import Scheme, SensitivityTable

OfBatch = Callable[[Batch, jax.Array, np.ndarray], Mapping[str, jax.Array]]
"""`(batch, counted, numbers of its windows in the data) -> path -> [windows, schemes that differ, ...]`."""


def windows_by_batch(
    what: str,
    model: Model,
    traced: Trace,
    schemes: Sequence[Scheme],
    candidates: CandidateSource,
    keep: np.ndarray,
    data: Dataset,
    of_batch: OfBatch,
    *,
    batch_size: int,
    store: Store | None,
    inputs: Mapping[str, Any],
    shape: tuple[int, ...] = (),
) -> np.ndarray:
    """What `of_batch` gives for every window; it is not called where no candidate differs from its weight.

    Args:
      what: for the progress bar.
      model: gives the task.
      traced: gives the weights.
      schemes: columns.
      candidates: quantized weights.
      keep: `bool[weights, schemes]`, the candidates that differ, from `differing_errors`.
      data: windows.
      of_batch: gives the numbers; rows that fill up the last batch come too.
      batch_size: windows per pass.
      store: finished items, one a batch.
      inputs: of an item, what else `of_batch` depends on beside model, data and candidates; `item` names it.
      shape: of what a window has for one candidate.

    Returns:
      `float64[windows, weights, schemes, *shape]`; 0 where the candidate is the weight itself.

    Raises:
      MpqError: a number is not finite; names the candidate, or says that the model itself is at fault.
    """
    windows = np.zeros((len(data.inputs), *keep.shape, *shape))
    if keep.any():
        key = {**inputs, **measured_on(model, traced, data, batch_size)}
        key["candidates"] = candidates_digest(traced.weights, schemes, candidates)

        def rows(batch: Batch, counted: jax.Array, numbers: np.ndarray) -> np.ndarray:
            return dense(jax.device_get(of_batch(batch, counted, numbers)), traced, keep)

        windows = kept_by_batch(what, model, data, rows, batch_size=batch_size, store=store, inputs=key)
    require_finite_windows(windows, keep, model, data.source)
    return windows


def kept_by_batch(
    what: str,
    model: Model,
    data: Dataset,
    rows: Callable[[Batch, jax.Array, np.ndarray], np.ndarray],
    *,
    batch_size: int,
    store: Store | None,
    inputs: Mapping[str, Any],
) -> np.ndarray:
    """`float64[windows, ...]`: what `rows` gives for every batch, each an item; rows that fill up the last one are cut.

    Args:
      what: for the progress bar.
      model: gives the task.
      data: windows.
      rows: `(batch, counted, numbers of its windows in the data) -> [windows, ...]`.
      batch_size: windows per pass.
      store: finished items.
      inputs: all that `rows` depends on beside its arguments; `item` names it.
    """

    def make(start: int, stop: int, batch: Batch) -> list[Any]:
        values = rows(batch, model.task.counted(batch.mask), np.arange(start, start + batch_size))
        return values[: stop - start].tolist()

    starts, parts = range(0, len(data.inputs), batch_size), []
    for start, batch in track(zip(starts, data.batches(batch_size), strict=True), what, len(starts)):
        stop = min(start + batch_size, len(data.inputs))
        parts += kept(store, functools.partial(make, start, stop, batch), **inputs, windows=[start, stop])
    return np.asarray(parts, np.float64)


def table_of_windows(
    label: str,
    model: Model,
    traced: Trace,
    schemes: Sequence[Scheme],
    candidates: CandidateSource,
    data: Dataset,
    counts: np.ndarray,
    windows: np.ndarray,
    keep: np.ndarray,
) -> SensitivityTable:
    """Means over outputs with standard errors over documents.

    Args:
      label: of the table: the metric's name and options.
      model: gives the digest.
      traced: gives the weights.
      schemes: columns.
      candidates: quantized weights.
      data: what was scored on.
      counts: `[D]`, outputs that count in every document, from `check_inputs`.
      windows: `float64[windows, weights, schemes]`, sums over the outputs of each window that count.
      keep: `bool[weights, schemes]`, the candidates that differ from their weight.

    Raises:
      MpqError: an entry is not finite.
    """
    mean, stderr = mean_over_documents(sums_over_documents(windows, data.document), counts)
    stderr = np.where(keep, stderr, 0.0)  # an exact candidate costs nothing: that is certain
    return make_table(label, model, traced.weights, schemes, candidates, data, mean, stderr)
