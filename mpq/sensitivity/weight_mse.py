"""Squared weight error: ||delta||^2, the score that knows nothing of the model's function.

    c[l, s]  =  ||w_ls - w_l||^2,    in nats by one measured plan (`mpq.sensitivity.anchor`)

It is what every proxy has to beat: all weights count alike, whatever reads them. As a criterion for bit allocation it
goes back to the rate-distortion view of a code (Gersho and Gray 1992, *Vector Quantization and Signal Compression*,
chapter 8), which is optimal where the loss is the squared error itself.

Cost: the candidates, and two forward passes for the unit.
Fails on: weights that matter more than others: small ones that many inputs run through, large ones behind a small gain.

Differences from the book: the distortion of a weight is its actual quantization error, not the high-rate formula
variance * 4^-bits.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.sensitivity.anchor import anchored_table
from mpq.sensitivity.base import CandidateSource, Coupling, Store, check_inputs, squared_errors
from mpq.trace import Trace
from mpq.types import Scheme, SensitivityTable


@dataclasses.dataclass(frozen=True)
class WeightMSE:
    """Squared weight error. No options."""

    coupling = Coupling.FACTOR

    @property
    def name(self) -> str:
        """`weight_mse`."""
        return "weight_mse"

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
          traced: gives the weights.
          schemes: columns of the table.
          candidates: quantized weights.
          data: windows that the one plan is measured on.
          key: not used; nothing is drawn.
          batch_size: windows per forward pass.
          store: keeps the squared errors, one a candidate, and the measurement.

        Raises:
          MpqError: no output counts, a weight or a candidate is not finite, or the measured plan's outputs are not.
        """
        del key
        check_inputs(model, traced.weights, data)
        scores = np.array([squared_errors(model.params, spec, schemes, candidates, store) for spec in traced.weights])
        return anchored_table(
            self.name, scores, model, traced, schemes, candidates, data, batch_size=batch_size, store=store
        )
