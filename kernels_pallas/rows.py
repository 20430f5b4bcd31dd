"""Weights of layout `plain` on a CPU, in XLA alone: some rows at a time become operands.

The reference makes the whole weight an array of float32; XLA may do so for all weights of a model before the first is
used, since none waits for an activation. In a loop no more than `ROWS` rows of a weight are there at once, whatever its
width, so a plan of any mix of widths takes the memory that it promises.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.backend import Backend, Config, Problem, dot_type, plain_scales
from kernels_pallas.bits import planes, unpack_bits
from kernels_pallas.devices import Device
from kernels_pallas.layouts import signed
from kernels_pallas.packed import Packed

ROWS = 128
"""Rows that become operands at once, about: of a few thousand columns they fit into a cache."""
FILLED = 8
"""Rows that fill whole bytes in planes of every width."""


def block(group: int | None, integer: bool) -> int:
    """Rows of a block: of integers those of one group, whose sum is one of int32."""
    return ROWS if group is None or not integer else group


def _run(x: jax.Array, packed: Packed, config: Config, interpret: bool) -> jax.Array:
    """As `backend.Run`: whole blocks in a loop, what is left behind it."""
    del config, interpret
    integer = jnp.issubdtype(x.dtype, jnp.integer)
    x, wide = (x, jnp.int32) if integer else (x.astype(jnp.float32), jnp.float32)
    size, scales = block(packed.group_size, integer), plain_scales(packed)
    group, one_scale = packed.group_size or packed.k, packed.group_size is None

    def product(start: jax.Array | int, rows: int) -> jax.Array:
        codes = signed(unpack_bits(_slices(packed, start, rows), packed.bits, rows), packed.spec)
        part = lax.dynamic_slice_in_dim(x, start, rows, axis=1)
        if integer:
            sums = jnp.matmul(part.astype(jnp.int32), codes.astype(jnp.int32))
            return sums if one_scale else sums.astype(jnp.float32) * scales[start // group]
        weight = codes.astype(jnp.float32) if packed.levels is None else jnp.asarray(packed.levels)[codes]
        if not one_scale:
            weight = weight * scales[(start + jnp.arange(rows)) // group]
        return jnp.matmul(part, weight, precision=lax.Precision.HIGHEST)

    total = jnp.zeros((x.shape[0], packed.n), wide if one_scale else jnp.float32)
    if count := packed.k // size:
        total = lax.fori_loop(0, count, lambda i, total: total + product(i * size, size), total)
    if rest := packed.k - count * size:
        total = total + product(count * size, rest)
    return total.astype(jnp.float32) * scales if one_scale else total


def _slices(packed: Packed, start: jax.Array | int, rows: int) -> jax.Array:
    """The bytes of some rows, from a multiple of `FILLED` on, as if there were no others."""
    parts, first = [], 0
    for width in planes(packed.bits):
        size = math.ceil(rows * width / 8)
        parts.append(lax.dynamic_slice_in_dim(packed.codes, first + start * width // 8, size, axis=0))
        first += math.ceil(packed.k * width / 8)
    return jnp.concatenate(parts)


def _refuses(problem: Problem) -> str | None:
    size = problem.group_size
    if problem.activation_bits is None or size is None or size % FILLED == 0 or size >= problem.k:
        return None
    return f"its groups have {size} rows, allowed for int8 are multiples of {FILLED} and whole columns"


def _seconds(problem: Problem, device: Device) -> float:
    """Roofline, unpacking that stays in a cache, and the sums that every block reads and writes."""
    blocks = -(-problem.k // block(problem.group_size, problem.activation_bits is not None))
    sums = 8 * problem.batch * blocks * problem.m * problem.n
    unpack = problem.batch * problem.k * problem.n / device.unpack
    # int32 products of integers, which XLA has no library for, are as slow as those of float32
    dot = "float32" if problem.activation_bits is not None else dot_type(problem)
    return device.seconds(problem.num_bytes, problem.macs, dot) + unpack + sums / 4 / device.bandwidth


PLAIN = Backend(
    platforms=("cpu",),
    layouts=("plain",),
    interpretable=False,
    run=_run,
    refuses=_refuses,
    seconds=_seconds,
)
