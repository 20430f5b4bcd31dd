"""Layer output error: what GPTQ minimizes (Frantar et al. 2023, arXiv:2210.17323, eq. 1), summed over positions.

    c[l, s]  =  sum over positions of ||x^T delta||^2  =  T tr(delta^T G delta),    G = E[x x^T] over T positions

in nats by one measured plan (`mpq.sensitivity.anchor`). Lookups are weighted by how often each row is looked up, and a
tied embedding has both parts (`mpq.sensitivity.layer_outputs`). It is the additive criterion that EvoPress
(Sieberling et al. 2024, arXiv:2410.14649) compares its search with.

Cost: one forward pass that also makes the grams, two for the unit, and on a scheme one product of error and gram.
Fails on: outputs that matter unequally. A layer whose outputs are large has large errors, whether a normalization
follows or not, and nothing says which of its outputs the loss sees.

Differences from the paper: sums over positions, not means, so that weights read at different numbers of positions
compare; the inputs are those of the unquantized model throughout.
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
class LayerError:
    """Squared error of the weight's output. No options."""

    coupling = Coupling.FACTOR

    @property
    def name(self) -> str:
        """`layer_error`."""
        return "layer_error"

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
        scores = output_errors(self.name, _of_gram, model, traced, schemes, candidates, data, batch_size, store)
        return anchored_table(
            self.name, scores, model, traced, schemes, candidates, data, batch_size=batch_size, store=store
        )


@jax.jit
def _of_gram(errors: jax.Array, gram: jax.Array) -> jax.Array:
    """`float32[schemes]`: tr(delta^T G delta)."""
    return jnp.einsum("sbkn,sbkn->s", jnp.einsum("bkl,sbln->sbkn", gram, errors), errors)
