"""The contract of every backend: plain `jnp`, float32 at HIGHEST precision, any layout, any number of tokens.

Weights alone (`activation_bits=None`): `y = x @ w`, with `x` and `w = dequantize(packed)` in float32. (Where `x` is
bfloat16, some round `w` to it, as a dense weight would be: the kernel of TPUs for more tokens than a group has rows,
and `dense`; that of Hopper rounds the values of a table.)

Weights and activations (`activation_bits=8`): every token, a row of `x`, is rounded to int8 by a scale of its own,

    t = max |x| / 127,   q = round(x / t),   y[n] = t * sum over groups g of  s[g, n] * (q[g] . (code[g, n] - z[g, n])),

with the inner product in int32, exact, and the sum over groups in float32. Codes `x int8[m, k]`, rounded before, take
the place of q; whoever knows their scales multiplies by them.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.packed import Packed, dequantize, unpack

MAX_CODE = 127


def quantize_tokens(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round every token to int8, symmetric, ties to even.

    Args:
      x: floats `[m, k]`.

    Returns:
      Codes `int8[m, k]` in -127 to 127, and scales `float32[m, 1]`; a token of zeros has scale 1.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0.0)
    scale = jnp.where(largest > 0, largest / MAX_CODE, 1.0)
    return jnp.clip(jnp.round(x / scale), -MAX_CODE, MAX_CODE).astype(jnp.int8), scale


def matmul(x: jax.Array, packed: Packed, activation_bits: int | None) -> jax.Array:
    """`float32[m, n]` of floats `x[m, k]` and a weight without batch axes, as the module says."""
    if activation_bits is None:
        return jnp.matmul(x.astype(jnp.float32), dequantize(packed), precision=lax.Precision.HIGHEST)
    if x.dtype == jnp.int8:
        return _integer_matmul(x, packed)
    codes, scale = quantize_tokens(x)
    return _integer_matmul(codes, packed) * scale


def _integer_matmul(x: jax.Array, packed: Packed) -> jax.Array:
    """The sum over groups, for `x int8[m, k]`: one group after the other."""
    codes, scales, zeros = unpack(packed)
    m, groups, size = x.shape[0], packed.spec.groups, packed.group_size or packed.k
    fill = groups * size - packed.k
    rows = jnp.pad(x, ((0, 0), (0, fill))).reshape(m, groups, size).swapaxes(0, 1).astype(jnp.int32)
    columns = jnp.pad(codes, ((0, fill), (0, 0))).reshape(groups, size, packed.n).astype(jnp.int32)
    if zeros is not None:
        columns = columns - zeros[:, None, :].astype(jnp.int32)

    def add(total: jax.Array, group: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        row, column, scale = group
        return total + jnp.matmul(row, column).astype(jnp.float32) * scale, None

    start = jnp.zeros((m, packed.n), jnp.float32)
    return lax.scan(add, start, (rows, columns, scales.astype(jnp.float32)))[0]
