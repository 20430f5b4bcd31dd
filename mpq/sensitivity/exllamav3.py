"""Measured KL around a low-bit model: exllamav3's `measure` (github.com/turboderp-org/exllamav3).

With `low` the scheme of smallest size and P_l(v) the KL to the original of the plan with all weights at low but weight
l, which is at v, exllamav3 measures what a better scheme saves there, P_l(s) - P_l(low), for its greedy optimizer. A
table needs the same from the original weight on:

    loss_increase[l, s]  =  P_l(s) - P_l(original)        [nats per output]

over the outputs of the data, with standard errors over documents, paired. Differences between the schemes of a weight,
all that an allocation reads, are exllamav3's. It needs no labels. Beside `kl`, the same measurement around the original
model, it shows how much the company of the other weights matters.

Cost: one forward pass for every (weight, scheme) pair whose candidate differs from the weight, one for every weight,
and the reference.
Fails on: plans far from low. Savings shrink as the others improve, so that their sum promises more than is there, and
the order changes; entries may be negative, where one weight's error undoes another's. exllamav3 meets both with an
exponent of 0.69 on the savings, and shipped plans worse than uniform (its issue 108).

Differences from exllamav3: single weights, not groups of layers; rounding by the given quantizer; exact softmax, no
1e-10 under the logarithm.
"""

import dataclasses
import functools
from collections.abc import Sequence

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
    quantization_error,
    substituted_all,
    window_divergences,
)
from mpq.sensitivity.one_by_one import score_one_by_one
from mpq.trace import Trace
from mpq.types import MpqError, Params, Scheme, SensitivityTable, WeightSpec


@dataclasses.dataclass(frozen=True)
class ExLlamaV3:
    """Measured KL of one weight at a time in the smallest uniform plan.

    Attributes:
      keep_bytes: most memory for the reference's outputs; above it the reference runs again for every measurement.
    """

    keep_bytes: int = 1 << 30

    coupling = Coupling.ROW | Coupling.COLUMN

    @property
    def name(self) -> str:
        """`exllamav3`."""
        return "exllamav3"

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
          traced: gives the weights; all others are at the smallest scheme where one is measured.
          schemes: columns of the table.
          candidates: quantized weights.
          data: windows to measure on.
          key: not used; the measurement is deterministic.
          batch_size: windows per forward pass.
          store: finished items, one per weight and scheme.

        Raises:
          MpqError: no output counts, a weight or a candidate is not finite, or the outputs of a plan are not.
        """
        del key
        counts = check_inputs(model, traced.weights, data)
        low = schemes[by_size(traced.weights, schemes)[0]]
        for spec in traced.weights:
            quantization_error(model.params, spec, [low], candidates)  # names a candidate that breaks the plan
        plan = substituted_all(model.params, traced.weights, low, candidates)
        reference = Reference(model, data, batch_size, keep_bytes=self.keep_bytes)

        def in_plan(spec: WeightSpec, params: Params) -> np.ndarray:
            matrix = spec.to_matrix(params[spec.param])
            return window_divergences(model, spec.write(plan, matrix), reference.batches())

        @functools.lru_cache(maxsize=1)  # asked for once a scheme, weight after weight
        def of_original(spec: WeightSpec) -> np.ndarray:
            values = in_plan(spec, model.params)
            if not np.isfinite(values).all():
                raise MpqError(
                    f"all weights but {spec.path} stored as {low} make the model's outputs NaN or infinite: "
                    "leave this scheme out"
                )
            return values

        def measure(spec: WeightSpec, changed: Params, first: int, last: int) -> np.ndarray:
            del first, last
            return in_plan(spec, changed) - of_original(spec)

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
            beside={"plan": candidates_digest(traced.weights, [low], candidates)},
        )
