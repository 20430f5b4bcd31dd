"""What gradient descent sees of a `QTensor`: real numbers behind its codes, scales and zero points.

Forward, every one of them is rounded as it will be stored, so the loss that is trained is that of the stored weight,
bit for bit. Backward, the rounding is taken for the identity (straight-through estimator; Bengio et al. 2013,
arXiv:1308.3432), and what the grid clips gets no gradient. Scales move by factors (their logarithm is learned), so they
keep their sign and never reach zero.

Of large weights a *low-rank update* can be learned instead: value = start + left @ right, as LoRA's (Hu et al. 2021,
arXiv:2106.09685, eq. 3) inside the rounding, so that nothing is left beside the stored codes in the end. Optimizers
then keep moments of `rank (k + n)` numbers, not of `k n`. Difference from the paper: `left` is drawn with variance
1/rank, so that a step of Adam moves values about as far as it moves learned ones, and no other scale is needed.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from mpq.quantize.rounding import round_scale
from mpq.types import QTensor, Scheme


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Latent:
    """The trained numbers of one weight; None where a part is kept as it is.

    Attributes:
      value: `float32[batch, k, n]`, the weight over its scale, in mean steps of the format's grid; a code is that,
        shifted by the zero point and rounded.
      log_scale: `float32[batch, groups, n]`, logarithm of what the first scale is multiplied by.
      zero_point: `float32[batch, groups, n]`, in codes.
      left, right: `float32[batch, k, rank]` and `float32[batch, rank, n]`, whose product is added to the start in place
        of a learned `value`.
    """

    value: jax.Array | None
    log_scale: jax.Array | None
    zero_point: jax.Array | None
    left: jax.Array | None = None
    right: jax.Array | None = None

    def merged(self, w: jax.Array, qtensor: QTensor) -> Self:
        """The same with the low-rank update, if it is one, in `value`; arguments as of `start`."""
        if self.left is None or self.right is None:
            return self
        value = start_value(w, qtensor) + self.left @ self.right
        return dataclasses.replace(self, value=value, left=None, right=None)


def start(
    w: jax.Array,
    qtensor: QTensor,
    *,
    rounding: bool = True,
    scale: bool = True,
    rank: int = 0,
    key: jax.Array | None = None,
) -> Latent:
    """The latent numbers from which `freeze` gives `qtensor` back.

    Args:
      w: `float32[batch, k, n]`, the original weight.
      qtensor: of a scheme with a scale.
      rounding: learn the codes; those along a trellis are kept, as one that moves would move those behind it.
      scale: learn scales and zero points.
      rank: of a low-rank update in the place of learned values; 0: none.
      key: of the update.
    """
    assert qtensor.scale is not None
    zero_point = None
    if scale and qtensor.zero_point is not None:
        zero_point = qtensor.grid.decode(qtensor.zero_point)
    log_scale = jnp.zeros(qtensor.scale.shape) if scale else None
    rounding = rounding and qtensor.scheme.format.span == 1
    if not (rounding and rank):
        return Latent(start_value(w, qtensor) if rounding else None, log_scale, zero_point)
    assert key is not None  # whoever asks for an update has one
    batch, k, n = w.shape
    left = jax.random.normal(key, (batch, k, rank), jnp.float32) / np.float32(np.sqrt(rank))
    return Latent(None, log_scale, zero_point, left, jnp.zeros((batch, rank, n), jnp.float32))


def start_value(w: jax.Array, qtensor: QTensor) -> jax.Array:
    """`float32[batch, k, n]`, the `Latent.value` to start from.

    A code that is the nearest one starts at the weight itself, any other (GPTQ's) in the middle of its step.
    """
    grid, decode = qtensor.grid, qtensor.grid.decode
    shift = 0.0 if qtensor.zero_point is None else qtensor.spread(decode(qtensor.zero_point))
    exact = w / qtensor.spread(_effective(qtensor))
    nearest = grid.encode(exact + shift) == qtensor.qvalue
    return jnp.where(nearest, exact, decode(qtensor.qvalue) - shift) / _step(qtensor.scheme)


def reconstruct(latent: Latent, qtensor: QTensor) -> jax.Array:
    """`float32[batch, k, n]`: what `freeze(latent, qtensor).dequantize()` is, with gradients to `latent`.

    A low-rank update is merged before.
    """
    stored = freeze(jax.lax.stop_gradient(latent), qtensor)
    decode = qtensor.grid.decode
    shift = 0.0
    if stored.zero_point is not None:
        zero_point = decode(stored.zero_point)
        if latent.zero_point is not None:
            zero_point = _straight_through(zero_point, _within(latent.zero_point, qtensor))
        shift = qtensor.spread(zero_point)
    value = decode(stored.qvalue)
    if latent.value is not None:
        value = _straight_through(value, _within(latent.value * _step(qtensor.scheme) + shift, qtensor))
    scale = _effective(stored)
    if latent.log_scale is not None:
        scale = scale * _straight_through(jnp.ones(()), latent.log_scale)
    return (value - shift) * qtensor.spread(scale)


def freeze(latent: Latent, qtensor: QTensor) -> QTensor:
    """The stored weight: latent numbers rounded; parts that are not learned are those of `qtensor`."""
    scheme, number_format = qtensor.scheme, qtensor.grid
    scale, zero_point, qvalue = qtensor.scale, qtensor.zero_point, qtensor.qvalue
    assert scale is not None
    if latent.log_scale is not None:
        first = scale.astype(jnp.float32)
        magnitude = round_scale(jnp.abs(first) * jnp.exp(latent.log_scale), scheme.scale_dtype)
        scale = jnp.where(first < 0, -magnitude, magnitude).astype(scheme.scale_dtype)
    if latent.zero_point is not None:
        zero_point = jnp.round(_within(latent.zero_point, qtensor)).astype(jnp.int8)
    if latent.value is not None:
        shift = 0.0 if zero_point is None else qtensor.spread(number_format.decode(zero_point))
        qvalue = number_format.encode(latent.value * _step(scheme) + shift)
    return dataclasses.replace(qtensor, qvalue=qvalue, scale=scale, zero_point=zero_point)


def _step(scheme: Scheme) -> float:
    """Mean distance of neighbouring levels: 1 for integers. It gives all formats the same learning rate."""
    number_format = scheme.format
    if number_format.uniform or number_format.max_magnitude is None:
        return 1.0
    return 2 * number_format.max_magnitude / (number_format.max_qvalue - number_format.min_qvalue)


def _within(value: jax.Array, qtensor: QTensor) -> jax.Array:
    """`value` clipped to the range of the grid; what lies beyond has no gradient."""
    grid = qtensor.grid
    end = lambda code: grid.decode(jnp.full((1,) * value.ndim, code, jnp.int8))
    return jnp.clip(value, end(grid.min_qvalue), end(grid.max_qvalue))


def _straight_through(exact: jax.Array, smooth: jax.Array) -> jax.Array:
    """`exact`, bit for bit, with the gradient of `smooth`."""
    return exact + (smooth - jax.lax.stop_gradient(smooth))


def _effective(qtensor: QTensor) -> jax.Array:
    scale = qtensor.effective_scale
    assert scale is not None
    return scale
