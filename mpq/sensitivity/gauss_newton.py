"""Gauss-Newton: the exact quadratic form of the actual quantization error, from one forward-mode derivative.

    loss_increase = 1/(2N) sum_t a_t^T H_t a_t,     a = J delta = d/de z(w + e delta) at e = 0     [nats per output]

with z the model's outputs, t over the N outputs that count, and H_t = d^2 KL(z_t || z')/dz'^2 at z' = z_t, the Hessian
of the task's divergence (Schraudolph 2002, Neural Computation 14(7)). For a softmax H_t = diag(p) - p p^T, and the form
is half the variance of a_t under p: the type-II Fisher form with every label enumerated (Martens 2020, JMLR 21(146)),
which `fisher` estimates. It is the second-order term of the measured KL (`kl`), has no Monte Carlo noise, needs no
labels and no backward pass; its standard error is over documents alone.

Cost: about three forward passes for every (weight, scheme) pair whose candidate differs from the weight, and memory for
a second copy of the parameters, which holds the direction. That is more than `kl`; what it buys is the second-order
term by itself, such as to hold other metrics against.
Fails on: large errors, where the KL is no longer quadratic (at 2 bits typically 20 to 50 % low); interactions;
functions that have a reverse-mode rule alone (`jax.custom_vjp`).

Differences from the paper: no matrix and no product with it is formed, only the form along one direction; H_t is taken
by automatic differentiation, so any task will do, and where a person's own divergence is not convex it is not clipped.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.curvature import second_derivative
from mpq.evaluate import sum_counted
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.sensitivity.base import CandidateSource, Coupling, Store, check_inputs
from mpq.sensitivity.one_by_one import concatenated, direction_of, score_one_by_one
from mpq.tasks import Task
from mpq.trace import Trace
from mpq.types import Params, Scheme, SensitivityTable, WeightSpec


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    """Exact Gauss-Newton quadratic form of the quantization error."""

    coupling = Coupling.NONE

    @property
    def name(self) -> str:
        """`gauss_newton`."""
        return "gauss_newton"

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
          data: windows; their labels are not used.
          key: not used; nothing is drawn.
          batch_size: windows per pass.
          store: finished items, one per weight and scheme.

        Raises:
          MpqError: no output counts, or a weight, a candidate or the model's outputs are not finite.
        """
        del key
        counts = check_inputs(model, traced.weights, data)
        direction = direction_of(model.params)

        def measure(spec: WeightSpec, changed: Params, first: int, last: int) -> np.ndarray:
            del first, last
            along, counted = direction(spec, changed), model.task.counted
            batches = data.batches(batch_size)
            return concatenated(
                [_row_forms(model.apply, model.task, model.params, along, b.inputs, counted(b.mask)) for b in batches]
            )

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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _row_forms(
    apply: Callable[[Params, jax.Array], jax.Array],
    task: Task,
    params: Params,
    direction: Params,
    inputs: jax.Array,
    counted: jax.Array,
) -> jax.Array:
    """`float32[batch]`: 1/2 a^T H a, summed over the outputs of each row that count."""
    outputs_of = lambda p: apply(p, inputs).astype(jnp.float32)
    outputs, a = jax.jvp(outputs_of, (params,), (direction,))
    reference = task.distribution(outputs)
    divergence = lambda z: task.divergence(reference, task.distribution(z))
    forms = second_derivative(divergence, outputs, a)
    # A divergence takes NaN for a class of probability 0, and its form would be 0.
    return sum_counted(jnp.where(jnp.isnan(reference).any(axis=-1), jnp.nan, forms), counted) / 2
