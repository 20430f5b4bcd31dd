"""Codes in registers become the tensor cores' first operand, with few instructions and without the conversion unit.

A warpgroup holds a tile in the words that `fragments` describes, and decodes its own. To bfloat16, whose seven bits of
mantissa keep `128 + c` exact for c < 128: a mask takes one field of both halves of a word, an exclusive or turns two's
complement into an offset and puts the exponent of 128 above it, one subtraction of pairs removes 128 and the offset
(Kim et al. 2022, arXiv:2211.10017, have the trick in float16). A field that stands 2 or 4 bits up counts 4 or 16 times,
which the subtraction undoes as a multiply-add: so 2 bits shift once in three fields. Codes of 8 bits have no room under
128: without their sign they are the mantissa, their sign alone tells 128 from 256, and the difference is the code.

Values of a table of 16 are looked up a byte at a time: `prmt` takes four bytes of eight by four indices, so four of them
and two choices between halves of the table make four values.

To int8: a field stays in the upper bits of its byte, where it counts `2^(8 - bits)` times; `over` says how often.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import compat
from kernels_pallas.fragments import LANES, ROWS, words

_SIGN, _EXPONENT = 0x80, 0x4300


def over(bits: int) -> int:
    """How many times its code a value of int8 counts."""
    return 2 ** (8 - bits)


def held(ref: Any) -> jax.Array:
    """The words of a tile, `int32[words, 128]` in shared memory, in registers: a thread loads 16 bytes at once."""
    return compat.load(ref, _fours(ref.shape))


def _fours(shape: tuple[int, ...]) -> Any:
    return compat.mosaic_gpu().Layout.WG_STRIDED(tuple(shape), vec_size=4)


def operand(
    stored: jax.Array, part: int, parts: int, bits: int, levels: Sequence[float] | None, dtype: Any
) -> jax.Array:
    """Rows of a tile, `dtype[64, 128 / parts]`, in the layout of the first operand.

    Args:
      stored: what `held` gave.
      part: which rows, of so many equal parts.
      parts: 1 or 2.
      bits: 8, 4 or 2.
      levels: the values of 16 codes, or None for integers.
      dtype: bfloat16 or int8.
    """
    gpu, shape = compat.mosaic_gpu(), (ROWS, LANES // parts)
    integers = jnp.dtype(dtype) == jnp.int8
    layout = gpu.Layout.WGMMA_8BIT if integers else gpu.Layout.WGMMA
    decode = _to_int8(bits) if integers else _table(tuple(levels)) if levels is not None else _to_bfloat16(bits)
    count = words(bits) // parts
    mine = range(part * count, (part + 1) * count)

    @gpu.inline_mgpu(
        arg_types=(_fours(stored.shape),),
        return_type=gpu.ShapeDtypeStruct(shape, jnp.dtype(dtype), layout=layout),
    )
    def decoded(context: Any, array: Any) -> Any:
        del context
        lanes, fours = compat.mosaic_lanes(), array.registers.flat
        found = decode([lanes.word(fours[i // 4], i % 4) for i in mine])
        return lanes.array(found, layout.to_mgpu(), shape, integers)

    return decoded(stored)


def column_scales(ref: Any) -> jax.Array:
    """`float32[64]`, where the sums of its columns are."""
    return compat.load(ref, compat.mosaic_gpu().Layout.WGMMA.reduce(1))


def multiply(sums: Any, first: jax.Array, x: Any, thread: jax.Array, scratch: Sequence[Any]) -> None:
    """Begins to add `first @ x^T` to the accumulator; `x[tokens, rows]` is in shared memory."""
    del thread, scratch
    compat.mosaic_gpu().wgmma(sums, first, x.T)


def finish_all_but(count: int) -> None:
    """Waits until no more than the last so many calls of `multiply` are unfinished."""
    compat.mosaic_gpu().wgmma_wait(count)


def zeros(*shape: int) -> jax.Array:
    """Of float32, in the layout of sums, or of scales of their columns."""
    gpu = compat.mosaic_gpu()
    layout = gpu.Layout.WGMMA if len(shape) == 2 else gpu.Layout.WGMMA.reduce(1)
    return gpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


Decode = Callable[[list[Any]], list[Any]]
"""Words of a thread to its registers, in order."""


def _each(count: int, instructions: Callable[[int], str]) -> Decode:
    """So many registers out of every word, by PTX that reads `$1` and writes `$0`."""
    return lambda held: [
        compat.mosaic_lanes().assemble("{ .reg .b32 t, c, d; " + instructions(i) + " }", word)
        for word in held
        for i in range(count)
    ]


def _to_bfloat16(bits: int) -> Decode:
    return _each(16 // bits, functools.partial({8: _bytes, 4: _nibbles, 2: _crumbs}[bits]))


def _bytes(i: int) -> str:
    select = 0x4240 + 0x101 * i
    return (
        f"prmt.b32 t, $1, 0x43434343, {select:#x}; "
        "and.b32 c, t, 0xff7fff7f; and.b32 d, t, 0xff80ff80; sub.rn.bf16x2 $0, c, d;"
    )


def _nibbles(i: int) -> str:
    shift = f"shr.u32 t, $1, {4 * i};" if i else "mov.b32 t, $1;"
    return f"{shift} mov.b32 c, 0x43084308; lop3.b32 t, t, 0x000f000f, c, 0x6a; sub.rn.bf16x2 $0, t, c;"


def _crumbs(i: int) -> str:
    window, place = divmod(i, 3)
    shift = f"shr.u32 t, $1, {6 * window};" if window else "mov.b32 t, $1;"
    magic, mask = _EXPONENT + (2 << 2 * place), 3 << 2 * place
    factor, less = _bfloat16(4.0**-place), _bfloat16(-(128 / 4**place + 2))
    return (
        f"{shift} lop3.b32 t, t, {_twice(mask)}, {_twice(magic)}, 0x6a; "
        f"mov.b32 c, {_twice(factor)}; mov.b32 d, {_twice(less)}; fma.rn.bf16x2 $0, t, c, d;"
    )


def _table(levels: tuple[float, ...]) -> Decode:
    values = [_bfloat16(level) for level in (*levels, *[0.0] * (16 - len(levels)))]
    quads = [values[i : i + 4] for i in range(0, 16, 4)]
    plane = lambda shift: [sum((value >> shift & 0xFF) << 8 * i for i, value in enumerate(quad)) for quad in quads]
    look = " ".join(
        f"prmt.b32 a, {p[0]:#x}, {p[1]:#x}, i; prmt.b32 b, {p[2]:#x}, {p[3]:#x}, i; prmt.b32 {out}, a, b, s;"
        for out, p in (("l", plane(0)), ("h", plane(8)))
    )
    text = lambda half, pair: (
        "{ .reg .b32 i, s, a, b, l, h; and.b32 i, $1, 0x77777777; shr.u32 s, $1, 1; "
        "and.b32 s, s, 0x44444444; or.b32 s, s, 0x32103210; "
        + ("shr.u32 i, i, 16; shr.u32 s, s, 16; " if half else "")
        + look
        + f" prmt.b32 $0, l, h, {pair}; }}"
    )
    pieces = [text(half, pair) for half in (0, 1) for pair in ("0x5140", "0x7362")]
    return lambda held: [compat.mosaic_lanes().assemble(piece, word) for word in held for piece in pieces]


def _to_int8(bits: int) -> Decode:
    if bits == 8:
        return lambda held: [
            compat.mosaic_lanes().assemble(f"prmt.b32 $0, $1, $2, {select};", *held[i : i + 2])
            for i in range(0, len(held), 2)
            for select in ("0x6240", "0x7351")
        ]
    mask, count = 0x01010101 * (0xFF & -over(bits)), 8 // bits
    return _each(count, lambda i: f"shl.b32 t, $1, {8 - bits - bits * i}; and.b32 $0, t, {mask:#x};")


def _bfloat16(value: float) -> int:
    """Its bits."""
    return int(np.asarray(value, jnp.bfloat16).view(np.uint16))


def _twice(half: int) -> str:
    return f"{0x10001 * half:#x}"
