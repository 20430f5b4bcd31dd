"""Twins of `registers` for Pallas's interpreter of GPU kernels, which has no registers of threads.

What they compute is the same; codes are decoded from the order of `fragments` by arithmetic on whole arrays, and both
operands of a product go through shared memory, as the interpreter asks.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat, fragments
from kernels_pallas.fragments import LANES, ROWS


def held(ref: Any) -> jax.Array:
    """As `registers.held`."""
    return ref[...]


def operand(stored: jax.Array, part: int, parts: int, bits: int, table: Any, dtype: Any, alone: int = 1) -> jax.Array:
    """As `registers.operand`."""
    if alone > 1:
        its = operand(stored, part, parts, bits, table, dtype)
        return jnp.concatenate([its if i == part % alone else jnp.zeros_like(its) for i in range(alone)], axis=1)
    stored = stored.reshape(1, 1, *stored.shape)
    rows = slice(part * LANES // parts, (part + 1) * LANES // parts)
    codes = fragments.load(stored, bits, table is not None)[rows].T
    if table is not None:
        index, pairs = codes.astype(jnp.int32) & (2**bits - 1), table[...]
        values = lax.bitcast_convert_type((pairs[:16, 0] & 0xFFFF).astype(jnp.uint16), jnp.bfloat16)
        return functools.reduce(jnp.add, [jnp.where(index == i, values[i], 0) for i in range(16)]).astype(dtype)
    if jnp.dtype(dtype) == jnp.int8:
        return fragments.permute_rows(codes, bits) * jnp.int8(2 ** (8 - bits))
    return codes.astype(dtype)


def column_scales(ref: Any) -> jax.Array:
    """As `registers.column_scales`."""
    return ref[...]


def multiply(sums: Any, first: jax.Array, x: Any, thread: jax.Array, scratch: Sequence[Any]) -> None:
    """As `registers.multiply`."""
    gpu = compat.mosaic_gpu()
    left, right = (ref.at[thread] for ref in scratch)
    left[...], right[...] = first, x[...].T
    gpu.commit_smem()
    gpu.wgmma(sums, left, right)
    gpu.wgmma_wait(0)


def finish_all_but(count: int) -> None:
    """As `registers.finish_all_but`: `multiply` waited."""
    del count


def store(ref: Any, value: jax.Array) -> None:
    """As `registers.store`."""
    ref[...] = value.T


def token_scales(ref: Any) -> jax.Array:
    """As `registers.token_scales`."""
    return ref[...]


def keep(ref: Any, value: jax.Array) -> None:
    """As `registers.keep`."""
    ref[...] = value


def kept(ref: Any) -> jax.Array:
    """As `registers.kept`."""
    return ref[...]


def flags(count: int) -> None:
    """As `registers.flags`: the interpreter has none, and runs one block after the other."""
    del count


def raise_flag(flags: None, i: jax.Array) -> None:
    """As `registers.raise_flag`."""
    del flags, i


def await_flag(flags: None, i: jax.Array) -> None:
    """As `registers.await_flag`: blocks of larger numbers, which are waited for, run before."""
    del flags, i


def zeros(*shape: int) -> jax.Array:
    """As `registers.zeros`."""
    return jnp.zeros(shape, jnp.float32)


def scratch(warpgroups: int, tokens: int, rows: int, dtype: Any) -> list[Any]:
    """Shared memory for both operands of every warpgroup."""
    gpu = compat.mosaic_gpu()
    return [gpu.SMEM((warpgroups, ROWS, rows), dtype), gpu.SMEM((warpgroups, rows, tokens), dtype)]
