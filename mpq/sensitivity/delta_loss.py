"""DeltaLoss of AutoRound's AutoScheme (github.com/intel/auto-round; SignRoundV2, arXiv:2512.04746).

    c[l, s]  =  sum_i | dL/dw_i at the model with all weights at s  *  (w - w_ls)_i |

in nats by one measured plan (`mpq.sensitivity.anchor`). L is the loss of the labels; where the task has none, the
divergence from the original model. Gradients at the quantized model do not vanish as those at a trained one do
(`mpq.sensitivity.first_order`), because the plan is far from the minimum.

Cost: one forward and backward pass for every scheme, whatever the number of weights, and two forward passes for the
unit.
Fails on: signs. The loss along an error falls here and rises there; absolute values turn all of it into damage, the
more of it the more elements a weight has. The gradient belongs to a plan that puts all weights at s: where that plan is
broken, at 2 bits, so is the score of every weight.

Differences from AutoRound: the gradient is summed over all data before absolute values are taken, not batch by batch,
so that the batch size does not matter; there are no quantized activations, hence no term for them; embeddings and heads
are scored as all other weights are.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from mpq.evaluate import require_finite
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.progress import track
from mpq.sensitivity.anchor import anchored_table
from mpq.sensitivity.base import (
    CandidateSource,
    Coupling,
    Store,
    candidates_digest,
    check_inputs,
    measured_on,
    squared_errors,
    substituted_all,
)
from mpq.sensitivity.gradients import summed_gradient, unsigned_products
from mpq.store import kept
from mpq.trace import Trace
from mpq.types import MpqError, Scheme, SensitivityTable


@dataclasses.dataclass(frozen=True)
class DeltaLoss:
    """Unsigned first-order score with gradients at uniform plans. No options."""

    coupling = Coupling.FACTOR | Coupling.COLUMN

    @property
    def name(self) -> str:
        """`delta_loss`."""
        return "delta_loss"

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
          traced: gives the weights; all of them are quantized where a gradient is taken.
          schemes: columns of the table.
          candidates: quantized weights.
          data: windows, with their real labels if there are any.
          key: not used; nothing is drawn.
          batch_size: windows per pass.
          store: finished items, one a scheme, and the measurement.

        Raises:
          MpqError: no output counts, a weight or a candidate is not finite, or the outputs or gradients of the model or
            of a uniform plan are not.
        """
        del key
        check_inputs(model, traced.weights, data)
        on = measured_on(model, traced, data, batch_size)
        columns = []
        for scheme in track(schemes, "sensitivity delta_loss", len(schemes)):
            make = functools.partial(_column, model, traced, scheme, candidates, data, batch_size)
            among = candidates_digest(traced.weights, [scheme], candidates)
            columns.append(kept(store, make, item=self.name, **on, candidates=among))
        scores = np.array(columns, np.float64).T
        return anchored_table(
            self.name, scores, model, traced, schemes, candidates, data, batch_size=batch_size, store=store
        )


def _column(
    model: Model, traced: Trace, scheme: Scheme, candidates: CandidateSource, data: Dataset, batch_size: int
) -> list[float]:
    """Scores of all weights at one scheme."""
    squares = [squared_errors(model.params, spec, [scheme], candidates) for spec in traced.weights]
    if not np.any(squares):
        return [0.0] * len(squares)
    params = substituted_all(model.params, traced.weights, scheme, candidates)
    gradient = summed_gradient(model, params, traced.weights, data, batch_size)
    rows = [unsigned_products(gradient, model.params, spec, [scheme], candidates) for spec in traced.weights]
    scores = np.concatenate(rows)
    if not np.isfinite(scores).all():
        original = summed_gradient(model, model.params, traced.weights, data, batch_size)
        for value in original.values():
            require_finite(np.asarray(value), model.params, f"{data.source}, in a gradient")
        raise MpqError(
            f"all weights stored as {scheme} make the gradient of the loss NaN or infinite: leave this scheme out"
        )
    return scores.tolist()
