"""First-order Taylor term of the loss of the labels at the original weights.

    signed      loss_increase[l, s]  =  < grad_l L, delta_ls >                       [nats per output]
    unsigned    c[l, s]  =  sum_i |grad_i L * delta_i|,    in nats by one measured plan (`mpq.sensitivity.anchor`)

L is the mean loss of the data's labels. The signed term is the first one of the Taylor series of which the curvature
metrics take the second (LeCun, Denker and Solla 1990, *Optimal Brain Damage*, eq. 2, where it is dropped); it has its
unit and may be negative. mlx-lm's `dynamic_quant` uses such a signed product at a low-bit model, AutoRound the unsigned
one at quantized models (`mpq.sensitivity.delta_loss`).

Cost: one forward and backward pass, and for a scheme one multiply-add for every element of a window's gradient;
unsigned, also two forward passes for the unit.
Fails on: trained models. At a minimum of the loss the gradient is zero on the data that it was trained on, and what is
left elsewhere is noise: error bars of the signed term are about its size, and rounding errors have no sign to follow.
It is here to show that. The unsigned sum does not cancel, and measures how large gradients are, not what errors do.

Differences from the paper: none of the second order is added, and the term is taken of quantization errors.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mpq.evaluate import require_finite
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.sensitivity.anchor import anchored_table
from mpq.sensitivity.base import (
    CandidateSource,
    Coupling,
    Store,
    candidates_digest,
    check_inputs,
    measured_on,
    require_targets,
)
from mpq.sensitivity.by_batch import table_of_windows
from mpq.sensitivity.gradients import slopes_of_data, summed_gradient, unsigned_products
from mpq.sensitivity.taps import BY_GRADIENT
from mpq.store import kept
from mpq.trace import Trace
from mpq.types import Scheme, SensitivityTable


@dataclasses.dataclass(frozen=True)
class FirstOrder:
    """First-order term of the loss.

    Attributes:
      signed: the Taylor term itself; False: the sum of absolute values of its products.
    """

    signed: bool = True

    @property
    def name(self) -> str:
        """`first_order`."""
        return "first_order"

    @property
    def coupling(self) -> Coupling:
        """The unit, where the sum is unsigned."""
        return Coupling.NONE if self.signed else Coupling.FACTOR

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
          traced: the model's trace.
          schemes: columns of the table.
          candidates: quantized weights.
          data: windows with their real labels.
          key: not used; nothing is drawn.
          batch_size: windows per pass.
          store: finished items, one a batch; unsigned, the scores and the measurement.

        Raises:
          MpqError: no output counts, the data has no labels, or a weight, a candidate or the model's outputs are not
            finite.
        """
        del key
        counts = check_inputs(model, traced.weights, data)
        require_targets(self.name, model, data)
        if not self.signed:
            scores = _unsigned(model, traced, schemes, candidates, data, batch_size, store)
            label = f"{self.name}(signed=False)"
            return anchored_table(
                label, scores, model, traced, schemes, candidates, data, batch_size=batch_size, store=store
            )
        keep, windows = slopes_of_data(
            BY_GRADIENT, model, traced, schemes, candidates, data, batch_size, store, self.name
        )
        return table_of_windows(self.name, model, traced, schemes, candidates, data, counts, windows, keep)


def _unsigned(
    model: Model,
    traced: Trace,
    schemes: Sequence[Scheme],
    candidates: CandidateSource,
    data: Dataset,
    batch_size: int,
    store: Store | None,
) -> np.ndarray:
    """`float64[weights, schemes]`: sum of |gradient * error|."""

    def make() -> list[Any]:
        gradient = summed_gradient(model, model.params, traced.weights, data, batch_size)
        rows = [unsigned_products(gradient, model.params, spec, schemes, candidates) for spec in traced.weights]
        require_finite(np.array(rows), model.params, f"{data.source}, in a gradient")
        return np.array(rows).tolist()

    on = measured_on(model, traced, data, batch_size)
    among = candidates_digest(traced.weights, schemes, candidates)
    return np.array(kept(store, make, item="first_order(signed=False)", **on, candidates=among))
