"""The loop of the metrics that look at one candidate at a time: one number for every window, weight and scheme."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq.estimate import mean_over_documents, sums_over_documents
from mpq.evaluate import Reference
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.progress import track
from mpq.sensitivity.base import CandidateSource, Store, make_table, measured_on
from mpq.store import kept
from mpq.trace import Trace
from mpq.types import MpqError, Params, Scheme, SensitivityTable, WeightSpec

Measure = Callable[[WeightSpec, Params, int, int], np.ndarray]
"""`(weight, params with that weight replaced, first, last) -> float64[windows]`: the loss increase of each window from
`first`, where a batch begins, up to `last`, summed over its outputs that count; rows that fill up a batch come too."""


@dataclasses.dataclass(frozen=True, eq=False)
class Single:
    """Numbers of one candidate in place of its weight, each kept as an item.

    Attributes:
      metric: its name, which stands for all that decides the numbers beside the candidate, the model and the data.
      model: the original parameters.
      traced: gives the weights.
      candidates: quantized weights.
      data: what is measured on.
      measure: gives the numbers.
      batch_size: windows in a batch.
      store: finished items, one for every weight, scheme and part of the data.
      beside: what else the numbers depend on, plain data.
    """

    metric: str
    model: Model
    traced: Trace
    candidates: CandidateSource
    data: Dataset
    measure: Measure
    batch_size: int
    store: Store | None
    beside: Mapping[str, Any]

    def windows(self, spec: WeightSpec, scheme: Scheme, first: int, last: int) -> list[float]:
        """The loss increase of windows `first` to `last`, each summed over its outputs that count.

        Zeros, without a pass, where the candidate is the weight itself, bit for bit.

        Raises:
          MpqError: a number is NaN or infinite; names the weight and the scheme, or says that the model is at fault.
        """
        return kept(
            self.store,
            lambda: self._measured(spec, scheme, first, last),
            item=self.metric,
            **self._on,
            **self.beside,
            windows=[first, last],
            weight=spec.path,
            candidate=self.candidates.digest(spec, scheme),
        )

    @functools.cached_property
    def _on(self) -> dict[str, Any]:
        return measured_on(self.model, self.traced, self.data, self.batch_size)

    def _measured(self, spec: WeightSpec, scheme: Scheme, first: int, last: int) -> list[float]:
        original = self.model.params
        changed = spec.write(original, self.candidates.dequantized(spec, scheme))
        if bool(jnp.array_equal(changed[spec.param], original[spec.param])):
            return [0.0] * (last - first)
        values = self.measure(spec, changed, first, last)[: last - first]
        if not np.isfinite(values).all():
            for _ in Reference(self.model, self.data, self.batch_size, keep_bytes=0).batches():
                pass  # raises if already the unquantized model gives NaN
            raise MpqError(
                f"weight {spec.path} stored as {scheme} makes the model's outputs NaN or infinite: leave this scheme "
                "out"
            )
        return values.tolist()


def score_one_by_one(
    metric: str,
    model: Model,
    traced: Trace,
    schemes: Sequence[Scheme],
    candidates: CandidateSource,
    data: Dataset,
    counts: np.ndarray,
    measure: Measure,
    *,
    batch_size: int,
    store: Store | None,
    batches_per_part: int | None = None,
    beside: Mapping[str, Any] = MappingProxyType({}),
) -> SensitivityTable:
    """Call `measure` for every part of the data, weight and scheme whose candidate differs from the weight.

    Args:
      metric: its name, which stands for all that decides the numbers beside the candidate, the model and the data.
      model: the original parameters.
      traced: gives the weights.
      schemes: columns.
      candidates: quantized weights.
      data: what is measured on.
      counts: `[D]`, outputs that count in every document, from `check_inputs`.
      measure: gives the numbers.
      batch_size: windows in a batch.
      store: finished items, one for every weight, scheme and part.
      batches_per_part: batches that one call of `measure` works off; None: all.
      beside: what else the numbers depend on, plain data, for the keys of items.

    Returns:
      Means with standard errors over documents.

    Raises:
      MpqError: a number is NaN or infinite; names the weight and the scheme, or says that the model itself is at fault.
    """
    size = batch_size * (batches_per_part or -(-len(data.inputs) // batch_size))
    weights = traced.weights
    parts = range(0, len(data.inputs), size)
    windows = np.zeros((len(data.inputs), len(weights), len(schemes)))
    single = Single(metric, model, traced, candidates, data, measure, batch_size, store, beside)
    items = itertools.product(parts, enumerate(weights), enumerate(schemes))
    for first, (row, spec), (column, scheme) in track(
        items, f"sensitivity {metric}", len(parts) * len(weights) * len(schemes)
    ):
        last = min(first + size, len(data.inputs))
        windows[first:last, row, column] = single.windows(spec, scheme, first, last)
    mean, stderr = mean_over_documents(sums_over_documents(windows, data.document), counts)
    stderr = np.where((windows == 0).all(axis=0), 0.0, stderr)  # an exact candidate costs nothing: that is certain
    return make_table(metric, model, weights, schemes, candidates, data, mean, stderr)


def concatenated(rows: Sequence[jax.Array]) -> np.ndarray:
    """`float64[windows]` from one array a batch."""
    return np.concatenate([np.asarray(r, np.float64) for r in rows])


def direction_of(params: Params) -> Callable[[WeightSpec, Params], Params]:
    """A function of what `Measure` gets: the error of that one weight, and zeros for all other parameters.

    The zeros are made once, so one compiled function of all parameters serves every weight; those of one shape are one.
    """
    of_shape = {(param.shape, param.dtype): jnp.zeros_like(param) for param in params.values()}
    zeros = {path: of_shape[param.shape, param.dtype] for path, param in params.items()}
    return lambda spec, changed: {**zeros, spec.param: changed[spec.param] - params[spec.param]}
