"""The scores by which NNCF chooses between INT4 and INT8 (github.com/openvinotoolkit/nncf, `compress_weights`).

    HESSIAN_INPUT_ACTIVATION         a_l  =  ||w_l - Q8(w_l)||_F * 2 E[x_k^2]
    WEIGHT_QUANTIZATION_ERROR        a_l  =  1 / (max over columns n of mean_k (w - Q8(w))_kn^2  +  eps)

Q8 is INT8 with a zero point, a scale for every output channel; the first, its data-aware score after HAWQ, has the mean
of the squared inputs, over positions and channels, for half the Hessian of the squared output error; the second needs
no data; eps is that of float32. Both only compare weights. With KL_s the measured KL of all weights at s, shared out in
nats per output (`mpq.sensitivity.anchor`),

    loss_increase[l, s]  =  KL_s * a_l / sum of a over the weights that s changes

Cost: one forward pass that also makes the grams (not for the second), one for every scheme, and the reference.
Fails on: the error of another format than those in question. A weight that 8 bits suit and 4 do not, for outliers or
many equal values, looks harmless at 4; all schemes of a weight differ by a factor that all weights share. The first is
linear in the error's norm where the loss is quadratic. The second is upside down, large where the error is small, and
constant where errors are below eps, as those of weights of a small scale are.

Differences from NNCF: its aggregate of the squared inputs divides what earlier samples left by the size of each new
one, so that only the last counts (its source says "possibly with an error"); here it is the mean over all. Its
data-aware scores put embeddings at 0, below every other weight, and keep them at 8 bits by a rule; here a lookup is the
product with one-hot rows that it is. Its other data-aware scores, the variance or magnitude of the inputs times the
second one, are left out.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.calibrate import calibrate, count_lookups
from mpq.formats import parse_scheme
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.quantize import RTN, Candidates
from mpq.sensitivity.anchor import anchored_columns
from mpq.sensitivity.base import (
    CandidateSource,
    Coupling,
    Store,
    check_inputs,
    measured_on,
    quantization_error,
    squared_errors,
)
from mpq.store import kept
from mpq.trace import Trace
from mpq.types import Scheme, SensitivityTable

INT8 = parse_scheme("int8_channel_zp_sfloat32")


@dataclasses.dataclass(frozen=True)
class NNCF:
    """NNCF's comparison of weights by their INT8 error.

    Attributes:
      data_free: take the inverse of the largest column's error instead of the error times the squared inputs.
    """

    data_free: bool = False

    coupling = Coupling.COLUMN

    @property
    def name(self) -> str:
        """`nncf`."""
        return "nncf"

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
          traced: gives the weights and their uses.
          schemes: columns of the table.
          candidates: quantized weights; they say which weights a scheme changes, and are the plans that are measured.
          data: windows that give the inputs, and that the plans are measured on.
          key: not used; nothing is drawn.
          batch_size: windows per pass.
          store: keeps the squared inputs and the measurements.

        Raises:
          MpqError: no output counts, a weight, an input or a candidate is not finite, or the outputs of a measured plan
            are not.
        """
        del key
        check_inputs(model, traced.weights, data)
        int8 = Candidates(model.params, traced.weights, RTN())
        errors = (quantization_error(model.params, spec, [INT8], int8) for spec in traced.weights)
        squares = [np.square(np.asarray(e), dtype=np.float64) for e in errors]  # [1, batch, k, n]
        if self.data_free:
            score = np.array([1 / (s.mean(axis=2).max() + np.finfo(np.float32).eps) for s in squares])
        else:
            norms = np.sqrt([s.sum() for s in squares])
            score = norms * 2 * _squared_inputs(model, traced, data, batch_size, store)
        changes = [squared_errors(model.params, spec, schemes, candidates) > 0 for spec in traced.weights]
        label = f"{self.name}(data_free=True)" if self.data_free else self.name
        return anchored_columns(
            label,
            score[:, None] * np.array(changes),
            model,
            traced,
            schemes,
            candidates,
            data,
            batch_size=batch_size,
            store=store,
        )


def _squared_inputs(model: Model, traced: Trace, data: Dataset, batch_size: int, store: Store | None) -> np.ndarray:
    """`float64[weights]`: E[x_k^2] over positions and channels; of one-hot rows 1 / n, added where there are both."""

    def make() -> list[float]:
        stats = calibrate(traced, model.params, data, batch_size)
        lookups = count_lookups(traced, model.params, data, batch_size)
        of_matmul = lambda path: float(jnp.diagonal(stats[path].gram, axis1=1, axis2=2).mean()) if path in stats else 0
        return [of_matmul(s.path) + (1 / s.n if s.path in lookups else 0) for s in traced.weights]

    on, paths = measured_on(model, traced, data, batch_size), [spec.path for spec in traced.weights]
    return np.array(kept(store, make, item="squared_inputs", **on, weights=paths), np.float64)
