"""Measured loss: quantize one weight, run the model, and compare its loss on the data's labels.

    loss_increase[l, s] = 1/N sum_t [ loss(q_t(w'), y_t) - loss(q_t(w), y_t) ],   w' = w with weight l replaced

over the N outputs of the data that count, y_t the next token, the class or the target, in nats per output. The
difference is taken output by output and its standard error is over documents, so what makes a document hard for both
models cancels. It is the one-at-a-time evaluation of AIMET (Pandey et al. 2023, arXiv:2302.05397, phase 1).

It may be negative: rounding may by chance move a model towards these labels. Averaged over labels drawn from the model
itself it would be the measured KL (`kl`), which has the same mean for a model that fits its data and far less noise.

Cost: one forward pass for every (weight, scheme) pair whose candidate differs from the weight, plus one for the loss of
the original, of which one number an output is kept.
Fails on: small errors, where the first-order term (the model is never exactly at the minimum of these data) hides the
quadratic one behind its noise; interactions, as `kl` does; tasks and data without targets, which are refused.

Differences from the paper: nats of the loss instead of the task's score or an SQNR, so that weights add up; the other
weights stay as they are in the checkpoint instead of in the widest format.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from mpq.evaluate import distributions, require_finite, sum_counted
from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.sensitivity.base import CandidateSource, Coupling, Store, check_inputs, require_targets
from mpq.sensitivity.one_by_one import concatenated, score_one_by_one
from mpq.tasks import Task
from mpq.trace import Trace
from mpq.types import Params, Scheme, SensitivityTable, WeightSpec


@dataclasses.dataclass(frozen=True)
class MeasuredLoss:
    """Measured increase of the loss on the data's labels."""

    coupling = Coupling.NONE

    @property
    def name(self) -> str:
        """`loss`."""
        return "loss"

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
          traced: gives the weights.
          schemes: columns of the table.
          candidates: quantized weights.
          data: windows with their real labels.
          key: not used; the measurement is deterministic.
          batch_size: windows per forward pass.
          store: finished items, one per weight and scheme.

        Raises:
          MpqError: no output counts, there are no targets, a weight is not finite, or the outputs of the model or of a
            candidate are not.
        """
        del key
        counts = check_inputs(model, traced.weights, data)
        require_targets(self.name, model, data)
        batches = [(batch, model.task.counted(batch.mask)) for batch in data.batches(batch_size)]
        losses = functools.partial(_losses, model.apply, model.task)

        @functools.cache
        def original() -> list[jax.Array]:
            values = [losses(model.params, batch) for batch, _ in batches]
            sums = [_row_sums(v, counted) for v, (_, counted) in zip(values, batches, strict=True)]
            require_finite(concatenated(sums), model.params, data.source)
            return values

        def measure(spec: WeightSpec, changed: Params, first: int, last: int) -> np.ndarray:
            del spec, first, last
            pairs = zip(batches, original(), strict=True)
            return concatenated([_row_sums(losses(changed, batch) - v, counted) for (batch, counted), v in pairs])

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
def _losses(apply: Callable[[Params, jax.Array], jax.Array], task: Task, params: Params, batch: Batch) -> jax.Array:
    """`float32[batch, ...]`: loss of every output at the data's targets, nats."""
    return task.loss(distributions(apply, task, params, batch.inputs), task.targets(batch.inputs, batch.labels))


_row_sums = jax.jit(sum_counted)
