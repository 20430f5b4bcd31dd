"""NVIDIA Hopper, in Pallas for Mosaic GPU: few tokens times weights of 8, 4 or 2 bits, activations in bfloat16 or int8.

The tensor cores take a first operand of 64 rows from registers and a second one of 8 columns or more from shared
memory. So the weight's columns are the rows, and the tokens the columns: `y^T = w^T x^T`, and few tokens waste little.
A block is one warpgroup that copies, as many tiles ahead as shared memory holds, and some that multiply 64 columns of
the weight each:

    wait for a tile -> codes to registers (`registers`, exact) -> products of 128 rows -> times the group's scale in
    float32 -> added to a sum in float32

Scales meet partial sums, so dequantized weights are never rounded; sums of int8 are int32 within a group. See Frantar et
al. 2024, arXiv:2408.11743, on why few tokens are bound by the bytes of the codes. Every processor must read at once for
that, so rows are split among blocks, too, and a second pass adds their sums in a fixed order: no atomics.

It lowers for CUDA in the tests, and on an H200 equals the contract (`experiments/results/kernels`).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import compat, fragments, interpreted, registers
from kernels_pallas.backend import Backend, Config, Problem, dot_type
from kernels_pallas.devices import DEVICES, Device
from kernels_pallas.fragments import LANES, ROWS
from kernels_pallas.packed import Packed, width

MAX_TOKENS = 256

_COPYING = 40
"""Registers of a thread that copies."""

_SHARED = DEVICES["NVIDIA H200"].fast_memory - 1024  # barriers take some


def _kernel(per_scale: int | None, bits: int, levels: Any, on: Any, *refs: Any) -> None:
    """One block: `w[k / 128, n / 64, words, 128]`, `s[groups, n]`, `x[m, k]` in global memory to `y[splits, n, m]`.

    Tiles of the three are in shared memory, with barriers that say which are full and which are free.

    Args:
      per_scale: tiles of rows that share a scale; None: all.
      bits: of a code.
      levels: values of a table, or None.
      on: `registers`, or its twin for the interpreter.
      refs: as above, the tiles, the barriers, and what the twin needs.
    """
    w, s, x, y, w_tile, s_tile, x_tile, full, free, *scratch = refs
    gpu = compat.mosaic_gpu()
    thread, split = lax.axis_index("warpgroup"), lax.axis_index("split")
    stages, warpgroups = w_tile.shape[:2]
    first, tokens = lax.axis_index("columns") * warpgroups, x_tile.shape[1]
    token = lax.axis_index("tokens") * tokens
    steps = w.shape[0]
    begin, end = (lax.div((split + i) * steps, y.shape[0]) for i in (0, 1))

    @pl.when(thread == warpgroups)
    def _copy() -> None:
        gpu.set_max_registers(_COPYING, action="decrease")

        def ahead(step: jax.Array, carry: jax.Array) -> jax.Array:
            turn = step - begin
            slot = lax.rem(turn, stages)

            @pl.when(turn >= stages)
            def _wait() -> None:
                gpu.barrier_wait(free.at[slot])

            rows = pl.ds(first * ROWS, warpgroups * ROWS)
            group = 0 if per_scale is None else lax.div(step, per_scale)
            gpu.copy_gmem_to_smem(w.at[step, pl.ds(first, warpgroups)], w_tile.at[slot], full.at[slot])
            gpu.copy_gmem_to_smem(s.at[group, rows], s_tile.at[slot], full.at[slot])
            part = x.at[pl.ds(token, tokens), pl.ds(step * LANES, LANES)]
            gpu.copy_gmem_to_smem(part, x_tile.at[slot], full.at[slot])
            return carry

        lax.fori_loop(begin, end, ahead, jnp.int32(0))

    @pl.when(thread < warpgroups)
    def _multiply() -> None:
        gpu.set_max_registers(most_registers(warpgroups), action="increase")
        kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32

        def product(slot: jax.Array, sums: Any) -> jax.Array:
            """Adds a tile's product to `sums`; the scale of its columns."""
            gpu.barrier_wait(full.at[slot])
            operand = on.operand(w_tile.at[slot, thread], bits, levels, x.dtype)
            scale = on.column_scales(s_tile.at[slot, pl.ds(thread * ROWS, ROWS)])
            on.multiply(sums, operand, x_tile.at[slot], thread, scratch)
            return scale

        def grouped(step: jax.Array, total: jax.Array) -> jax.Array:
            slot = lax.rem(step - begin, stages)

            def one(sums: Any) -> jax.Array:
                scale = product(slot, sums)
                part = sums[...].astype(jnp.float32)
                return part * lax.broadcast_in_dim(scale, part.shape, [0])

            part = pl.run_scoped(one, gpu.ACC((ROWS, tokens), kind))
            gpu.barrier_arrive(free.at[slot])
            return total + part

        def whole(sums: Any) -> jax.Array:
            def one(step: jax.Array, scale: jax.Array) -> jax.Array:
                slot = lax.rem(step - begin, stages)
                scale = product(slot, sums)
                gpu.barrier_arrive(free.at[slot])
                return scale

            scale = lax.fori_loop(begin, end, one, on.zeros(ROWS))
            part = sums[...].astype(jnp.float32)
            return part * lax.broadcast_in_dim(scale, part.shape, [0])

        if per_scale is None:
            total = pl.run_scoped(whole, gpu.ACC((ROWS, tokens), kind))
        else:
            total = lax.fori_loop(begin, end, grouped, on.zeros(ROWS, tokens))
        y[split, pl.ds((first + thread) * ROWS, ROWS), pl.ds(token, tokens)] = total


def most_registers(warpgroups: int) -> int:
    """Of a thread that multiplies, by eights.

    Threads start with equal shares of the 65,536 of a processor, at most 248. Those that multiply wait for more until
    those that copy have given theirs away, forever if there are too few.
    """
    share = min(248, 65536 // (128 * (warpgroups + 1)) // 8 * 8)
    return min(232, (share * (warpgroups + 1) - _COPYING) // warpgroups // 8 * 8)


def _run(x: jax.Array, packed: Packed, config: Config, interpret: bool) -> jax.Array:
    warpgroups, splits, tokens, stages = config
    gpu, spec, m = compat.mosaic_gpu(), packed.spec, x.shape[0]
    padded = jnp.pad(x, ((0, -m % tokens), (0, spec.tiled_k - spec.k)))
    integers = x.dtype == jnp.int8
    if integers:
        padded = fragments.permute_rows(padded, packed.bits)
    swizzle = gpu.find_swizzle(LANES * width(x.dtype), "x")
    transforms = (gpu.TilingTransform((8, swizzle * 8 // width(x.dtype))), gpu.SwizzleTransform(swizzle))
    per_scale = None if packed.group_size is None else packed.group_size // LANES
    call = gpu.kernel(
        functools.partial(_kernel, per_scale, packed.bits, packed.levels, interpreted if interpret else registers),
        out_type=jax.ShapeDtypeStruct((splits, spec.tiled_n, padded.shape[0]), jnp.float32),
        grid=(spec.tiled_n // ROWS // warpgroups, splits, padded.shape[0] // tokens),
        grid_names=("columns", "split", "tokens"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[
            gpu.SMEM((stages, warpgroups, *packed.codes.shape[-2:]), jnp.int32),
            gpu.SMEM((stages, warpgroups * ROWS), jnp.float32),
            gpu.SMEM((stages, tokens, LANES), x.dtype, transforms=transforms),
            gpu.Barrier(num_arrivals=3, num_barriers=stages),
            gpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            *(interpreted.scratch(warpgroups, tokens, x.dtype) if interpret else ()),
        ],
        interpret=compat.gpu_interpreter() if interpret else False,
        compiler_params=gpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=f"mpq_{'t' if packed.levels else 'w'}{packed.bits}a{width(x.dtype)}",
    )
    parts = call(packed.codes, packed.scales, padded)
    total = functools.reduce(jnp.add, [parts[i] for i in range(splits)])[: spec.n, :m].T
    return total / registers.over(packed.bits) if integers else total


def tiles(problem: Problem) -> Config:
    """`(warpgroups, splits, tokens, stages)` from sizes alone: as many blocks as processors, in whole rounds."""
    tokens = min(64, -(-problem.m // 8) * 8)
    columns = -(-problem.n // LANES) * LANES // ROWS
    warpgroups = 2 if columns % 4 or tokens > 32 else 4
    steps = _steps(problem)
    blocks = columns // warpgroups * -(-problem.m // tokens)
    # Rounds of all processors that the blocks take, as a share of those that they fill.
    cost = lambda splits: (-(-blocks * splits // 132) * -(-steps // splits), splits)
    splits = min((s for s in range(1, min(16, steps) + 1)), key=cost)
    stages = min(12, _SHARED // _stage_bytes(problem, warpgroups, tokens))
    return warpgroups, splits, tokens, stages


def _steps(problem: Problem) -> int:
    whole = problem.k if problem.group_size is None else problem.groups * problem.group_size
    return -(-whole // LANES)


def _stage_bytes(problem: Problem, warpgroups: int, tokens: int) -> int:
    x_bytes = 1 if dot_type(problem) == "int8" else 2
    return warpgroups * (ROWS * LANES * problem.bits // 8 + 4 * ROWS) + tokens * LANES * x_bytes + 16


def legal(problem: Problem, config: Config) -> bool:
    """Whether the columns divide among the warpgroups, no split is empty, and the tiles fit into shared memory."""
    if len(config) != 4 or min(config) < 1:
        return False
    warpgroups, splits, tokens, stages = config
    columns = -(-problem.n // LANES) * LANES // ROWS
    fits = stages * _stage_bytes(problem, warpgroups, tokens) <= _SHARED
    return fits and columns % warpgroups == 0 and splits <= _steps(problem) and tokens % 8 == 0 and tokens <= 256


def _refuses(problem: Problem) -> str | None:
    if problem.activation_bits is None and problem.x_dtype != "bfloat16":
        return f"its activations are {problem.x_dtype}, allowed are bfloat16 and those that are rounded to int8"
    if problem.activation_bits is not None and problem.table:
        return "values of a table have no integer product"
    if not 1 <= problem.m <= MAX_TOKENS:
        return f"it has {problem.m} tokens, allowed are 1 to {MAX_TOKENS}"
    return None


def _seconds(problem: Problem, device: Device) -> float:
    """Never the fastest, until it is for all that it takes."""
    del problem, device
    return math.inf


HOPPER = Backend(
    platforms=("cuda",),
    layouts=("hopper",),
    interpretable=True,
    run=_run,
    refuses=_refuses,
    seconds=_seconds,
    tiles=tiles,
    legal=legal,
)
