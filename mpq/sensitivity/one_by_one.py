"""The loop of the metrics that look at one candidate at a time: one number for every window, weight and scheme."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.estimate import mean_over_documents, sums_over_documents
from mpq.evaluate import Reference
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.progress import track
from mpq.sensitivity.base import CandidateSource, Store, make_table, substituted
from mpq.types import MpqError, Params, Scheme, SensitivityTable, WeightSpec

Measure = Callable[[WeightSpec, Params, int], np.ndarray]
"""`(weight, params with that weight replaced, first window) -> float64[windows]`: the loss increase of each window of
the part that begins there, summed over its outputs that count; rows that fill up the last batch come too."""


def score_one_by_one(
    metric: str,
    model: Model,
    weights: Sequence[WeightSpec],
    schemes: Sequence[Scheme],
    candidates: CandidateSource,
    data: Dataset,
    counts: np.ndarray,
    measure: Measure,
    *,
    batch_size: int,
    store: Store | None,
    batches_per_part: int | None = None,
) -> SensitivityTable:
    """Call `measure` for every part of the data, weight and scheme whose candidate differs from the weight.

    Args:
      metric: its name.
      model: the original parameters.
      weights: rows.
      schemes: columns.
      candidates: quantized weights.
      data: what is measured on.
      counts: `[D]`, outputs that count in every document, from `check_inputs`.
      measure: gives the numbers.
      batch_size: windows in a batch.
      store: finished items, one for every weight, scheme and part.
      batches_per_part: batches that one call of `measure` works off; None: all.

    Returns:
      Means with standard errors over documents.

    Raises:
      MpqError: a number is NaN or infinite; names the weight and the scheme, or says that the model itself is at fault.
    """
    size = batch_size * (batches_per_part or -(-len(data.inputs) // batch_size))
    parts = range(0, len(data.inputs), size)
    windows = np.zeros((len(data.inputs), len(weights), len(schemes)))
    items = itertools.product(parts, enumerate(weights), enumerate(schemes))
    for first, (row, spec), (column, scheme) in track(
        items, f"sensitivity {metric}", len(parts) * len(weights) * len(schemes)
    ):
        last = min(first + size, len(data.inputs))
        name = f"{spec.path}|{scheme}|{first}:{last}"
        values = None if store is None else store.get(name)
        if values is None:
            changed = substituted(model.params, spec, candidates.dequantized(spec, scheme))
            if bool(jnp.array_equal(changed[spec.param], model.params[spec.param])):
                values = [0.0] * (last - first)  # no pass where the candidate is the weight itself, bit for bit
            else:
                values = measure(spec, changed, first)[: last - first].tolist()
                _require_finite(values, model, spec, scheme, data, batch_size)
            if store is not None:
                store.put(name, values)
        windows[first:last, row, column] = values
    mean, stderr = mean_over_documents(sums_over_documents(windows, data.document), counts)
    stderr = np.where((windows == 0).all(axis=0), 0.0, stderr)  # an exact candidate costs nothing: that is certain
    return make_table(metric, model, weights, schemes, candidates, data, mean, stderr)


def _require_finite(
    values: Sequence[float], model: Model, spec: WeightSpec, scheme: Scheme, data: Dataset, batch_size: int
) -> None:
    if np.isfinite(values).all():
        return
    for _ in Reference(model, data, batch_size, keep_bytes=0).batches():
        pass  # raises if already the unquantized model gives NaN
    raise MpqError(
        f"weight {spec.path} stored as {scheme} makes the model's outputs NaN or infinite: leave this scheme out"
    )


def concatenated(rows: Sequence[jax.Array]) -> np.ndarray:
    """`float64[windows]` from one array a batch."""
    return np.concatenate([np.asarray(r, np.float64) for r in rows])


def direction_of(params: Params) -> Callable[[WeightSpec, Params], Params]:
    """A function of what `Measure` gets: the error of that one weight, and zeros for all other parameters.

    The zeros are made once, so one compiled function of all parameters serves every weight.
    """
    zeros = {path: jnp.zeros_like(param) for path, param in params.items()}
    return lambda spec, changed: {**zeros, spec.param: changed[spec.param] - params[spec.param]}
