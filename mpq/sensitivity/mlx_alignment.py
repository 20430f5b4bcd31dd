"""Alignment of mlx-lm's `dynamic_quant`: the derivative at the low-bit model (github.com/ml-explore/mlx-lm).

With `low` the scheme of smallest size and g = grad KL(original || all weights at low), mlx-lm scores a weight by what
moving it to a higher scheme saves to first order, <g, w_low - w_s>. A table needs the same from the original weight on:

    loss_increase[l, s]  =  < g_l, delta_ls >,     loss[l, low] - loss[l, s]  =  < g_l, w_low - w_s >

in nats per output. Differences between the schemes of a weight, all that an allocation reads, are mlx-lm's scores.
Entries may be negative. It needs no labels.

Cost: one forward and backward pass, on every scheme one multiply-add for every element of a window's gradient, and the
reference.
Fails on: distance. The gradient is that of a plan far from the minimum, where KL is no straight line: for a quadratic
loss <g, delta> at low counts twice what the error costs, and errors at other schemes only as far as they point along
those of low. Signs: products cancel, so that error bars are large (mlx-lm issue 1759: five models from one seed). Where
the low plan is broken, at 2 bits, so is the score of every weight.

Differences from mlx-lm: any number of schemes instead of two; not divided by the weight's elements, which makes its
threshold a gain per bit and is the allocator's work here; a mean over outputs, not of batches' means.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mpq.evaluate import Reference
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.sensitivity.base import (
    CandidateSource,
    Coupling,
    Store,
    by_size,
    candidates_digest,
    check_inputs,
    measured_on,
    substituted_all,
)
from mpq.sensitivity.by_batch import table_of_windows
from mpq.sensitivity.errors import differing_errors
from mpq.sensitivity.gradients import divergence_slopes
from mpq.sensitivity.taps import telling_windows
from mpq.store import kept
from mpq.trace import Trace
from mpq.types import MpqError, Scheme, SensitivityTable


@dataclasses.dataclass(frozen=True)
class MLXAlignment:
    """Signed first-order score with the gradient at the smallest uniform plan. No options."""

    coupling = Coupling.ROW | Coupling.COLUMN

    @property
    def name(self) -> str:
        """`mlx_alignment`."""
        return "mlx_alignment"

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
        """Score every weight at every scheme.

        Args:
          model: gives the function and the original parameters.
          traced: the model's trace; all its weights are at the smallest scheme where the gradient is taken.
          schemes: columns of the table.
          candidates: quantized weights.
          data: windows; their labels are not used.
          key: not used; nothing is drawn.
          batch_size: windows per pass.
          store: keeps the derivatives.

        Raises:
          MpqError: no output counts, or a weight, a candidate, the model's outputs or the smallest plan's gradients are
            not finite.
        """
        del key
        counts = check_inputs(model, traced.weights, data)
        low = schemes[by_size(traced.weights, schemes)[0]]
        keep, errors = differing_errors(model.params, traced, schemes, candidates)
        windows = np.zeros((len(data.inputs), *keep.shape))

        def make() -> list[Any]:
            shaped = telling_windows(traced.on((batch_size, *data.inputs.shape[1:])))
            plan = substituted_all(model.params, traced.weights, low, candidates)
            slopes = divergence_slopes(shaped, plan, errors, Reference(model, data, batch_size, keep_bytes=0), keep)
            if not np.isfinite(slopes[:, keep]).any(axis=1).all():
                raise MpqError(
                    f"all weights stored as {low} make the gradient of the KL NaN or infinite: leave this scheme out"
                )
            return slopes.tolist()

        if errors:
            on = measured_on(model, traced, data, batch_size)
            among = candidates_digest(traced.weights, schemes, candidates)
            windows = np.asarray(kept(store, make, item=self.name, **on, candidates=among), np.float64)
        return table_of_windows(self.name, model, traced, schemes, candidates, data, counts, windows, keep)
