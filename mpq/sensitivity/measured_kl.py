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
from collections.abc import Sequence

import jax
import numpy as np

from mpq.evaluate import Reference
from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.sensitivity.base import CandidateSource, Coupling, Store, check_inputs, window_divergences
from mpq.sensitivity.one_by_one import score_one_by_one
from mpq.trace import Trace
from mpq.types import Params, Scheme, SensitivityTable, WeightSpec


@dataclasses.dataclass(frozen=True)
class MeasuredKL:
    """Measured KL to the original model.

    Attributes:
      keep_bytes: most memory for the reference's outputs (4 bytes times tokens times vocabulary). Data that
        needs more is worked off in parts of that size, so the reference still runs once.
    """

    keep_bytes: int = 1 << 30

    coupling = Coupling.NONE

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
        part = _Part(reference)

        def measure(spec: WeightSpec, changed: Params, first: int, last: int) -> np.ndarray:
            del spec
            return window_divergences(model, changed, part.at(first, last))

        return score_one_by_one(
            self.name,
            model,
            traced,
            schemes,
            candidates,
            data,
            counts,
            measure,
            batch_size=batch_size,
            store=store,
            batches_per_part=per_part,
        )


class _Part:
    """The reference's outputs on one part of the data at a time, computed when first asked for."""

    def __init__(self, reference: Reference):
        self._reference = reference
        self._windows: tuple[int, int] | None = None
        self._pairs: list[tuple[Batch, jax.Array]] = []

    def at(self, first: int, last: int) -> list[tuple[Batch, jax.Array]]:
        """Batches from window `first` up to `last`, with the reference's distributions."""
        if (first, last) != self._windows:
            self._pairs = []  # frees the old part before the new one is made
            size = self._reference.batch_size
            self._pairs = list(self._reference.batches(first // size, -(-last // size)))
            self._windows = first, last
        return self._pairs
