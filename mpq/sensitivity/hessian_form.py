"""Hessian form: the second-order term of the loss on the data, along the actual quantization error of one weight.

    loss_increase = 1/2 delta^T H_l delta,     H_l = d^2 L / dw_l^2     [nats per output]

L is the mean loss at the data's labels (next tokens, classes, targets), or where the task has none the divergence from
the model's own outputs. The form is a second derivative along a line, d^2/de^2 L(w + e delta) at e = 0, taken forward
over forward mode: no backward pass, and a number for every window, hence a standard error over documents. It is the
term that Optimal Brain Damage (LeCun, Denker and Solla 1989) approximates by the Hessian's diagonal and HAWQ-V2
(`hessian_trace`) by its mean.

H = Gauss-Newton matrix + sum over outputs of the loss's slope times the second derivative of the output. The second
part may be negative, and then the result may be: without it the form is `gauss_newton`, and for outputs that are linear
in the weight both are the same.

Cost: two nested forward-mode derivatives, five to eight forward passes, for every (weight, scheme) pair whose candidate
differs from the weight, and memory for a second copy of the parameters, which holds the direction.
Fails on: models away from a minimum of the data, where the first-order term that `loss` has in it is larger; large
errors; interactions; functions that have a reverse-mode rule alone (`jax.custom_vjp`).

Differences from the paper: the whole block of the Hessian, not its diagonal; a weight's error, not its removal.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from mpq.curvature import second_derivative
from mpq.evaluate import require_labels, sum_counted
from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.sensitivity.base import CandidateSource, Coupling, Store, check_inputs, output_losses
from mpq.sensitivity.one_by_one import concatenated, direction_of, score_one_by_one
from mpq.tasks import Task
from mpq.trace import Trace
from mpq.types import Params, Scheme, SensitivityTable, WeightSpec


@dataclasses.dataclass(frozen=True)
class HessianForm:
    """Quadratic form of the quantization error with the loss's Hessian."""

    coupling = Coupling.NONE

    @property
    def name(self) -> str:
        """`hessian`."""
        return "hessian"

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
          data: windows, with their real labels where the task has any.
          key: not used; nothing is drawn.
          batch_size: windows per pass.
          store: finished items, one per weight and scheme.

        Raises:
          MpqError: no output counts, a label is no class of the model, or a weight, a candidate or the model's outputs
            are not finite.
        """
        del key
        counts = check_inputs(model, traced.weights, data)
        require_labels(model, model.params, data)
        direction = direction_of(model.params)

        def measure(spec: WeightSpec, changed: Params, first: int, last: int) -> np.ndarray:
            del first, last
            return rows_along(model, data, batch_size, direction(spec, changed)) / 2

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
        )


def rows_along(model: Model, data: Dataset, batch_size: int, direction: Params) -> np.ndarray:
    """Second derivative of the loss along `direction`, `float64[windows]`, summed over the outputs that count.

    Rows that fill up the last batch come too, and are 0.

    Args:
      model: where it is taken.
      data: the loss's data.
      batch_size: windows per pass.
      direction: in the structure and shapes of the parameters.
    """
    counted = model.task.counted
    batches = data.batches(batch_size)
    return concatenated(
        [_row_derivatives(model.apply, model.task, model.params, direction, b, counted(b.mask)) for b in batches]
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _row_derivatives(
    apply: Callable[[Params, jax.Array], jax.Array],
    task: Task,
    params: Params,
    direction: Params,
    batch: Batch,
    counted: jax.Array,
) -> jax.Array:
    """`float32[batch]`: d^2/de^2 of each row's loss at params + e direction."""
    losses = lambda p: output_losses(apply, task, p, batch)
    return sum_counted(second_derivative(losses, params, direction), counted)
