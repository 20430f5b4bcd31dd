"""Average Hessian trace: HAWQ-V2 (Dong et al. 2020, arXiv:1911.03852).

Second-order Taylor expansion of the mean NLL L of the real labels at a minimum, with the Hessian block of a weight
replaced by a multiple of the identity of equal trace:

    loss_increase  =  1/2 * tr(H_l) / n_l * ||delta_l||^2      [nats per token],  H_l = d^2 L / dw_l^2,  n_l elements

tr(H_l) by Hutchinson (1989): E[v^T H v] for random signs v. One probe over *all* weights gives every tr(H_l) at once:
the cross terms v_l^T H_lj v_j (j != l) have mean zero. They add variance, which the standard error, over probes,
reports.

Cost: a Hessian-vector product, about two gradients and a forward pass, for every probe and batch; schemes cost nothing.
Fails on: weights whose Hessian is far from isotropic over the error's directions, which is the rule (inputs of unequal
size, embeddings with rare rows); models that are not at a minimum of the data, where the neglected gradient term
matters. A trace can be estimated negative, then so is the loss increase: the error bar says whether that is noise.

Differences from the paper: the 1/2 of Taylor's formula is kept, so the result is in nats; the paper sets a fixed
tolerance on the running mean, here the number of probes is given and the standard error reported.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.curvature import rademacher_like, trace_sample
from mpq.evaluate import require_finite
from mpq.inputs import Batch, Dataset
from mpq.models.model import Model
from mpq.progress import track
from mpq.sensitivity.base import (
    CandidateSource,
    Coupling,
    Store,
    check_inputs,
    half_mean_square,
    make_table,
    measured_on,
    output_losses,
)
from mpq.store import kept
from mpq.tasks import Task
from mpq.trace import Trace
from mpq.types import Params, Scheme, SensitivityTable, WeightSpec


@dataclasses.dataclass(frozen=True)
class HessianTrace:
    """HAWQ-V2's average Hessian trace.

    Attributes:
      num_probes: Hutchinson probes over all weights at once; at least 2, so that there is a standard error.
    """

    num_probes: int = 16

    coupling = Coupling.NONE

    @property
    def name(self) -> str:
        """`hessian_trace`."""
        return "hessian_trace"

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
          data: windows with their real labels.
          key: probe p uses only `fold_in(key, p)`, and of it every parameter its own path: more probes extend the
            sequence.
          batch_size: windows per pass.
          store: finished probes.

        Raises:
          MpqError: no output counts, or a weight, a candidate or a product is not finite.
        """
        counts = check_inputs(model, traced.weights, data)
        weights = {spec.path: spec.to_matrix(model.params[spec.param]) for spec in traced.weights}
        samples = np.zeros((self.num_probes, len(traced.weights)))
        counted = lambda batch: model.task.counted(batch.mask)
        on, seed = measured_on(model, traced, data, batch_size), jax.random.key_data(key).tolist()

        def make(probe: int) -> list[float]:
            v = rademacher_like(jax.random.fold_in(key, probe), weights)
            sums = [
                _samples(model.apply, model.task, traced.weights, model.params, weights, batch, counted(batch), v)
                for batch in data.batches(batch_size)
            ]
            return (np.sum(np.asarray(sums, np.float64), axis=0) / counts.sum()).tolist()

        for probe in track(range(self.num_probes), "sensitivity hessian_trace", self.num_probes):
            one = functools.partial(make, probe)
            samples[probe] = kept(store, one, item=self.name, **on, key=seed, weights=list(weights), probe=probe)
        require_finite(samples, model.params, f"{data.source}, in a Hessian-vector product")
        half = np.array([half_mean_square(model.params, spec, schemes, candidates) for spec in traced.weights])
        stderr = (
            samples.std(axis=0, ddof=1) / np.sqrt(self.num_probes)
            if self.num_probes > 1
            else np.full(len(half), np.nan)
        )
        stderr = np.where(half == 0, 0.0, stderr[:, None] * half)  # an exact candidate costs nothing: that is certain
        loss = samples.mean(axis=0)[:, None] * half
        label = f"{self.name}(num_probes={self.num_probes})"
        return make_table(label, model, traced.weights, schemes, candidates, data, loss, stderr)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _samples(
    apply: Callable[[Params, jax.Array], jax.Array],
    task: Task,
    specs: tuple[WeightSpec, ...],
    params: Params,
    weights: Params,
    batch: Batch,
    counted: jax.Array,
    v: Params,
) -> jax.Array:
    """`float32[weights]`: v_l^T (H v)_l of the loss summed over the batch's outputs that count."""

    def loss(weights: Params, batch: Batch) -> jax.Array:
        changed = functools.reduce(lambda p, spec: spec.write(p, weights[spec.path]), specs, dict(params))
        return jnp.sum(jnp.where(counted, output_losses(apply, task, changed, batch), 0.0))

    samples = trace_sample(loss, weights, batch, v)
    return jnp.stack([samples[spec.path] for spec in specs])
