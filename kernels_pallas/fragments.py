"""The order of codes in layout `hopper`: that in which the threads of a warpgroup feed them to the tensor cores.

A warpgroup (128 threads) multiplies `ROWS` columns of the weight by `LANES` rows of it at a time: one tile. Its first
operand lies in registers of 32 bits, two values of bfloat16 each. Thread t, with warp w = t // 32, g = t % 32 // 4 and
q = t % 4, holds in register r = 4 j + 2 h + o, for j < 8 and h, o < 2,

    column 16 w + g + 8 o,  rows 16 j + 8 h + 2 q + e  for e = 0 and 1

(PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16", matrix A). The fields of a thread's words follow registers:
word r // p, with p = 16 / bits, holds value e of register r at bit `bits * (r % p) + 16 e`, in two's complement. So a
shift and a mask make two values of one register out of a word, and no thread needs a value of another. Codes that are
indices of a table, which are looked up two at a time, stand side by side: at bit `bits * (2 (r % p) + e)`. Four words
of a thread are neighbours, since it loads 16 bytes at once, and then come those of the next thread:

    codes int32[rows / 128, columns / 64, words of a thread, 128]

Activations of int8 fill registers with four values of rows that are four neighbours. What two registers of bfloat16
hold of one column makes one of those if the rows of the activations are put into that order: `permute_rows`.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax import lax

LANES = 128
"""Rows of a tile."""

ROWS = 64
"""Columns of the weight in a tile: rows of the tensor cores' first operand."""

THREADS = 128


def words(bits: int) -> int:
    """Words of 32 bits that a thread holds of a tile."""
    return ROWS * LANES * bits // (32 * THREADS)


def store(codes: np.ndarray, bits: int, table: bool = False) -> np.ndarray:
    """`int32[*batch, k / 128, n / 64, words, 128]` of codes `int8[*batch, k, n]`, whose sizes are of whole tiles."""
    *batch, k, n = codes.shape
    tiles = (k // LANES, n // ROWS)
    fields = (codes.view(np.uint8) & np.uint8(2**bits - 1)).astype(np.uint32)
    fields = _transposed(fields.reshape(*batch, tiles[0], *_ROW, tiles[1], *_COLUMN), _TO_REGISTERS)
    fields = fields.reshape(*batch, *tiles, words(bits), 16 // bits, 2, THREADS)
    packed = np.bitwise_or.reduce(fields << _shifts(bits, table, True).astype(np.uint32), axis=(-3, -2))
    fours = packed.reshape(*batch, *tiles, -1, 4, THREADS).swapaxes(-1, -2)
    return fours.reshape(packed.shape).view(np.int32)


def load(stored: jax.Array, bits: int, table: bool = False) -> jax.Array:
    """The inverse, `int8[*batch, k, n]`; of a NumPy array a NumPy array."""
    *batch, tiles_k, tiles_n, count, _ = stored.shape
    fours = stored.reshape(*batch, tiles_k, tiles_n, -1, THREADS, 4).swapaxes(-1, -2)
    packed = fours.reshape(*batch, tiles_k, tiles_n, count, 1, 1, THREADS)
    shifts = _shifts(bits, table, isinstance(stored, np.ndarray))
    fields = ((packed << (32 - bits - shifts)) >> np.int32(32 - bits)).astype(np.int8)
    fields = fields.reshape(*batch, tiles_k, tiles_n, 8, 2, 2, 2, 4, 8, 4)
    return _transposed(fields, _FROM_REGISTERS).reshape(*batch, tiles_k * LANES, tiles_n * ROWS)


def permute_rows(x: jax.Array, bits: int) -> jax.Array:
    """Activations `x[..., k]` in the order in which registers of int8 hold the rows of a weight of so many bits."""
    if bits == 2:  # a word holds the fields of two neighbouring blocks of 16 rows, a byte of each in turn
        return _transposed(x.reshape(*x.shape[:-1], -1, 2, 2, 4, 2), (1, 2, 3, 0)).reshape(x.shape)
    return _transposed(x.reshape(*x.shape[:-1], -1, 2, 4, 2), (1, 2, 0)).reshape(x.shape)


_ROW = (8, 2, 4, 2)
"""A row of a tile as (j, h, q, e)."""

_COLUMN = (4, 2, 8)
"""A column of a tile as (w, o, g)."""

_TO_REGISTERS = (0, 5, 1, 2, 7, 4, 6, 8, 3)
"""Of (row tile, j, h, q, e, column tile, w, o, g): row tile, column tile, (j, h, o), e and the thread (w, g, q)."""

_FROM_REGISTERS = tuple(_TO_REGISTERS.index(axis) for axis in range(9))


def _transposed(array: Any, order: tuple[int, ...]) -> Any:
    """Its last axes in this order."""
    front = array.ndim - len(order)
    return array.transpose(*range(front), *(front + axis for axis in order))


def _shifts(bits: int, table: bool, host: bool) -> Any:
    """`int32[fields, 2, 1]`: where value e of a register stands in its word. Kernels take no constants of the host."""
    count = _host_count if host else functools.partial(lax.broadcasted_iota, np.int32)
    field, value = (count((16 // bits, 2, 1), axis) for axis in (0, 1))
    return bits * (2 * field + value) if table else bits * field + 16 * value


def _host_count(shape: tuple[int, ...], axis: int) -> np.ndarray:
    return np.indices(shape, np.int32)[axis]
