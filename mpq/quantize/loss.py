"""The layer loss, and choices by it."""

import functools

import jax
import jax.numpy as jnp

from mpq.types import QTensor

dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
"""Matrix product in full single precision on every device."""


def layer_loss(w: jax.Array, qtensor: QTensor, gram: jax.Array) -> jax.Array:
    """`float32[..., n]`: eT gram e of every output column, e = w - quantized; `w[..., k, n]`, `gram[..., k, k]`."""
    error = w - qtensor.dequantize()
    return jnp.sum(error * dot(gram, error), axis=-2)


def better(first: QTensor, second: QTensor, w: jax.Array, gram: jax.Array) -> QTensor:
    """Every output column from `first` where that leaves the smaller layer loss, else (also if NaN) from `second`.

    Columns that are encoded together come from one of them.
    What all columns share is one value in both: a tensor scale, or the scale and zero point of a scheme per tensor.
    """
    one, other = (by_span(layer_loss(w, q, gram), q.scheme.format.span) for q in (first, second))
    return choose(one < other, first, second)


def by_span(loss: jax.Array, span: int) -> jax.Array:
    """`[..., n]`, the sum over the columns that are encoded with each."""
    if span == 1:
        return loss
    n = loss.shape[-1]
    sums = jnp.pad(loss, [*[(0, 0)] * (loss.ndim - 1), (0, -n % span)]).reshape(*loss.shape[:-1], -1, span).sum(-1)
    return jnp.repeat(sums, span, axis=-1)[..., :n]


def choose(keep: jax.Array, first: QTensor, second: QTensor) -> QTensor:
    """Every output column from `first` where `keep[..., n]`, else from `second`, and what all columns share, too."""
    pick = lambda a, b: jnp.where(keep[..., None, :], a, b) if a.shape[-1] == keep.shape[-1] else b
    return jax.tree.map(pick, first, second)
