"""Weights of layout `hopper` unpacked in global memory, for a library's dot with many tokens.

A block of one warpgroup takes one tile: words from global memory to registers, decoded there (`registers`), times the
group's scale in float32, rounded to bfloat16 as a dense weight is; or int8 codes as they stand. A tile is copied out of
shared memory. It is bound by the bytes that it writes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import compat, registers
from kernels_pallas.fragments import LANES, ROWS
from kernels_pallas.hopper_kernel import first_group
from kernels_pallas.packed import Packed


def _kernel(group_size: int | None, bits: int, table: bool, *refs: Any) -> None:
    """`w[k / 128, n / 64, words, 128]`, `s[groups, n]` in global memory to `y[n, k]`."""
    (w, s), values, (y, tile, *places) = refs[:2], refs[2 : 2 + table], refs[2 + table :]
    gpu = compat.mosaic_gpu()
    row, column = lax.axis_index("rows"), lax.axis_index("columns")
    if table:
        gpu.copy_gmem_to_smem(*values, *places)
        gpu.barrier_wait(places[1])
    rows = _together(group_size, y.dtype)
    held = registers.held(w.at[row, column])
    for part in range(LANES // rows):
        code = registers.operand(held, part, LANES // rows, bits, places[0] if table else None, y.dtype)
        if y.dtype != jnp.int8:
            group = first_group(row, group_size) + part
            scale = registers.column_scales(s.at[group, pl.ds(column * ROWS, ROWS)], shared=False)
            value = code.astype(jnp.float32)
            code = (value * lax.broadcast_in_dim(scale, value.shape, [0])).astype(y.dtype)
        tile[:, pl.ds(part * rows, rows)] = code
    gpu.commit_smem()
    gpu.copy_smem_to_gmem(tile, y.at[pl.ds(column * ROWS, ROWS), pl.ds(row * LANES, LANES)])
    gpu.wait_smem_to_gmem(0)


def _together(group_size: int | None, dtype: Any) -> int:
    """Rows that are decoded together: those of a tile that share a scale, if the values are to have one."""
    return LANES if jnp.dtype(dtype) == jnp.int8 else min(LANES, group_size or LANES)


def unpacked(packed: Packed, dtype: Any) -> jax.Array:
    """`dtype[n, k]` of whole tiles, without zero points.

    Args:
      packed: in layout `hopper`, without batch axes.
      dtype: bfloat16: values. int8: codes times `registers.over(bits)`, rows in the order of `fragments.permute_rows`.
    """
    gpu, spec, table = compat.mosaic_gpu(), packed.spec, packed.levels is not None
    call = gpu.kernel(
        functools.partial(_kernel, packed.group_size, packed.bits, table),
        out_type=jax.ShapeDtypeStruct((spec.tiled_n, spec.tiled_k), dtype),
        grid=(spec.tiled_k // LANES, spec.tiled_n // ROWS),
        grid_names=("rows", "columns"),
        scratch_types=[
            registers.shared_tile((ROWS, LANES), dtype, _together(packed.group_size, dtype)),
            *registers.table_places(packed.levels),
        ],
        compiler_params=compat.gpu_params(),
        kernel_name=f"mpq_unpack_{'t' if table else 'w'}{packed.bits}",
    )
    return call(packed.codes, packed.scales, *registers.table_values(packed.levels))
