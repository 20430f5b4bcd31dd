"""AWQ: channels whose inputs are large get finer steps (Lin et al. 2023, arXiv:2306.00978).

    x W = (x / s)(s W),     s_j = a_j^alpha / sqrt(max(a^alpha) min(a^alpha))                          (eq. 4 and 5)

with a_j the size of channel j of the input. Rounding s W errs by about what rounding W does, and the division by s
shrinks the error of the channels that matter. The division costs nothing: `mpq.equalize.folds` finds where it goes. The
strength alpha is searched for every input, together for all weights that read it, each rounded to nearest under its own
scheme of the plan; what is compared is the error of their outputs, tr(delta^T G delta) with G = E[x x^T].

Differences from the paper: a_j is the root mean square of the channel, which the statistics of calibration hold, in
place of the mean magnitude; the error is that of the weights' own outputs, not of the block's; no clipping is searched
apart, for the search of scales weighs rows by their inputs already, which leaves AWQ less to gain.
Fails on: inputs that no layer hands over (heads that share their values, a residual sum), where nothing is scaled; a
loss that does not see all outputs alike, where a smaller error of the outputs is no smaller loss.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq.calibrate import divided
from mpq.equalize.folds import Fold
from mpq.models.model import Model
from mpq.quantize.loss import layer_loss
from mpq.quantize.rtn import RTN
from mpq.trace import Trace
from mpq.types import LayerStats, Params, Scheme, WeightSpec

STRENGTHS = tuple(step / 20 for step in range(1, 21))
"""Of alpha, beside 0, which scales nothing."""


def awq(
    model: Model, traced: Trace, folds: Sequence[Fold], choice: Mapping[str, Scheme], stats: Mapping[str, LayerStats]
) -> tuple[Model, dict[str, LayerStats], dict[str, float]]:
    """The same function with scales moved to where rounding is cheapest.

    Args:
      model: the original.
      traced: its trace.
      folds: scales that can move, of `find_folds`.
      choice: path -> scheme of the weights.
      stats: of the inputs of the original.

    Returns:
      The model that is to be rounded, the statistics of its inputs, and the strength that was chosen, by the path of
      the first reader.
    """
    weights = {spec.path: spec for spec in traced.weights}
    params, moved, strengths = dict(model.params), dict(stats), {}
    for fold in folds:
        rows = [weights[path] for path in fold.rows if path in choice and path in stats]
        if not rows or _shares_columns(fold, choice):
            continue
        sizes = np.sqrt(np.mean([np.diagonal(stats[spec.path].gram[0]) for spec in rows], axis=0, dtype=np.float64))
        tried = [np.ones(fold.width, np.float32), *(factors(sizes, alpha) for alpha in STRENGTHS)]
        losses = [output_error(params, rows, choice, moved, s) for s in tried]
        best = int(np.argmin(losses))
        strengths[fold.rows[0]] = (0.0, *STRENGTHS)[best]
        params = fold.apply(params, weights, tried[best])
        moved |= {path: divided(moved[path], tried[best]) for path in fold.rows if path in moved}
    return dataclasses.replace(model, params=params), moved, strengths


def factors(sizes: np.ndarray, alpha: float) -> np.ndarray:
    """`float32[k]` of `sizes: float64[k]`; 1 for a channel that is always 0.

    Args:
      sizes: of the channels, not negative.
      alpha: strength.
    """
    used = sizes > 0
    if not used.any():
        return np.ones(len(sizes), np.float32)
    s = np.where(used, sizes, sizes[used].min()) ** alpha
    return np.where(used, s / np.sqrt(s.max() * s.min()), 1.0).astype(np.float32)


def output_error(
    params: Params,
    rows: Sequence[WeightSpec],
    choice: Mapping[str, Scheme],
    stats: Mapping[str, LayerStats],
    s: np.ndarray,
) -> float:
    """What rounding to nearest leaves of the readers' outputs, summed over them, with inputs divided by `s`.

    Args:
      params: of the model before.
      rows: the readers.
      choice: path -> scheme.
      stats: of their inputs before.
      s: `float32[k]`.
    """
    factor, total = jnp.asarray(s)[:, None], 0.0
    for spec in rows:
        weight, gram = spec.read(params) * factor, jnp.asarray(divided(stats[spec.path], s).gram)
        total += float(_loss(weight, RTN("mse")(weight, choice[spec.path], gram), gram).sum())
    return total


_loss = jax.jit(layer_loss)


def _shares_columns(fold: Fold, choice: Mapping[str, Scheme]) -> bool:
    """Whether the weight that is divided has one scale for columns that would no longer be of one size."""
    return fold.columns is not None and fold.columns in choice and choice[fold.columns].per_tensor
