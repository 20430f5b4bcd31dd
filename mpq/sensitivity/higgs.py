"""Linearity theorem of HIGGS (Malinovskii et al. 2025, NAACL, arXiv:2411.17525): coefficients times errors.

    loss_increase[l, s]  =  alpha_l * t2[l, s],      t2[l, s] = ||delta_ls||^2 / ||w_l||^2           [nats per output]
    alpha_l  =  KL(p_w || p_w') / t2_l,      w' = w with Gaussian noise on weight l, ||noise||^2 = t2_l ||w_l||^2

t2_l is the geometric mean of the t2[l, s] of the schemes that change the weight: noise of the size of the errors in
question, so that the coefficient is right where it is used, and not only for small errors. By the theorem the loss is
linear in t2 for errors that are as good as random, as those of a quantizer after a random rotation are. The standard
error is over documents, of the measured KL.

Cost: one forward pass for every weight, whatever the number of schemes, and the reference.
Fails on: errors that are not random, such as GPTQ's, which avoid the directions that the inputs take; small weights,
where one draw of the noise is not yet its average, which the error bar does not contain; schemes far apart, since one
coefficient serves all.

Differences from the paper: KL on the data given instead of perplexity; the noise is scaled to its size exactly, not in
expectation; one noise level, that of the schemes at hand, where the paper fits a line through several.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.curvature import stable_id
from mpq.estimate import mean_over_documents, sums_over_documents
from mpq.evaluate import Reference
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.progress import track
from mpq.sensitivity.base import (
    CandidateSource,
    Coupling,
    Store,
    check_inputs,
    make_table,
    measured_on,
    window_divergences,
)
from mpq.sensitivity.snr import noise_to_signal
from mpq.store import kept
from mpq.trace import Trace
from mpq.types import MpqError, Scheme, SensitivityTable, WeightSpec


@dataclasses.dataclass(frozen=True)
class Higgs:
    """Measured coefficients times relative errors.

    Attributes:
      keep_bytes: most memory for the reference's outputs; above it the reference runs again for every weight.
    """

    keep_bytes: int = 1 << 30

    coupling = Coupling.ROW

    @property
    def name(self) -> str:
        """`higgs`."""
        return "higgs"

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
          data: windows to measure on.
          key: the noise of a weight uses only this and the weight's path.
          batch_size: windows per forward pass.
          store: finished items, one a weight.

        Raises:
          MpqError: no output counts, a weight or a candidate is not finite, or the outputs with noise are not.
        """
        counts = check_inputs(model, traced.weights, data)
        t2 = np.array([noise_to_signal(model.params, spec, schemes, candidates) for spec in traced.weights])
        reference = Reference(model, data, batch_size, keep_bytes=self.keep_bytes)
        on, seed = measured_on(model, traced, data, batch_size), jax.random.key_data(key).tolist()
        alpha = np.zeros((len(data.inputs), len(traced.weights), 1))
        for row, spec in enumerate(track(traced.weights, "sensitivity higgs", len(traced.weights))):
            if not t2[row].any():
                continue
            size = float(np.exp(np.log(t2[row][t2[row] > 0]).mean()))
            make = functools.partial(_measured, model, reference, spec, size, key)
            values = kept(store, make, item=self.name, **on, key=seed, weight=spec.path, size=size)
            if not np.isfinite(values).all():
                raise MpqError(
                    f"noise of the size of its errors on weight {spec.path} makes the model's outputs NaN or infinite: "
                    "leave out the schemes with the largest errors"
                )
            alpha[:, row, 0] = np.asarray(values, np.float64) / size
        mean, stderr = mean_over_documents(sums_over_documents(alpha, data.document), counts)
        stderr = np.where(t2 == 0, 0.0, stderr * t2)  # an exact candidate costs nothing: that is certain
        return make_table(self.name, model, traced.weights, schemes, candidates, data, mean * t2, stderr)


def _measured(model: Model, reference: Reference, spec: WeightSpec, size: float, key: jax.Array) -> list[float]:
    """KL of each window, nats, with noise of `size` on one weight."""
    weight = spec.to_matrix(model.params[spec.param])
    noise = noise_of_size(jax.random.fold_in(key, stable_id(spec.path)), weight, size)
    changed = spec.write(model.params, weight + noise)
    return window_divergences(model, changed, reference.batches())[: len(reference.data.inputs)].tolist()


def noise_of_size(key: jax.Array, weight: jax.Array, t2: float) -> jax.Array:
    """Gaussian noise with t2 times the squared norm of `weight`, of its shape."""
    noise = jax.random.normal(key, weight.shape, weight.dtype)
    size = np.float32(min(np.sqrt(t2), float(np.finfo(np.float32).max)))
    return noise * (size * jnp.linalg.norm(weight.reshape(-1)) / jnp.linalg.norm(noise.reshape(-1)))
