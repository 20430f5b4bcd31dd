"""NVIDIA Hopper, in Pallas for Mosaic GPU: few tokens times weights of 4 or 8 bits, activations in bfloat16.

The tensor cores take a first operand of 64 rows from registers and a second one of 8 columns or more from shared
memory. So the weight's columns are the rows, and the tokens the columns: `y^T = w^T x^T`, and few tokens waste little.
A block is one warpgroup that copies, ahead by `STAGES` tiles, and two that multiply 64 columns of the weight each:

    wait for a tile -> codes to registers, int to bfloat16 (exact) -> one product of 128 rows -> times the group's scale
    in float32 -> added to a sum in float32

Scales meet partial sums, so dequantized weights are never rounded. See Frantar et al. 2024, arXiv:2408.11743, on why
few tokens are bound by the bytes of the codes.

It lowers for CUDA in the tests, and on an H100 equals the contract. There it is faster than a dense bfloat16 dot for
one token and large weights only (`experiments/results/kernels`): a block for every 128 columns, without splitting k,
leaves many of the processors idle. So `auto` does not take it yet.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import compat
from kernels_pallas.backend import Backend, Config, Problem
from kernels_pallas.devices import Device
from kernels_pallas.layouts import LANES
from kernels_pallas.packed import Packed, width

ROWS = 64
"""Columns of the weight that a warpgroup multiplies."""

WARPGROUPS = 2
STAGES = 4
MAX_TOKENS = 64


def _kernel(group: int, *refs: Any) -> None:
    """One block: `w[n, k]`, `s[groups, n]`, `x[m, k]` in global memory to `y[n, m]`.

    Tiles of the three are in shared memory, with barriers that say which are full and which are free.
    """
    w, s, x, y, w_tile, s_tile, x_tile, full, free = refs
    gpu = compat.mosaic_gpu()
    thread, first = lax.axis_index("warpgroup"), lax.axis_index("columns") * ROWS * WARPGROUPS
    steps = w.shape[1] // LANES

    @pl.when(thread == WARPGROUPS)
    def _copy() -> None:
        def ahead(step: jax.Array, carry: jax.Array) -> jax.Array:
            slot = lax.rem(step, STAGES)

            @pl.when(step >= STAGES)
            def _wait() -> None:
                gpu.barrier_wait(free.at[slot])

            rows, part = pl.ds(first, ROWS * WARPGROUPS), pl.ds(step * LANES, LANES)
            gpu.copy_gmem_to_smem(w.at[rows, part], w_tile.at[slot], full.at[slot])
            gpu.copy_gmem_to_smem(s.at[lax.div(step * LANES, group), rows], s_tile.at[slot], full.at[slot])
            gpu.copy_gmem_to_smem(x.at[:, part], x_tile.at[slot], full.at[slot])
            return carry

        lax.fori_loop(0, steps, ahead, jnp.int32(0))

    @pl.when(thread < WARPGROUPS)
    def _multiply() -> None:
        rows = pl.ds(thread * ROWS, ROWS)

        def step_(step: jax.Array, total: jax.Array) -> jax.Array:
            slot = lax.rem(step, STAGES)
            gpu.barrier_wait(full.at[slot])
            operand = _operand(gpu, w_tile.at[slot, rows])
            scale = compat.load(s_tile.at[slot, rows], gpu.Layout.WGMMA.reduce(1))

            def product(sums: Any) -> jax.Array:
                gpu.wgmma(sums, operand, x_tile.at[slot].T)
                gpu.wgmma_wait(0)
                return sums[...]

            part = pl.run_scoped(product, gpu.ACC(total.shape, jnp.float32))
            gpu.barrier_arrive(free.at[slot])
            return total + part * lax.broadcast_in_dim(scale, part.shape, [0])

        zero = gpu.layout_cast(jnp.zeros((ROWS, x.shape[0]), jnp.float32), gpu.Layout.WGMMA)
        y[pl.ds(first + thread * ROWS, ROWS), :] = lax.fori_loop(0, steps, step_, zero)


def _operand(gpu: Any, tile: Any) -> jax.Array:
    """Codes of a tile in registers as bfloat16, in the layout of the tensor cores' first operand."""
    ratio = 16 // width(tile.dtype)
    layout = {2: gpu.Layout.WGMMA_UPCAST_2X, 4: gpu.Layout.WGMMA_UPCAST_4X}[ratio]
    return gpu.layout_cast(compat.load(tile, layout), gpu.Layout.WGMMA).astype(jnp.bfloat16)


def _run(x: jax.Array, packed: Packed, config: Config, interpret: bool) -> jax.Array:
    del config, interpret
    gpu, spec, m = compat.mosaic_gpu(), packed.spec, x.shape[0]
    tokens = max(8, 1 << math.ceil(math.log2(max(m, 1))))
    padded = jnp.pad(x, ((0, tokens - m), (0, spec.tiled_k - spec.k)))
    columns = ROWS * WARPGROUPS

    def tile(*shape: int, dtype: Any) -> Any:
        bits = width(dtype)
        swizzle = gpu.find_swizzle(shape[-1] * bits, "tile")
        transforms = (gpu.TilingTransform((8, swizzle * 8 // bits)), gpu.SwizzleTransform(swizzle))
        return gpu.SMEM((STAGES, *shape), dtype, transforms=transforms)

    call = gpu.kernel(
        functools.partial(_kernel, packed.group_size or spec.tiled_k),
        out_type=jax.ShapeDtypeStruct((spec.tiled_n, tokens), jnp.float32),
        grid=(spec.tiled_n // columns,),
        grid_names=("columns",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            tile(columns, LANES, dtype=packed.codes.dtype),
            gpu.SMEM((STAGES, columns), jnp.float32),
            tile(tokens, LANES, dtype=x.dtype),
            gpu.Barrier(num_arrivals=3, num_barriers=STAGES),
            gpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
        ],
        compiler_params=gpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=f"mpq_w{packed.bits}a16",
    )
    return call(packed.codes, packed.scales, padded)[: spec.n, :m].T


def _refuses(problem: Problem) -> str | None:
    if problem.activation_bits is not None or problem.x_dtype != "bfloat16":
        return "its activations are bfloat16 and not rounded"
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
    interpretable=False,
    run=_run,
    refuses=_refuses,
    seconds=_seconds,
)
