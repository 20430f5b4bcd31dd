"""Rounded activations in training: forward what will run, to the bit; backward the rounding is straight-through.

Static ranges are learned as LSQ learns step sizes (Esser et al. 2020, arXiv:1902.08153, eq. 3): of x' = s q(x / s) the
derivative in s is round(v) - v for v = x / s inside the range, and the end of the grid outside; what is clipped has no
gradient in x. Differences from the paper: the logarithm of a factor of the range is learned, and Adam, which has a
scale of its own for every number, makes the paper's scale of gradients unnecessary. Zero points stay.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq.activations.apply import RoundedActivation
from mpq.activations.scheme import fake_quantize, nearest_fp8, scale_and_zero


def start_rows(rows: Sequence[RoundedActivation]) -> dict[str, jax.Array]:
    """Path of every static row -> `float32[parts]`, logarithms of what its range is multiplied by: zeros."""
    return {one.spec.path: jnp.zeros(len(one.low), jnp.float32) for one in rows if one.low is not None}


def freeze_rows(rows: Sequence[RoundedActivation], factors: Mapping[str, jax.Array]) -> tuple[RoundedActivation, ...]:
    """The rows with their learned ranges."""
    out = []
    for one in rows:
        if one.limits is not None:
            low, high = (np.asarray(end) for end in _limits(one, factors[one.spec.path]))
            one = dataclasses.replace(one, low=tuple(low.tolist()), high=tuple(high.tolist()))
        out.append(one)
    return tuple(out)


def train_rounded(one: RoundedActivation, x: jax.Array, windows: int, factor: jax.Array | None) -> jax.Array:
    """`x[batch, positions, width]` rounded, with gradients to `x` and to the logarithm of the range's factor.

    Args:
      one: the row; without factors of smoothing.
      x: its value.
      windows: of the batch.
      factor: `float32[parts]` of a static row; None: dynamic.
    """
    real = jnp.ones(windows, bool)
    options: dict[str, Any] = {"heads": one.spec.heads, "real": real}
    stop = jax.lax.stop_gradient
    if factor is None:
        return _straight_through(fake_quantize(stop(x), one.scheme.kind, one.scheme.top, **options | one.fixed), x)
    limits = _limits(one, stop(factor))
    exact = fake_quantize(stop(x), one.scheme.kind, one.scheme.top, **options, limits=limits)
    return _straight_through(exact, _smooth(one, x, factor))


def _smooth(one: RoundedActivation, x: jax.Array, factor: jax.Array) -> jax.Array:
    """The same up to rounding of the scale to its dtype, differentiable."""
    low, high = _limits(one, jax.lax.stop_gradient(factor))
    top = jnp.float32(one.scheme.top)
    scale, zero = scale_and_zero(jnp.minimum(low, 0.0), jnp.maximum(high, 0.0), one.scheme.asymmetric, top)
    scale = jax.lax.stop_gradient(scale) * jnp.exp(factor - jax.lax.stop_gradient(factor))
    parts = (*x.shape[:2], len(factor), x.shape[2] // len(factor))
    spread = lambda array: array[None, None, :, None]
    value = x.astype(jnp.float32).reshape(parts) / spread(scale)
    least = jnp.zeros_like(zero) if one.scheme.asymmetric else -jnp.full_like(zero, top)
    code = jnp.clip(value, spread(least - zero), spread(top - zero))
    nearest = nearest_fp8 if one.scheme.minifloat else jnp.round
    return (_straight_through(nearest(code), code) * spread(scale)).reshape(x.shape).astype(x.dtype)


def _limits(one: RoundedActivation, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    assert one.limits is not None
    low, high = one.limits
    return low * jnp.exp(factor), high * jnp.exp(factor)


def _straight_through(exact: jax.Array, smooth: jax.Array) -> jax.Array:
    """`exact` up to the rounding of one addition, with the gradient of `smooth`."""
    return jax.lax.stop_gradient(exact) + (smooth - jax.lax.stop_gradient(smooth))
