"""Squared error at a weight's output, as far as the moments of its inputs tell: shared by `imatrix` and `layer_error`.

Summed over the positions that count, with x the input there and every use of the weight for itself,

    matmul, convolution    sum ||x^T delta||^2  =  T * tr(delta^T G delta),    G = E[x x^T] over its T rows
    lookup                 sum ||delta[:, v]||^2  =  sum_v N_v ||delta[:, v]||^2,    v looked up N_v times

G comes from `mpq.calibrate.calibrate`, N_v from `count_lookups`. A lookup multiplies one-hot rows, so that its gram is
diag(N_v / N), and the formula is the same one. A tied embedding has both parts. Sums, not means, over positions:
weights are read at different numbers of them (convolutions, the pooled vector of an encoder), and the loss adds up the
effect of all.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.calibrate import calibrate, count_lookups
from mpq.files import digest_arrays
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.sensitivity.base import CandidateSource, Store, quantization_error
from mpq.store import kept
from mpq.trace import Trace
from mpq.types import LayerStats, Scheme, WeightSpec

OfGram = Callable[[jax.Array, jax.Array], jax.Array]
"""`(errors float32[schemes, batch, k, n], gram float32[batch, k, k]) -> float32[schemes]`, the mean over rows."""


def output_errors(
    item: str,
    of_gram: OfGram,
    model: Model,
    traced: Trace,
    schemes: Sequence[Scheme],
    candidates: CandidateSource,
    data: Dataset,
    batch_size: int,
    store: Store | None,
) -> np.ndarray:
    """Squared error at the output of every weight, summed over positions.

    Args:
      item: names `of_gram`.
      of_gram: what is made of errors and gram.
      model: gives the original parameters.
      traced: gives the weights and their uses.
      schemes: columns.
      candidates: quantized weights.
      data: windows that give the inputs.
      batch_size: windows per pass.
      store: finished items, one a candidate. Its key holds the weight's own moments, not the model: the same pass
        over the data, which is always made, may lead to moments that were seen before.

    Returns:
      `float64[weights, schemes]`.
    """
    stats = calibrate(traced, model.params, data, batch_size)
    lookups = count_lookups(traced, model.params, data, batch_size)

    def make(spec: WeightSpec, scheme: Scheme) -> float:
        errors, score = quantization_error(model.params, spec, [scheme], candidates), 0.0
        if spec.path in stats:
            of_scheme = float(of_gram(errors, jnp.asarray(stats[spec.path].gram))[0])
            # A form that is not negative may come out below 0 by rounding where the error avoids the inputs.
            score += stats[spec.path].num_tokens * max(of_scheme, 0.0)
        if spec.path in lookups:
            squares = np.square(np.asarray(errors[0]), dtype=np.float64).sum(axis=(0, 1))
            score += float(squares @ lookups[spec.path])
        return score

    scores = np.zeros((len(traced.weights), len(schemes)))
    for row, spec in enumerate(traced.weights):
        moments = _digest(stats.get(spec.path), lookups.get(spec.path))
        for column, scheme in enumerate(schemes):
            digest = candidates.digest(spec, scheme)
            one = functools.partial(make, spec, scheme)
            scores[row, column] = kept(store, one, item=item, inputs=moments, candidate=digest)
    return scores


def _digest(stats: LayerStats | None, lookups: np.ndarray | None) -> str:
    """Of what a weight's uses say about its inputs."""
    of_matmul = {} if stats is None else {"gram": stats.gram, "rows": np.asarray(stats.num_tokens)}
    return digest_arrays(of_matmul if lookups is None else of_matmul | {"lookups": lookups})
