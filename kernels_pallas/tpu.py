"""TPUs, in Pallas: a tile of codes is converted in vector memory and multiplied there; scales meet the partial sums.

The grid is (tiles of tokens, tiles of columns, tiles of rows), the last one sequential with a float32 sum in scratch. A
tile of rows holds whole groups, or is part of one. For each group in it the codes become the activations' dtype (every
code of at most 8 bits is exact in bfloat16), one dot makes the partial sum, and the group's scale multiplies that: `m`
products a column instead of `group_size`, and no rounding of dequantized weights. That is for few tokens. The matrix
unit multiplies 128 rows at once: where groups are shorter, a token comes once for each group in them, zeros in place of
the others' rows, so that one dot makes the partial sums of all. With more tokens than a group has rows, scaling partial
sums costs more than scaling weights: then a tile is dequantized into scratch memory, rounded to bfloat16 as a dense
weight would be, and multiplied at once; of bfloat16 activations alone, since others would be rounded more than they
are. int4 is cast to int8 for int8 activations, since the matrix unit takes no mixed integers.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import compat
from kernels_pallas.backend import Backend, Config, Problem, dot_type
from kernels_pallas.devices import DEVICES, Device
from kernels_pallas.layouts import LANES
from kernels_pallas.packed import Packed, width

SUBLANES = {"float32": 8, "bfloat16": 16, "int8": 32}
"""Rows of a register tile: the least number of tokens."""

_VMEM = DEVICES["TPU v5 lite"].fast_memory // 2  # the other half is the compiler's


def _kernel(x_ref: Any, w_ref: Any, s_ref: Any, y_ref: Any, sum_ref: Any, *, segment: int) -> None:
    """One tile: `x[bm, bk]`, `w[bk, bn]`, `s[groups, 1, bn]` added into `sum[bm, bn]`, at the end written to `y`.

    A segment is a group, part of one, or several: then `x[several * bm, bk]` is as `_spread_out` makes it.
    """
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    total = sum_ref[...]
    bm, several = sum_ref.shape[0], x_ref.shape[0] // sum_ref.shape[0]
    for i in range(w_ref.shape[0] // segment):
        rows = slice(i * segment, (i + 1) * segment)
        part = _partial(x_ref[:, rows], w_ref[rows, :])
        for g in range(several):
            total += part[g * bm : (g + 1) * bm] * s_ref[i * several + g]
    sum_ref[...] = total

    @pl.when(step == pl.num_programs(2) - 1)
    def _finish() -> None:
        y_ref[...] = sum_ref[...]


def _dequantizing_kernel(
    x_ref: Any, w_ref: Any, s_ref: Any, y_ref: Any, sum_ref: Any, scaled_ref: Any, *, segment: int
) -> None:
    """The same with scales before the product: `scaled[bk, bn]` is the tile in the activations' dtype."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    several = s_ref.shape[0] * segment // w_ref.shape[0]
    for i in range(w_ref.shape[0] // segment):
        rows = slice(i * segment, (i + 1) * segment)
        w = w_ref[rows, :].astype(jnp.float32)
        scaled = w.reshape(several, -1, w.shape[1]) * s_ref[i * several : (i + 1) * several]
        scaled_ref[rows, :] = scaled.reshape(w.shape).astype(scaled_ref.dtype)
    sum_ref[...] += jnp.dot(x_ref[...], scaled_ref[...], preferred_element_type=jnp.float32)

    @pl.when(step == pl.num_programs(2) - 1)
    def _finish() -> None:
        y_ref[...] = sum_ref[...]


def _partial(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w` of activations and codes, in float32."""
    exact = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, w.astype(x.dtype), precision=precision, preferred_element_type=exact).astype(jnp.float32)


def tiles(problem: Problem) -> Config:
    """Tile sizes `(bm, bn, bk)` from sizes alone: the largest that fit the vector memory twice, columns first.

    Large tiles amortize what a step of the grid costs, and a kernel in the sweep of small ones is many times slower. A
    fourth number, 1, asks for scales before the product.
    """
    return largest_tiles(problem, 1)[0]


def largest_tiles(problem: Problem, count: int) -> list[Config]:
    """The first so many in the order of `tiles`."""
    _, tiled_k, tiled_n = _padded(problem)
    bm = min(256, -(-problem.m // _sublanes(problem)) * _sublanes(problem))
    choices = itertools.product(_divisors(tiled_n, 2048), _divisors(tiled_k, 4096))
    largest_first = sorted(choices, key=lambda tile: (tile[0] * tile[1], tile[0]), reverse=True)
    before = (1,) if _may_scale_before(problem) and problem.m > (problem.group_size or problem.m) else ()
    fitting = ((bm, bn, bk, *before) for bn, bk in largest_first if legal(problem, (bm, bn, bk, *before)))
    return list(itertools.islice(fitting, count))


def _may_scale_before(problem: Problem) -> bool:
    return problem.x_dtype == "bfloat16" and problem.activation_bits is None


def legal(problem: Problem, config: Config) -> bool:
    """Whether tiles `(bm, bn, bk)` divide the problem, agree with its groups and fit the vector memory twice."""
    if len(config) != 3 and not (len(config) == 4 and config[3] == 1 and _may_scale_before(problem)):
        return False
    bm, bn, bk = config[:3]
    _, tiled_k, tiled_n = _padded(problem)
    group = problem.group_size or tiled_k
    if bm % _sublanes(problem) or bn % LANES or bk % LANES or tiled_n % bn or tiled_k % bk:
        return False
    if bk % group and group % bk:
        return False
    x_bits = 8 * jnp.dtype(dot_type(problem)).itemsize
    rows = bm * _several(group, config)
    moved = rows * bk * x_bits // 8 + bk * bn * problem.bits // 8 + 4 * max(1, bk // group) * bn + 4 * bm * bn
    held = 4 * rows * bn + (bk if len(config) == 4 else min(max(group, LANES), bk)) * bn * x_bits // 8
    return 2 * moved + held <= _VMEM


def _several(group: int, config: Config) -> int:
    """How often a token comes: once for each group in 128 rows, unless weights are scaled."""
    return 1 if len(config) == 4 else max(1, LANES // group)


def _spread_out(x: jax.Array, bm: int, group: int, several: int) -> jax.Array:
    """`x[m, k]` as `[m / bm, several, bm, k]` with its first axes joined: each time all but some groups' rows are 0."""
    mine = jnp.arange(x.shape[1]) // group % several == jnp.arange(several)[:, None]
    return jnp.where(mine[:, None], x.reshape(-1, 1, bm, x.shape[1]), 0).reshape(-1, x.shape[1])


def _divisors(size: int, limit: int) -> list[int]:
    """Multiples of 128 up to `limit` that divide `size`, a multiple of 128."""
    return [part for part in range(LANES, min(size, limit) + 1, LANES) if size % part == 0]


def _padded(problem: Problem) -> tuple[int, int, int]:
    bm = _sublanes(problem)
    whole = problem.k if problem.group_size is None else problem.groups * problem.group_size
    return -(-problem.m // bm) * bm, -(-whole // LANES) * LANES, -(-problem.n // LANES) * LANES


def _sublanes(problem: Problem) -> int:
    return SUBLANES.get(dot_type(problem), 8)


def _run(x: jax.Array, packed: Packed, config: Config, interpret: bool) -> jax.Array:
    """As `backend.Run`; float16 is computed in float32, which the hardware has."""
    x = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
    m, spec = x.shape[0], packed.spec
    (bm, bn, bk), before = config[:3], len(config) == 4
    padded = jnp.pad(x, ((0, -m % bm), (0, spec.tiled_k - spec.k)))
    group = packed.group_size or spec.tiled_k
    per_tile, several = max(1, bk // group), _several(group, config)
    # `lax.div`, for floor division asks for a sign, which does not lower without a chip at hand.
    scale_row = (lambda i, j, k: (k, 0, j)) if bk >= group else (lambda i, j, k: (lax.div(k, group // bk), 0, j))
    grid = (padded.shape[0] // bm, spec.tiled_n // bn, spec.tiled_k // bk)
    moved = several * padded.size * width(x.dtype) + packed.size_bits + 32 * padded.shape[0] * spec.tiled_n
    call = pl.pallas_call(
        functools.partial(_dequantizing_kernel if before else _kernel, segment=min(max(group, LANES), bk)),
        out_shape=jax.ShapeDtypeStruct((padded.shape[0], spec.tiled_n), jnp.float32),
        grid=grid,
        in_specs=[
            pl.BlockSpec((several * bm, bk), lambda i, j, k: (i, k)),
            pl.BlockSpec((bk, bn), lambda i, j, k: (k, j)),
            pl.BlockSpec((per_tile, 1, bn), scale_row),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
        scratch_shapes=[
            compat.tpu_scratch((bm, bn), jnp.float32),
            *([compat.tpu_scratch((bk, bn), x.dtype)] if before else []),
        ],
        compiler_params=compat.tpu_params(("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * several * padded.size * spec.tiled_n, transcendentals=0, bytes_accessed=moved // 8
        ),
        name=f"mpq_w{packed.bits}a{width(x.dtype)}{'_scaled' if before else ''}",
        interpret=compat.tpu_interpreter() if interpret else False,
    )
    tokens = padded if several == 1 else _spread_out(padded, bm, group, several)
    return call(tokens, packed.codes, packed.scales)[:m, : spec.n]


def _refuses(problem: Problem) -> str | None:
    return None if problem.m else "it has no tokens"


def _seconds(problem: Problem, device: Device) -> float:
    """Roofline, and the partial sums or the weights that vector instructions scale."""
    config = tiles(problem)
    scaled = -(-problem.m // config[0]) * problem.k if len(config) == 4 else problem.groups * problem.m
    macs = problem.macs * _several(problem.group_size or LANES, config)
    return device.seconds(problem.num_bytes, macs, dot_type(problem)) + (
        problem.batch * scaled * problem.n / device.unpack
    )


TPU = Backend(
    platforms=("tpu",),
    layouts=("tpu",),
    interpretable=True,
    run=_run,
    refuses=_refuses,
    seconds=_seconds,
    tiles=tiles,
    legal=legal,
)
