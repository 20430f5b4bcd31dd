"""CPUs, in XLA alone: one dot for every segment of rows, over unpacked operands that stay in the caches.

The whole weight in float32 would be written to memory and read again, which takes longer than the matmul where tokens
are few. A loop over segments unpacks a small part, multiplies, scales and adds. Two facts about XLA on CPUs shape it:

- Dots of int8 with int32 sums run in a fast library if `x` has two rows or more, in a naive loop if it has one. So a
  single token is doubled.
- XLA would fuse the unpacking into the dot and leave the fast path; an optimization barrier between them keeps it.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.backend import Backend, Config, Problem, dot_type, plain_scales
from kernels_pallas.devices import Device
from kernels_pallas.layouts import cpu_fields
from kernels_pallas.packed import Packed

CHUNK = 256
"""Most rows of a segment that become float32 at once: for a few thousand columns they fit into a cache."""


def chunk(segment: int) -> int:
    """Rows of a segment that are unpacked together: the largest divisor up to `CHUNK`, or all if that is small."""
    largest = next(size for size in range(min(segment, CHUNK), 0, -1) if segment % size == 0)
    return largest if 4 * largest >= min(segment, CHUNK) else segment


def _run(x: jax.Array, packed: Packed, config: Config, interpret: bool) -> jax.Array:
    """As `backend.Run`: a step takes a chunk of rows of all segments that share bytes."""
    del config, interpret
    spec, m = packed.spec, x.shape[0]
    integer = jnp.issubdtype(x.dtype, jnp.integer)
    x = x if integer else x.astype(jnp.float32)
    if integer and m == 1:
        x = jnp.concatenate([x, x])
    size = spec.segment if integer else chunk(spec.segment)
    parts, stride = spec.segment // size, spec.segments * spec.bits // 8
    whole = jnp.pad(x, ((0, 0), (0, spec.segments * spec.segment - spec.k)))
    rows = whole.reshape(x.shape[0], spec.segments * parts, size).swapaxes(0, 1)
    scales = _segment_scales(packed)

    def step(index: jax.Array, total: jax.Array) -> jax.Array:
        i, part = lax.div(index, jnp.int32(parts)), lax.rem(index, jnp.int32(parts))
        stored = lax.dynamic_slice(packed.codes, (i, jnp.int32(0), part * size), (1, spec.n, size))[0]
        fields = lax.optimization_barrier(_operands(packed, stored, integer))
        for f, field in enumerate(fields):
            segment = f * stride + i
            total = total + _dot(rows[segment * parts + part], field) * scales[segment]
        return total

    start = jnp.zeros((x.shape[0], spec.n), jnp.float32)
    return lax.fori_loop(0, stride * parts, step, start)[:m]


def _operands(packed: Packed, stored: jax.Array, integer: bool) -> tuple[jax.Array, ...]:
    """Fields of one row of bytes as operands, `int8` or `float32[n, segment]`."""
    fields = cpu_fields(stored, packed.spec)
    if integer:
        return fields
    if packed.levels is None:
        return tuple(field.astype(jnp.float32) for field in fields)
    return tuple(_look_up(field, packed.levels) for field in fields)


def _look_up(codes: jax.Array, levels: tuple[float, ...]) -> jax.Array:
    """`levels[codes]` as a chain of selects: vector instructions, where a gather goes element by element."""
    value = jnp.full(codes.shape, levels[0], jnp.float32)
    for code, level in enumerate(levels[1:], start=1):
        value = jnp.where(codes == jnp.int8(code), jnp.float32(level), value)
    return value


def _dot(row: jax.Array, column: jax.Array) -> jax.Array:
    """`row[m, segment]` times `column[n, segment]` transposed, in float32; of int8 the sums are int32, exact."""
    integer = jnp.issubdtype(row.dtype, jnp.integer)
    product = lax.dot_general(
        row,
        column,
        (((1,), (1,)), ((), ())),
        precision=None if integer else lax.Precision.HIGHEST,
        preferred_element_type=jnp.int32 if integer else jnp.float32,
    )
    return product.astype(jnp.float32)


def _segment_scales(packed: Packed) -> jax.Array:
    """`float32[segments, n or 1]`: of the group of every segment, zeros for those that only fill bytes."""
    scales, segments = plain_scales(packed), packed.spec.segments
    if packed.group_size is None:
        return jnp.broadcast_to(scales, (segments, scales.shape[1]))
    return jnp.pad(scales, ((0, segments - scales.shape[0]), (0, 0)))


def _seconds(problem: Problem, device: Device) -> float:
    """Roofline, unpacking, and the sums that every segment reads and writes."""
    segments = problem.groups if problem.group_size is not None else 8 // problem.bits
    sums = 8 * problem.batch * segments * problem.m * problem.n
    unpack = problem.batch * problem.k * problem.n / device.unpack
    # Unpacked operands and sums stay in the caches; those of the reference go to memory, at four times the price.
    return device.seconds(problem.num_bytes, problem.macs, dot_type(problem)) + unpack / 4 + sums / 4 / device.bandwidth


CPU = Backend(
    platforms=("cpu",),
    layouts=("cpu",),
    interpretable=False,
    run=_run,
    seconds=_seconds,
)
