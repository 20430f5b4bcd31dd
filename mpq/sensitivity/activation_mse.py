"""Activation-weighted squared error: the importance matrix of llama.cpp (its pull request 4861, `llama-imatrix`).

    c[l, s]  =  sum over positions of sum_k x_k^2 sum_n delta_kn^2,    in nats by one measured plan

(`mpq.sensitivity.anchor`): the squared error at the weight's output, if inputs were uncorrelated. llama.cpp weights the
search of its scales with E[x_k^2] and its open bit allocation (pull request 15550) starts from this error. Lookups are
weighted by how often each row is looked up, and a tied embedding has both parts (`mpq.sensitivity.layer_outputs`).

Cost: one forward pass that also makes the grams, and two for the unit.
Fails on: inputs that are far from uncorrelated; errors whose effect later layers cancel or amplify, since all outputs
count alike.

Differences from llama.cpp: sums over positions, not means, so that weights read at different numbers of positions
compare; embeddings are weighted by frequency, where llama.cpp has no importance for them; none of its normalizations by
row energy, bias terms or boosts by layer name.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.sensitivity.anchor import anchored_table
from mpq.sensitivity.base import CandidateSource, Coupling, Store, check_inputs
from mpq.sensitivity.layer_outputs import output_errors
from mpq.trace import Trace
from mpq.types import Scheme, SensitivityTable


@dataclasses.dataclass(frozen=True)
class Imatrix:
    """Squared error weighted by the squares of the inputs. No options."""

    coupling = Coupling.FACTOR

    @property
    def name(self) -> str:
        """`imatrix`."""
        return "imatrix"

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
          candidates: quantized weights.
          data: windows that give the inputs, and that the one plan is measured on.
          key: not used; nothing is drawn.
          batch_size: windows per pass.
          store: keeps the scores and the measurement.

        Raises:
          MpqError: no output counts, a weight, an input or a candidate is not finite, or the measured plan's outputs
            are not.
        """
        del key
        check_inputs(model, traced.weights, data)
        scores = output_errors(self.name, _of_diagonal, model, traced, schemes, candidates, data, batch_size, store)
        return anchored_table(
            self.name, scores, model, traced, schemes, candidates, data, batch_size=batch_size, store=store
        )


@jax.jit
def _of_diagonal(errors: jax.Array, gram: jax.Array) -> jax.Array:
    """`float32[schemes]`: sum_k G_kk sum_n delta_kn^2."""
    return jnp.einsum("bk,sbk->s", jnp.diagonal(gram, axis1=1, axis2=2), jnp.sum(jnp.square(errors), axis=-1))
