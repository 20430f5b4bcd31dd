"""Parameters beside the weights, trained with them: biases, and the scales and statistics of norms.

They are stored as they were, so that training them costs no byte, and they take up what rounding does on average to a
layer's output (`mpq.quantize.correction` does that alone, in closed form). One whose values are all positive, as the
scale or the variance of a norm, is learned as the logarithm of factors and stays positive; any other by differences, in
units of its own root mean square. Forward, they are rounded to the dtype that they are stored in.
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mpq.types import Params, WeightSpec


def start_beside(params: Params, weights: Iterable[WeightSpec]) -> dict[str, jax.Array]:
    """Path -> zeros, of every parameter in floating point that holds none of the weights."""
    taken = {spec.param for spec in weights}
    floats = {path: p for path, p in params.items() if path not in taken and jnp.issubdtype(p.dtype, jnp.floating)}
    return {path: jnp.zeros(p.shape, jnp.float32) for path, p in floats.items()}


def positive(params: Params, learned: Iterable[str]) -> frozenset[str]:
    """Which of the learned parameters have positive values alone."""
    return frozenset(path for path in learned if bool((np.asarray(params[path], np.float32) > 0).all()))


def reconstruct_beside(
    learned: Mapping[str, jax.Array], params: Params, stored: Mapping[str, str], kept: frozenset[str]
) -> dict[str, jax.Array]:
    """The parameters, as they will be stored, with gradients to what is learned.

    Args:
      learned: path -> numbers of the parameter's shape; zeros give the parameter, rounded to its dtype.
      params: what it began with.
      stored: dtype names in the checkpoint; without an entry, the parameter's own.
      kept: paths of those that stay positive.
    """
    out = {}
    for path, change in learned.items():
        begin = params[path].astype(jnp.float32)
        if path in kept:
            value = begin * jnp.exp(change)
        else:
            size = jnp.sqrt(jnp.mean(jnp.square(begin)))
            value = begin + jnp.where(size > 0, size, 1.0) * change
        dtype = stored.get(path, str(params[path].dtype))
        rounded = jax.lax.stop_gradient(value).astype(dtype).astype(jnp.float32)
        out[path] = (rounded + (value - jax.lax.stop_gradient(value))).astype(params[path].dtype)
    return out
