"""Products of integers where activations have a scale for every group of rows of the weight, as weights have.

With x = t[m, g] q and w = s[h, n] (code - z[h, n]), rows are divided into segments that lie in one group of each:

    y[m, n] = sum over segments of  t[m, g] s[h, n] (q[segment] . (code[segment, n] - z[h, n]))

The inner product is int8 by int8 with int32 sums, exact; the sum over segments is in float32. Segments are as long as
the smaller group, which has to divide the larger one. It is one path for all hardware and layouts: codes are unpacked
whole, and XLA multiplies a segment at a time.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.errors import KernelError
from kernels_pallas.packed import Packed, unpack


def segment_size(packed: Packed, group_size: int) -> int | None:
    """Rows of a segment, of activations with a scale for so many; None: groups do not nest, or values are looked up."""
    of_weight = packed.group_size or packed.k
    if packed.levels is not None:
        return None
    if group_size >= packed.k or of_weight >= packed.k:
        return min(group_size, of_weight)
    small, large = sorted((group_size, of_weight))
    return small if large % small == 0 else None


def grouped_matmul(codes: jax.Array, scales: jax.Array, packed: Packed, group_size: int) -> jax.Array:
    """`x @ w` of rounded activations with a packed weight of integers.

    Args:
      codes: `int8[*batch, m, k]`, with the batch axes of the weight.
      scales: floats `[*batch, m, ceil(k / group_size)]`, what a step of each group is worth.
      packed: the weight.
      group_size: rows that share a scale of `scales`.

    Returns:
      `float32[*batch, m, n]`.

    Raises:
      KernelError: the groups do not nest, or the weight is one of a table.
    """
    size = segment_size(packed, group_size)
    if size is None:
        raise KernelError(
            f"no product of integers of groups of {group_size} with a weight in groups of {packed.group_size}"
            f"{' of looked up values' if packed.levels else ''}: one has to divide the other"
        )
    if packed.batch_shape:
        return lax.map(lambda one: grouped_matmul(one[0], one[1], one[2], group_size), (codes, scales, packed))
    w, steps, zeros = unpack(packed)
    (m, k), segments = codes.shape, -(-packed.k // size)
    fill = segments * size - k
    rows = jnp.pad(codes, ((0, 0), (0, fill))).reshape(m, segments, size).swapaxes(0, 1)
    columns = jnp.pad(w, ((0, fill), (0, 0))).reshape(segments, size, packed.n)
    first = jnp.arange(segments) * size
    left = scales.astype(jnp.float32).T[first // group_size]
    group = first // (packed.group_size or packed.k)
    right = jnp.broadcast_to(steps.astype(jnp.float32)[group], (segments, packed.n))
    centre = None if zeros is None else zeros[group].astype(jnp.int32)

    def add(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        row, column, t, s, *z = part
        product = lax.dot_general(row, column, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
        if z:
            product = product - row.astype(jnp.int32).sum(axis=1, keepdims=True) * z[0]
        return total + product.astype(jnp.float32) * t[:, None] * s, None

    parts = (rows, columns, left, right) if centre is None else (rows, columns, left, right, centre)
    return lax.scan(add, jnp.zeros((m, packed.n), jnp.float32), parts)[0]
