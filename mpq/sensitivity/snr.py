"""Relative weight error: noise to signal, ||delta||^2 / ||w||^2.

    c[l, s]  =  ||w_ls - w_l||^2 / ||w_l||^2,    in nats by one measured plan (`mpq.sensitivity.anchor`)

The criterion `snr` of Microsoft's Olive (github.com/microsoft/Olive, `SelectiveMixedPrecision`). Behind a
normalization, or in a network that is equivariant to the scale of its layers, the scale of a weight means nothing, and
this score is the squared error without it. It is also t^2 of the linearity theorem, with every alpha_l equal
(`mpq.sensitivity.higgs` measures them).

Cost: the candidates, and two forward passes for the unit.
Fails on: weights that matter more than others. A large matrix and a small one of equal relative error score alike.

Differences from Olive: its score is 10 log10(signal / noise) in decibels, where low means sensitive; here the
reciprocal before the logarithm, which orders alike and adds up over weights. Its `snr_relative`, the gain over one
higher precision, is left to the allocator, which compares columns. Fused weights are scored one by one and added up,
not as one matrix.
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
from mpq.types import Params, Scheme, SensitivityTable, WeightSpec


@dataclasses.dataclass(frozen=True)
class SNR:
    """Noise-to-signal ratio of the weight. No options."""

    coupling = Coupling.FACTOR

    @property
    def name(self) -> str:
        """`snr`."""
        return "snr"

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
        scores = np.array([noise_to_signal(model.params, spec, schemes, candidates, store) for spec in traced.weights])
        return anchored_table(
            self.name, scores, model, traced, schemes, candidates, data, batch_size=batch_size, store=store
        )


def noise_to_signal(
    params: Params,
    spec: WeightSpec,
    schemes: Sequence[Scheme],
    candidates: CandidateSource,
    store: Store | None = None,
) -> np.ndarray:
    """`float64[schemes]`: ||candidate - weight||^2 / ||weight||^2; 0 for an exact candidate of a weight of zeros."""
    signal = np.square(np.asarray(params[spec.param][spec.where]), dtype=np.float64).sum()
    return squared_errors(params, spec, schemes, candidates, store) / max(signal, float(np.finfo(np.float32).tiny))
