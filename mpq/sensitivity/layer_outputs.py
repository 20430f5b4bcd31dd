"""Squared error at a weight's output, as far as the moments of its inputs tell: shared by `imatrix` and `layer_error`.

Summed over the positions that count, with x the input there and every use of the weight for itself,

    matmul, convolution    sum ||x^T delta||^2  =  T * tr(delta^T G delta),    G = E[x x^T] over its T rows
    lookup                 sum ||delta[:, v]||^2  =  sum_v N_v ||delta[:, v]||^2,    v looked up N_v times

G comes from `mpq.calibrate.calibrate`, N_v from `count_lookups`. A lookup multiplies one-hot rows, so that its gram is
diag(N_v / N), and the formula is the same one. A tied embedding has both parts. Sums, not means, over positions:
weights are read at different numbers of them (convolutions, the pooled vector of an encoder), and the loss adds up the
effect of all.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.calibrate import calibrate, count_lookups
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.sensitivity.base import CandidateSource, Store, quantization_error
from mpq.trace import Trace
from mpq.types import Scheme

OfGram = Callable[[jax.Array, jax.Array], jax.Array]
"""`(errors float32[schemes, batch, k, n], gram float32[batch, k, k]) -> float32[schemes]`, the mean over rows."""


def output_errors(
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
      of_gram: what is made of errors and gram.
      model: gives the original parameters.
      traced: gives the weights and their uses.
      schemes: columns.
      candidates: quantized weights.
      data: windows that give the inputs.
      batch_size: windows per pass.
      store: keeps the result.

    Returns:
      `float64[weights, schemes]`.
    """
    scores = None if store is None else store.get("scores")
    if scores is None:
        stats = calibrate(traced, model.params, data, batch_size)
        lookups = count_lookups(traced, model.params, data, batch_size)
        scores = np.zeros((len(traced.weights), len(schemes)))
        for row, spec in enumerate(traced.weights):
            errors = quantization_error(model.params, spec, schemes, candidates)
            if spec.path in stats:
                gram, rows = jnp.asarray(stats[spec.path].gram), stats[spec.path].num_tokens
                # A form that is not negative may come out below 0 by rounding where the error avoids the inputs.
                scores[row] += rows * np.maximum(np.asarray(of_gram(errors, gram), np.float64), 0.0)
            if spec.path in lookups:
                squares = np.square(np.asarray(errors), dtype=np.float64).sum(axis=(1, 2))
                scores[row] += squares @ lookups[spec.path]
        if store is not None:
            store.put("scores", scores.tolist())
    return np.asarray(scores, np.float64)
