"""Measured KL: quantize one weight, run the model, compare. The ground truth that the other metrics approximate.

    loss_increase[l, s] = 1/N sum_t KL(p_w(. | x_<t) || p_w'(. | x_<t)),   w' = w with weight l replaced by a candidate

over the N predicted tokens of the data, in nats per token (over images or sentences in other tasks); the standard
error is over documents (`mpq.estimate`). It needs no labels. It is the one-at-a-time measurement of ModelOpt's
`kl_div` search and of llama.cpp's `--kl-divergence`, with an error bar.

Cost: one forward pass for every (weight, scheme) pair whose candidate differs from the weight, plus one for the
reference.
Fails on: interactions. The sum over weights is the loss of a plan only as far as the errors of different weights do not
correlate; that gap grows below 3 bits.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.estimate import mean_over_documents, sums_over_documents
from mpq.evaluate import Reference, row_divergence
from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.progress import track
from mpq.sensitivity.base import CandidateSource, Store, check_inputs, make_table, substituted
from mpq.trace import Trace
from mpq.types import MpqError, Scheme, SensitivityTable, WeightSpec


@dataclasses.dataclass(frozen=True)
class MeasuredKL:
    """Measured KL to the original model.

    Attributes:
      keep_bytes: most memory for the reference's outputs (4 bytes times tokens times vocabulary). Data that
        needs more is worked off in parts of that size, so the reference still runs once.
    """

    keep_bytes: int = 1 << 30

    @property
    def name(self) -> str:
        """`kl`."""
        return "kl"

    def __call__(
        self,
        model: Model,
        traced: Trace,
        schemes: Sequence[Scheme],
        candidates: CandidateSource,
        data: Dataset,
        *,
        key: jax.Array,
        batch_size: int,
        store: Store | None = None,
    ) -> SensitivityTable:
        """Measure every weight at every scheme.

        Args:
          model: gives the function and the original parameters.
          traced: gives the weights.
          schemes: columns of the table.
          candidates: quantized weights.
          data: windows to measure on.
          key: not used; the measurement is deterministic.
          batch_size: windows per forward pass.
          store: finished items, one per weight, scheme and part of the data.

        Raises:
          MpqError: no output counts, a weight is not finite, or the outputs of a candidate are not.
        """
        del key
        counts = check_inputs(model, traced.weights, data)
        reference = Reference(model, data, batch_size, keep_bytes=0)
        per_part = max(1, self.keep_bytes * -(-len(data.inputs) // batch_size) // reference.nbytes)
        windows = np.zeros((len(data.inputs), len(traced.weights), len(schemes)))
        items = itertools.product(
            range(0, len(data.inputs), per_part * batch_size), enumerate(traced.weights), enumerate(schemes)
        )
        total = -(-len(data.inputs) // (per_part * batch_size)) * len(traced.weights) * len(schemes)
        part = _Part(reference, per_part)
        for first, (row, spec), (column, scheme) in track(items, "sensitivity kl", total):
            last = min(first + per_part * batch_size, len(data.inputs))
            name = f"{spec.path}|{scheme}|{first}:{last}"
            values = None if store is None else store.get(name)
            if values is None:
                values = _measure(model, spec, scheme, candidates, part.at(first))[: last - first]
                if store is not None:
                    store.put(name, values)
            windows[first:last, row, column] = values
        mean, stderr = mean_over_documents(sums_over_documents(windows, data.document), counts)
        stderr = np.where((windows == 0).all(axis=0), 0.0, stderr)  # an exact candidate costs nothing: that is certain
        return make_table(self.name, model, traced.weights, schemes, candidates, data, mean, stderr)


class _Part:
    """The reference's outputs on one part of the data at a time, computed when first asked for."""

    def __init__(self, reference: Reference, num_batches: int):
        self._reference, self._num_batches = reference, num_batches
        self._first: int | None = None
        self._pairs: list[tuple[Batch, jax.Array]] = []

    def at(self, first: int) -> list[tuple[Batch, jax.Array]]:
        """Batches from window `first` on, with the reference's distributions."""
        if first != self._first:
            self._pairs = []  # frees the old part before the new one is made
            start = first // self._reference.batch_size
            self._pairs = list(self._reference.batches(start, start + self._num_batches))
            self._first = first
        return self._pairs


def _measure(
    model: Model,
    spec: WeightSpec,
    scheme: Scheme,
    candidates: CandidateSource,
    pairs: Sequence[tuple[Batch, jax.Array]],
) -> list[float]:
    """Sum of the KL over each window, nats; no forward pass where the candidate is the weight itself, bit for bit."""
    params = substituted(model.params, spec, candidates.dequantized(spec, scheme))
    if bool(jnp.array_equal(params[spec.param], model.params[spec.param])):
        return [0.0] * sum(len(batch.inputs) for batch, _ in pairs)
    sums = [
        row_divergence(model.apply, model.task, params, batch.inputs, model.task.counted(batch.mask), p)
        for batch, p in pairs
    ]
    values = np.concatenate([np.asarray(s, np.float64) for s in sums])
    if not np.isfinite(values).all():
        raise MpqError(
            f"weight {spec.path} stored as {scheme} makes the model's outputs NaN or infinite: leave this scheme out"
        )
    return values.tolist()
