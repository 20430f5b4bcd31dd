"""The gradient score of NVIDIA's Model Optimizer: squared products of output gradients and output errors.

It is `auto_quantize` with method "gradient" (github.com/NVIDIA/Model-Optimizer, torch/quantization/algorithms.py).

    c[l, s]  =  sum over positions and outputs n of  clamp(e_n * (x^T delta_ls)_n, +-1e10)^2

in nats by one measured plan (`mpq.sensitivity.anchor`). x is the weight's input, e the gradient of the loss of the
data's labels in the weight's output, x^T delta the change of that output. It is the quadratic form of the errors with
the empirical Fisher of every output element by itself: off-diagonal elements are left out, between positions as well as
between outputs.

Cost: one forward and backward pass, on every scheme a product of input and error, and two forward passes for the unit.
Fails on: what it leaves out, the correlation of errors, which one-position Fisher underrates where attention averages
(`mpq.sensitivity.fisher`); the labels of the data instead of the model's own, which is no curvature where the model is
wrong (Kunstner, Balles and Hennig 2019, arXiv:1905.12558).

Differences from Model Optimizer: gradients of the summed loss, not of each batch's mean, so that the batch size does
not matter; uses of one weight are added up, a lookup's output included; scores are not made monotone in bits; fused
weights are scored one by one and added up.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.sensitivity.anchor import anchored_table
from mpq.sensitivity.base import CandidateSource, Coupling, Store, check_inputs, require_targets
from mpq.sensitivity.errors import WeightErrors, looked_up
from mpq.sensitivity.gradients import slopes_of_data
from mpq.sensitivity.taps import Form
from mpq.trace import Trace
from mpq.types import Scheme, SensitivityTable

LIMIT = 1e10


@dataclasses.dataclass(frozen=True)
class ModelOptGradient:
    """Squared products of output gradients and output errors. No options."""

    coupling = Coupling.FACTOR

    @property
    def name(self) -> str:
        """`modelopt_gradient`."""
        return "modelopt_gradient"

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
          store: finished items, one a batch, and the measurement.

        Raises:
          MpqError: no output counts, the data has no labels, a weight, a candidate or the model's outputs are not
            finite, or the measured plan's outputs are not.
        """
        del key
        check_inputs(model, traced.weights, data)
        require_targets(self.name, model, data)
        _, windows = slopes_of_data(SQUARES, model, traced, schemes, candidates, data, batch_size, store, self.name)
        scores = windows.sum(axis=0)
        return anchored_table(
            self.name, scores, model, traced, schemes, candidates, data, batch_size=batch_size, store=store
        )


def _of_matmul(x: jax.Array, errors: WeightErrors, e: jax.Array) -> jax.Array:
    """`[schemes, windows, spans]`; scheme by scheme, since the change of the output is as large as the output."""
    of_scheme = lambda delta: _squares(jnp.einsum("bwptk,bkn->bwptn", x, delta) * e, (0, 3, 4))
    return jax.lax.map(of_scheme, errors.matrices())


def _of_lookup(indices: jax.Array, errors: WeightErrors, e: jax.Array) -> jax.Array:
    """`[schemes, windows, spans]`: the error of the row looked up is the change of the output."""
    return _squares(looked_up(errors, indices) * e, (3, 4))


def _squares(products: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(jnp.square(jnp.clip(products, -LIMIT, LIMIT)), axis=axes)


SQUARES = Form(_of_matmul, _of_lookup)
