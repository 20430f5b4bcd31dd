"""Codes in registers become the tensor cores' first operand, with few instructions and without the conversion unit.

A warpgroup holds a tile in the words that `fragments` describes, and decodes its own. To bfloat16, whose seven bits of
mantissa keep `128 + c` exact for c < 128: a mask takes one field of both halves of a word, an exclusive or turns two's
complement into an offset and puts the exponent of 128 above it, one subtraction of pairs removes 128 and the offset
(Kim et al. 2022, arXiv:2211.10017, have the trick in float16). A field that stands 2 or 4 bits up counts 4 or 16 times,
which the subtraction undoes as a multiply-add: so 2 bits shift once in three fields. Codes of 8 bits have no room under
128: without their sign they are the mantissa, their sign alone tells 128 from 256, and the difference is the code.

Values of a table of 16 are looked up two at a time, in a table of all pairs in shared memory (Guo et al. 2024,
arXiv:2407.10960). Every lane of a warp has its own copy in its own bank, so that no two lanes wait for each other.

To int8: a field stays in the upper bits of its byte, where it counts `2^(8 - bits)` times; `over` says how often.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas import compat
from kernels_pallas.fragments import LANES, ROWS, words
from kernels_pallas.packed import width

_EXPONENT = 0x4300
"""128 in bfloat16."""


def over(bits: int) -> int:
    """How many times its code a value of int8 counts."""
    return 2 ** (8 - bits)


def too_long(rows: int) -> str | None:
    """Why so many products of int8, of which a code counts up to 128, are not added up in int32; or None."""
    most = (2**31 - 1) // (127 * 128)
    return f"it adds up {rows} rows in one integer, allowed are {most}" if rows > most else None


def held(ref: Any) -> jax.Array:
    """The words of a tile, `int32[words, 128]` in shared memory, in registers: a thread loads 16 bytes at once."""
    return compat.load(ref, _fours(ref.shape))


def _fours(shape: tuple[int, ...]) -> Any:
    return compat.mosaic_gpu().Layout.WG_STRIDED(tuple(shape), vec_size=4)


def operand(stored: jax.Array, part: int, parts: int, bits: int, table: Any, dtype: Any, alone: int = 1) -> jax.Array:
    """Rows of a tile, `dtype[64, alone * 128 / parts]`, in the layout of the first operand.

    Args:
      stored: what `held` gave.
      part: which rows, of so many equal parts.
      parts: 1, 2 or 4.
      bits: 8, 4 or 2.
      table: `pairs` in shared memory, or None for integers.
      dtype: bfloat16 or int8.
      alone: parts that the operand has, all but this one zeros.
    """
    gpu, shape = compat.mosaic_gpu(), (ROWS, alone * LANES // parts)
    integers = jnp.dtype(dtype) == jnp.int8
    layout = gpu.Layout.WGMMA_8BIT if integers else gpu.Layout.WGMMA
    decode = _to_int8(bits) if integers else _to_bfloat16(bits)
    count = words(bits) // parts
    mine = range(part * count, (part + 1) * count)

    @gpu.inline_mgpu(
        arg_types=(_fours(stored.shape), *([] if table is None else [gpu.RefType()])),
        return_type=gpu.ShapeDtypeStruct(shape, jnp.dtype(dtype), layout=layout),
    )
    def decoded(context: Any, array: Any, *tables: Any) -> Any:
        del context
        lanes, fours = compat.mosaic_lanes(), array.registers.flat
        found = [lanes.word(fours[i // 4], i % 4) for i in mine]
        found = _looked_up(found, lanes.lane_address(*tables)) if tables else decode(found)
        if alone > 1:
            zeros = [lanes.assemble("mov.b32 $0, 0;")] * len(found)
            found = [word for i in range(alone) for word in (found if i == part % alone else zeros)]
        return lanes.array(found, layout.to_mgpu(), shape, integers)

    return decoded(stored, *([] if table is None else [table]))


def column_scales(ref: Any, shared: bool = True) -> jax.Array:
    """`float32[64]` of memory, shared or not, where the sums of its columns are."""
    return compat.load(ref, compat.mosaic_gpu().Layout.WGMMA.reduce(1), shared)


def shared_tile(shape: tuple[int, ...], dtype: Any, rows: int = LANES) -> Any:
    """Shared memory swizzled as the tensor cores read it, so many of its last axis at a time."""
    gpu, bits = compat.mosaic_gpu(), width(dtype)
    swizzle = gpu.find_swizzle(rows * bits, "tile")
    return gpu.SMEM(
        shape, dtype, transforms=(gpu.TilingTransform((8, swizzle * 8 // bits)), gpu.SwizzleTransform(swizzle))
    )


def multiply(sums: Any, first: jax.Array, x: Any, thread: jax.Array, scratch: Sequence[Any]) -> None:
    """Begins to add `first @ x^T` to the accumulator; `x[tokens, rows]` is in shared memory."""
    del thread, scratch
    compat.mosaic_gpu().wgmma(sums, first, x.T)


def finish_all_but(count: int) -> None:
    """Waits until no more than the last so many calls of `multiply` are unfinished."""
    compat.mosaic_gpu().wgmma_wait(count)


def store(ref: Any, value: jax.Array) -> None:
    """`ref[tokens, 64] = value[64, tokens]^T` in global memory: eight neighbouring columns at once."""
    ref.T[...] = compat.mosaic_gpu().layout_cast(value, compat.sums_layout())


def token_scales(ref: Any) -> jax.Array:
    """`float32[tokens]` of global memory where the sums of its tokens are."""
    return compat.load(ref, compat.mosaic_gpu().Layout.WGMMA.reduce(0), shared=False)


def keep(ref: Any, value: jax.Array) -> None:
    """Sums `float32[64, tokens]` into global memory, for `kept` of another block."""
    ref[...] = value


def kept(ref: Any) -> jax.Array:
    """What `keep` left there."""
    return compat.load(ref, compat.mosaic_gpu().Layout.WGMMA, shared=False)


def flags(count: int) -> Any:
    """So many flags that all blocks see, down when the kernel begins, and when it ends."""
    return pl.get_global(compat.mosaic_gpu().SemaphoreType.REGULAR((count,)))


def raise_flag(flags: Any, i: jax.Array) -> None:
    """After all that this warpgroup wrote to global memory."""
    compat.mosaic_gpu().commit_smem()  # the warpgroup meets; one thread raises the flag
    pl.semaphore_signal(flags.at[i])


def await_flag(flags: Any, i: jax.Array) -> None:
    """Waits until a flag is up, and takes it down."""
    pl.semaphore_wait(flags.at[i])


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
    return _each(16 // bits, {8: _bytes, 4: _nibbles, 2: _crumbs}[bits])


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


PAIRS = (256, 32)
"""Shape of `pairs`: bytes of two codes, lanes."""


def pairs(levels: Sequence[float]) -> np.ndarray:
    """`int32[256, 32]`: of every byte of two codes the values of the lower and the upper one, in bfloat16; 32 times."""
    values = np.zeros(16, jnp.bfloat16)
    values[: len(levels)] = np.asarray(levels, jnp.bfloat16)
    both = values.view(np.uint16).astype(np.uint32)
    byte = np.arange(PAIRS[0])
    found = both[byte % 16] | both[byte // 16] << np.uint32(16)
    # Without strides of zero, of which JAX would make a constant that is spread out again at every call.
    return np.ascontiguousarray(np.broadcast_to(found[:, None], PAIRS)).view(np.int32)


def table_places(levels: Sequence[float] | None) -> tuple[Any, ...]:
    """Shared memory for `pairs`, and the barrier that says that they are there; nothing without a table."""
    gpu = compat.mosaic_gpu()
    return () if levels is None else (gpu.SMEM(PAIRS, jnp.int32), gpu.Barrier())


def table_values(levels: Sequence[float] | None) -> tuple[np.ndarray, ...]:
    """`pairs` as an operand of a kernel; nothing without a table."""
    return () if levels is None else (pairs(levels),)


def _looked_up(held: list[Any], table: Any) -> list[Any]:
    lanes = compat.mosaic_lanes()
    text = (
        "{{ .reg .b32 t; bfe.u32 t, $1, {}, 8; mad.lo.u32 t, t, "
        + str(4 * PAIRS[1])
        + ", $2; ld.shared.b32 $0, [t]; }}"
    )
    return [lanes.assemble(text.format(8 * i), word, table) for word in held for i in range(4)]


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
